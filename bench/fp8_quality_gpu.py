"""Held-out loss after 300 steps with `compute: fp8` against bf16, on SmolLM2-135M and real instructions, three seeds each.

    python bench/fp8_quality_gpu.py --model MODEL --data alpaca.json --out DIR [--jobs 3]     on a GPU with fp8 products
    python bench/fp8_quality_gpu.py --table DIR                                               the verdict again, as Markdown

MODEL: a folder, a GGUF file or a name, as a recipe takes it. Both ways see the same batches in the same order and start from the
same adapter. The bound: the mean held-out loss of fp8 is at most 0.5 % above that of bf16; the spread of bf16 between seeds is
shown beside it. Writes DIR/fp8_quality.jsonl; exit code 1 when the bound is missed or a run fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

WAYS, SEEDS = ("bf16", "fp8"), (0, 1, 2)
STEPS, ROWS, TOKENS = 300, 2, 1024
BOUND = 0.005


def recipe(model: str, data: str, compute: str, seed: int, output: str, steps: int) -> Any:
    from halfbyte.config import Recipe

    return Recipe.model_validate(
        {
            "model": model,
            "compute": compute,
            "adapter": {"rank": 16, "alpha": 32},
            "data": {"train": [{"path": data}], "eval": 0.1, "tokens": TOKENS},
            "train": {
                "batch": ROWS,
                "max_steps": steps,
                "epochs": 100,
                "seed": seed,
                "eval_every": 0,
                "save_every": 0,
                "log_every": 50,
                "best": False,
            },
            "memory": {"recompute": "off", "microbatch": ROWS},
            "output": output,
        }
    )


def run(options: argparse.Namespace) -> None:
    """One run in this process, its result as one line of JSON."""
    import torch

    from halfbyte.train.run import train

    output = options.out / f"{options.compute}-{options.seed}"
    result = train(recipe(options.model, options.data, options.compute, options.seed, str(output), options.steps))

    def pooled(scores: Any) -> float:
        tokens = sum(s["tokens"] for s in scores.values())
        return float(sum(s["loss"] * s["tokens"] for s in scores.values()) / tokens)

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    line = {"compute": options.compute, "seed": options.seed, "steps": options.steps, "before": pooled(result.eval_before)}
    line |= {"after": pooled(result.eval_after), "seconds": round(result.seconds, 1), "device": where, "torch": torch.__version__}
    print(json.dumps(line), flush=True)


def everything(options: argparse.Namespace) -> int:
    """Every way and seed, `--jobs` at a time, each in a fresh process."""
    options.out.mkdir(parents=True, exist_ok=True)

    def one(job: tuple[str, int]) -> str:
        compute, seed = job
        command = [sys.executable, __file__, "--model", options.model, "--data", options.data, "--out", str(options.out)]
        command += ["--steps", str(options.steps), "--compute", compute, "--seed", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"compute"')]
        return lines[-1] if lines else json.dumps({"compute": compute, "seed": seed, "failed": (done.stdout + done.stderr)[-1500:]})

    jobs = [(compute, seed) for seed in SEEDS for compute in WAYS]
    with ThreadPoolExecutor(options.jobs) as pool, (options.out / "fp8_quality.jsonl").open("w") as file:
        for text in pool.map(one, jobs):
            print(text, flush=True)
            file.write(text + "\n")
            file.flush()
    text, kept = verdict(options.out / "fp8_quality.jsonl")
    print(text)
    return 0 if kept else 1


def verdict(results: Path) -> tuple[str, bool]:
    """Markdown, and whether the bound holds with every run there."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    after = {way: {r["seed"]: r["after"] for r in rows if r["compute"] == way and "after" in r} for way in WAYS}
    text = ["| seed | bf16 | fp8 | difference |", "| ---: | ---: | ---: | ---: |"]
    pairs = [(seed, after["bf16"][seed], after["fp8"][seed]) for seed in SEEDS if all(seed in after[way] for way in WAYS)]
    text += [f"| {seed} | {a:.4f} | {b:.4f} | {b / a - 1:+.2%} |" for seed, a, b in pairs]
    if len(pairs) < len(SEEDS):
        return "\n".join([*text, "", f"{len(SEEDS) - len(pairs)} pairs are missing: no verdict"]), False
    mean = statistics.mean(b for _, _, b in pairs) / statistics.mean(a for _, a, _ in pairs) - 1
    spread = statistics.stdev(a for _, a, _ in pairs) / statistics.mean(a for _, a, _ in pairs)
    kept = mean <= BOUND
    text += [
        "",
        f"fp8 {mean:+.2%} on average (bound {BOUND:+.1%}: {'kept' if kept else 'MISSED'}); bf16 between seeds: {spread:.2%}",
    ]
    return "\n".join(text), kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--compute", help="with --seed: one run")
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
        run(options)
        return 0
    return everything(options)


if __name__ == "__main__":
    sys.exit(main())
