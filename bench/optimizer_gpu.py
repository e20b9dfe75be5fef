"""Clip and step on a CUDA GPU: first the proof, then ours in 32 and 8 bits beside torch's fused AdamW and bitsandbytes' 8-bit one.

    python bench/optimizer_gpu.py --out DIR       # about 15 s; writes DIR/optimizer_gpu.jsonl
    python bench/optimizer_gpu.py --out DIR --variants     # also R and warps of the step, tile and warps of the norm

The gate is `tests/kernels/checks_adamw.py` on this GPU, and the same bits twice: if it is red nothing is reported and the exit code
is 1. Parameters: LoRA r = 16 on all linear layers of an 8B Llama 3, 41.9 million in 448 tensors. Every time is a median of
alternating measurements; the buffers (670 MB and more) are larger than any cache. Ours zeroes the gradient in the step, so the
others are charged for theirs. Host time: until the call returns, the GPU being idle before it (bitsandbytes waits for the GPU).
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from torch import nn  # noqa: E402

from halfbyte.kernels.adamw import fused  # noqa: E402
from halfbyte.kernels.adamw.parts import PARTIALS  # noqa: E402
from halfbyte.optim.adamw import AdamW  # noqa: E402
from halfbyte.optim.config import OptimConfig  # noqa: E402
from halfbyte.optim.flat import Flat, flatten  # noqa: E402
from kernels import checks_adamw  # noqa: E402

HIDDEN, KV, MLP, LAYERS, RANK = 4096, 1024, 14336, 32, 16
SHAPES = [(HIDDEN, HIDDEN), (KV, HIDDEN), (KV, HIDDEN), (HIDDEN, HIDDEN), (MLP, HIDDEN), (MLP, HIDDEN), (HIDDEN, MLP)]
LR, CLIP = 1e-4, 1.0
Report = Callable[..., None]
Step = Callable[[], Any]


def parameters() -> list[tuple[str, nn.Parameter, str]]:
    """The 448 LoRA matrices, random."""
    found = []
    for layer in range(LAYERS):
        for i, (n, k) in enumerate(SHAPES):
            for role, shape in (("lora_a", (RANK, k)), ("lora_b", (n, RANK))):
                found.append((f"{layer}.{i}.{role}", nn.Parameter(torch.randn(shape, device="cuda") * 0.01), role))
    return found


def gate(report: Report) -> bool:
    """The checks; and a step of 42 M parameters twice from the same start: the same bits, and near torch's."""
    for name, check in checks_adamw.CHECKS.items():
        try:
            check("cuda")
        except AssertionError as error:
            report(what="gate", check=name, ok=False, reason=str(error)[:400])
            return False
        report(what="gate", check=name, ok=True)
    named = parameters()
    start = [p.detach().clone() for _, p, _ in named]
    flat = flatten(named)
    grads = torch.randn(flat.grads.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    values, ends = flat.values.clone(), []
    for bits in (32, 32, 8, 8):
        flat.values.copy_(values)
        optimizer = AdamW(flat, OptimConfig(bits=bits))
        for _ in range(3):
            flat.grads.copy_(grads)
            optimizer.clip(torch.ones((), device="cuda"), torch.ones((), device="cuda"), CLIP)
            optimizer.step(LR)
        ends.append(flat.values.clone())
    same = torch.equal(ends[0], ends[1]) and torch.equal(ends[2], ends[3])
    theirs = [nn.Parameter(t) for t in start]
    others = torch.optim.AdamW(theirs, lr=LR, weight_decay=0.0, fused=True)
    flat.grads.copy_(grads).mul_(CLIP / (torch.linalg.vector_norm(grads) + 1e-6))
    for copy, (_, p, _) in zip(theirs, named, strict=True):
        copy.grad = p.grad.clone()
    for _ in range(3):
        others.step()
    flat.values.copy_(ends[0])
    moved = max(float((a.detach() - p.detach()).abs().max()) for a, (_, p, _) in zip(theirs, named, strict=True))
    report(what="gate", check="same bits twice, and torch's within 1e-6", ok=same and moved < 1e-6, furthest=moved)
    return same and moved < 1e-6


def medians(steps: dict[str, Step], repeats: int = 25) -> dict[str, float]:
    """Milliseconds of each on the device, measured in turn."""
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    for _ in range(repeats):
        for name, step in steps.items():
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(2_000_000)  # a millisecond in which launches queue up: short host times do not count
            first.record()
            step()
            last.record()
            events[name].append((first, last))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def host(step: Step, repeats: int = 15) -> float:
    """Microseconds of Python for one call."""
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        before = time.perf_counter()
        step()
        found.append(1e6 * (time.perf_counter() - before))
    torch.cuda.synchronize()
    return statistics.median(found)


def ours(flat: Flat, bits: int) -> Step:
    """Clip and step, gradients zeroed. The first step's moments are random, later ones shrink alike: codes stay spread."""
    optimizer = AdamW(flat, OptimConfig(bits=bits))  # type: ignore[arg-type]
    loss, scale = torch.ones((), device="cuda"), torch.ones((), device="cuda")

    def step() -> None:
        optimizer.clip(loss, scale, CLIP)
        optimizer.step(LR)

    flat.grads.normal_()
    step()
    return step


def torchs_flat(flat: Flat) -> Step:
    """torch's fused AdamW on the two flat groups, norm and clip on the flat gradient, then zeroed."""
    leaves = [nn.Parameter(group.values) for group in flat.groups]
    for leaf, group in zip(leaves, flat.groups, strict=True):
        leaf.grad = group.grads
    optimizer = torch.optim.AdamW(leaves, lr=LR, weight_decay=0.0, fused=True)

    def step() -> None:
        norm = torch.linalg.vector_norm(flat.grads)
        flat.grads.mul_((CLIP / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
        flat.grads.zero_()

    return step


def a_tensor_each(flat: Flat, build: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Step:
    """The usual loop on 448 parameters: clip_grad_norm_, step, gradients zeroed in place."""
    flat.grads.normal_()
    leaves = [nn.Parameter(values.clone()) for values in flat.named().values()]
    for leaf, (group, segment) in zip(leaves, ((g, s) for g in flat.groups for s in g.segments), strict=True):
        leaf.grad = group.view(group.grads, segment).clone()
    optimizer = build(leaves)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(leaves, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def peers(flat: Flat, report: Report) -> dict[str, Step]:
    found = {
        "torch fused, two flat tensors": torchs_flat(flat),
        "torch fused, 448 tensors": a_tensor_each(flat, lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.0, fused=True)),
    }
    try:
        import bitsandbytes
    except ImportError as error:
        report(what="note", text=f"bitsandbytes is not importable: {error}")
        return found
    return found | {"bitsandbytes AdamW8bit, 448 tensors": a_tensor_each(flat, lambda p: bitsandbytes.optim.AdamW8bit(p, lr=LR))}


def variants(flat: Flat, report: Report) -> None:
    """The step for R and warps, the norm for tile and warps; milliseconds and share of the copy bandwidth measured beside."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / medians({"copy": lambda: target.copy_(source)})["copy"]
    n = flat.values.numel()
    for bits, moved in ((32, 32), (8, 20)):
        optimizer = AdamW(flat, OptimConfig(bits=bits))  # type: ignore[arg-type]
        flat.grads.normal_()
        optimizer.clip(torch.ones((), device="cuda"), torch.ones((), device="cuda"), CLIP)
        arguments = (flat.values, flat.grads, optimizer.moments, LR, optimizer.rule, optimizer.kept)
        steps: dict[str, Step] = {
            f"{rows} {warps}": functools.partial(fused.step, *arguments, rows, warps)
            for rows, warps in ((1, 1), (1, 2), (1, 8), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8))
        }
        for name, ms in medians(steps, 10).items():
            rows, warps = map(int, name.split())
            report(what="step", bits=bits, blocks=rows, warps=warps, ms=round(ms, 4), of_copy=round(moved * n / ms / copy, 3))
    partials = torch.empty(PARTIALS, device="cuda")
    for tile, warps in ((2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8)):
        constants = {"TILES": -(-n // (tile * PARTIALS)), "TILE": tile, "num_warps": warps}
        norm = functools.partial(fused._sums[(PARTIALS,)], partials, flat.grads, n, **constants)
        ms = medians({"norm": norm}, 10)["norm"]
        report(what="norm", tile=tile, warps=warps, ms=round(ms, 4), of_copy=round(4 * n / ms / copy, 3))


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "optimizer_gpu.jsonl").open("w") as file:

        def report(**row: Any) -> None:
            line = json.dumps(row)
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()

        report(what="machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__)
        if not gate(report):
            return 1
        torch.manual_seed(0)
        flat = flatten(parameters())
        flat.grads.normal_()
        steps = {"ours, 32 bits": ours(flat, 32), "ours, 8 bits": ours(flat, 8)} | peers(flat, report)
        ms = medians(steps)
        for name, step in steps.items():
            report(what="clip and step", who=name, parameters=flat.numel, ms=round(ms[name], 4), host_us=round(host(step), 1))
        if args.variants:
            variants(flat, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
