"""Nibble packing: two 4-bit codes a byte, the first element in the HIGH nibble (the byte order of bitsandbytes).

Why high first: existing `*-bnb-4bit` checkpoints are read without touching a byte. Cost: none; both directions are one
pass over the bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor, pad: int = 0) -> Tensor:
    """Codes uint8 `[..., k]`, each below 16, to bytes uint8 `[..., ceil(k/2)]`; an odd k leaves `pad` in the last low nibble."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=pad)
    return codes[..., 0::2] << 4 | codes[..., 1::2]


def unpack_nibbles(data: Tensor, k: int) -> Tensor:
    """The inverse: bytes uint8 `[..., ceil(k/2)]` to codes uint8 `[..., k]`."""
    return torch.stack([data >> 4, data & 15], dim=-1).flatten(-2)[..., :k]
