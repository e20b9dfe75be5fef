"""The reference: what `formats` says the bits mean, nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.formats import quantize as formats
from halfbyte.formats.packed import Packed


def decode(packed: Packed, out: Tensor) -> None:
    """Writes the weight into `out` (contiguous, n elements, any float dtype)."""
    out.view(packed.shape).copy_(formats.dequantize(packed, out.dtype))


def decode_new(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight `[*shape]` as a fresh tensor."""
    return formats.dequantize(packed, dtype)
