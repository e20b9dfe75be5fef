"""Loss scaling for fp16: multiply the loss so that small gradients survive fp16's 5 exponent bits, divide them again after.

Why our own: with flat gradients it is one multiplication, and nothing but a scale and a counter, both on the device, has to
be saved. An overflow halves the scale and skips that step; 2,000 clean steps double it (the schedule of arXiv 1710.03740).
bf16 and fp32 use a scale of 1 that never moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROWTH_EVERY = 2000
SMALLEST, LARGEST = 1.0, 2.0**24


@dataclass(frozen=True)
class LossScale:
    """scale: fp32 scalar; clean: fp32 scalar, steps since the last overflow; moving: false for bf16 and fp32."""

    scale: Tensor
    clean: Tensor
    moving: bool

    @classmethod
    def create(cls, compute: torch.dtype, device: torch.device) -> LossScale:
        moving = compute == torch.float16
        return cls(torch.tensor(2.0**16 if moving else 1.0, device=device), torch.zeros((), device=device), moving)

    def after(self, found_inf: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and clean steps behind a step, not taken yet. found_inf: fp32 scalar, 1 when the gradient was not finite. No host
        sync."""
        if not self.moving:
            return self.scale, self.clean
        clean = (self.clean + 1) * (1 - found_inf)
        grown = torch.where(clean >= GROWTH_EVERY, self.scale * 2, self.scale)
        scale = torch.where(found_inf > 0, self.scale / 2, grown).clamp(SMALLEST, LARGEST)
        return scale, clean * (clean < GROWTH_EVERY).float()

    def take(self, found: tuple[Tensor, Tensor]) -> None:
        """What `after` found; allocates nothing."""
        if self.moving:
            self.scale.copy_(found[0])
            self.clean.copy_(found[1])
