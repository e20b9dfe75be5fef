"""The token engine on a CUDA GPU: tokens a second of an 8B model, where a token's time goes, and what else could make it.

    python bench/generation_engine.py --out DIR [--limit 80] [--cuts]     # gate first; JSON lines in DIR/generation_engine.jsonl
    python bench/generation_gpu.py --out DIR      # the same, and every kernel's proof in the gate

The gate: attention of a token and products of a few rows against float64, and the engine's greedy tokens equal to the model's own
forward wherever that one's two likeliest tokens are apart, from an empty cache and from a kept one. Every setup is also run once on
two layers: that compiles its kernels. All in parallel processes; if one is red nothing is reported and the exit code is 1. --cuts:
other cuts of attention and of products of 16 rows, beside the usual ones, instead of the rest. What does not fit into --limit
seconds is named in the last line.

engine: `ms_at_P` a token with P places in the cache (replays), tokens a second as a caller sees them. first-token: reading prompts.
layer: a profile folded by the position of a launch in its layer, medians over layers and tokens; `us` its own time (with early
launches its waiting too), `adds_us` by how much it moves the end. outside: what stands before and behind the layers.
Baselines (`generation_setups.py`) run in the same engine.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "bench")]

import torch  # noqa: E402
from gemv_gpu import NESTED  # noqa: E402
from generation_setups import OURS, PLACES, THEIRS, Bench, Setup, adapt, model_of, pack, set_up  # noqa: E402
from profile_fold import fold  # noqa: E402
from reporting import Report, passed  # noqa: E402
from side_by_side import Job, together  # noqa: E402

from halfbyte.generate import step  # noqa: E402
from halfbyte.generate.engine import Engine  # noqa: E402
from halfbyte.layers import swap  # noqa: E402

DEPTHS = (256, PLACES - 64)
MAIN = [
    Setup("bf16"), Setup("bf16", 16), Setup("nf4"), Setup("nf4+adapter"), Setup("nf4+adapter", early=False),
    *(Setup("nf4+adapter", rows) for rows in (2, 4, 16)), Setup("bitsandbytes"), Setup("bitsandbytes", 16),
]  # fmt: skip
CUTS = [
    Setup("nf4+adapter", rows, True, *cut)
    for cut in ((128, None, None), (512, None, None), (512, None, 8192), (128, 8, None), (256, None, 8192), (256, 2, 8192))
    for rows in (1, 16)
] + [Setup("nf4+adapter", 16, many=many) for many in ((4, 3, 168), (4, 4, 128))]


def clear_tokens(model: Any, prompt: list[int], answer: list[int]) -> None:
    """Asserts that the answer is the model's own wherever its choice is clear."""
    ids = torch.tensor([[*prompt, *answer]], device="cuda")
    with torch.no_grad():
        scores = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    top = scores.topk(2).values
    clear = ((top[:, 0] - top[:, 1]) > 0.05 * scores.std()).cpu()
    same = scores.argmax(-1).cpu() == torch.tensor(answer)
    assert clear.sum() >= len(answer) // 2, f"only {int(clear.sum())} clear choices"
    assert same[clear].all(), f"{int((~same & clear).sum())} of {int(clear.sum())} clear tokens differ"


def gate_engine(count: int) -> None:
    """So many rows, twice, and once more from what the cache holds."""
    from halfbyte.formats.quantize import quantize

    model = model_of(4, hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=2, vocab_size=4096,
                     max_position_embeddings=4096)  # fmt: skip
    pack(model, lambda module: quantize(module.weight, NESTED, name="gate"))
    assert all(row.adopted for row in swap.adopt(model).layers), "not adopted"
    adapt(model)
    prompts = [list(range(5, 45)), [7, 8, 9]][:count]
    engine = Engine(model, count, 512, 100)
    assert not engine.plain, engine.plain
    answers = engine.answer(prompts, 100, set())
    engine.forget()
    assert engine.answer(prompts, 100, set()) == answers, "the second answer differs"
    longer = [[*prompt, *answer, 3, 1, 4] for prompt, answer in zip(prompts, answers, strict=True)]
    for prompt, answer in zip([*prompts, *longer], [*answers, *engine.answer(longer, 100, set())], strict=True):
        clear_tokens(model, prompt, answer)


def warm(setup: Setup) -> None:
    """Compiles what a setup launches, into Triton's cache on disk; of one that is about attention, only that."""
    with set_up(setup):
        attention = bool(setup.cut) and setup.many is None
        bench, setup = (Bench(1, 4096), replace(setup, weights="bf16")) if attention else (Bench(2), setup)
        bench.engine(setup).answer([list(range(1, 17))] * setup.rows, 8, set())
        torch.cuda.synchronize()


def at_depth(engine: Engine, place: int, tokens: int) -> float:
    """Milliseconds a token from `place` on."""
    engine.forget()
    engine.b.position.fill_(place)
    engine.b.number.zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(tokens):
        engine.advance()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / tokens


def speed(engine: Engine, setup: Setup, report: Report) -> None:
    """An answer from a short prompt as a caller sees it, and replays."""
    prompts = [list(range(1, 17))] * setup.rows
    fields: dict[str, Any] = {}
    if not setup.cut:
        engine.answer(prompts, 8, set())
        engine.forget()
        started = time.perf_counter()
        engine.answer(prompts, 256, set())
        fields["tokens_per_s"] = round(256 * setup.rows / (time.perf_counter() - started), 1)
    at_depth(engine, DEPTHS[0], 8)
    for place in DEPTHS:
        fields[f"ms_at_{place}"] = round(at_depth(engine, place, 48), 4)
    report(what="engine", weights=setup.weights, rows=setup.rows, early=setup.early, cut=setup.cut, **fields,
           tokens_per_s_replays=round(setup.rows * 1e3 / fields[f"ms_at_{DEPTHS[0]}"], 1))  # fmt: skip


def first_token(bench: Bench, engine: Engine, report: Report) -> None:
    """Milliseconds to read a prompt, by the engine and by the model's own forward; and of a turn that continues."""

    def timed(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - started) * 1e3)
        return round(statistics.median(times[1:]), 2)

    for tokens in (32, 512, 1536):
        prompt = list(range(1, tokens + 1))

        def fresh(prompt: list[int] = prompt) -> None:
            engine.forget()
            engine.prefill([prompt])

        def continued(prompt: list[int] = prompt) -> None:
            engine.cached = [prompt[:-24]]
            engine.prefill([prompt])

        @torch.no_grad()
        def modules(prompt: list[int] = prompt) -> None:
            bench.model.base_model(input_ids=torch.tensor([prompt], device="cuda"), use_cache=True)

        report(what="first-token", tokens=tokens, ms=timed(fresh), ms_of_modules=timed(modules), ms_24_new=timed(continued))


def profile(engine: Engine, setup: Setup, report: Report) -> None:
    """The launches of a token, folded."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    for place in DEPTHS:
        at_depth(engine, place, 4)
        engine.b.position.fill_(place)
        torch.cuda.synchronize()
        with recorded(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(4):
                engine.advance()
            torch.cuda.synchronize()
        events = sorted(
            (e.time_range.start, e.time_range.end, e.name) for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA
        )
        # What is launched beside the replays (a fill of the position) is a few events in front.
        spare = len(events) % 4
        for line in fold(events[spare:], 4, len(engine.products)):
            report(weights=setup.weights, rows=setup.rows, early=setup.early, place=place, **line)


def run(setups: list[Setup], report: Report) -> None:
    bench = Bench(32)
    have = importlib.util.find_spec("bitsandbytes") is not None
    for setup in setups:
        if not report.fits(f"{setup.weights} {setup.rows} {setup.cut}"):
            continue
        if setup.weights == "bitsandbytes" and not have:
            report(what="engine", weights=setup.weights, rows=setup.rows, left_out="not installed")
            continue
        with set_up(setup):
            engine = bench.engine(setup)
            speed(engine, setup, report)
            if setup.weights == "nf4+adapter" and not setup.cut:
                profile(engine, setup, report)
            if setup == Setup("nf4+adapter") and len(setups) == len(MAIN):
                first_token(bench, engine, report)
        THEIRS.clear()
        step.multiply = OURS
        del engine


def jobs(setups: list[Setup]) -> dict[str, Job]:
    """The gate, and what compiles the kernels of the setups."""
    from kernels import checks_generation as checks

    found: dict[str, Job] = {f"engine, {rows} rows": (gate_engine, (rows,)) for rows in (1, 2)}
    found |= {f"decode_step {dtype}": (checks.check_decode_step, ("cuda", (dtype,))) for dtype in (torch.bfloat16, torch.float32)}
    found["packed_gemv"] = (checks.check_packed_gemv, ("cuda", (torch.bfloat16,), None, (1, 2, 3, 8)))
    return found | {f"warm {setup}": (warm, (setup,)) for setup in setups if setup.weights != "bitsandbytes"}


def measure(out: Path, limit: float, cuts: bool, proofs: Mapping[str, Job]) -> int:
    """The exit code. proofs: more checks for the gate. Call it before anything asks for CUDA: the gate forks."""
    out.mkdir(parents=True, exist_ok=True)
    setups = [Setup("nf4+adapter"), Setup("nf4+adapter", 16), *CUTS] if cuts else MAIN
    if not passed(together({**proofs, **jobs(setups)}, limit), out / "generation_gate.json"):
        return 1
    with (out / "generation_engine.jsonl").open("w") as lines:
        report = Report(lines, limit)
        report.machine()
        run(setups, report)
        report.done()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=80, help="seconds after which no further setup is measured")
    parser.add_argument("--cuts", action="store_true", help="other cuts of attention and of products instead")
    options = parser.parse_args()
    return measure(options.out, options.limit, options.cuts, {})


if __name__ == "__main__":
    sys.exit(main())
