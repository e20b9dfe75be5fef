"""What the twins of `adamw` share: moments, the rule, and what stays on the device between `measure` and `step`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

BLOCK = 256
"""Elements that share a scale in 8 bits; parts begin at multiples of it."""
LARGEST_PARTS = 4
CHUNK = 1 << 22
"""Elements of a chunk of moments that pass through the GPU: 32 MiB in 32 bits. Half of it takes 5 % more time in 32 bits and twice
as much in 8, where a chunk's calls take longer than its copies (H200)."""
SLOTS = 2
"""Chunks that are on the GPU at a time."""
PARTIALS = 1024
"""Partial sums of the norm: a constant, not the device's size, so that every GPU adds in the same order."""


@dataclass(frozen=True)
class Moments:
    """first, second: fp32 `[n]`; or, with scales fp32 `[B]` beside them, uint8 codes `[n]` of the dynamic 8-bit maps."""

    first: Tensor
    second: Tensor
    first_scales: Tensor | None = None
    second_scales: Tensor | None = None

    def fields(self) -> list[Tensor]:
        """The tensors, scales last."""
        return [t for t in (self.first, self.second, self.first_scales, self.second_scales) if t is not None]

    def part(self, span: slice) -> Moments:
        """Views of elements `span`, which begins and ends at multiples of BLOCK."""
        assert span.start % BLOCK == 0 and span.stop % BLOCK == 0, "an 8-bit block would be cut"
        if self.first_scales is None or self.second_scales is None:
            return Moments(self.first[span], self.second[span])
        blocks = slice(span.start // BLOCK, span.stop // BLOCK)
        return Moments(self.first[span], self.second[span], self.first_scales[blocks], self.second_scales[blocks])


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

    def part(self, span: slice) -> Rule:
        """The rule of elements `span` alone, its parts counted from there."""
        first, last = span.start // BLOCK, span.stop // BLOCK
        found, start = [], 0
        for part in self.parts:
            if start < last and part.end > first:
                found.append(replace(part, end=min(part.end, last) - first))
            start = part.end
        return replace(self, parts=tuple(found))


@dataclass(frozen=True)
class Scratch:
    """count: fp32 scalar, steps done. scalars: fp32 `[5]`: factor of the gradient, found_inf, 1 / (1 - b1^t),
    1 / sqrt(1 - b2^t), t. logs: fp64 `[2]` of the betas. partials: fp32 `[PARTIALS]`."""

    count: Tensor
    scalars: Tensor
    logs: Tensor
    partials: Tensor
