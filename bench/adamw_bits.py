"""Held-out loss of a QLoRA run with AdamW's moments in 8 bits against 32 bits: the same rows, order, schedule and start.

    python bench/adamw_bits.py [--steps 80] [--seeds 0 1] [--compute bf16]      # writes bench/results/adamw_bits.json

SmolLM2-135M in nf4, LoRA r=16 on all linear layers, `python-docs` (no network but for the model), batches of 4 x 256 tokens at the
quickstart's rate of 1e-3. Every run is a process of its own, so that a kept heap is nobody's. Exit code 1 where the mean losses
over the seeds differ by more than LIMIT. Cost: about 4 s a step on one CPU core, four runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

RESULTS = Path(__file__).parent / "results" / "adamw_bits.json"
LIMIT = 0.003


def recipe(bits: int, seed: int, steps: int, compute: str, output: str) -> dict[str, Any]:
    """What is trained."""
    return {
        "model": "smollm2-135m",
        "format": {"kind": "nf4", "nested": True},
        "compute": compute,
        "adapter": {"rank": 16, "alpha": 32, "targets": "all-linear"},
        "data": {"train": [{"path": "python-docs"}], "eval": 0.05, "tokens": 256},
        "train": {
            "batch": 4,
            "max_steps": steps,
            "lr": 1e-3,
            "warmup": 5,
            "seed": seed,
            "eval_every": 0,
            "save_every": 0,
            "log_every": 20,
            "best": False,
        },
        "optim": {"bits": bits},
        "memory": {"recompute": "off", "microbatch": 4},
        "output": output,
    }


def one(bits: int, seed: int, steps: int, compute: str) -> None:
    """Prints a JSON line."""
    from halfbyte.recipe import recipe_from
    from halfbyte.train.run import train

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = train(recipe_from(recipe(bits, seed, steps, compute, folder)))
    losses = {name: [pooled(scores), pooled_tokens(scores)] for name, scores in named(result).items()}
    print(
        json.dumps(
            {
                "bits": bits,
                "seed": seed,
                "steps": result.steps,
                "before": losses["before"][0],
                "after": losses["after"][0],
                "held_out_tokens": losses["after"][1],
                "train_loss": result.loss_after,
                "seconds": round(time.monotonic() - started, 1),
            }
        ),
        flush=True,
    )


def named(result: Any) -> dict[str, Any]:
    return {"before": result.eval_before, "after": result.eval_after}


def pooled_tokens(scores: Any) -> int:
    return sum(s["tokens"] for s in scores.values())


def pooled(scores: Any) -> float:
    """Mean loss over the tokens of all sets."""
    return float(sum(s["loss"] * s["tokens"] for s in scores.values()) / pooled_tokens(scores))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean losses by bits, and how much the 8-bit one is above the 32-bit one."""
    means = {}
    for bits in (32, 8):
        after = [r["after"] for r in runs if r["bits"] == bits]
        means[bits] = sum(after) / len(after)
    gap = means[8] / means[32] - 1
    pairs = {seed: _of(runs, 8, seed) / _of(runs, 32, seed) - 1 for seed in sorted({r["seed"] for r in runs})}
    return {"mean_32": means[32], "mean_8": means[8], "gap": gap, "gap_by_seed": pairs, "limit": LIMIT, "ok": abs(gap) <= LIMIT}


def _of(runs: list[dict[str, Any]], bits: int, seed: int) -> float:
    return float(next(r["after"] for r in runs if (r["bits"], r["seed"]) == (bits, seed)))


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--compute", default="bf16")
    parser.add_argument("--only", type=int, nargs=2, metavar=("BITS", "SEED"), help="one run, one JSON line")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.only:
        one(*args.only, args.steps, args.compute)
        return 0
    import torch

    runs = []
    for seed in args.seeds:
        for bits in (32, 8):
            command = [sys.executable, __file__, "--steps", str(args.steps), "--compute", args.compute]
            done = subprocess.run([*command, "--only", str(bits), str(seed)], stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"bits"'))))
            print(json.dumps(runs[-1]), flush=True)
    told = {"threads": os.environ.get("OMP_NUM_THREADS", ""), "compute": args.compute, "torch": torch.__version__}
    found = {"machine": told, "runs": runs, "summary": summary(runs)}
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found["summary"]))
    return 0 if found["summary"]["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
