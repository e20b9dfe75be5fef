"""int4: 16 evenly spaced levels a group of weights along K, the last group of a row short when K is no multiple of the block.

Four kinds of zero, two decoding rules (fp32):

    none   (q - 8) * s    s = max|x| / 7, codes 1..15 (the QLoRA paper's Int4; a foreign file may also use code 0)
    int    (q - z) * s    s = (max - min) / 15 over the group and 0, z a whole number in 0..15: 0 is exact
    float  (q - z) * s    s = (max - min) / 15, z = -min / s
    min    q * s + m      s = (max - min) / 15, m = min

Why along K and not over the flat tensor: GPTQ, AWQ, HQQ and GGUF files all do, and are repacked into this losslessly.
Cost: 4 + 32 / block bits a weight, twice the 32 with a zero point; errors in docs/concepts/formats.md.

Letters: N = rows, K = columns, B = block, G = ceil(K / B) groups a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.formats.packed import Zero
from halfbyte.formats.packing import pack_nibbles, unpack_nibbles
from halfbyte.formats.tiling import matrix_tiles

MIDDLE = 8
"""The code of 0 in the symmetric form."""


def encode(weight: Tensor, block: int, zero: Zero) -> tuple[Tensor, Tensor, Tensor]:
    """`weight` `[N, K]` to bytes uint8 `[N, ceil(K/2)]`, scales fp32 `[N, G]`, zeros fp32 `[N, G]` (symmetric: `[0]`).

    A group that holds a value that is not finite gets a scale that is not finite: callers check.
    """
    rows, columns = weight.shape
    groups = -(-columns // block)
    data = torch.empty(rows, -(-columns // 2), dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, groups, dtype=torch.float32, device=weight.device)
    zeros = torch.empty((0,) if zero == "none" else (rows, groups), dtype=torch.float32, device=weight.device)
    for row, column in matrix_tiles(rows, columns, block, weight.device):
        x_NGB = _groups_of(weight[row, column].to(torch.float32), block)
        group = slice(column.start // block, -(-column.stop // block))
        codes, scales[row, group], z = _encode_groups(x_NGB, zero)
        if z is not None:
            zeros[row, group] = z
        codes = codes.to(torch.uint8).flatten(1)[:, : column.stop - column.start]
        data[row, column.start // 2 : -(-column.stop // 2)] = pack_nibbles(codes)
    return data, scales, zeros


def decode(data: Tensor, scales: Tensor, zeros: Tensor, block: int, zero: Zero, out: Tensor) -> None:
    """Writes the decoded weight into `out` `[N, K]` of any float dtype; shapes as `encode` returns them."""
    for row, column in matrix_tiles(out.shape[0], out.shape[1], block, data.device):
        width = column.stop - column.start
        q = unpack_nibbles(data[row, column.start // 2 : -(-column.stop // 2)], width).to(torch.float32)
        group = slice(column.start // block, -(-column.stop // block))
        s = scales[row, group].repeat_interleave(block, 1)[:, :width]
        if zero == "none":
            out[row, column] = (q - MIDDLE) * s
            continue
        z = zeros[row, group].repeat_interleave(block, 1)[:, :width]
        out[row, column] = q * s + z if zero == "min" else (q - z) * s


def _encode_groups(x: Tensor, zero: Zero) -> tuple[Tensor, Tensor, Tensor | None]:
    """fp32 `[N, G, B]` to codes `[N, G, B]` in fp32, scales `[N, G]` and zeros `[N, G]` (None when symmetric)."""
    if zero == "none":
        s = x.abs().amax(2) / 7
        return _steps(x, s).clamp_(-7, 7).add_(MIDDLE), s, None
    low, high = x.amin(2), x.amax(2)
    if zero == "int":
        low, high = low.clamp(max=0), high.clamp(min=0)
        s = (high - low) / 15
        z = _steps(low.neg(), s)
        return _steps(x, s).add_(z[..., None]).clamp_(0, 15), s, z
    s = (high - low) / 15
    codes = _steps(x - low[..., None], s).clamp_(0, 15)
    if zero == "min":
        return codes, s, low
    # A constant group has no step: with a step of 1, z = -min alone says its value, exactly.
    s = s.where(s > 0, 1.0).where(torch.isfinite(s), s)
    return codes, s, -low / s


def _steps(x: Tensor, s: Tensor) -> Tensor:
    """x in whole steps of s, halves to even; 0 where the step is 0."""
    s = s.where(s > 0, float("inf"))
    return (x / (s if x.dim() == s.dim() else s[..., None])).round_()


def _groups_of(x: Tensor, block: int) -> Tensor:
    """`[N, K]` as `[N, G, B]`; a short last group is filled up with the row's last value, which moves no min and no max."""
    missing = -x.shape[1] % block
    if missing:
        x = torch.cat([x, x[:, -1:].expand(-1, missing)], 1)
    return x.view(x.shape[0], -1, block)
