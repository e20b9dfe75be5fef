"""Dynamic 8-bit maps: signed and unsigned floats with a moving number of exponent bits (arXiv 2110.02861, section 2.1).

Why: seven decades in one byte, finest where it is largest: for values whose size varies, such as scales and optimizer
states. Level k of a decade 10^(i-6) is the middle of one of 2^i (unsigned 2^(i+1)) equal parts of [0.1, 1].
The signed map has a quirk that files depend on: its largest level is 1, its smallest -0.99297.

The levels are computed in numpy, operation by operation as the published files had them, and not with `torch.linspace`,
whose last bit depends on the version and whose dtype on a global default; a test holds their SHA-256.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from halfbyte.formats.codebook import blocks_of
from halfbyte.formats.tiling import flat_tiles


def _levels(signed: bool) -> Tensor:
    levels = [0.0, 1.0]
    tenth = np.float32(0.1)
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        step = np.float32((np.float32(1) - tenth) / np.float32(parts))
        k = np.arange(parts + 1)
        # The second half counts down from 1. Products and sums in float64, rounded once: what a fused multiply-add gives.
        up, down = float(tenth) + float(step) * k, 1.0 - float(step) * (parts - k)
        edges = np.where(k < (parts + 1) // 2, up, down).astype(np.float32)
        middles = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        levels += middles.tolist()
        if signed:
            levels += (-middles).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32, device="cpu")


SIGNED = _levels(True)
UNSIGNED = _levels(False)


def dynamic_map(signed: bool) -> Tensor:
    """The 256 levels, fp32, ascending, on the CPU. Shared: do not write to it."""
    return SIGNED if signed else UNSIGNED


def quantize_blockwise(x: Tensor, block: int, *, signed: bool = True) -> tuple[Tensor, Tensor]:
    """`[n]` to codes uint8 `[n]` and scales fp32 `[ceil(n/block)]`; the level nearest to x / max|x|, ties to the lower one.

    An all-zero block gets scale 0 and the code of 0. Not finite input gives a scale that is not finite: callers check.
    """
    n = x.numel()
    codes = torch.empty(n, dtype=torch.uint8, device=x.device)
    scales = torch.empty(-(-n // block), dtype=torch.float32, device=x.device)
    levels = dynamic_map(signed).to(x.device)
    thresholds = (levels[1:] + levels[:-1]) * 0.5
    for span in flat_tiles(n, block, x.device):
        blocks = blocks_of(x[span].to(torch.float32), block)
        absmax = blocks.abs().amax(1)
        scales[span.start // block : -(-span.stop // block)] = absmax
        scaled = (blocks / absmax.where(absmax > 0, 1.0)[:, None]).view(-1)[: span.stop - span.start]
        codes[span] = torch.bucketize(scaled, thresholds, out_int32=True).to(torch.uint8)
    return codes, scales


def dequantize_blockwise(codes: Tensor, scales: Tensor, block: int, *, signed: bool = True) -> Tensor:
    """The inverse: fp32 `[n]`, `level * scale`. Loss on N(0, 1) in blocks of 256: relative Frobenius error 0.015."""
    out = torch.empty(codes.numel(), dtype=torch.float32, device=codes.device)
    levels = dynamic_map(signed).to(codes.device)
    for span in flat_tiles(codes.numel(), block, codes.device):
        values = blocks_of(levels[codes[span].int()], block) * scales[span.start // block : -(-span.stop // block), None]
        out[span] = values.view(-1)[: span.stop - span.start]
    return out
