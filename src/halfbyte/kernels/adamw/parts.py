"""What the twins of `adamw` share: moments, the rule, and what stays on the device between `measure` and `step`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

BLOCK = 256
"""Elements that share a scale in 8 bits; parts begin at multiples of it."""
LARGEST_PARTS = 4
PARTIALS = 1024
"""Partial sums of the norm: a constant, not the device's size, so that every GPU adds in the same order."""


@dataclass(frozen=True)
class Moments:
    """first, second: fp32 `[n]`; or, with scales fp32 `[B]` beside them, uint8 codes `[n]` of the dynamic 8-bit maps."""

    first: Tensor
    second: Tensor
    first_scales: Tensor | None = None
    second_scales: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """Neighbouring blocks of the flat buffer that learn alike. end: the block after the last; rate: multiplies the learning
    rate; decay: decoupled weight decay."""

    end: int
    rate: float
    decay: float


@dataclass(frozen=True)
class Rule:
    """AdamW's constants, and the parts in order; the first starts at block 0, each other where the one before it ends."""

    beta1: float
    beta2: float
    eps: float
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Scratch:
    """count: fp32 scalar, steps done. scalars: fp32 `[5]`: factor of the gradient, found_inf, 1 / (1 - b1^t),
    1 / sqrt(1 - b2^t), t. logs: fp64 `[2]` of the betas. partials: fp32 `[PARTIALS]`."""

    count: Tensor
    scalars: Tensor
    logs: Tensor
    partials: Tensor
