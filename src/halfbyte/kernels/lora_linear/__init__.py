"""`lora_linear`: y_i = x W_iᵀ + b_i + s_i · drop(x) A_iᵀ B_iᵀ for a group of weights that share their input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.formats.packed import Packed
from halfbyte.formats.quantize import dequantize


@dataclass(frozen=True)
class LowRank:
    """An adapter of one weight: `a [r, K]`, `b [N, r]`, `scale`.

    The masters are fp32 and cast to the compute dtype inside; `layer` numbers the dropout mask.
    """

    a: Tensor
    b: Tensor
    scale: float
    layer: int = 0


@dataclass(frozen=True)
class Dropout:
    """Which mask: Philox(seed, step, row, layer, element), the same whatever the microbatch is.

    p: probability of zero. state: int64 `[3]` on the device: seed, step, first row of this microbatch. tokens: row length.
    """

    p: float
    state: Tensor
    tokens: int


def lora_linear(
    x: Tensor,
    weights: list[Packed | Tensor],
    biases: list[Tensor | None],
    loras: list[LowRank | None],
    dropout: Dropout | None = None,
) -> list[Tensor]:
    """x `[..., K]` in the compute dtype; returns one `[..., N_i]` a weight, in the dtype of x."""
    out = []
    for weight, bias, lora in zip(weights, biases, loras, strict=True):
        dense = dequantize(weight, x.dtype) if isinstance(weight, Packed) else weight.to(x.dtype)
        y = torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
        if lora is not None:
            y = y + lora.scale * ((x @ lora.a.to(x.dtype).T) @ lora.b.to(x.dtype).T)
        out.append(y)
    return out
