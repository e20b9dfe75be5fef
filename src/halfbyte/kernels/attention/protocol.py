"""What a way to run attention offers: plain functions with an explicit backward, no autograd, nothing synchronised.

Letters: T tokens, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from halfbyte.kernels.attention.documents import Documents


class Method(Protocol):
    """One way to run attention. q `[T, H, d]`, k and v `[T, G, d]`: strided views whose last stride is 1.

    scale: on q kᵀ. window: a query sees so many keys, itself included (None: all before it). cap: the soft cap, or None.
    """

    @property
    def name(self) -> str:
        """As the recipe and the log call it."""

    @property
    def holds_operands(self) -> bool:
        """Whether residuals hold q, k, v and out (autograd's graph does). They may then be dropped, and are where those are to go:
        backward runs the forward once more. Residuals of the others are small, and needed."""

    def obstacle(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, cap: float | None) -> str | None:
        """Why it cannot run on these, or None. Costs no device time."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, cap: float | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """out `[T, H, d]` contiguous, and the residuals that backward needs besides q, k, v and out."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        residuals: tuple[Tensor, ...],
        documents: Documents,
        scale: float,
        window: int | None,
        cap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq `[T, H, d]`, dk, dv `[T, G, d]`, last stride 1."""
