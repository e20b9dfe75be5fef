"""What the twins of `cross_entropy` receive and return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

IGNORE = -100
"""A label that carries no loss."""


@dataclass(frozen=True)
class Head:
    """The output layer: logits = cap · tanh(scale · (h Wᵀ + b) / cap); cap 0 means none.

    weight `[V, H]`, bias `[V]` or none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float = 0.0


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
