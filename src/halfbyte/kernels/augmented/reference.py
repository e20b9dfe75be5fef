"""The reference: S written down part by part. What a twin must equal bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from halfbyte.formats.packed import Packed
from halfbyte.kernels.dequantize import decode

if TYPE_CHECKING:
    from halfbyte.kernels.augmented import Group


def write_weights(group: Group, out: Tensor) -> None:
    """W `[N, K]` into `out[:N, :K]`."""
    for m, rows in zip(group.members, group.row_slices, strict=True):
        weight = decode(m.weight, out.dtype) if isinstance(m.weight, Packed) else m.weight.detach()
        out[rows, : group.width].copy_(weight)


def write_adapters(group: Group, out: Tensor) -> None:
    """s*B into `out[:N, K:]`, A into `out[N:, :K]`."""
    if group.rank == 0:
        return
    beside, below = out[: group.rows, group.width :], out[group.rows :, : group.width]
    beside.zero_()
    below.zero_()
    for m, rows, ranks in zip(group.members, group.row_slices, group.rank_slices, strict=True):
        if m.lora is not None:
            beside[rows, ranks] = (m.lora.scale * m.lora.b.detach().float()).to(out.dtype)
            below[ranks] = m.lora.a.detach().to(out.dtype)
