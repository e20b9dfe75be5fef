"""`adamw`: clip and step (arXiv 1711.05101) over every trainable parameter at once, moments in 32 or in 8 bits.

    norm = |g| / loss scale;   f = min(1, largest / (norm + 1e-6)) / loss scale;   g <- f g
    m <- b1 m + (1 - b1) g;    v <- b2 v + (1 - b2) g g
    x <- (1 - lr decay) x - (lr / (1 - b1^t)) m / (sqrt(v) / sqrt(1 - b2^t) + eps);    g <- 0

Why its own: one launch instead of one a group, the clipped gradient never goes back to memory, and the next step's zeroing
costs no pass of its own. The step's finite flag, count and corrections are computed and read on the device; where the loss or
the norm is not finite, nothing but the gradient (which becomes 0) changes. Same input, same bits: sums have a fixed order.
Cost: 36 bytes moved a parameter with 32-bit moments, 24 with 8-bit ones; kept: 8 bytes, or 2.03.

8 bits (arXiv 2110.02861): blocks of 256 elements of the flat buffer share an fp32 scale, their largest magnitude; m uses the signed
dynamic map, v the unsigned one; the nearest level, a tie takes the lower; a negative m too small for a level of its own keeps
its sign (code 126, not 127, which is 0), as bitsandbytes' CUDA kernel does. The update itself uses m and v before rounding.

Letters: n = elements with padding, B = n / 256 blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfbyte.formats.dynamic8 import dynamic_map
from halfbyte.kernels.adamw import cpu, reference
from halfbyte.kernels.adamw.parts import BLOCK, CHUNK, LARGEST_PARTS, PARTIALS, SLOTS, Moments, Part, Rule, Scratch
from halfbyte.kernels.dispatch import twin

__all__ = [
    "BLOCK",
    "CHUNK",
    "SLOTS",
    "Moments",
    "Part",
    "Rule",
    "Scratch",
    "cleared",
    "layout",
    "measure",
    "moments",
    "scratch",
    "step",
]


def moments(values: Tensor, bits: int) -> Moments:
    """Moments of zero for the flat buffer `values` `[n]`; bits: 32 or 8."""
    fields = [torch.empty(n, dtype=dtype, device=values.device) for n, dtype in layout(values.numel(), bits)]
    return cleared(Moments(*fields))


def layout(n: int, bits: int) -> list[tuple[int, torch.dtype]]:
    """Elements and dtype of each field of `Moments` for n elements."""
    if bits == 32:
        return [(n, torch.float32)] * 2
    assert bits == 8 and n % BLOCK == 0
    return [(n, torch.uint8)] * 2 + [(n // BLOCK, torch.float32)] * 2


def cleared(state: Moments) -> Moments:
    """The same, every moment zero."""
    if state.first_scales is None or state.second_scales is None:
        state.first.zero_(), state.second.zero_()
        return state
    for codes, scales, signed in ((state.first, state.first_scales, True), (state.second, state.second_scales, False)):
        codes.fill_(int((dynamic_map(signed) == 0).nonzero()))
        scales.zero_()
    return state


def scratch(rule: Rule, device: torch.device) -> Scratch:
    """What a run keeps between `measure` and `step`."""
    assert 0 < len(rule.parts) <= LARGEST_PARTS
    logs = [math.log(beta) if beta else -math.inf for beta in (rule.beta1, rule.beta2)]
    return Scratch(
        count=torch.zeros((), device=device),
        scalars=torch.zeros(5, device=device),
        logs=torch.tensor(logs, dtype=torch.float64, device=device),
        partials=torch.zeros(PARTIALS, device=device),
    )


def measure(grads: Tensor, loss: Tensor, scale: Tensor, largest: float, kept: Scratch) -> Tensor:
    """What the next `step` needs to know of the gradient; changes neither it nor the count.

    grads: fp32 `[n]`, of loss * scale. loss, scale: fp32 scalars on the device. largest: norm to clip to, 0 is never.
    Returns fp32 `[4]`: loss, norm before clipping, 1 where one of them is not finite (else 0), scale.
    """
    if twin(grads.device) == "fused":
        from halfbyte.kernels.adamw import fused

        return fused.measure(grads, loss, scale, largest, kept)
    return reference.measure(grads, loss, scale, largest, kept)


def step(values: Tensor, grads: Tensor, state: Moments, lr: float, rule: Rule, kept: Scratch) -> None:
    """One step with what `measure` found: updates values `[n]`, moments and count, and zeroes grads `[n]`.

    All of them may be a part of the buffer, and `rule` that part's: parts one after the other are the step of the whole,
    bit for bit.
    """
    which = twin(values.device)
    if which == "fused":
        from halfbyte.kernels.adamw import fused

        fused.step(values, grads, state, lr, rule, kept)
    elif which == "cpu" and state.first_scales is None:
        cpu.step(values, grads, state, lr, rule, kept)
    else:
        reference.step(values, grads, state, lr, rule, kept)
