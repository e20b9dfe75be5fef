"""The CUDA twin: vendor GEMMs around one Triton kernel that turns a chunk of logits into its own gradient in place.

Why: at 8,192 labelled rows, 4,096 wide, and a vocabulary of 128,256 the two products are 17 TFLOP and the logits 2.1 GB; what is
neither of the two products is pure loss. So the logits of a chunk of rows are written once, in the compute dtype, into one buffer,
and the kernel reads them twice (the second time from the L2 cache: a program owns a row, so few rows are under way at a time) and
writes the gradient over them. Sums, exponentials and logarithms are fp32.
Cost: one buffer of logits (`chunk_bytes`), a chunk of gathered hidden rows, the gradient of the labelled rows. A packed head is
decoded in slices of the vocabulary, twice a chunk.

Letters: T = positions, n = labelled ones, H = hidden size, V = vocabulary.
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.formats.packed import Packed
from halfbyte.kernels.cross_entropy import tiled
from halfbyte.kernels.cross_entropy.choice import Way
from halfbyte.kernels.cross_entropy.parts import Head, Results, Task
from halfbyte.kernels.cross_entropy.slices import slices
from halfbyte.kernels.cross_entropy.softmax import TUNING, Tuning, softmax_
from halfbyte.kernels.cross_entropy.tiled import Tile
from halfbyte.kernels.dequantize import decode
from halfbyte.kernels.dequantize.fused import INTERPRETED, to_dtype
from halfbyte.kernels.gemm import matmul

ALIGNED = 64
"""Rows of logits start at multiples of this many numbers, whatever V is."""


@triton.jit
def _expand(out, compact, index, factor, H, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    """Row t of out: row index[t] of compact times the factor, zeros where the index is negative."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(index + row).to(tl.int64)
    times = tl.load(factor)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Not `(k < H) & (source >= 0)`: Triton's interpreter (3.9) takes no mask of a block and a number.
    x = tl.load(compact + source * H + k, mask=k < tl.where(source >= 0, H, 0), other=0.0).to(tl.float32)
    tl.store(out + row * H + k, to_dtype(x * times, out.dtype.element_ty, INTERPRETED), mask=k < H)


def expand(compact: Tensor, labels_kept: Tensor, factor: Tensor) -> Tensor:
    """A gradient `[n, H]` of the labelled rows as one of all rows `[T, H]`, times a scalar fp32 tensor. labels_kept: bool `[T]`."""
    out = compact.new_empty(len(labels_kept), compact.shape[1])
    if out.numel():
        index = torch.where(labels_kept, labels_kept.cumsum(0, dtype=torch.int32) - 1, -1)
        block = min(triton.next_power_of_2(out.shape[1]), 4096)
        _expand[(len(out), triton.cdiv(out.shape[1], block))](
            out, compact, index, factor, out.shape[1], BLOCK=block, INTERPRETED=INTERPRETED
        )
    return out


def _padded(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty `[rows, columns]` whose rows start at aligned addresses."""
    width = -(-columns // ALIGNED) * ALIGNED
    return torch.empty(rows, width, dtype=dtype, device=like.device)[:, :columns]


def chunk_rows(chunk_bytes: int, vocabulary: int, itemsize: int) -> int:
    """Rows of a chunk: whole tiles of a GEMM where there is room for one."""
    rows = chunk_bytes // (itemsize * vocabulary)
    return rows // 256 * 256 if rows >= 256 else max(rows, 1)


class Products:
    """The two products of a chunk, with a dense head or a packed one, which is decoded slice by slice of the vocabulary."""

    def __init__(self, head: Head, dtype: torch.dtype) -> None:
        self.packed = head.weight if isinstance(head.weight, Packed) else None
        self.weight = None if self.packed is not None else head.dense(dtype)
        self.dtype = dtype

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        assert self.packed is not None
        for at, part in slices(self.packed):
            yield at, decode(part, self.dtype)

    def logits(self, h: Tensor, z: Tensor) -> None:
        """z `[c, V]` = h Wᵀ, in 16 bits or, where z is, in fp32."""
        parts = [(slice(None), self.weight)] if self.weight is not None else self._slices()
        for at, weight in parts:
            matmul(h, weight.T, z[:, at])
            del weight  # before the next slice is decoded

    def gradient(self, d: Tensor, out: Tensor) -> None:
        """out `[c, H]` = d W; the slices of a packed head are summed in fp32."""
        if self.weight is not None:
            matmul(d, self.weight, out)
            return
        total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        for at, weight in self._slices():
            matmul(d[:, at], weight, total, beta=1.0)
            del weight
        out.copy_(total)


def cross_entropy(task: Task, tuning: Tuning = TUNING, way: Way = "chunked", tile: Tile | None = None) -> Results:
    """Sum of losses, correct tokens, and the gradients of the sum; by a method that `choice` describes."""
    hidden, head, wants, n = task.hidden, task.head, task.wants, task.labelled
    vocabulary = head.vocabulary
    wide = way == "exact" and hidden.is_cuda and hidden.dtype != torch.float32
    size = max(min(chunk_rows(task.chunk_bytes, vocabulary, 4 if wide else hidden.element_size()), n), 1)
    rows = None if n == len(hidden) else task.rows()
    targets = task.labels if rows is None else task.labels[rows]
    products = Products(head, hidden.dtype)
    grad = wants.hidden or wants.weight or wants.bias
    losses = torch.empty(n, dtype=torch.float32, device=hidden.device)
    hits = torch.empty(n, dtype=torch.int32, device=hidden.device)
    dh = hidden.new_empty(n, hidden.shape[1]) if wants.hidden else None
    dw = torch.zeros(head.weight.shape, dtype=torch.float32, device=hidden.device) if wants.weight else None
    db = torch.zeros(vocabulary, dtype=torch.float32, device=hidden.device) if wants.bias else None
    chunk = _padded(size, vocabulary, hidden, hidden.dtype)
    gathered = hidden.new_empty(0 if rows is None else size, hidden.shape[1])
    for start in range(0, n, size):
        at = slice(start, min(start + size, n))
        d = chunk[: at.stop - start]
        h = hidden[at] if rows is None else torch.index_select(hidden, 0, rows[at], out=gathered[: len(d)])
        # A bias sums its gradient over the rows: in fp32, before it is rounded for the products.
        dz = _padded(len(d), vocabulary, hidden, torch.float32) if db is not None else d
        given = targets[at], losses[at], hits[at], task
        z = _padded(len(d), vocabulary, hidden, torch.float32) if wide else d
        if way == "tiled":
            assert products.weight is not None
            tiled.chunk(h, products.weight, z, dz if grad else None, *given, tile)
        else:
            products.logits(h, z)
            softmax_(z, dz if grad else None, *given, tuning)
        if db is not None:
            db += dz.sum(0)
            d.copy_(dz)
        if dh is not None:
            products.gradient(d, dh[at])
        if dw is not None:
            matmul(d.T, h, dw, beta=1.0)
    return Results(
        losses.sum(),
        hits.sum(),
        dh,
        None if dw is None else dw.to(head.weight.dtype),
        None if db is None or head.bias is None else db.to(head.bias.dtype),
    )
