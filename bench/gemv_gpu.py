"""Packed products with one row of x on a CUDA GPU: shapes of the kernel against a copy, the proof before.

    python bench/gemv_gpu.py --out DIR [--only gate|products|layer] [--limit 60]      # JSON lines in DIR/gemv_gpu.jsonl, flushed

The gate: every shape at full size against the decoded weights in fp32, side by side with runs that compile what is measured. If it
is red nothing is reported and the exit code is 1. Every form of the kernel against float64: `generation_gpu.py --only gate`.

layer: a graph of whole layers' four groups in turn, as a token runs them, norms inside (without attention); A x fed by the product
before, left as it is, or by launches of its own. product: one graph of launches of one group, each of which reads another copy of
the weights, more than 4 x the L2 in all; A x comes in pieces. Rates count the bytes of the packed weights and adapters, read once.
bitsandbytes: its product for one row, where it can be imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

import torch  # noqa: E402
from gputime import turns  # noqa: E402
from reporting import Report, passed  # noqa: E402
from side_by_side import Job, together  # noqa: E402

from halfbyte.formats.packed import Format, Packed  # noqa: E402
from halfbyte.kernels.dequantize import decode  # noqa: E402
from halfbyte.kernels.lora_linear.members import LowRank, Member  # noqa: E402
from halfbyte.kernels.packed_gemv import Pieces, Product, RmsNorm, Shape, build, multiply, pieces, programs  # noqa: E402

NESTED = Format("nf4", 64, nested=True)
GROUPS: dict[str, tuple[tuple[int, ...], int, str | None]] = {
    "q+k+v": ((4096, 1024, 1024), 4096, None),
    "o": ((4096,), 4096, None),
    "gate+up": ((14336, 14336), 4096, "silu"),
    "down": ((4096,), 14336, None),
    "head": ((128256,), 4096, None),
}
ADDED = ("o", "down")
"""Groups whose output is added to the residual."""
PACKED_SHAPES = {
    "16 warps x 1": Shape(1, 16, 1), "16 warps x 1, 3 ahead": Shape(1, 16, 1, ahead=3), "8 warps x 2": Shape(1, 8, 2, 128),
    "8 warps x 2, 2 ahead": Shape(1, 8, 2, 128, ahead=2), "8 warps x 1": Shape(1, 8, 1, 128),
}  # fmt: skip
DENSE_SHAPES = {
    "16 warps x 1": Shape(1, 16, 1), "16 warps x 1, 1 ahead": Shape(1, 16, 1, ahead=1), "8 warps x 2": Shape(1, 8, 2, 128),
}  # fmt: skip
Says = Callable[..., None]
LEFT = 132
"""Pieces of A x: programs of the launch in front."""


def shapes_of(name: str) -> dict[str, Shape]:
    return DENSE_SHAPES if name == "head" else PACKED_SHAPES


def random_packed(n: int, k: int) -> Packed:
    """Random bytes as a nested nf4 weight of ordinary size: no time is spent on quantising."""
    blocks = n * k // 64
    codes = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device="cuda")
    scales = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda")
    outer = torch.full((-(-blocks // 256),), 0.01, device="cuda").view(torch.uint8)
    offset = torch.full((1,), 0.04, device="cuda").view(torch.uint8)
    return Packed(NESTED, (n, k), torch.bfloat16, codes, scales, outer, offset, torch.empty(0, dtype=torch.uint8, device="cuda"))


def group(name: str, rank: int = 16) -> Product:
    rows, width, activation = GROUPS[name]
    members = []
    for n in rows:
        if name == "head":
            members.append(Member(torch.randn(n, width, device="cuda", dtype=torch.bfloat16) * 0.02, None, None))
            continue
        low = LowRank(torch.randn(rank, width, device="cuda") * 0.02, torch.randn(n, rank, device="cuda") * 0.02, 2.0)
        members.append(Member(random_packed(n, width), None, low if rank else None))
    return build(members, torch.bfloat16, activation)  # type: ignore[arg-type]


def stored(product: Product) -> int:
    """Bytes that a product reads: weights as stored, A and s * B in 16 bits."""
    total = 0
    for m in product.members:
        total += m.weight.nbytes
        total += 0 if m.lora is None else 2 * (m.lora.a.numel() + m.lora.b.numel())
    return total


def replayed(f: Callable[[], Any], repeats: int = 5) -> float:
    """Median milliseconds of one replay of what `f` launches."""
    f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    times = []
    for _ in range(repeats + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[1:])[repeats // 2]


def left_for(product: Product) -> Pieces | None:
    """A x as the launch in front leaves it (here: nothing)."""
    return None if product.launch is None or not product.launch.rank else pieces(product, LEFT, None)


def prove(name: str) -> None:
    """The shapes of a group, against the decoded weights multiplied in fp32."""
    product = group(name)
    x = torch.randn(1, product.width, device="cuda", dtype=torch.bfloat16)
    outputs = []
    for m in product.members:
        weight = decode(m.weight, torch.float32) if isinstance(m.weight, Packed) else m.weight.float()
        low = 0 if m.lora is None else m.lora.scale * (x.float() @ m.lora.a.T) @ m.lora.b.T
        outputs.append(x.float() @ weight.T + low)
    truth = torch.nn.functional.silu(outputs[0]) * outputs[1] if product.activation else torch.cat(outputs, 1)
    before = torch.randn(1, product.rows, device="cuda", dtype=torch.bfloat16) if name in ADDED else None
    truth = truth if before is None else before.float() + truth
    for label, shape in shapes_of(name).items():
        left = left_for(product)
        if left is not None:
            a = torch.cat([m.lora.a for m in product.members if m.lora is not None])
            left.sums[7, 0] = x.float()[0] @ a.bfloat16().float().T
        for fed in (None, left):
            out = torch.full_like(truth, float("nan"), dtype=torch.bfloat16) if before is None else before.clone()
            multiply(product, x, out, None if before is None else out, pieces=fed, shape=shape)
            error = float((out.float() - truth).norm() / truth.norm())
            assert error < 6e-3, f"{name}, {label}: off by {error}"


def silent(**fields: Any) -> None:
    """A report of what was run only to be compiled."""


def jobs() -> dict[str, Job]:
    """The gate's pieces by name."""
    found: dict[str, Job] = {f"shapes of {name}": (prove, (name,)) for name in GROUPS}
    return found | {f"layer, {label}, {how}": (bench_layers, (1.0, silent, 2, ((label, how),))) for label, how in runs()}


def copy_rate(report: Says) -> float:
    """Outside of a graph, as for every other benchmark: inside one a copy of this size reached 2.7 TB/s where 4.2 are there."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / turns({"copy": lambda: target.copy_(source)})["copy"] / 1e6
    report(what="copy", gb_per_s=round(rate))
    return rate


def bench_products(copy: float, report: Report) -> None:
    for name in GROUPS:
        if not report.fits(name):
            continue
        one = group(name)
        copies = [one, *(group(name) for _ in range(max(1, 300_000_000 // stored(one))))]
        left = left_for(one)
        x = torch.randn(1, one.width, device="cuda", dtype=torch.bfloat16)
        out = torch.zeros(1, one.rows, device="cuda", dtype=torch.bfloat16)
        for label, shape in shapes_of(name).items():

            def all_of_them(
                shape: Shape = shape, x: Any = x, out: Any = out, name: str = name, copies: Any = copies, left: Any = left
            ) -> None:
                for product in copies:
                    multiply(product, x, out, out if name in ADDED else None, pieces=left, shape=shape)

            us = replayed(all_of_them) / len(copies) * 1e3
            rate = stored(one) / us / 1e3
            report(what="product", group=name, shape=label, us=round(us, 2), gb_per_s=round(rate), of_copy=round(rate / copy, 3))
        del copies


def runs() -> tuple[tuple[str, str], ...]:
    """Layers that are measured: the shape of all four groups alike, and how A x comes."""
    others = [label for label, shape in PACKED_SHAPES.items() if shape != Shape(1, 16, 1)]
    return (*(("chosen", how) for how in ("fed", "left", "launched")), *((label, "fed") for label in others))


def bench_layers(copy: float, report: Says, layers: int = 8, wanted: tuple[tuple[str, str], ...] | None = None) -> None:
    """Whole layers: what a token's products cost when the groups follow each other. wanted: of `runs`."""
    names = [n for n in GROUPS if n != "head"]
    made = [{n: group(n) for n in names} for _ in range(layers)]
    x = {n: torch.randn(1, GROUPS[n][1], device="cuda", dtype=torch.bfloat16) for n in names}
    out = {n: torch.zeros(1, made[0][n].rows, device="cuda", dtype=torch.bfloat16) for n in names}
    count = sum(stored(p) for p in made[0].values())
    norm = RmsNorm(torch.ones(GROUPS["q+k+v"][1], device="cuda", dtype=torch.bfloat16), 1e-5, 0.0)
    normed = {"q+k+v": norm, "gate+up": norm}
    following = dict(zip(names, [*names[1:], names[0]], strict=True))

    def run(how: str, shape: Shape | None, fed: Any) -> None:
        for layer, left in zip(made, fed, strict=True):
            for n in names:
                add = out[n] if n in ADDED else None
                if how == "launched":
                    multiply(layer[n], x[n], out[n], add, shape=shape)
                else:
                    feeds = None if how == "left" or n == "q+k+v" else left[following[n]]
                    multiply(layer[n], x[n], out[n], add, norm=normed.get(n), pieces=left[n], feeds=feeds, shape=shape)

    for label, how in wanted or runs():
        shape = PACKED_SHAPES.get(label)
        counts = {following[n]: programs(made[0][n], 1, shape) for n in names}
        fed = [{n: pieces(layer[n], counts[n], normed.get(n)) for n in names} for layer in made]
        us = replayed(lambda how=how, shape=shape, fed=fed: run(how, shape, fed)) / layers * 1e3
        report(what="layer", shape=label, a_x=how, us=round(us, 2), of_copy=round(count / us / 1e3 / copy, 3))


def bench_bitsandbytes(report: Report) -> None:
    """Its 4-bit product for one row, on the same shapes, where it is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        report(what="bitsandbytes", left_out="not installed")
        return
    import bitsandbytes as bnb

    for name, (rows, width, _) in GROUPS.items():
        if name == "head":
            continue
        n = max(rows)
        copies = []
        for _ in range(max(2, 300_000_000 // (n * width // 2))):
            weight = torch.randn(n, width, device="cuda", dtype=torch.bfloat16) * 0.02
            copies.append(bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
        x = torch.randn(1, width, device="cuda", dtype=torch.bfloat16)

        def all_of_them(x: Any = x, copies: Any = copies) -> None:
            for codes, state in copies:
                bnb.matmul_4bit(x, codes.t(), state)

        us = replayed(all_of_them) / len(copies) * 1e3
        report(what="bitsandbytes", version=bnb.__version__, rows=n, columns=width, us=round(us, 2),
               gb_per_s=round(n * width * 0.516 / us / 1e3))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("gate", "products", "layer"))
    parser.add_argument("--limit", type=float, default=60, help="seconds after which no further group is measured")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if not passed(together(jobs(), options.limit), out / "gemv_gate.json"):
        return 1
    if options.only == "gate":
        return 0
    with (out / "gemv_gpu.jsonl").open("w") as lines:
        report = Report(lines, options.limit)
        report.machine()
        copy = copy_rate(report)
        if options.only != "products" and report.fits("layers"):
            bench_layers(copy, report)
        if options.only != "layer":
            bench_products(copy, report)
            if report.fits("bitsandbytes"):
                bench_bitsandbytes(report)
        report.done()
    return 0


if __name__ == "__main__":
    sys.exit(main())
