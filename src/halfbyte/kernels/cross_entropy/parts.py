"""What the twins of `cross_entropy` receive and return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""A label that carries no loss."""


@dataclass(frozen=True)
class Head:
    """The output layer: logits = cap · tanh(scale · (h Wᵀ + b) / cap); cap 0 means none.

    weight `[V, H]`, bias `[V]` or none. Of a model: `layers.head.find`.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float = 0.0

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits `[..., V]` in fp32 of hidden `[..., H]`: the formula, for probes and the reference."""
        z = (hidden @ self.weight.to(hidden.dtype).T).float()
        if self.bias is not None:
            z = z + self.bias.float()
        z = self.scale * z
        return z if self.cap == 0.0 else self.cap * torch.tanh(z / self.cap)


@dataclass(frozen=True)
class Wants:
    """Which gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool


@dataclass(frozen=True)
class Results:
    """loss: fp32 scalar, the SUM over labelled positions. correct: int64 scalar. Gradients are of that sum."""

    loss: Tensor
    correct: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
