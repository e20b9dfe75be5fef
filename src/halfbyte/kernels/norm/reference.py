"""Norms as they are written down, fp32 inside (float64 for float64), one rounding at the end.

    residual = x + delta                                       rounded to x's dtype: it is what the next layer reads
    rms      y = residual * rstd * w,                          rstd = 1 / sqrt(mean(residual^2) + eps)
    layer    y = (residual - mean) * rstd * w + b,             rstd = 1 / sqrt(mean((residual - mean)^2) + eps)

Letters: T tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class NormSpec:
    """Which norm. offset: added to the weight before use (Gemma stores weight - 1)."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0


def wide(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic: fp32, or float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def factor(weight: Tensor | None, spec: NormSpec, like: Tensor) -> Tensor | float:
    """w `[H]` in the dtype of `like`."""
    return 1.0 if weight is None else weight.to(like.dtype) + spec.offset


def add_norm(
    x: Tensor, delta: Tensor | None, spec: NormSpec, weight: Tensor | None, bias: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `halfbyte.kernels.norm.add_norm`."""
    residual = x if delta is None else x + delta
    r = wide(residual)
    mean = None
    if spec.kind == "layer":
        mean = r.mean(-1)
        r = r - mean[:, None]
    rstd = torch.rsqrt(r.square().mean(-1) + spec.eps)
    y = r * rstd[:, None] * factor(weight, spec, r)
    out.copy_(y if bias is None else y + bias.to(y.dtype))
    return residual, rstd, mean


def norm_backward(
    d_out: Tensor,
    residual: Tensor,
    rstd: Tensor,
    mean: Tensor | None,
    spec: NormSpec,
    weight: Tensor | None,
    add: Tensor | None,
    out: Tensor,
) -> None:
    """See `halfbyte.kernels.norm.norm_backward`."""
    r = wide(residual)
    unit = (r if mean is None else r - mean[:, None]) * rstd[:, None]
    g = wide(d_out) * factor(weight, spec, r)
    d = g - unit * (g * unit).mean(-1, keepdim=True)
    if mean is not None:
        d = d - g.mean(-1, keepdim=True)
    d = d * rstd[:, None]
    out.copy_(d if add is None else d + wide(add))
