"""Paged AdamW on a CUDA GPU: first the proof, then its time beside the unpaged step and bitsandbytes' paged AdamW.

    python bench/paged_gpu.py --out DIR       # about 40 s; writes DIR/paged_gpu.jsonl

Gate: the bits of the unpaged step over six steps, one of them not finite, in 32 and 8 bits; and a state forced out of a cap: the
allocator may use less than the moments need, the unpaged optimizer does not fit, the paged one trains and ends at the same bits.
If it is red nothing is reported and the exit code is 1. Parameters: LoRA of rank 16 and of rank 64 on all linear layers of an
8B Llama 3 (41.9 and 167.8 million). bus: the speed of copies of pinned memory in either direction and in both at once, the bound of
any paging. idle: paging is allowed and not needed: the step must take what it took before there was paging (one launch).
bitsandbytes pages no tensor of less than 100,000 elements, so `least` also gives the share of its states that it paged.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

import torch  # noqa: E402
from gputime import kernels, turns  # noqa: E402
from reporting import Report  # noqa: E402
from torch import nn  # noqa: E402

from halfbyte.optim.adamw import AdamW  # noqa: E402
from halfbyte.optim.config import OptimConfig  # noqa: E402
from halfbyte.optim.flat import Flat, flatten  # noqa: E402
from halfbyte.optim.paged import Pages  # noqa: E402
from halfbyte.pinned import Arena  # noqa: E402

HIDDEN, KV, MLP, LAYERS = 4096, 1024, 14336, 32
SHAPES = [(HIDDEN, HIDDEN), (KV, HIDDEN), (KV, HIDDEN), (HIDDEN, HIDDEN), (MLP, HIDDEN), (MLP, HIDDEN), (HIDDEN, MLP)]
LR, CLIP = 1e-4, 1.0
GIB = 1 << 30


def parameters(rank: int) -> Flat:
    """The 448 LoRA matrices, random."""
    found = []
    for layer in range(LAYERS):
        for i, (n, k) in enumerate(SHAPES):
            for role, shape in (("lora_a", (rank, k)), ("lora_b", (n, rank))):
                found.append((f"{layer}.{i}.{role}", nn.Parameter(torch.randn(shape, device="cuda") * 0.01), role))
    return flatten(found)


def take(optimizer: AdamW, grads: torch.Tensor | None = None) -> None:
    if grads is not None:
        optimizer.flat.grads.copy_(grads)
    one = torch.ones((), device="cuda")
    optimizer.clip(one, one, CLIP)
    optimizer.step(LR)


def free() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def end_of(flat: Flat, start: torch.Tensor, bits: int, paged: bool) -> list[torch.Tensor]:
    """Values and moments after six steps, the third not finite, on the host."""
    flat.values.copy_(start)
    optimizer = AdamW(flat, OptimConfig(bits=bits), paged=paged)
    generator = torch.Generator("cuda").manual_seed(1)
    for i in range(6):
        flat.grads.normal_(generator=generator)
        if i == 2:
            flat.grads[5] = float("inf")
        take(optimizer)
    state = optimizer.state_dict()
    return [t.cpu().clone() for t in (*state.values(), flat.values, flat.grads)]


def gate(flat: Flat, report: Report) -> bool:
    """Same bits; and what does not fit a cap trains there."""
    start = flat.values.clone()
    good = True
    for bits in (32, 8):
        whole, paged = (end_of(flat, start, bits, paged) for paged in (False, True))
        same = all(torch.equal(a, b) for a, b in zip(whole, paged, strict=True))
        report(what="gate", check="paged is unpaged, bit for bit", bits=bits, ok=same)
        good = good and same
    whole = end_of(flat, start, 32, False)
    free()
    total = torch.cuda.get_device_properties(0).total_memory
    cap = torch.cuda.memory_reserved() + 256 * (1 << 20)
    torch.cuda.set_per_process_memory_fraction(cap / total)
    try:
        AdamW(flat, OptimConfig())
        report(what="gate", check="unpaged moments do not fit the cap", ok=False)
        return False
    except torch.OutOfMemoryError as error:
        report(what="gate", check="unpaged moments do not fit the cap", ok=True, reason=str(error)[:80])
    free()
    paged = end_of(flat, start, 32, True)
    torch.cuda.set_per_process_memory_fraction(1.0)
    same = all(torch.equal(a, b) for a, b in zip(whole, paged, strict=True))
    report(what="gate", check="under the cap, paged: the same bits", ok=same, cap_mib=cap >> 20, moments_mib=8 * len(start) >> 20)
    flat.values.copy_(start)
    return good and same


def bus(report: Report) -> None:
    """GB/s in a direction, of 64 MiB copies between pinned memory and the GPU."""
    arena = Arena([(1 << 26, torch.uint8)] * 2, torch.device("cuda", 0))
    there = [torch.empty(1 << 26, dtype=torch.uint8, device="cuda") for _ in range(2)]
    other = torch.cuda.Stream()

    def to_gpu() -> None:
        there[0].copy_(arena.tensors[0], non_blocking=True)

    def to_host() -> None:
        arena.tensors[1].copy_(there[1], non_blocking=True)

    def both() -> None:
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            to_host()
        to_gpu()
        torch.cuda.current_stream().wait_stream(other)

    ms = turns({"in": to_gpu, "out": to_host, "both": both}, 10)
    report(what="bus", **{f"{name}_gb_s": round((1 << 26) / t / 1e6, 1) for name, t in ms.items()})


def host_us(step: Callable[[], None]) -> float:
    """Microseconds until the call returns, the GPU idle before it: the least of ten."""
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - start)
    torch.cuda.synchronize()
    return round(best * 1e6, 1)


def ours(flat: Flat, rank: int, report: Report) -> None:
    """Unpaged, and paged in chunks of several sizes; time on the device, on the host, and memory."""
    n, device = len(flat.values), flat.values.device
    for bits in (32, 8):
        built: dict[str, AdamW] = {}
        free()
        before = torch.cuda.memory_allocated()
        built["unpaged"] = AdamW(flat, OptimConfig(bits=bits))
        memory = {"unpaged": torch.cuda.memory_allocated() - before}
        for chunk in (1 << 19, 1 << 20, 1 << 21, 1 << 22, 1 << 23):
            before = torch.cuda.memory_allocated()
            optimizer = AdamW(flat, OptimConfig(bits=bits))
            optimizer.page(Pages(n, bits, device, chunk))
            name = f"paged, chunks of 2^{chunk.bit_length() - 1}"
            built[name], memory[name] = optimizer, torch.cuda.memory_allocated() - before
        steps = {name: lambda optimizer=optimizer: take(optimizer) for name, optimizer in built.items()}
        for step in steps.values():
            step()
        launched = kernels({"unpaged": steps["unpaged"]})["unpaged"]
        report(what="idle", rank=rank, bits=bits, kernels=len(launched), names=[name[:40] for name in launched])
        for name, ms in turns(steps, 7, lead=True).items():
            mib = memory[name] >> 20
            report(what="step", who="ours", how=name, rank=rank, bits=bits, ms=round(ms, 3), host_us=host_us(steps[name]), mib=mib)
        del built, steps, optimizer, step
        free()


def theirs(flat: Flat, rank: int, report: Report) -> None:
    """bitsandbytes' AdamW, paged and not, a tensor each, with torch's clip and zeroing; `least`: the share of states it pages."""
    try:
        import bitsandbytes
    except ImportError as error:
        report(what="note", text=f"bitsandbytes is not importable: {error}")
        return
    for bits in (32, 8):
        for paged in (True, False):
            leaves = [nn.Parameter(values.clone()) for values in flat.named().values()]
            for leaf in leaves:
                leaf.grad = torch.randn_like(leaf)
            build = getattr(bitsandbytes.optim, f"{'Paged' if paged else ''}AdamW{bits}bit")
            optimizer = build(leaves, lr=LR)

            def step(leaves: list[nn.Parameter] = leaves, optimizer: Any = optimizer) -> None:
                torch.nn.utils.clip_grad_norm_(leaves, CLIP)
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)

            for _ in range(2):
                step()
            states = [t for state in optimizer.state.values() for k, t in state.items() if k in ("state1", "state2")]
            out = sum(t.numel() for t in states if getattr(t, "is_paged", False)) / max(1, sum(t.numel() for t in states))
            ms = turns({"step": step}, 5)["step"]
            row = {"how": "paged" if paged else "unpaged", "rank": rank, "bits": bits, "ms": round(ms, 3), "host_us": host_us(step)}
            report(what="step", who="bitsandbytes", **row, least=round(out, 3))
            del optimizer, leaves, states, step
            free()


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "paged_gpu.jsonl").open("w") as file:
        report = Report(file)
        report(what="machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__)
        torch.manual_seed(0)
        flat = parameters(16)
        if not gate(flat, report):
            return 1
        bus(report)
        for rank in (16, 64):
            if rank != 16:
                del flat
                free()
                flat = parameters(rank)
            ours(flat, rank, report)
            theirs(flat, rank, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
