"""Codebook formats (nf4, fp4): 16 levels, one fp32 scale a block of consecutive elements of the FLAT tensor.

    scale = max |x| over the block;  code = the level nearest to x / scale;  decoded = level * scale (fp32, then one rounding)

Why the flat tensor: it is bitsandbytes' layout, so blocks cross rows when K is no multiple of the block; any shape is
accepted. What differs from bitsandbytes, on purpose: an all-zero block gets the code of 0 (its CUDA encoder writes -1, which
nested scales then turn into a constant), a denormal block is quantised rather than flushed, NaN and inf are errors.

Letters: n = elements, B = block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.formats.packing import pack_nibbles
from halfbyte.formats.tiling import flat_tiles

CELLS = 64
"""Equal cells over [-1, 1]; no two thresholds of a codebook share one."""


@dataclass(frozen=True)
class Codebook:
    """levels: fp32 [16], by code. thresholds: fp32, ascending; x above the i-th passes to rank i+1, a tie stays below.

    signed_magnitude: thresholds and `codes` rank |x|, and bit 3 is the sign (fp4); otherwise they rank x itself (nf4).
    codes: the code of each rank. zero: the code that decodes to 0.
    """

    levels: Tensor
    thresholds: Tensor
    codes: tuple[int, ...]
    signed_magnitude: bool
    zero: int

    def nearest(self, x: Tensor, cells: Cells) -> Tensor:
        """Codes uint8 of fp32 values `[n]` in [-1, 1], given `self.cells(device)`; NaN gets any code."""
        value = x.abs() if self.signed_magnitude else x
        cell = _cell(value)
        rank = cells.rank.index_select(0, cell).add_((value > cells.bound.index_select(0, cell)).view(torch.uint8))
        if not self.signed_magnitude:
            return rank
        # A negative that rounds to zero takes the plain zero code, so that no -0.0 is ever written.
        return cells.codes.index_select(0, rank.int()) | ((x < 0) & (rank > 0)).to(torch.uint8) << 3

    def cells(self, device: torch.device) -> Cells:
        """The tables of `nearest` on a device."""
        homes = _cell(self.thresholds).tolist()
        assert len(set(homes)) == len(homes)
        bound = torch.full((CELLS + 1,), float("inf"), dtype=torch.float32, device="cpu")
        bound[homes] = self.thresholds
        rank = [sum(home < cell for home in homes) for cell in range(CELLS + 1)]
        small = [torch.tensor(table, dtype=torch.uint8, device="cpu").to(device) for table in (rank, self.codes)]
        return Cells(bound.to(device), *small)


@dataclass(frozen=True)
class Cells:
    """bound: fp32, the threshold inside each cell, or inf. rank: uint8, thresholds in the cells before it. codes: uint8, by rank.

    Why: a search by table lookup costs a CPU 2 ns a weight, `torch.bucketize` 21 (one thread). It is exact: the cell is a
    monotone function of x, so only the threshold in x's own cell is in doubt.
    """

    bound: Tensor
    rank: Tensor
    codes: Tensor


def _cell(x: Tensor) -> Tensor:
    return ((x + 1) * (CELLS // 2)).to(torch.int32).clamp_(0, CELLS)


def encode(weight: Tensor, block: int, book: Codebook) -> tuple[Tensor, Tensor]:
    """`weight`, any shape, to bytes uint8 `[ceil(n/2)]` and scales fp32 `[ceil(n/B)]` (not finite where an input is not)."""
    flat = weight.reshape(-1)
    cells = book.cells(flat.device)
    n = flat.numel()
    data = torch.empty(-(-n // 2), dtype=torch.uint8, device=flat.device)
    scales = torch.empty(-(-n // block), dtype=torch.float32, device=flat.device)
    for span in flat_tiles(n, block, flat.device):
        x_BB = blocks_of(flat[span].to(torch.float32), block)
        absmax = x_BB.abs().amax(1)
        scales[span.start // block : -(-span.stop // block)] = absmax
        scaled = (x_BB / absmax.where(absmax > 0, 1.0)[:, None]).view(-1)[: span.stop - span.start]
        data[span.start // 2 : -(-span.stop // 2)] = pack_nibbles(book.nearest(scaled, cells), pad=book.zero)
    return data, scales


def decode(data: Tensor, scales: Tensor, block: int, book: Codebook, out: Tensor) -> None:
    """Writes the decoded weight into `out` `[n]` of any float dtype: one fp32 product, then one rounding."""
    # Both nibbles of a byte are looked up at once: byte b holds the levels of b >> 4 and b & 15.
    pairs = torch.stack([book.levels.repeat_interleave(16), book.levels.repeat(16)], dim=1).to(data.device)  # [256, 2]
    for span in flat_tiles(out.numel(), block, data.device):
        levels = pairs.index_select(0, data[span.start // 2 : -(-span.stop // 2)].int()).view(-1)[: span.stop - span.start]
        values = blocks_of(levels, block) * scales[span.start // block : -(-span.stop // block), None]
        out[span] = values.view(-1)[: span.stop - span.start]


def blocks_of(x: Tensor, block: int) -> Tensor:
    """`[n]` as `[ceil(n/B), B]`, the last block filled up with zeros (a copy only then)."""
    missing = -x.numel() % block
    return (torch.nn.functional.pad(x, (0, missing)) if missing else x).view(-1, block)
