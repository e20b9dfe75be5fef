"""The token engine on a CUDA GPU: tokens a second of an 8B model, where a token's time goes, and what else could make it.

    python bench/generation_engine.py --out DIR      # gate first; JSON lines in DIR/generation_engine.jsonl, flushed
    python bench/generation_gpu.py --out DIR --only engine      # the same

The gate: attention of a token against float64, and the engine's greedy tokens equal to the model's own forward wherever that one's
two likeliest tokens are apart, from an empty cache and from a kept one. Every setup is also run once on two layers: that compiles
its kernels. All in parallel processes; if one is red nothing is reported and the exit code is 1.

engine: `ms_at_P` a token with P places in the cache (replays), tokens a second as a caller sees them. first-token: reading prompts.
layer: a profile folded by the position of a launch in its layer, medians over layers and tokens; `us` its own time (with early
launches its waiting too), `adds_us` by how much it moves the end. outside: what stands before and behind the layers.
Baselines (`generation_setups.py`) run in the same engine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import queue
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# A parent that has asked CUDA for its devices cannot fork children that use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "bench")]

import torch  # noqa: E402
from generation_setups import NESTED, OURS, PLACES, THEIRS, Bench, Setup, adapt, model_of, pack, set_up  # noqa: E402
from profile_fold import fold  # noqa: E402

from halfbyte.generate import step  # noqa: E402
from halfbyte.generate.engine import Engine  # noqa: E402
from halfbyte.layers import swap  # noqa: E402

DEPTHS = (256, PLACES - 64)
LIMIT = 150.0
Report = Callable[..., None]
MAIN = [
    *(Setup("bf16", rows) for rows in (1, 4, 16)), Setup("nf4"), Setup("bitsandbytes"), Setup("bitsandbytes", 16),
    *(Setup("nf4+adapter", rows) for rows in (1, 4, 16)),
]  # fmt: skip
LATE = Setup("nf4+adapter", early=False)
CUTS = [
    Setup("nf4+adapter", rows, True, *cut)
    for cut in ((128, None, None), (512, None, None), (512, None, 8192), (256, 8, None), (256, None, 8192), (256, 2, 8192))
    for rows in (1, 16)
]


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


def gate_engine() -> None:
    """Two rows, then one; each twice, and once more from what the cache holds."""
    from halfbyte.formats.quantize import quantize

    model = model_of(4, hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=2, vocab_size=4096,
                     max_position_embeddings=4096)  # fmt: skip
    pack(model, lambda module: quantize(module.weight, NESTED, name="gate"))
    assert all(row.adopted for row in swap.adopt(model).layers), "not adopted"
    adapt(model)
    prompts = [list(range(5, 45)), [7, 8, 9]]
    for rows in (prompts, prompts[:1]):
        engine = Engine(model, len(rows), 512, 100)
        assert not engine.plain, engine.plain
        answers = engine.answer(rows, 100, set())
        engine.forget()
        assert engine.answer(rows, 100, set()) == answers, "the second answer differs"
        longer = [[*prompt, *answer, 3, 1, 4] for prompt, answer in zip(rows, answers, strict=True)]
        for prompt, answer in zip([*rows, *longer], [*answers, *engine.answer(longer, 100, set())], strict=True):
            clear_tokens(model, prompt, answer)


def gate_attention(dtype: torch.dtype) -> None:
    from kernels import checks_generation as checks

    checks.check_decode_step("cuda", (dtype,))


def warm(setup: Setup) -> None:
    """Compiles what a setup launches, into Triton's cache on disk; of one that is about attention, only that."""
    with set_up(setup):
        bench, setup = (Bench(1, 4096), replace(setup, weights="bf16")) if setup.cut else (Bench(2), setup)
        bench.engine(setup).answer([list(range(1, 17))] * setup.rows, 8, set())
        torch.cuda.synchronize()


def child(name: str, run: Callable[..., None], arguments: tuple[Any, ...], said: Any) -> None:
    torch.set_num_threads(1)
    try:
        run(*arguments)
        said.put((name, ""))
    except BaseException:
        said.put((name, traceback.format_exc()[-3000:]))


def on_device() -> None:
    torch.zeros(1, device="cuda")


def together(jobs: dict[str, tuple[Callable[..., None], tuple[Any, ...]]]) -> dict[str, str]:
    """Each job in a process of its own, all at once; what each says if it fails, or "" """
    context: Any = multiprocessing.get_context("fork")
    probe = context.Process(target=on_device)
    probe.start()
    probe.join()
    if probe.exitcode:
        context = multiprocessing.get_context("spawn")
    said, started = context.Queue(), time.perf_counter()
    running = [context.Process(target=child, args=(name, *job, said), daemon=True) for name, job in jobs.items()]
    for process in running:
        process.start()
    found: dict[str, str] = {}
    while len(found) < len(jobs) and (left := LIMIT - (time.perf_counter() - started)) > 0:
        try:
            name, fault = said.get(timeout=min(left, 5.0))
        except queue.Empty:
            if not any(process.is_alive() for process in running):
                break
            continue
        found[name] = fault
        print(f"{name}: {'RED' if fault else 'green'}, {time.perf_counter() - started:.0f} s\n{fault}", flush=True)
    for process in running:
        process.kill()
    return {name: found.get(name, f"did not end within {LIMIT} s, or died") for name in jobs}


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


def run(report: Report) -> None:
    bench = Bench(32)
    have = importlib.util.find_spec("bitsandbytes") is not None
    for setup in [*MAIN, LATE, *CUTS]:
        if setup.weights == "bitsandbytes" and not have:
            report(what="engine", weights=setup.weights, rows=setup.rows, left_out="not installed")
            continue
        with set_up(setup):
            engine = bench.engine(setup)
            speed(engine, setup, report)
            if setup.weights == "nf4+adapter" and not setup.cut:
                profile(engine, setup, report)
            if setup == Setup("nf4+adapter"):
                first_token(bench, engine, report)
        THEIRS.clear()
        step.multiply = OURS
        del engine


def main(out: Path | None = None) -> int:
    if out is None:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--out", type=Path, required=True)
        out = parser.parse_args().out
    assert out is not None
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    jobs: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {"engine": (gate_engine, ())}
    jobs |= {f"attention {dtype}": (gate_attention, (dtype,)) for dtype in (torch.bfloat16, torch.float32)}
    jobs |= {f"warm {s}": (warm, (s,)) for s in (*MAIN, LATE, *CUTS) if s.weights != "bitsandbytes"}
    found = together(jobs)
    (out / "generation_engine_gate.json").write_text(json.dumps(found, indent=1))
    if any(found.values()):
        print("no figures: a kernel that is wrong has no speed")
        return 1
    with (out / "generation_engine.jsonl").open("w") as lines:

        def report(**fields: Any) -> None:
            fields["at"] = round(time.perf_counter() - started, 1)
            print(json.dumps(fields), file=lines, flush=True)
            print(json.dumps(fields), flush=True)

        report(what="machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__)
        run(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
