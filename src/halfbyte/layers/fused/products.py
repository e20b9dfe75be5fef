"""The products of a group: with the adapter inside, as extra columns and rows of one matrix (`kernels.augmented`).

Forward: Y = [X | XA] [W | sB]ᵀ. Backward: dX = [dY | s dY B] [W ; A]. So the adapter costs two skinny products and no pass over Y or dX.
Dropout of the adapter's input hides X from A: XA and the share of dX are then made per member, from the recomputed mask.

Letters: T tokens, K inputs, N outputs of the group, R ranks of the group (padded).
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.augmented import Group
from halfbyte.kernels.dropout import Dropout, apply
from halfbyte.layers.fused.gradients import Gradients, add_product


def forward(group: Group, x: Tensor, out: Tensor, bias: Tensor | None, mask: Dropout | None) -> Tensor | None:
    """Writes Y `[T, N]` into `out` and returns XA `[T, R]`, or None without adapters.

    x `[T, K + R]`: the last R columns are free and become XA. x `[T, K]` is taken as well: the adapter is then added to Y.
    """
    n, k = group.rows, group.width
    s = group.matrix(out.dtype)
    if not group.rank:
        _product(x[:, :k], s[:n], bias, out)
        return None
    augmented = x.shape[1] > k
    xa = x[:, k:] if augmented else x.new_empty(x.shape[0], group.rank)
    if mask is None:
        torch.mm(x[:, :k], s[n:, :k].T, out=xa)
    else:
        xa.zero_()
        for member, ranks in zip(group.members, group.rank_slices, strict=True):
            if member.lora is not None and ranks is not None:
                xa[:, ranks] = apply([x[:, :k]], mask, member.lora.layer)[0] @ s[n:, :k][ranks].T
    if augmented:
        _product(x, s[:n], bias, out)
    else:
        _product(x, s[:n, :k], bias, out)
        out.addmm_(xa, s[:n, k:].T)
    return xa


def _product(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, w.T, out=out)
    else:
        torch.addmm(bias, x, w.T, out=out)


def backward(
    group: Group, dy: Tensor, x: Tensor, xa: Tensor | None, gradients: Gradients, mask: Dropout | None, out: Tensor | None
) -> None:
    """Adds the gradients of A and B; writes dX `[T, K]` into `out` if it is given.

    dy `[T, N + R]`: the last R columns are free. x `[T, >= K]`: the group's input. xa: as `forward` returned it.
    """
    if not group.rank:
        if out is not None:
            torch.mm(dy[:, : group.rows], group.matrix(dy.dtype), out=out)
        return
    s = group.matrix(dy.dtype)
    input_gradient(group, s, dy, out, mask)
    adapter_gradients(group, dy, x, xa, gradients, mask)


def input_gradient(group: Group, s: Tensor, dy: Tensor, out: Tensor | None, mask: Dropout | None) -> None:
    """Fills the tail of dy with s dY B, and writes dX into `out` if it is given."""
    n, k = group.rows, group.width
    torch.mm(dy[:, :n], s[:n, k:], out=dy[:, n:])
    if out is None:
        return
    if mask is None:
        torch.mm(dy, s[:, :k], out=out)
        return
    torch.mm(dy[:, :n], s[:n, :k], out=out)
    for member, ranks in zip(group.members, group.rank_slices, strict=True):
        if member.lora is not None and ranks is not None:
            out += apply([dy[:, n:][:, ranks] @ s[n:, :k][ranks]], mask, member.lora.layer)[0]


def adapter_gradients(
    group: Group, dy: Tensor, x: Tensor, xa: Tensor | None, gradients: Gradients, mask: Dropout | None
) -> None:
    """dA += (s dY B)ᵀ drop(X) and dB += s dYᵀ XA. dy: with its tail filled."""
    assert xa is not None
    n, k = group.rows, group.width
    tail, x = dy[:, n:], x[:, :k]
    adapted = [
        (member.lora, rows, ranks)
        for member, rows, ranks in zip(group.members, group.row_slices, group.rank_slices, strict=True)
        if member.lora is not None and ranks is not None
    ]
    for lora, rows, ranks in adapted:
        add_product(gradients.total(lora.b), dy[:, rows], xa[:, ranks], lora.scale)
    stacked = gradients.stacked([lora.a for lora, _, _ in adapted]) if mask is None else None
    if stacked is not None:
        add_product(stacked, tail[:, : stacked.shape[0]], x)
        return
    for lora, _, ranks in adapted:
        seen = x if mask is None else apply([x], mask, lora.layer)[0]
        add_product(gradients.total(lora.a), tail[:, ranks], seen)
