"""Whether the fused path learns what the reference path learns: SmolLM2 on real data, loss by loss; and what determinism costs.

    python bench/equivalence_gpu.py run --gguf SmolLM2-135M-Instruct.Q4_1.gguf --data alpaca.json --out bench/results/NAME.jsonl
    python bench/equivalence_gpu.py table --out bench/results/NAME.jsonl

200 steps of 2 rows x 1,024 tokens, nf4 nested, r = 16, two seeds, each on the fused kernels and on the reference ones
(`HALFBYTE_KERNELS`). A seed sets data order and adapter, so two seeds differ in every batch; what rounding may do is shown by how
far the two paths drift apart on the same batches, in the losses and in the held-out loss, against how far two seeds end apart. Then
two runs with `deterministic: true` and one seed: losses and adapter must be equal bit by bit. The runs go side by side, each in a
process, but for the two whose speed is compared: these have the GPU to themselves. Ends with a line `verdict: ...`; exit code 1
when it is red. `--model DIR` takes a checkpoint instead of the GGUF file, `--steps 2 --tokens 64` a CPU through it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from reporting import read

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
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        found[section][name] = json.loads(value)
    return found


def one(args: argparse.Namespace) -> None:
    """Train once in this process; one JSON line with every loss."""
    from halfbyte.config import Recipe
    from halfbyte.train.run import train

    events: list[dict[str, Any]] = []
    result = train(
        Recipe.model_validate(recipe(args, args.output)), on_event=lambda e: events.append({**e, "at": time.perf_counter()})
    )
    steps = [e for e in events if e.get("kind") == "train"]
    half = steps[len(steps) // 2 :] if len(steps) >= 4 else steps
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


def spawn(args: argparse.Namespace, path: str, seed: int, number: int, steps: int) -> dict[str, Any]:
    """One run in a process; its JSON line, also written to --out."""
    words = ["--set", "train.deterministic=true"] if path == "deterministic" else []
    call = [sys.executable, "-W", "ignore", __file__, "one", "--model", args.model, "--data", args.data, "--path", path]
    call += ["--seed", str(seed), "--steps", str(steps), "--tokens", str(args.tokens), "--compute", args.compute]
    call += ["--output", str(Path(args.work) / f"{path}-{seed}-{number}"), *words]
    kernels = {"HALFBYTE_KERNELS": "reference"} if path == "reference" else {}
    begun = time.monotonic()
    try:
        done = subprocess.run(call, capture_output=True, text=True, env=os.environ | kernels, timeout=args.limit)
    except subprocess.TimeoutExpired:
        found: dict[str, Any] = {"path": path, "seed": seed, "failed": f"took more than {args.limit:g} s"}
    else:
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"path"')]
        found = json.loads(lines[-1]) if lines else {"path": path, "seed": seed, "failed": done.stderr[-1500:]}
    found["took_s"] = round(time.monotonic() - begun, 1)
    with args.out.open("a") as file:
        file.write(json.dumps(found) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k != "losses"}), flush=True)
    return found


def run(args: argparse.Namespace, spawn: Callable[..., dict[str, Any]] = spawn) -> bool:
    """All runs; lines to --out, tables and the verdict to the terminal. True when it is green."""
    if args.gguf:
        from quality import dense

        args.model = str(Path(args.work) / "dense")
        if not (Path(args.model) / "config.json").exists():
            dense(argparse.Namespace(gguf=args.gguf, model=args.model))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.unlink(missing_ok=True)
    short = max(2, args.steps // 4)
    jobs = [(path, seed, 0, args.steps) for path in ("reference", "fused") for seed in SEEDS]
    alone: list[tuple[str, int, int, int]] = []
    if not args.no_deterministic:
        jobs += [("deterministic", 0, 1, short)]
        alone = [("alone", 0, 0, short), ("deterministic", 0, 0, short)]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: spawn(args, *job), jobs))
    for job in alone:
        spawn(args, *job)
    print(markdown(args.out))
    said, green = verdict(read(args.out), not args.no_deterministic)
    print(said, flush=True)
    return green


def drifts(rows: list[dict[str, Any]]) -> dict[str, tuple[list[float], float, str]]:
    """By pair of runs: the differences of their losses step by step, that of their held-out losses, and these two."""
    runs = {(r["path"], r["seed"]): r for r in rows if "failed" not in r}
    pairs = [(f"fused and reference, seed {s}", ("fused", s), ("reference", s)) for s in SEEDS]
    pairs += [(f"seeds 0 and 1, {path}", (path, 0), (path, 1)) for path in ("fused", "reference")]
    found = {}
    for name, a, b in pairs:
        if a in runs and b in runs:
            gaps = [abs(x - y) for x, y in zip(runs[a]["losses"], runs[b]["losses"], strict=True)]
            ends = runs[a]["held_out"], runs[b]["held_out"]
            found[name] = gaps, abs(ends[0] - ends[1]), f"{ends[0]:.4f}, {ends[1]:.4f}"
    return found


def exact(rows: list[dict[str, Any]]) -> tuple[bool, float] | None:
    """Whether the two deterministic runs are equal, and the share of the steps a second that it costs; None without them."""
    same = [r for r in rows if r["path"] == "deterministic" and "failed" not in r]
    alone = [r for r in rows if r["path"] == "alone" and "failed" not in r]
    if len(same) != 2 or not alone:
        return None
    equal = same[0]["losses"] == same[1]["losses"] and same[0]["adapter"] == same[1]["adapter"]
    return equal, 1 - same[1]["steps_per_s"] / alone[0]["steps_per_s"]  # the last one ran alone, as what it is held against


def verdict(rows: list[dict[str, Any]], deterministic: bool = True) -> tuple[str, bool]:
    """One line, and whether it is green: curves and held-out losses within the noise of two seeds, and runs equal bit by bit."""
    failed = sorted({r["path"] for r in rows if "failed" in r})
    found = drifts(rows)
    if failed or len(found) != 4:
        return f"verdict: red, not measured: {', '.join(failed) or 'runs are missing'}", False
    curve, noise = (max(mean(found[n][0]) for n in found if n.startswith(kind)) for kind in ("fused and", "seeds"))
    ends, end_noise = (max(found[n][1] for n in found if n.startswith(kind)) for kind in ("fused and", "seeds"))
    green = curve <= noise and ends <= end_noise
    said = f"curves differ by {curve:.4f} (two seeds: {noise:.4f}), held-out losses by {ends:.4f} ({end_noise:.4f})"
    if deterministic:
        bits = exact(rows)
        green = green and bits is not None and bits[0]
        known = "not measured" if bits is None else f"{'equal' if bits[0] else 'NOT equal'} bit by bit, cost {bits[1]:.1%}"
        said += f"; deterministic: {known}"
    return f"verdict: {'green' if green else 'red'}, {said}", green


def markdown(results: Path) -> str:
    """Drift of the two paths against the distance of two seeds, and the cost of determinism."""
    rows = read(results)
    text = ["| compared | largest difference | mean difference | held-out losses |", "| --- | ---: | ---: | --- |"]
    for name, (gaps, _, held) in drifts(rows).items():
        text.append(f"| {name} | {max(gaps):.4f} | {mean(gaps):.4f} | {held} |")
    if (bits := exact(rows)) is not None:
        same = "equal bit by bit" if bits[0] else "NOT equal"
        text += ["", f"Deterministic: two runs are {same}; cost {bits[1]:.1%} of the steps a second."]
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
    parser.add_argument("--jobs", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], help="a key of the recipe, as SECTION.KEY=JSON")
    parser.add_argument("--limit", type=float, default=140, help="seconds that one run may take")
    parser.add_argument("--no-deterministic", action="store_true")
    parser.add_argument("--work", default="runs/equivalence")
    parser.add_argument("--output", default="runs/equivalence/one")
    parser.add_argument("--out", type=Path, default=Path("bench/results/equivalence.jsonl"))
    args = parser.parse_args()
    if args.command == "table":
        print(markdown(args.out))
        return
    if args.command == "one":
        one(args)
    elif not run(args):
        sys.exit(1)


if __name__ == "__main__":
    main()
