"""What the twins of `cross_entropy` receive and return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.formats.packed import Packed
from halfbyte.kernels.dequantize import decode

IGNORE = -100
"""A label that carries no loss."""


@dataclass(frozen=True)
class Head:
    """The output layer: logits = cap · tanh(scale · (h Wᵀ + b) / cap); cap 0 means none.

    weight `[V, H]`, dense or packed (then it is frozen), bias `[V]` or none. Of a model: `layers.head.find`.
    """

    weight: Tensor | Packed
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float = 0.0

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self.weight.shape[0])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight `[V, H]` in `dtype`; a packed one is decoded whole."""
        return decode(self.weight, dtype) if isinstance(self.weight, Packed) else self.weight.to(dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits `[..., V]` in fp32 of hidden `[..., H]`: the formula, for probes and the reference."""
        z = (hidden @ self.dense(hidden.dtype).T).float()
        if self.bias is not None:
            z = z + self.bias.float()
        z = self.scale * z
        return z if self.cap == 0.0 else self.cap * torch.tanh(z / self.cap)


@dataclass(frozen=True)
class Extras:
    """What the loss of a position is besides -log p(target), lse being the log of the sum of all exp(logit):

    loss = lse + z · lse² - (1 - smoothing) · logit(target) - smoothing · mean(logits)
    smoothing: label smoothing (Szegedy et al. 2016, section 7). z: z-loss (Chowdhery et al. 2022, section 5).
    """

    smoothing: float = 0.0
    z: float = 0.0


PLAIN = Extras()


@dataclass(frozen=True)
class Wants:
    """Which gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool


@dataclass(frozen=True)
class Task:
    """One call. hidden `[T, H]`; labels int64 `[T]`; labelled: how many carry a loss, n; chunk_bytes: of logits at a time."""

    hidden: Tensor
    labels: Tensor
    head: Head
    extras: Extras
    wants: Wants
    labelled: int
    chunk_bytes: int

    def rows(self) -> Tensor:
        """int64 `[n]`: indices of the rows with a label, in order; without a sync of the device."""
        return torch.nonzero_static(self.labels != IGNORE, size=self.labelled)[:, 0]


@dataclass(frozen=True)
class Results:
    """loss: fp32 scalar, the SUM over labelled positions. correct: int64 scalar. Gradients are of that sum.

    hidden: the gradient of the labelled rows alone, `[n, H]`, in their order. weight `[V, H]`, bias `[V]`.
    """

    loss: Tensor
    correct: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
