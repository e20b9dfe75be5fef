"""Held-out loss after 300 steps with `compute: fp8` against bf16, on SmolLM2-135M and real instructions, three seeds each.

    python bench/fp8_quality_gpu.py --model FILE.gguf --data alpaca.json --out DIR [--jobs 6]     about two minutes on an H200
    python bench/fp8_quality_gpu.py --table DIR                                                   the verdict again, as Markdown
    python bench/fp8_quality_gpu.py ... --seeds 0                                                 one pair of runs
    python bench/fp8_quality_gpu.py ... --steps 2 --tokens 64 --held 2 --jobs 1                   the script itself, on a CPU

MODEL: a folder, a GGUF file or a name, as a recipe takes it. Both ways see the same batches in the same order and start from the
same adapter; every run is a process, `--jobs` side by side. Held-out rows are scored with the products of the run, and the
adapter of an fp8 run once more with products in bf16, as a run and `halfbyte eval` score it and as it is used later. The bound,
on both: the mean held-out loss of fp8 is at most 0.5 % above that of bf16. The standard error is over seeds, of the differences
of pairs; the spread of bf16 between seeds on the same rows is shown beside it; one seed has neither. Writes a line a run to
DIR/fp8_quality.jsonl when the run ends; exit code 1 when the bound is missed or a run fails. Without a GPU that has fp8 products
the reference emulates them in fp32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from reporting import read

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

WAYS, SEEDS = ("bf16", "fp8"), (0, 1, 2)
STEPS, ROWS, TOKENS, HELD = 300, 2, 1024, 40
WARM, RATE = 10, 2e-4
BOUND = 0.005
Scores = list[tuple[float, int]]
"""Summed loss and learned tokens of every held-out row."""


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One run in this process."""
    import torch

    from halfbyte.adapters import lora
    from halfbyte.adapters.config import AdapterConfig
    from halfbyte.config import Recipe
    from halfbyte.kernels.products import Augmented, Float8
    from halfbyte.layers import forward, head
    from halfbyte.layers.fused.keep import EVERYTHING
    from halfbyte.layers.fused.prepare import prepare
    from halfbyte.objectives import sft
    from halfbyte.optim.adamw import AdamW
    from halfbyte.optim.config import OptimConfig
    from halfbyte.optim.flat import flatten

    started, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    recipe = Recipe.model_validate({"model": options.model, "data": {"train": [{"path": options.data}]}, "output": "."})
    base, train, held = _loaded(recipe, options, device)
    adapter = lora.attach(base.model, AdapterConfig(rank=16, alpha=32), seed=options.seed)
    flat = flatten(adapter.parameters())
    optimizer, output, one = AdamW(flat, OptimConfig()), head.find(base.model), torch.ones((), device=device)

    def multiply(compute: str) -> None:
        done = prepare(base.model, EVERYTHING, Float8() if compute == "fp8" else Augmented(), in_place=True)
        assert not done.left, done.summary()

    def hidden(part: Any) -> Any:
        return forward.hidden_states(base.model, part.input_ids.to(device), part.position_ids.to(device), part.cu_seqlens)

    @torch.no_grad()
    def score() -> Scores:
        """Without a wait between rows."""
        sums = [(sft.sums(hidden(part), part.labels, output)[0], int((part.labels != -100).sum())) for part in held]
        return [(float(loss), tokens) for loss, tokens in sums]

    multiply(options.compute)
    line: dict[str, Any] = {"compute": options.compute, "seed": options.seed, "steps": options.steps, "before": mean(score())}
    base.model.train()
    losses, begun = [], time.perf_counter()
    for step in range(options.steps):
        batch = train.at(step)
        for part in batch.microbatches(ROWS):
            loss = sft.loss(hidden(part), part.labels, output, batch.trained_tokens)
            loss.backward()
        losses.append(loss.detach())
        optimizer.clip(loss, one, 1.0)
        optimizer.step(RATE * min((step + 1) / WARM, (options.steps - step) / options.steps))
    line["trained"] = statistics.mean(torch.stack(losses[-50:]).tolist())
    line["train_s"] = round(time.perf_counter() - begun, 1)
    base.model.eval()
    scores = score()
    line |= {"after": mean(scores), "rows": [[round(loss, 4), tokens] for loss, tokens in scores]}
    if options.compute == "fp8":
        multiply("bf16")
        line["after_in_bf16"] = mean(score())
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return line | {"seconds": round(time.perf_counter() - started, 1), "device": where, "torch": torch.__version__}


def mean(scores: Scores) -> float:
    """Mean loss of a learned token."""
    return sum(loss for loss, _ in scores) / sum(tokens for _, tokens in scores)


def _loaded(recipe: Any, options: argparse.Namespace, device: str) -> tuple[Any, Any, list[Any]]:
    """Model in nf4, training rows, and held-out rows: the same ones for every seed."""
    import torch

    from halfbyte.checkpoints import huggingface
    from halfbyte.data.config import DataConfig
    from halfbyte.data.loader import Loader
    from halfbyte.data.prepare import prepare
    from halfbyte.formats.config import FormatConfig

    base = huggingface.load(recipe.model, FormatConfig(kind="nf4"), torch.bfloat16, device)
    wanted = {"train": [{"path": options.data}], "eval": 0.1, "tokens": options.tokens, "too_long": "truncate_right"}
    config = DataConfig.model_validate(wanted)
    with TemporaryDirectory() as cache:
        prepared = prepare(config, base.tokenizer, 0, Path(cache))
        train = Loader(prepared.train, options.tokens, ROWS, options.seed)
        sets = [Loader(data, options.tokens, 1, 0) for data in prepared.eval.values()]
        parts = [part for loader in sets for batch in loader.sweep() for part in batch.microbatches(1)]
        # Rows are read from files that go away with the folder.
        return base, _Kept([train.at(step) for step in range(options.steps)]), parts[: options.held]


class _Kept:
    """Batches by step."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def at(self, step: int) -> Any:
        return self.batches[step]


def everything(options: argparse.Namespace) -> int:
    """Every way and seed, `--jobs` at a time, each in a fresh process."""
    options.out.mkdir(parents=True, exist_ok=True)

    def one(job: tuple[str, int]) -> str:
        compute, seed = job
        command = [sys.executable, __file__, "--model", options.model, "--data", options.data, "--out", str(options.out)]
        command += [word for name in ("steps", "tokens", "held") for word in (f"--{name}", str(getattr(options, name)))]
        command += ["--compute", compute, "--seed", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"compute"')]
        return lines[-1] if lines else json.dumps({"compute": compute, "seed": seed, "failed": (done.stdout + done.stderr)[-1500:]})

    jobs = [(compute, seed) for seed in options.seeds for compute in WAYS]
    with ThreadPoolExecutor(options.jobs) as pool, (options.out / "fp8_quality.jsonl").open("w") as file:
        file.write(json.dumps({"seeds": options.seeds}) + "\n")
        for done in as_completed([pool.submit(one, job) for job in jobs]):
            text = done.result()
            shown = json.loads(text)
            print(json.dumps({k: v for k, v in shown.items() if k != "rows"}), flush=True)
            file.write(text + "\n")
            file.flush()
    text, kept = verdict(options.out / "fp8_quality.jsonl")
    print(text)
    return 0 if kept else 1


def verdict(results: Path) -> tuple[str, bool]:
    """Markdown, and whether the bound holds with every run there."""
    lines = read(results)
    seeds = next((line["seeds"] for line in lines if "seeds" in line), SEEDS)
    rows = {(r["compute"], r["seed"]): r for r in lines if "after" in r}
    pairs = [(rows["bf16", seed], rows["fp8", seed]) for seed in seeds if ("bf16", seed) in rows and ("fp8", seed) in rows]
    text = ["| seed | before, bf16 | before, fp8 | bf16 | fp8 | difference | its adapter in bf16 |", f"|{' ---: |' * 7}"]
    for a, b in pairs:
        text.append(
            f"| {a['seed']} | {a['before']:.4f} | {b['before']:.4f} | {a['after']:.4f} | {b['after']:.4f} "
            f"| {b['after'] / a['after'] - 1:+.2%} | {b['after_in_bf16'] / a['after'] - 1:+.2%} |"
        )
    if len(pairs) < len(seeds):
        return "\n".join([*text, "", f"{len(seeds) - len(pairs)} pairs are missing: no verdict"]), False
    level = statistics.mean(a["after"] for a, _ in pairs)
    own, error = _difference([b["after"] - a["after"] for a, b in pairs], level)
    used, used_error = _difference([b["after_in_bf16"] - a["after"] for a, b in pairs], level)
    said = f"fp8 {own:+.2%}{error} (bound {BOUND:+.1%}: {_kept(own)}); its adapter with products in bf16 "
    said += f"{used:+.2%}{used_error} ({_kept(used)}); over held-out rows +- {_over_rows(pairs, level):.2%}"
    alike = [a["after"] for a, _ in pairs if a["before"] == pairs[-1][0]["before"]]  # on the same held-out rows
    if len(alike) > 1:
        said += f"; bf16 between {len(alike)} seeds: {statistics.stdev(alike) / level:.2%}"
    return "\n".join([*text, "", said]), max(own, used) <= BOUND


def _kept(difference: float) -> str:
    return "kept" if difference <= BOUND else "MISSED"


def _difference(found: list[float], level: float) -> tuple[float, str]:
    """Mean, relative, and its standard error in words, which one pair does not have."""
    error = f" +- {statistics.stdev(found) / len(found) ** 0.5 / level:.2%}" if len(found) > 1 else ""
    return statistics.mean(found) / level, error


def _over_rows(pairs: list[tuple[Any, Any]], level: float) -> float:
    """Relative standard error of the difference over held-out rows, each the mean of the seeds that were scored on it."""
    sets: dict[tuple[int, ...], list[list[float]]] = {}
    for a, b in pairs:
        found = [(y - x, tokens) for (x, tokens), (y, _) in zip(a["rows"], b["rows"], strict=True)]
        sets.setdefault(tuple(tokens for _, tokens in found), []).append([d for d, _ in found])
    each = [statistics.mean(row) for seeds in sets.values() for row in zip(*seeds, strict=True)]
    tokens = sum(map(sum, sets))
    return statistics.stdev(each) * len(each) ** 0.5 / tokens / level if len(each) > 1 else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a row")
    parser.add_argument("--held", type=int, default=HELD, help="rows that are scored")
    parser.add_argument("--jobs", type=int, default=len(WAYS) * len(SEEDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="a pair of runs each")
    parser.add_argument("--compute", choices=WAYS, help="with --seed: one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    if options.table:
        text, kept = verdict(options.table / "fp8_quality.jsonl")
        print(text)
        return 0 if kept else 1
    if not (options.model and options.data and options.out):
        parser.error("--model, --data and --out are needed")
    if options.compute:
        print(json.dumps(run(options)), flush=True)
        return 0
    return everything(options)


if __name__ == "__main__":
    sys.exit(main())
