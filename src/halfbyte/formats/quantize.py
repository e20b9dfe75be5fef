"""The two mirror verbs over every format."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats import nf4
from halfbyte.formats.packed import NESTED_BLOCK, Format, Packed


def _empty(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device)


def quantize(weight: Tensor, fmt: Format, *, name: str = "tensor") -> Packed:
    """Stores `weight` (any float dtype, any shape) in `fmt`. Raises FormatError naming `name` on NaN or inf."""
    if fmt.kind != "nf4":
        raise FormatError(f"{fmt.kind} is not available yet")
    x = weight.detach().to(torch.float32).reshape(-1)
    if not torch.isfinite(x).all():
        raise FormatError(f"{name} holds NaN or infinite values")
    n = x.numel()
    blocks = -(-n // fmt.block)
    padded = torch.nn.functional.pad(x, (0, blocks * fmt.block - n)).view(blocks, fmt.block)
    absmax = padded.abs().amax(1)
    scaled = padded * (1.0 / absmax.clamp_min(1e-38))[:, None]
    codes = torch.bucketize(scaled.reshape(-1)[:n], nf4.THRESHOLDS.to(x.device)).to(torch.uint8)
    if n % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=nf4.ZERO_CODE)
    packed = (codes[0::2] << 4) | codes[1::2]
    empty = _empty(x.device)
    if not fmt.nested:
        return Packed(fmt, tuple(weight.shape), weight.dtype, packed, absmax.view(torch.uint8), empty, empty, empty)
    from halfbyte.formats.dynamic8 import quantize_blockwise

    offset = absmax.mean()
    codes8, scales2 = quantize_blockwise(absmax - offset, NESTED_BLOCK)
    return Packed(
        fmt,
        tuple(weight.shape),
        weight.dtype,
        packed,
        codes8,
        scales2.view(torch.uint8),
        offset.reshape(1).view(torch.uint8),
        empty,
    )


def scales_of(packed: Packed) -> Tensor:
    """fp32 scales `[blocks]`, nested ones decoded."""
    if not packed.format.nested:
        return packed.scales.view(torch.float32)
    from halfbyte.formats.dynamic8 import dequantize_blockwise

    return dequantize_blockwise(packed.scales, packed.nested_scales.view(torch.float32), NESTED_BLOCK) + packed.nested_offset.view(
        torch.float32
    )


def dequantize(packed: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """The weight again, `[*shape]` in `dtype` (default: the source dtype): one fp32 product, then one rounding."""
    codes = torch.stack([packed.codes >> 4, packed.codes & 15], dim=-1).view(-1)[: packed.numel]
    levels = nf4.LEVELS.to(codes.device)[codes.int()]
    scales = scales_of(packed).repeat_interleave(packed.format.block)[: packed.numel]
    return (levels * scales).to(dtype or packed.dtype).view(packed.shape)
