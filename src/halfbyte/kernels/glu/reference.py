"""Gated linear units as they are written down, fp32 inside (float64 for float64), one rounding at the end.

h = act(gate) * up        d up = dh * act(gate)        d gate = dh * up * act'(gate)
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from halfbyte.kernels.norm.reference import wide

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]

ROOT_2_OVER_PI = math.sqrt(2 / math.pi)
CUBIC = 0.044715


def value_and_slope(x: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """act(x) and act'(x)."""
    if activation == "silu":
        s = torch.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    if activation == "gelu":
        below = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return x * below, below + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if activation == "gelu_tanh":
        t = torch.tanh(ROOT_2_OVER_PI * (x + CUBIC * x**3))
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * ROOT_2_OVER_PI * (1 + 3 * CUBIC * x * x)
    above = torch.relu(x)
    return (above, (x > 0).to(x.dtype)) if activation == "relu" else (above * above, 2 * above)


def glu(gate: Tensor, up: Tensor | None, activation: Activation, out: Tensor) -> None:
    """See `halfbyte.kernels.glu.glu`."""
    value, _ = value_and_slope(wide(gate), activation)
    out.copy_(value if up is None else value * wide(up))


def glu_backward(dh: Tensor, gate: Tensor, up: Tensor | None, activation: Activation) -> None:
    """See `halfbyte.kernels.glu.glu_backward`."""
    value, slope = value_and_slope(wide(gate), activation)
    d = wide(dh)
    u = wide(up) if up is not None else torch.ones_like(value)
    # All three before any is written: in fp32 `d` is dh itself.
    h, d_gate, d_up = value * u, d * u * slope, d * value
    dh.copy_(h)
    gate.copy_(d_gate)
    if up is not None:
        up.copy_(d_up)
