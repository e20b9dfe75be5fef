"""An experiment: s dY B and dB, both read off dY, by one reading of it. Kernels here, not in the library, until they win.

    python bench/once_gpu.py --out DIR      # under a minute; writes DIR/once_gpu.jsonl and DIR/once_gate.json
    TRITON_INTERPRET=1 python bench/once_gpu.py --out DIR --tiny      # the proof alone, on a CPU

Backward multiplies dY `[T, N]` by s B for the gradient of the input, and dYᵀ by XA for that of B: two products as thin as a rank,
each bound by its own reading of dY, the largest operand of a layer (gate and up: 470 MB). Here a program holds the sums of 512 rows
for the first while it walks along its columns, and finishes the second for those rows on the way; what rows and columns were split
into is added up in fixed order by two small launches, so two runs give the same bits.

Floor for 8B, 8,192 tokens: 705 MB a layer, 168 us at 4.2 TB/s, where the two products of each group take 202 + 208 us.
The gate: both results against float64, as wrong as torch's two products at most. Then, in turn on a hot chip, the two products as
the layer makes them now (`kernels.gemm`, `kernels.outer`) and every tile of the one reading.
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "bench")]

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from gputime import DEVICE, load, turns  # noqa: E402
from reporting import Report, passed  # noqa: E402
from torch import Tensor  # noqa: E402

from halfbyte.kernels.dequantize.fused import INTERPRETED, to_dtype  # noqa: E402
from halfbyte.kernels.gemm import matmul  # noqa: E402
from halfbyte.kernels.outer import Outer, outer  # noqa: E402
from kernels.checks import as_wrong_as_honest, poisoned  # noqa: E402

GROUPS = {"qkv": (6144, 48), "o": (4096, 16), "gate+up": (28672, 32), "down": (4096, 16)}
"""N and R of a layer's groups; B as dense as if one member had all of it."""


class Tile(NamedTuple):
    """rows: of dY whose sums a program holds. columns: of a step. splits: parts of N. warps, stages: of the compiler."""

    rows: int = 512
    columns: int = 64
    splits: int = 8
    warps: int = 8
    stages: int = 2


TILES = (Tile(), Tile(warps=16), Tile(rows=256, splits=4), Tile(rows=256, splits=4, stages=3))


@triton.jit(do_not_specialize=["T"])
def _once(
    dy, sb, xa, tails, sums, T, N, dy_stride, sb_stride, xa_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """tails fp32 `[splits, T, WIDE]`: dY sB over a split's SPAN columns. sums fp32 `[blocks, N, WIDE]`: dYᵀ XA over ROWS rows."""
    block, split = tl.program_id(0), tl.program_id(1)
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    r = tl.arange(0, WIDE)
    inside = row < T
    x = tl.load(xa + row[:, None] * xa_stride + r[None, :], mask=inside[:, None] & (r < R)[None, :], other=0.0)
    tail = tl.zeros((ROWS, WIDE), tl.float32)
    for start in tl.range(0, SPAN, COLUMNS, num_stages=STAGES):
        n = split * SPAN + start + tl.arange(0, COLUMNS)
        d = tl.load(dy + row[:, None] * dy_stride + n[None, :], mask=inside[:, None] & (n < N)[None, :], other=0.0)
        b = tl.load(sb + n[:, None] * sb_stride + r[None, :], mask=(n < N)[:, None] & (r < R)[None, :], other=0.0)
        if INTERPRETED:  # which takes bfloat16 for integers
            tail = tl.dot(d.to(tl.float32), b.to(tl.float32), tail, input_precision="ieee")
            mine = tl.dot(tl.trans(d.to(tl.float32)), x.to(tl.float32), input_precision="ieee")
        else:
            tail = tl.dot(d, b, tail)
            mine = tl.dot(tl.trans(d), x)
        at = (block.to(tl.int64) * N + n)[:, None] * WIDE + r[None, :]
        tl.store(sums + at, mine, mask=(n < N)[:, None] & (r < WIDE)[None, :])
    at = (split.to(tl.int64) * T + row)[:, None] * WIDE + r[None, :]
    tl.store(tails + at, tail, mask=inside[:, None] & (r < WIDE)[None, :])


@triton.jit(do_not_specialize=["L"])
def _added(
    parts, out, L, out_stride, scale, COUNT: tl.constexpr, ADD: tl.constexpr, LINES: tl.constexpr, R: tl.constexpr,
    WIDE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out `[L, R]` (+)= scale times the sum of COUNT parts `[L, WIDE]`, in order."""
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)[:, None]
    r = tl.arange(0, WIDE)[None, :]
    mask = (line < L) & (r < R)
    total = tl.zeros((LINES, WIDE), tl.float32)
    for i in tl.range(0, COUNT, num_stages=4):
        total += tl.load(parts + (i * L + line) * WIDE + r, mask=mask, other=0.0)
    at = out + line * out_stride + r
    total = total * scale
    if ADD:
        total += tl.load(at, mask=mask, other=0.0)
    tl.store(at, to_dtype(total, out.dtype.element_ty, INTERPRETED), mask=mask)


def once(dy: Tensor, sb: Tensor, xa: Tensor, scale: float, tail: Tensor, total: Tensor, tile: Tile) -> None:
    """tail `[T, R]` = dY sB in dY's dtype; total `[N, R]` += scale dYᵀ XA in fp32. dy `[T, N]`, rows strided."""
    (tokens, n), rank = dy.shape, sb.shape[1]
    wide = max(triton.next_power_of_2(rank), 16)
    blocks = triton.cdiv(tokens, tile.rows)
    span = triton.cdiv(triton.cdiv(n, tile.splits), tile.columns) * tile.columns
    splits = triton.cdiv(n, span)
    tails = torch.empty(splits, tokens, wide, dtype=torch.float32, device=dy.device)
    sums = torch.empty(blocks, n, wide, dtype=torch.float32, device=dy.device)
    _once[(blocks, splits)](
        dy, sb, xa, tails, sums, tokens, n, dy.stride(0), sb.stride(0), xa.stride(0), ROWS=tile.rows, COLUMNS=tile.columns,
        SPAN=span, R=rank, WIDE=wide, STAGES=tile.stages, INTERPRETED=INTERPRETED, num_warps=tile.warps,
    )  # fmt: skip
    common = {"LINES": 64, "R": rank, "WIDE": wide, "INTERPRETED": INTERPRETED}
    _added[(triton.cdiv(tokens, 64),)](tails, tail, tokens, tail.stride(0), 1.0, COUNT=splits, ADD=False, **common)
    _added[(triton.cdiv(n, 64),)](sums, total, n, total.stride(0), scale, COUNT=blocks, ADD=True, **common)


class Operands:
    """dY with room behind it, s B as columns of a wider matrix, XA behind an input, and a total: as the layer has them."""

    def __init__(self, tokens: int, n: int, rank: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(rows: int, width: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(rows, width, generator=generator) * scale).to(DEVICE)

        self.dy = normal(tokens, n + rank).bfloat16()
        self.sb = normal(n, 64 + rank, 0.02).bfloat16()[:, 64:]
        self.xa = normal(tokens, 64 + rank).bfloat16()[:, 64:]
        self.total = normal(n, rank)
        self.n, self.scale = n, 1.7

    def now(self) -> None:
        """The two products as the layer makes them."""
        matmul(self.dy[:, : self.n], self.sb, self.dy[:, self.n :])
        outer([Outer(self.total, self.dy[:, : self.n], self.xa, self.scale)])

    def one(self, tile: Tile) -> None:
        once(self.dy[:, : self.n], self.sb, self.xa, self.scale, self.dy[:, self.n :], self.total, tile)


def prove(tile: Tile, tokens: int, n: int, rank: int) -> str:
    """ "" if both results are as wrong as torch's at most, and the same in a second run; else what is not."""
    o = Operands(tokens, n, rank)
    before, dy = o.total.clone(), o.dy[:, :n].clone()
    found = []
    try:
        for _ in range(2):
            o.total.copy_(before)
            with poisoned():
                o.one(tile)
            found.append((o.dy[:, n:].clone(), o.total.clone()))
        truth = dy.double() @ o.sb.double()
        as_wrong_as_honest("s dY B", found[0][0], (dy.float() @ o.sb.float()).bfloat16(), truth)
        exact = before.double() + o.scale * dy.double().T @ o.xa.double()
        as_wrong_as_honest("dB", found[0][1], before + o.scale * (dy.float().T @ o.xa.float()), exact)
        assert torch.equal(o.dy[:, :n], dy), "dY was written"
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "another run, other bits"
    except AssertionError as error:
        return str(error)
    return ""


def measure(report: Report, tokens: int) -> None:
    """Each group's ways in turn, microseconds; the sum over a layer last."""
    layer: dict[str, float] = {}
    for name, (n, rank) in GROUPS.items():
        # Several sets, so that no call finds its dY in the cache.
        sets = [Operands(tokens, n, rank, seed) for seed in range(max(2, 200_000_000 // (tokens * n)))]
        ways: dict[str, Any] = {"two products": lambda sets=sets: [o.now() for o in sets]}
        ways |= {str(tuple(tile)): lambda sets=sets, tile=tile: [o.one(tile) for o in sets] for tile in TILES}
        for way in ways.values():
            way()
        load(ways, 0.5)
        us = {way: ms * 1e3 / len(sets) for way, ms in turns(ways, 10, lead=True).items()}
        report(what="group", group=name, us={way: round(value, 1) for way, value in us.items()})
        for way, value in us.items():
            layer[way] = layer.get(way, 0.0) + value
        del sets, ways
    report(what="layer", us={way: round(value, 1) for way, value in layer.items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="the proof alone, on small operands")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    tiles = [Tile(32, 16, 3), Tile(64, 32, 1)] if options.tiny else list(TILES)
    shapes = [(70, 100, 16), (33, 65, 3), (64, 64, 40)] + ([] if options.tiny else [(2048, n, r) for n, r in GROUPS.values()])
    found = {f"{tuple(tile)} {shape}": prove(tile, *shape) for tile in tiles for shape in shapes}
    if not passed(found, out / "once_gate.json"):
        return 1
    if options.tiny:
        return 0
    with (out / "once_gpu.jsonl").open("w") as lines:
        report = Report(lines)
        report.machine()
        measure(report, 8192)
        report.done()
    return 0


if __name__ == "__main__":
    sys.exit(main())
