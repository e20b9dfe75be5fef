"""Proofs of the attention methods on one device, without pytest: the tests run them, `bench/attention_gpu.py` as its gate.

Truth is float64 under a dense mask; honest is the same in the method's dtype, as a model's eager attention would run it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.attention import Documents, Method, heads
from kernels.checks import poisoned


@dataclass(frozen=True)
class Row:
    """A packed row: its documents' tokens (0: an empty one), heads, and what changes the mathematics."""

    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    size: int = 8
    window: int | None = None
    cap: float | None = None
    scale: float = 0.3

    @property
    def bounds(self) -> tuple[int, ...]:
        return tuple(itertools.accumulate(self.lengths, initial=0))

    def documents(self, device: str) -> Documents:
        bounds = torch.tensor([*self.bounds, self.bounds[-1]], dtype=torch.int32)
        return Documents.of(bounds, torch.device(device), self.bounds[-1])

    def inputs(self, device: str, dtype: torch.dtype, seed: int = 0, extra: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v as views of one packed buffer with columns behind each row, and dout."""
        generator = torch.Generator().manual_seed(seed)
        tokens, width = self.bounds[-1], (self.heads + 2 * self.kv_heads) * self.size
        packed = torch.randn(tokens, width + extra, generator=generator).to(device, dtype)
        parts = packed[:, :width].unflatten(1, (-1, self.size)).split([self.heads, self.kv_heads, self.kv_heads], 1)
        dout = torch.randn(tokens, self.heads, self.size, generator=generator).to(device, dtype)
        return *parts, dout


RAGGED = (5, 9, 1, 0, 17, 0, 0, 3)
ROWS = [
    Row((7,)),
    Row((1, 1, 1)),
    Row((6, 6, 6)),
    Row(RAGGED),
    Row((1,), kv_heads=1),
    Row(RAGGED, kv_heads=4, window=3),
    Row((6, 6), kv_heads=1, window=1),
    Row(RAGGED, window=100),
    Row(RAGGED, cap=2.0),
    Row((9, 9), cap=2.0),
    Row(RAGGED, cap=1.5, window=4, size=16),
]


def dense(q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
    """out `[T, H, d]` in the inputs' dtype (softmax in fp32 or wider), every pair of tokens scored."""
    share = row.heads // row.kv_heads
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * row.scale
    if row.cap is not None:
        scores = row.cap * torch.tanh(scores / row.cap)
    tokens = torch.arange(row.bounds[-1], device=q.device)
    document = torch.searchsorted(torch.tensor(row.bounds[1:], device=q.device), tokens, right=True)
    distance = tokens[:, None] - tokens[None, :]
    allowed = (document[:, None] == document[None, :]) & (distance >= 0)
    if row.window is not None:
        allowed &= distance < row.window
    weights = torch.softmax(scores.masked_fill(~allowed, float("-inf")), -1, dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.einsum("hqk,khd->qhd", weights.to(q.dtype), v)


def expected(row: Row, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of `dense`, in the inputs' dtype."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = dense(leaves[0], leaves[1], leaves[2], row)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def expected_apart(row: Row, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """The same for long rows: one document and one key head at a time, so that the scores of a pair are all that is held."""
    share = row.heads // row.kv_heads
    found = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, q, k, v)]
    for start, stop in itertools.pairwise(row.bounds):
        for head in range(row.kv_heads if stop > start else 0):
            some = slice(head * share, (head + 1) * share)
            alone = replace(row, lengths=(stop - start,), heads=share, kv_heads=1)
            one = slice(head, head + 1)
            parts = expected(alone, q[start:stop, some], k[start:stop, one], v[start:stop, one], dout[start:stop, some])
            for target, part, where in zip(found, parts, (some, some, one, one), strict=True):
                target[start:stop, where] = part
    return tuple(found)


def run(method: Method, row: Row, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of a method."""
    documents, arguments = row.documents(q.device.type), (row.scale, row.window, row.cap)
    out, residuals = method.forward(q, k, v, documents, *arguments)
    return out, *method.backward(dout, q, k, v, out, residuals, documents, *arguments)


@contextmanager
def heads_apart() -> Iterator[None]:
    """Inside, every row is long enough for its heads to run in parts."""
    before = heads.LONG, heads.FILLS
    heads.LONG = heads.FILLS = 1
    try:
        yield
    finally:
        heads.LONG, heads.FILLS = before


def check(method: Method, row: Row, device: str, dtype: torch.dtype, apart: bool = False) -> None:
    """Forward and all gradients, from strided views, into poisoned memory. apart: a row too long for a dense mask."""
    inputs = row.inputs(device, dtype)
    with poisoned():
        got = run(method, row, *inputs)
    form = expected_apart if apart else expected
    honest, truth = form(row, *inputs), form(row, *(x.double() for x in inputs))
    assert got[0].is_contiguous() and all(x.stride(-1) == 1 for x in got)
    for name, *tensors in zip(("out", "dq", "dk", "dv"), got, honest, truth, strict=True):
        # A token that sees itself alone has a weight of exactly one in the dense form; a kernel's is off by an fp32 ulp.
        one = torch.finfo(torch.float32).eps * float(tensors[-1].abs().max())
        floor = cancelled(row, *inputs) if name in ("dq", "dk") else one
        bounded(f"{method.name} {row} {dtype} {name}", *tensors, floor)


def cancelled(row: Row, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> float:
    """An fp32 ulp of what cancels in an element of dq or dk: kernels take dP - rowsum(out · dout), whose terms outlive it.

    Where a token sees itself alone, the truth is zero and so is the dense form's error, while a kernel's is this.
    """
    score = dout.double().norm(dim=-1).max() * v.double().norm(dim=-1).max()
    return float(torch.finfo(torch.float32).eps * row.scale * score * max(float(x.double().abs().max()) for x in (q, k)))


def bounded(name: str, got: Tensor, honest: Tensor, truth: Tensor, floor: float) -> None:
    """`as_wrong_as_honest`, with `floor` more for each element."""
    assert got.dtype == honest.dtype and got.shape == truth.shape, f"{name}: {got.dtype} {tuple(got.shape)}"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    ulp = float(truth.abs().max()) * torch.finfo(got.dtype).eps
    for norm, measure, room in (
        ("Frobenius", torch.linalg.vector_norm, floor * truth.numel() ** 0.5),
        ("maximum", lambda e: e.abs().max(), floor),
    ):
        error, bound = float(measure(got.double() - truth)), 2 * float(measure(honest.double() - truth)) + ulp + room
        assert error <= bound, f"{name}: {norm} error {error:.3e} exceeds {bound:.3e}"


def check_no_leak(method: Method, device: str, dtype: torch.dtype, row: Row) -> None:
    """A document's out and gradients are the same bits whatever the others hold."""
    q, k, v, dout = row.inputs(device, dtype)
    other = row.inputs(device, dtype, seed=1)
    middle = len(row.lengths) // 2
    here = slice(row.bounds[middle], row.bounds[middle + 1])
    assert row.lengths[middle] > 0
    moved = [torch.cat([b[: here.start], a[here], b[here.stop :]]) for a, b in zip((q, k, v, dout), other, strict=True)]
    # The same memory layout for both: products may be summed in another order for other strides.
    still = [torch.cat([a]) for a in (q, k, v, dout)]
    for a, b in zip(run(method, row, *still), run(method, row, *moved), strict=True):
        assert torch.equal(a[here], b[here]), f"{method.name} {row}: a neighbour's tokens are seen"
        assert not torch.equal(a, b)


def graphed(method: Method, row: Row) -> None:
    """Captured in a CUDA graph, it gives the same on other numbers as without."""
    inputs, other = row.inputs("cuda", torch.bfloat16), row.inputs("cuda", torch.bfloat16, seed=1)
    run(method, row, *inputs)
    documents, arguments = row.documents("cuda"), (row.scale, row.window, row.cap)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q, k, v, dout = inputs
        out, residuals = method.forward(q, k, v, documents, *arguments)
        got = (out, *method.backward(dout, q, k, v, out, residuals, documents, *arguments))
    for a, b in zip(inputs, other, strict=True):
        a.copy_(b)
    graph.replay()
    for a, b in zip(got, run(method, row, *other), strict=True):
        error = float((a.float() - b.float()).norm() / b.float().norm())
        assert error < 0.01, f"{method.name} in a graph differs by {error:.2g}"


def flex_by_definition(
    q: Tensor, k: Tensor, v: Tensor, *, score_mod: Any, block_mask: Any, scale: float, enable_gqa: bool
) -> Tensor:
    """flex_attention from its documentation, differentiable on a CPU."""
    index = torch.arange(q.shape[2])
    scores = scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    rows, columns = index[:, None], index[None, :]
    scores = scores if score_mod is None else score_mod(scores, 0, 0, rows, columns)
    scores = scores.masked_fill(~block_mask.mask_mod(0, 0, rows, columns), float("-inf"))
    assert enable_gqa == (q.shape[1] != k.shape[1])
    return torch.softmax(scores, -1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
