"""The two large products of a group and how they are made: with the adapter inside, in the compute dtype or in fp8.

    project        Y  = [X | XA] [W | s*B]ᵀ + bias       XA = drop(X) Aᵀ
    project_back   dX = [dY | s dY B] [W ; A]            under dropout: dY W + drop(s dY B A)

A layer's forward and backward are written against `Products`, so fp8 is one object instead of another, and nothing else.

Letters: T = tokens, K = inputs, N = outputs of the group, R = ranks of the group (padded).
"""

from __future__ import annotations

import functools
import logging
from typing import Protocol

from torch import Tensor

from halfbyte.kernels import fp8
from halfbyte.kernels.augmented import LEAST, PADDED_TO, Group
from halfbyte.kernels.dropout import Dropout, apply
from halfbyte.kernels.fp8 import Rows
from halfbyte.kernels.gemm import matmul

log = logging.getLogger("halfbyte")


class Products(Protocol):
    """How a group multiplies. error: about the relative error that a product has beyond its dtype's. padded_to: what R is a
    multiple of. holds: whether the matrices of `kernels.augmented` are what it multiplies by, and weights may live in them."""

    error: float
    padded_to: int
    holds: bool

    @property
    def exact(self) -> Products:
        """The same products in the dtype of the activations, over the same groups."""
        ...

    def rows(self, group: Group, tokens: int, back: bool = False) -> Rows | None:
        """Where the kernel in front may write the quantised X (or, `back`, dY); None when nobody wants it."""
        ...

    def project(
        self,
        group: Group,
        x: Tensor,
        out: Tensor,
        bias: Tensor | None,
        mask: Dropout | None,
        rows: Rows | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | None:
        """Writes Y `[T, N]` into `out` (rows strided) and returns XA `[T, R]`, or None without adapters.

        x `[T, K + R]`: the last R columns are free and become XA. x `[T, K]` is taken as well. rows: X quantised already.
        residual `[T, N]`: added to Y.
        """
        ...

    def project_back(self, group: Group, dy: Tensor, out: Tensor | None, mask: Dropout | None, rows: Rows | None = None) -> None:
        """dy `[T, N + R]`: fills the last R columns with s dY B; writes dX `[T, K]` into `out` if it is given.

        rows: dY quantised already.
        """
        ...


def _adapted(group: Group) -> list[tuple[int, slice]]:
    """Number of the dropout mask, and columns, of every member with an adapter."""
    return [
        (m.lora.layer, r) for m, r in zip(group.members, group.rank_slices, strict=True) if m.lora is not None and r is not None
    ]


def _project_small(group: Group, x: Tensor, a: Tensor, mask: Dropout | None) -> Tensor:
    """XA `[T, R]`, in the free columns of x if there are some. a `[R, K]`."""
    k = group.width
    xa = x[:, k:] if x.shape[1] > k else x.new_empty(x.shape[0], group.rank)
    if mask is None:
        matmul(x[:, :k], a.T, xa)
        return xa
    xa.zero_()
    for layer, ranks in _adapted(group):
        xa[:, ranks] = apply([x[:, :k]], mask, layer)[0] @ a[ranks].T
    return xa


def _add_dropped(group: Group, tail: Tensor, a: Tensor, mask: Dropout, out: Tensor) -> None:
    """out += drop(s dY B A), member by member."""
    for layer, ranks in _adapted(group):
        out += apply([tail[:, ranks] @ a[ranks]], mask, layer)[0]


class Augmented:
    """In the dtype of the activations: one matrix holds the weights and the adapters (`kernels.augmented`)."""

    error = 0.0
    holds = True

    def __init__(self, padded_to: int = PADDED_TO) -> None:
        self.padded_to = padded_to

    @property
    def exact(self) -> Products:
        return self

    def rows(self, group: Group, tokens: int, back: bool = False) -> Rows | None:
        return None

    def project(
        self,
        group: Group,
        x: Tensor,
        out: Tensor,
        bias: Tensor | None,
        mask: Dropout | None,
        rows: Rows | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | None:
        n, k = group.rows, group.width
        s = group.matrix(out.dtype)
        xa = _project_small(group, x, s[n:, :k], mask) if group.rank else None
        whole = x.shape[1] == s.shape[1]
        left, right = (x, s[:n]) if whole else (x[:, :k], s[:n, :k])
        matmul(left, right.T, out, bias=bias, c=residual, beta=0.0 if residual is None else 1.0)
        if xa is not None and not whole:
            matmul(xa, s[:n, k:].T, out, beta=1.0)
        return xa

    def project_back(self, group: Group, dy: Tensor, out: Tensor | None, mask: Dropout | None, rows: Rows | None = None) -> None:
        n, k = group.rows, group.width
        s = group.matrix(dy.dtype)
        if group.rank:
            matmul(dy[:, :n], s[:n, k:], dy[:, n:])
        if out is None:
            return
        if mask is None:
            matmul(dy, s[:, :k], out)
            return
        matmul(dy[:, :n], s[:n, :k], out)
        _add_dropped(group, dy[:, n:], s[n:, :k], mask, out)


@functools.cache
def _told(reason: str) -> None:
    log.warning("fp8: a group runs in 16 bits: %s", reason)


def _fits(group: Group) -> bool:
    reason = fp8.why_not(group)
    if reason is not None:
        _told(reason)
    return reason is None


class Float8:
    """In e4m3, with a scale a token and a scale a row of the weight (`kernels.fp8`); XA and s dY B in the compute dtype.

    A group whose shapes do not fit (`fp8.why_not`) is multiplied as `Augmented` does; that is logged, once a shape.
    """

    error = 0.04
    padded_to = LEAST  # a rank takes three columns, and rows begin with a cache line anyway
    holds = False

    def __init__(self) -> None:
        self.exact: Products = Augmented(self.padded_to)

    def rows(self, group: Group, tokens: int, back: bool = False) -> Rows | None:
        return Rows(tokens, group.rows if back else group.width, group.rank, group.device) if _fits(group) else None

    def project(
        self,
        group: Group,
        x: Tensor,
        out: Tensor,
        bias: Tensor | None,
        mask: Dropout | None,
        rows: Rows | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | None:
        if not _fits(group):
            return self.exact.project(group, x, out, bias, mask, residual=residual)
        weight, a = fp8.forward_weight(group, x.dtype)
        xa = _project_small(group, x, a, mask) if group.rank else None
        rows = _quantized(x[:, : group.width], xa, rows)
        fp8.product(rows, weight, bias, None, out, residual)
        return xa

    def project_back(self, group: Group, dy: Tensor, out: Tensor | None, mask: Dropout | None, rows: Rows | None = None) -> None:
        if not _fits(group):
            self.exact.project_back(group, dy, out, mask)
            return
        n = group.rows
        weight, sb = fp8.backward_weight(group, dy.dtype)
        if group.rank:
            matmul(dy[:, :n], sb, dy[:, n:])
        if out is None:
            return
        rows = _quantized(dy[:, :n], dy[:, n:] if group.rank and mask is None else None, rows, group.rank)
        if mask is None:
            fp8.product(rows, weight, None, None, out)
        else:
            fp8.product(rows, weight, None, n, out)
            _add_dropped(group, dy[:, n:], fp8.forward_adapter(group, dy.dtype), mask, out)


def _quantized(x: Tensor, small: Tensor | None, rows: Rows | None, rank: int = 0) -> Rows:
    """x `[T, K]` in e4m3 with `small` `[T, R]` behind it. rows: x quantised already. rank: of the room, if small is None."""
    if rows is None:
        rows = Rows(x.shape[0], x.shape[1], rank if small is None else small.shape[1], x.device)
        if small is None:
            fp8.quantize_rows(x, rows.main, rows.scale)
        else:
            fp8.quantize_both(x, small, rows)
    elif small is not None:
        fp8.fill_tail(rows, small)
    return rows
