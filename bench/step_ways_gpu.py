"""A training step of ours set up in several ways, in turn in one process, and where the chip waits between kernels.

    python bench/step_ways_gpu.py --dir M --out bench/results/NAME.jsonl [--rounds 3 --steps 6] [--rows 4 --tokens 2048 ...]

Ways that change neither the arithmetic nor what is kept, so that a gain of half a percent, which two processes cannot tell from the
chip's temperature, can be seen: ranks padded to 16 or to 64, where all rows of the augmented layout are whole cache lines; the loss
in eight pieces instead of one, so that the head is read eight times. First the gate: every way's loss and gradients against the
first one's, as two ways of rounding differ at most. Then, round by round on a hot chip, tokens/s of each; and of two profiled steps
as they are the pauses of more than 20 us between kernels, with the kernels before and behind. The checkpoint is that of
`throughput.py make`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from engines import Case, Engine, _fuse, engine, products_of

PAUSE = 20.0
"""Microseconds."""
PIECES = 1 << 25
"""Eight for 8,192 tokens of a vocabulary of 128,256, as kept activations have the loss eight times larger than usual."""


@dataclass(frozen=True)
class Way:
    """padded_to: what a group's R is a multiple of. chunk: bytes of logits at a time. 0: as usual."""

    padded_to: int = 0
    chunk: int = 0


WAYS = {
    "as it is": Way(),
    "R padded to 16": Way(16),
    "R padded to 64": Way(64),
    "loss in eight pieces": Way(chunk=PIECES),
}


def take(machine: Engine, case: Case, way: Way) -> None:
    """Sets the model up; the way before is forgotten."""
    from halfbyte.kernels import cross_entropy

    products = products_of(case)
    products.padded_to = way.padded_to or products.padded_to
    _fuse(machine.model, case, products)
    for device, usual in USUAL.items():
        cross_entropy.CHUNK_BYTES[device] = way.chunk or usual


USUAL = {"cpu": 1 << 26, "cuda": 1 << 28}


def gradients(machine: Engine) -> tuple[float, Any]:
    """Loss and all gradients of batch 0, in fp32; they are zero again behind it."""
    import torch

    learning = [p for p in machine.model.parameters() if p.requires_grad]
    loss = float(machine.forward_backward(0))
    found = torch.cat([p.grad.flatten() for p in learning]).clone()
    for p in learning:
        p.grad.zero_()
    return loss, found


def gate(machine: Engine, case: Case) -> dict[str, float]:
    """Relative difference of each way's gradients from the first one's; raises AssertionError where it is more than rounding."""
    found: dict[str, float] = {}
    truth: tuple[float, Any] | None = None
    for name, way in WAYS.items():
        take(machine, case, way)
        loss, got = gradients(machine)
        truth = truth or (loss, got)
        found[name] = round(float((got - truth[1]).norm() / truth[1].norm()), 5)
        assert abs(loss - truth[0]) < 2e-3 * abs(truth[0]), f"{name}: the loss is {loss}, not {truth[0]}"
        assert found[name] < 0.05, f"{name}: gradients differ by {found[name]}"
    return found


def timed(machine: Engine, steps: int) -> float:
    """Seconds of a step, behind one that warms up."""
    from gputime import sync

    machine.step(0)
    sync()
    start = time.perf_counter()
    for i in range(steps):
        machine.step(i)
    sync()
    return (time.perf_counter() - start) / steps


def pauses(spans: Iterable[tuple[float, float, str]]) -> list[dict[str, Any]]:
    """Of kernels (start, end in us, name): pauses of more than `PAUSE`, by the kernels around them, the longest in all first."""
    found: dict[tuple[str, str], list[float]] = {}
    until, before = None, ""
    for start, end, name in sorted(spans):
        if until is not None and start - until > PAUSE:
            found.setdefault((before, name), []).append(start - until)
        if until is None or end > until:
            until, before = end, name
    return [
        {"behind": a[:80], "before": b[:80], "count": len(us), "us": round(sum(us), 1)}
        for (a, b), us in sorted(found.items(), key=lambda item: -sum(item[1]))
    ]


def profiled(machine: Engine) -> list[dict[str, Any]]:
    """The pauses of two steps. The profiler makes the host slower: what it adds shows where the host was not far ahead."""
    import torch
    from gputime import CUDA, sync
    from torch.profiler import ProfilerActivity, profile

    if not CUDA:
        return []
    for i in range(2):
        machine.step(i)
    sync()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for i in range(2):
            machine.step(i)
        sync()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return pauses([(e.time_range.start, e.time_range.end, e.name) for e in events])


def run(case: Case, root: str, rounds: int, steps: int, out: Path) -> None:
    """All of it; a JSON line each to `out` and the terminal."""
    import torch
    from gputime import CUDA, DEVICE, Watch

    machine = engine(case, case.directory(root), None, DEVICE)
    tokens = machine.batches[0].ids.numel()
    for i in range(2):  # B is zero at first, and what stands beside a weight then adds nothing
        machine.step(i)
    watch = Watch()
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    peak: dict[str, float] = {}
    with out.open("a") as file:

        def say(**line: Any) -> None:
            text = json.dumps(line)
            file.write(text + "\n")
            file.flush()
            print(text, flush=True)

        say(what="machine", gpu=torch.cuda.get_device_name() if CUDA else "none", torch=torch.__version__, tokens=tokens)
        say(what="gate", gate="green", differences=gate(machine, case))
        for _ in range(rounds):
            for name, way in WAYS.items():
                take(machine, case, way)
                if CUDA:
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                seconds[name].append(timed(machine, steps))
                clock = watch.between(start, time.perf_counter())
                peak[name] = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
                say(what="round", way=name, step_ms=round(seconds[name][-1] * 1e3, 2), **clock)
        for name, found in seconds.items():
            ratio = [a / b for a, b in zip(seconds["as it is"], found, strict=True)]
            say(what="way", way=name, tokens_per_s=round(tokens / median(found)), faster=round(median(ratio), 4),
                peak_GiB=round(peak[name], 2))  # fmt: skip
        take(machine, case, WAYS["as it is"])
        say(what="pauses", steps=2, pauses=profiled(machine))
    watch.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="model", help="where the checkpoints are")
    parser.add_argument("--out", type=Path, required=True, help="lines are added")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    for field in fields(Case):
        if field.name in ("size", "layers", "rows", "tokens", "recompute"):
            parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    args = parser.parse_args()
    case = Case("halfbyte", args.size, args.layers, args.rows, args.tokens, args.recompute)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    run(case, args.dir, args.rounds, args.steps, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
