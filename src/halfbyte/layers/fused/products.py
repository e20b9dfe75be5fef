"""The products of a group: with the adapter inside, as extra columns and rows of one matrix (`kernels.augmented`).

Forward: Y = [X | XA] [W | sB]ᵀ. Backward: dX = [dY | s dY B] [W ; A]. The adapter costs two skinny products, no pass over Y or dX.
Dropout of the adapter's input hides X from A: XA and the share of dX are then made per member, from the recomputed mask.

Letters: T tokens, K inputs, N outputs of the group, R ranks of the group (padded).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.augmented import Group
from halfbyte.kernels.dropout import Dropout, apply
from halfbyte.kernels.lora_linear.members import LowRank, Member
from halfbyte.layers.fused.gradients import Gradients, add_product


@dataclass(frozen=True)
class Projection:
    """A group and its members' biases behind each other, `[N]`, None where nobody has one."""

    group: Group
    bias: Tensor | None

    @classmethod
    def of(cls, members: list[Member], dtype: torch.dtype) -> Projection:
        """dtype: of the bias, the compute dtype."""
        group = Group(members)
        if all(m.bias is None for m in members):
            return cls(group, None)
        parts = [
            torch.zeros(m.weight.shape[0], dtype=dtype, device=group.device) if m.bias is None else m.bias.detach().to(dtype)
            for m in members
        ]
        return cls(group, torch.cat(parts))

    @property
    def rows(self) -> int:
        """N."""
        return self.group.rows

    @property
    def width(self) -> int:
        """K."""
        return self.group.width

    @property
    def rank(self) -> int:
        """R."""
        return self.group.rank

    def adapted(self) -> Iterator[tuple[LowRank, slice, slice]]:
        """Adapter, rows in N and columns in R of every member that has one."""
        g = self.group
        for member, rows, ranks in zip(g.members, g.row_slices, g.rank_slices, strict=True):
            if member.lora is not None and ranks is not None:
                yield member.lora, rows, ranks


def forward(p: Projection, x: Tensor, out: Tensor, mask: Dropout | None) -> Tensor | None:
    """Writes Y `[T, N]` into `out` and returns XA `[T, R]`, or None without adapters.

    x `[T, K + R]`: the last R columns are free and become XA. x `[T, K]` is taken as well: the adapter is then added to Y.
    """
    n, k = p.rows, p.width
    s = p.group.matrix(out.dtype)
    if not p.rank:
        _product(x[:, :k], s[:n, :k], p.bias, out)
        return None
    augmented = x.shape[1] > k
    xa = x[:, k:] if augmented else x.new_empty(x.shape[0], p.rank)
    if mask is None:
        torch.mm(x[:, :k], s[n:, :k].T, out=xa)
    else:
        xa.zero_()
        for lora, _, ranks in p.adapted():
            xa[:, ranks] = apply([x[:, :k]], mask, lora.layer)[0] @ s[n:, :k][ranks].T
    if augmented:
        _product(x, s[:n], p.bias, out)
    else:
        _product(x, s[:n, :k], p.bias, out)
        out.addmm_(xa, s[:n, k:].T)
    return xa


def _product(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, w.T, out=out)
    else:
        torch.addmm(bias, x, w.T, out=out)


def input_gradient(p: Projection, dy: Tensor, out: Tensor | None, mask: Dropout | None) -> None:
    """Fills the tail of dy `[T, N + R]` with s dY B, and writes dX `[T, K]` into `out` if it is given."""
    n, k = p.rows, p.width
    if out is None and not p.rank:
        return
    s = p.group.matrix(dy.dtype)
    if p.rank:
        torch.mm(dy[:, :n], s[:n, k:], out=dy[:, n:])
    if out is None:
        return
    if mask is None or not p.rank:
        torch.mm(dy, s[:, :k], out=out)
        return
    torch.mm(dy[:, :n], s[:n, :k], out=out)
    for lora, _, ranks in p.adapted():
        out += apply([dy[:, n:][:, ranks] @ s[n:, :k][ranks]], mask, lora.layer)[0]


def adapter_gradients(p: Projection, dy: Tensor, x: Tensor, xa: Tensor | None, gradients: Gradients, mask: Dropout | None) -> None:
    """dA += (s dY B)ᵀ drop(X) and dB += s dYᵀ XA. dy: with its tail filled. x `[T, >= K]`."""
    adapted = list(p.adapted())
    if not adapted:
        return
    assert xa is not None
    tail, x = dy[:, p.rows :], x[:, : p.width]
    for lora, rows, ranks in adapted:
        add_product(gradients.total(lora.b), dy[:, rows], xa[:, ranks], lora.scale)
    stacked = gradients.stacked([lora.a for lora, _, _ in adapted]) if mask is None else None
    if stacked is not None:
        add_product(stacked, tail[:, : stacked.shape[0]], x)
        return
    for lora, _, ranks in adapted:
        seen = x if mask is None else apply([x], mask, lora.layer)[0]
        add_product(gradients.total(lora.a), tail[:, ranks], seen)
