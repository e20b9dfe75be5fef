"""Whether the fused path learns what the reference path learns: SmolLM2 on real data, loss by loss; and what determinism costs.

    python bench/equivalence_gpu.py run --gguf SmolLM2-135M-Instruct.Q4_1.gguf --data alpaca.json --out bench/results/NAME.jsonl
    python bench/equivalence_gpu.py table --out bench/results/NAME.jsonl

200 steps of 2 rows x 1,024 tokens, nf4 nested, r = 16, two seeds, each on the fused kernels and on the reference ones
(`HALFBYTE_KERNELS`). A seed sets data order and adapter, so two seeds differ in every batch; what rounding may do is shown by how
far the two paths drift apart on the same batches, in the losses and in the held-out loss, against how far two seeds end apart. Then
two runs with `deterministic: true` and one seed: losses and adapter must be equal bit by bit. The paths run side by side, each in
a process; the figures of speed are from runs that had the GPU to themselves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

SEEDS = (0, 1)
ROWS, TOKENS = 2, 1024


def recipe(args: argparse.Namespace, output: str) -> dict[str, Any]:
    """The recipe of a run, as a dict."""
    found: dict[str, Any] = {
        "model": args.model,
        "compute": args.compute,
        "adapter": {"rank": 16, "alpha": 32},
        "data": {"train": [{"path": args.data}], "eval": 0.1, "tokens": args.tokens},
        "train": {
            **{"batch": ROWS, "max_steps": args.steps, "epochs": 100, "lr": 2e-4, "seed": args.seed},
            **{"eval_every": 0, "save_every": 0, "log_every": 1, "best": False},
        },
        "memory": {"recompute": "off", "microbatch": ROWS},
        "output": output,
    }
    for override in args.set:
        section, _, value = override.partition("=")
        found[section] = json.loads(value)
    return found


def one(args: argparse.Namespace) -> None:
    """Train once in this process; one JSON line with every loss."""
    import time

    from halfbyte.config import Recipe
    from halfbyte.train.run import train

    events: list[dict[str, Any]] = []
    result = train(
        Recipe.model_validate(recipe(args, args.output)), on_event=lambda e: events.append({**e, "at": time.perf_counter()})
    )
    steps = [e for e in events if e.get("kind") == "train"]
    half = steps[len(steps) // 2 :]
    seconds = half[-1]["at"] - half[0]["at"]
    scores = result.eval_after
    held_out = sum(s["loss"] * s["tokens"] for s in scores.values()) / sum(s["tokens"] for s in scores.values())
    files = sorted(Path(args.output).rglob("adapter_model.safetensors"))
    line = {
        "path": args.path,
        "seed": args.seed,
        "losses": [e["loss"] for e in steps],
        "held_out": held_out,
        "steps_per_s": round((len(half) - 1) / seconds, 3),
        "adapter": hashlib.sha256(files[-1].read_bytes()).hexdigest(),
    }
    print(json.dumps(line), flush=True)


def run(args: argparse.Namespace) -> None:
    """All runs; lines and the verdict to --out."""
    from quality import dense

    work = Path(args.work)
    args.model = str(work / "dense")
    if not (work / "dense" / "config.json").exists():
        dense(argparse.Namespace(gguf=args.gguf, model=args.model))
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def spawn(path: str, seed: int, number: int = 0, *words: str) -> dict[str, Any]:
        kernels = {"HALFBYTE_KERNELS": "reference"} if path == "reference" else {}
        call = [sys.executable, "-W", "ignore", __file__, "one", "--model", args.model, "--data", args.data, "--path", path]
        call += ["--seed", str(seed), "--steps", str(args.steps), "--tokens", str(args.tokens), "--compute", args.compute]
        call += ["--output", str(work / f"{path}-{seed}-{number}"), *words]
        done = subprocess.run(call, capture_output=True, text=True, env=os.environ | kernels)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"path"')]
        found: dict[str, Any] = json.loads(lines[-1]) if lines else {"path": path, "seed": seed, "failed": done.stderr[-1500:]}
        with args.out.open("a") as file:
            file.write(json.dumps(found) + "\n")
        shown = {k: v for k, v in found.items() if k != "losses"}
        print(json.dumps(shown), flush=True)
        return found

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: spawn(*job), [(path, seed) for path in ("reference", "fused") for seed in SEEDS]))
    short = ("--steps", str(max(4, args.steps // 4)))
    if not args.no_deterministic:
        spawn("alone", 0, 0, *short)
        for number in range(2):
            spawn("deterministic", 0, number, *short, "--set", "deterministic=true")
    print(markdown(args.out))


def markdown(results: Path) -> str:
    """Drift of the two paths against the distance of two seeds, and the cost of determinism."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    runs = {(r["path"], r["seed"]): r for r in rows if "failed" not in r}
    text = ["| compared | largest difference | mean difference | held-out losses |", "| --- | ---: | ---: | --- |"]
    pairs = [(f"fused and reference, seed {s}", ("fused", s), ("reference", s)) for s in SEEDS]
    pairs += [(f"seeds 0 and 1, {path}", (path, 0), (path, 1)) for path in ("fused", "reference")]
    for name, a, b in pairs:
        if a in runs and b in runs:
            gaps = [abs(x - y) for x, y in zip(runs[a]["losses"], runs[b]["losses"], strict=True)]
            held = f"{runs[a]['held_out']:.4f}, {runs[b]['held_out']:.4f}"
            text.append(f"| {name} | {max(gaps):.4f} | {mean(gaps):.4f} | {held} |")
    exact = [r for r in rows if r["path"] == "deterministic" and "failed" not in r]
    alone = runs.get(("alone", 0))
    if len(exact) == 2 and alone:
        same = exact[0]["losses"] == exact[1]["losses"] and exact[0]["adapter"] == exact[1]["adapter"]
        cost = 1 - mean(r["steps_per_s"] for r in exact) / alone["steps_per_s"]
        text += [
            "",
            f"Deterministic: two runs are {'equal bit by bit' if same else 'NOT equal'}; cost {cost:.1%} of the steps a second.",
        ]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "one", "table"])
    parser.add_argument("--gguf")
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--path", default="fused")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--compute", default="bf16")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--set", action="append", default=[], help="a key of the recipe, as KEY=JSON")
    parser.add_argument("--no-deterministic", action="store_true")
    parser.add_argument("--work", default="runs/equivalence")
    parser.add_argument("--output", default="runs/equivalence/one")
    parser.add_argument("--out", type=Path, default=Path("bench/results/equivalence.jsonl"))
    args = parser.parse_args()
    if args.command == "table":
        print(markdown(args.out))
        return
    {"run": run, "one": one}[args.command](args)


if __name__ == "__main__":
    main()
