"""Dynamic 8-bit maps: signed and unsigned floating codes with a moving number of exponent bits (arXiv 2110.02861, section 2.1)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 levels, fp32, ascending."""
    levels: list[float] = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        levels += (10 ** (i - 6) * means).tolist()
        if signed:
            levels += (-(10 ** (i - 6)) * means).tolist()
    return torch.tensor(sorted([*levels, 0.0, 1.0]), dtype=torch.float32)


def quantize_blockwise(x: Tensor, block: int, *, signed: bool = True) -> tuple[Tensor, Tensor]:
    """fp32 `[n]` to codes uint8 `[n]` and scales fp32 `[ceil(n/block)]`; nearest level, ties to the lower one."""
    n = x.numel()
    blocks = -(-n // block)
    padded = torch.nn.functional.pad(x, (0, blocks * block - n)).view(blocks, block)
    absmax = padded.abs().amax(1)
    levels = dynamic_map(signed).to(x.device)
    scaled = padded * (1.0 / absmax.clamp_min(1e-38))[:, None]
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) * 0.5).to(torch.uint8)
    return codes.view(-1)[:n], absmax


def dequantize_blockwise(codes: Tensor, scales: Tensor, block: int, *, signed: bool = True) -> Tensor:
    """The inverse: fp32 `[n]`."""
    levels = dynamic_map(signed).to(codes.device)[codes.int()]
    return levels * scales.repeat_interleave(block)[: codes.numel()]
