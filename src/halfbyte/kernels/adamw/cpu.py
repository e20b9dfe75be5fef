"""The CPU twin for 32-bit moments: torch's fused AdamW, one threaded pass a part (a third of the reference's time)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from halfbyte.kernels.adamw.parts import BLOCK, Moments, Rule, Scratch


@torch.no_grad()
def step(values: Tensor, grads: Tensor, state: Moments, lr: float, rule: Rule, kept: Scratch) -> None:
    """The mirror of `reference.step`, to rounding; torch divides the gradient by `grad_scale` and reads `found_inf`.

    Whatever has to be allocated is there before anything changes.
    """
    factor, found_inf, *_, t = kept.scalars.unbind()
    inverse, done = 1 / factor, torch.where(found_inf > 0, kept.count, t)
    counts = [t - 1 for _ in rule.parts]
    start = 0
    for part, count in zip(rule.parts, counts, strict=True):
        span = slice(start * BLOCK, part.end * BLOCK)
        adamw(
            [values[span]],
            [grads[span]],
            [state.first[span]],
            [state.second[span]],
            [],
            [count],
            fused=True,
            grad_scale=inverse,
            found_inf=found_inf,
            amsgrad=False,
            beta1=rule.beta1,
            beta2=rule.beta2,
            lr=lr * part.rate,
            weight_decay=part.decay,
            eps=rule.eps,
            maximize=False,
        )
        start = part.end
    grads.zero_()
    kept.count.copy_(done)
