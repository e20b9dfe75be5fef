"""The reference: S written down part by part. What a twin must equal bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from halfbyte.formats.packed import Packed
from halfbyte.kernels.dequantize import decode

if TYPE_CHECKING:
    from halfbyte.kernels.augmented import Group


def write_weight(weight: Packed | Tensor, out: Tensor) -> None:
    """A member's weight into its rows `[N_i, K]` of S."""
    out.copy_(decode(weight, out.dtype) if isinstance(weight, Packed) else weight.detach())


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


def write(group: Group, out: Tensor, weights: bool) -> None:
    """W (if `weights`), s*B and A into `out` `[N + R, K + R]`."""
    if weights:
        for m, rows in zip(group.members, group.row_slices, strict=True):
            write_weight(m.weight, out[rows, : group.width])
    write_adapters(group, out)
