"""A group of linear layers within the fused layer: weights and adapters, biases, and the gradients of A and B.

The two large products are `kernels.products`'; XA and s dY B, which they leave behind their operands, are all that dA and dB need.

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
from halfbyte.kernels.outer import Outer, outer
from halfbyte.layers.fused.gradients import Gradients


@dataclass(frozen=True)
class Projection:
    """A group and its members' biases behind each other, `[N]`, None where nobody has one."""

    group: Group
    bias: Tensor | None

    @classmethod
    def of(cls, members: list[Member], dtype: torch.dtype, padded_to: int) -> Projection:
        """dtype: of the bias, the compute dtype. padded_to: see `Group`."""
        group = Group(members, padded_to)
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


def adapter_gradients(p: Projection, dy: Tensor, x: Tensor, xa: Tensor | None, gradients: Gradients, mask: Dropout | None) -> None:
    """dA += (s dY B)ᵀ drop(X); dB += s dYᵀ XA waits for `gradients.settle`. dy: with its tail filled. x `[T, >= K]`."""
    adapted = list(p.adapted())
    if not adapted:
        return
    assert xa is not None
    tail, x = dy[:, p.rows :], x[:, : p.width]
    gradients.waiting += [Outer(gradients.total(lora.b), dy[:, rows], xa[:, ranks], lora.scale) for lora, rows, ranks in adapted]
    stacked = gradients.stacked([lora.a for lora, _, _ in adapted]) if mask is None else None
    if stacked is not None:
        outer([Outer(stacked, tail[:, : stacked.shape[0]], x)])
        return
    for lora, _, ranks in adapted:
        seen = x if mask is None else apply([x], mask, lora.layer)[0]
        outer([Outer(gradients.total(lora.a), tail[:, ranks], seen)])
