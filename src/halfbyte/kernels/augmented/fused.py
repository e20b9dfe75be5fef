"""The Triton twin: all of S in one launch, whatever the number of members.

The programs of a launch are, in this order: tiles of weights, tiles of s*B, tiles of A. A table on the device, 16 int64 a member,
tells them addresses and places; it is rebuilt when a tensor has moved, so a step pays a comparison of addresses, an allocation and
a launch. Tiles of weights are those of `dequantize/words.py`, bit for bit.
What does not fit (a width that is no multiple of 8, int8, dense members, formats unlike the first one) is written member by
member, by launches of its own; adapters of mixed dtypes or strides are written by the reference.

Letters: N = rows of W, K = width, R = padded rank, as in the package.
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.formats.packed import Packed
from halfbyte.kernels.augmented import reference
from halfbyte.kernels.dequantize.levels import nested_levels
from halfbyte.kernels.dequantize.words import INTERPRETED, Tiling, columns_of_tile, decode_tile, suits, table, tiling_of, to_dtype

if TYPE_CHECKING:
    from halfbyte.kernels.augmented import Group
    from halfbyte.kernels.lora_linear.members import LowRank

MASTERS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
A_WIDTH = 2048
"""Elements of a tile of A, all of one row."""
B_TILE = 2048
"""Elements of a tile of s*B, whole rows of R."""

# Fields of a member's entry in the table. The first seven are addresses: of the five stored tensors, A and B.
_FIELDS = tl.constexpr(16)
_A, _B = tl.constexpr(5), tl.constexpr(6)
_FIRST_ROW, _ROWS, _FIRST_RANK, _RANK, _SCALE = (tl.constexpr(i) for i in range(7, 12))
_FIRST_TILE, _FIRST_B_TILE = tl.constexpr(12), tl.constexpr(13)


@triton.jit
def _entry(members, tile, field, MEMBERS: tl.constexpr):
    """The entry of the member that a tile belongs to: the last that begins at or before it."""
    which = 0
    for m in tl.static_range(1, MEMBERS):
        which = tl.where(tile >= tl.load(members + m * _FIELDS + field), m, which)
    return members + which * _FIELDS


@triton.jit
def _write_b(
    out, members, tile, K, R, stride,
    MEMBERS: tl.constexpr, MASTER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one member's s*B, zeros in the columns of the others."""
    entry = _entry(members, tile, _FIRST_B_TILE, MEMBERS)
    b = tl.load(entry + _B).to(tl.pointer_type(MASTER))
    first, rank = tl.load(entry + _FIRST_RANK).to(tl.int32), tl.load(entry + _RANK).to(tl.int32)
    s = tl.load(entry + _SCALE).to(tl.int32).to(tl.float32, bitcast=True)
    row0 = (tile - tl.load(entry + _FIRST_B_TILE)) * ROWS
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    alive = row < tl.load(entry + _ROWS) - row0
    own = alive & (column >= first) & (column < first + rank)
    values = tl.load(b + row0 * rank + (row * rank + column - first), mask=own, other=0.0).to(tl.float32) * s
    target = out + (tl.load(entry + _FIRST_ROW) + row0) * stride + K + (row * stride + column)
    tl.store(target, to_dtype(values, out.dtype.element_ty, INTERPRETED), mask=alive & (column < R))


@triton.jit
def _write_a(
    out, members, tile, N, K, stride,
    MEMBERS: tl.constexpr, MASTER: tl.constexpr, WIDTH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """WIDTH elements of one row below W: those of the member whose it is, or zeros."""
    tiles = tl.cdiv(K, WIDTH)
    line = (tile // tiles).to(tl.int64)
    # A matrix of one row: vectors of a length that tiles of W have too would tie their layouts to these ones'.
    k = tile % tiles * WIDTH + tl.arange(WIDTH, 2 * WIDTH)[None, :] - WIDTH
    address, within, found = tl.load(members + _A), line, 0
    for m in tl.static_range(MEMBERS):
        entry = members + m * _FIELDS
        first, rank = tl.load(entry + _FIRST_RANK), tl.load(entry + _RANK)
        if (line >= first) & (line < first + rank):
            address, within, found = tl.load(entry + _A), line - first, 1
    a = address.to(tl.pointer_type(MASTER))
    values = tl.load(a + within * K + k, mask=(k < K) & (found == 1), other=0.0).to(tl.float32)
    tl.store(out + (N + line) * stride + k, to_dtype(values, out.dtype.element_ty, INTERPRETED), mask=k < K)


@triton.jit
def _write_w(
    out, members, tile, table, nested_levels, K, tiles, stride,
    MEMBERS: tl.constexpr, ZERO: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EVEN: tl.constexpr, LOOKUP: tl.constexpr, POLICY: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of one member's weight."""
    entry = _entry(members, tile, _FIRST_TILE, MEMBERS)
    inside = (tile - tl.load(entry + _FIRST_TILE)).to(tl.uint32)
    row_tile = inside // tiles.to(tl.uint32)
    row = row_tile.to(tl.int64) * ROWS
    column = (inside - row_tile * tiles.to(tl.uint32)).to(tl.int32) * COLUMNS
    scale_dtype: tl.constexpr = tl.uint8 if NESTED else tl.float32
    decode_tile(
        out + (tl.load(entry + _FIRST_ROW) + row) * stride + column,
        tl.load(entry).to(tl.pointer_type(tl.int32)),
        tl.load(entry + 1).to(tl.pointer_type(scale_dtype)),
        tl.load(entry + 2).to(tl.pointer_type(tl.float32)),
        tl.load(entry + 3).to(tl.pointer_type(tl.float32)),
        tl.load(entry + 4).to(tl.pointer_type(tl.float32)),
        table, nested_levels, row * K + column, K, stride, tl.minimum(tl.load(entry + _ROWS) - row, ROWS).to(tl.int32), K - column,
        ZERO, NESTED, BLOCK, ROWS, COLUMNS, EVEN, LOOKUP, POLICY, INTERPRETED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "K", "R", "tiles", "b_tiles", "w_tiles"])
def _augmented(
    out, members, table, nested_levels, N, K, R, tiles, b_tiles, w_tiles,
    MEMBERS: tl.constexpr, ALIGNED: tl.constexpr, MASTER: tl.constexpr, A_WIDTH: tl.constexpr, B_ROWS: tl.constexpr,
    B_COLUMNS: tl.constexpr, ZERO: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EVEN: tl.constexpr, LOOKUP: tl.constexpr, POLICY: tl.constexpr, DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One tile a program. tiles: of W, a row. w_tiles: of W; 0 where W is not wanted."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    # Said to the compiler, for stores of 16 bytes.
    if ALIGNED:
        K = K // 8 * 8
    R = R // 16 * 16
    stride = K + R
    # The small tiles come last: they even out the end of the launch.
    if program < w_tiles:
        _write_w(
            out, members, program, table, nested_levels, K, tiles, stride,
            MEMBERS, ZERO, NESTED, BLOCK, ROWS, COLUMNS, EVEN, LOOKUP, POLICY, INTERPRETED,
        )  # fmt: skip
    elif program < w_tiles + b_tiles:
        _write_b(out, members, program - w_tiles, K, R, stride, MEMBERS, MASTER, B_ROWS, B_COLUMNS, INTERPRETED)
    else:
        _write_a(out, members, program - w_tiles - b_tiles, N, K, stride, MEMBERS, MASTER, A_WIDTH, INTERPRETED)


class Plan:
    """What a launch for one group needs, as long as its tensors stay where they are."""

    __slots__ = ("_constants", "_numbers", "_options", "_runs", "_slow", "_small_tiles", "_tables", "_tensors", "_w_tiles",
                 "_where", "reference_adapters")  # fmt: skip

    def __init__(self, group: Group, tiling: Tiling | None = None) -> None:
        loras = [m.lora for m in group.members if m.lora is not None]
        self.reference_adapters = not _uniform(loras)
        self._tensors = [t for m in group.members if isinstance(m.weight, Packed) for t in m.weight.tensors()]
        self._tensors += [t for lora in loras for t in (lora.a, lora.b)]
        self._where = [t.data_ptr() for t in self._tensors]
        fast = [isinstance(m.weight, Packed) and _fits(m.weight, group.width) for m in group.members]
        formats = [m.weight.format for m, yes in zip(group.members, fast, strict=True) if yes and isinstance(m.weight, Packed)]
        fast = [yes and m.weight.format == formats[0] for m, yes in zip(group.members, fast, strict=True)]  # type: ignore[union-attr]
        self._slow = [(m.weight, rows) for m, rows, yes in zip(group.members, group.row_slices, fast, strict=True) if not yes]
        self._build(group, fast, loras, tiling or tiling_of(formats[0] if formats else None, str(group.device)))

    def _build(self, group: Group, fast: list[bool], loras: list[LowRank], tiling: Tiling) -> None:
        rank = 0 if self.reference_adapters else group.rank
        columns = columns_of_tile(group.width, tiling.columns)
        b_columns = triton.next_power_of_2(max(rank, 1))
        tile_rows, b_rows = max(tiling.weights // columns, 1), max(B_TILE // b_columns, 1)
        tiles = triton.cdiv(group.width, columns)
        entries, w_tiles, b_tiles = [], 0, 0
        for m, rows, ranks, yes in zip(group.members, group.row_slices, group.rank_slices, fast, strict=True):
            count = rows.stop - rows.start
            stored = [t.data_ptr() for t in m.weight.tensors()] if isinstance(m.weight, Packed) else [0] * 5
            adapter = [0, 0] if m.lora is None else [m.lora.a.data_ptr(), m.lora.b.data_ptr()]
            place = [rows.start, count, 0 if ranks is None else ranks.start, 0 if m.lora is None else m.lora.a.shape[0]]
            scale = 0 if m.lora is None else struct.unpack("<i", struct.pack("<f", m.lora.scale))[0]
            entries.append([*stored, *adapter, *place, scale, w_tiles, b_tiles, 0, 0])
            w_tiles += triton.cdiv(count, tile_rows) * tiles if yes else 0
            b_tiles += triton.cdiv(count, b_rows) if rank else 0
        a_tiles = rank * triton.cdiv(group.width, A_WIDTH)
        packed = next((m.weight for m, yes in zip(group.members, fast, strict=True) if yes), None)
        device = group.device
        levels = nested_levels(str(device))
        fmt = packed.format if isinstance(packed, Packed) else None
        entry_table = torch.tensor(entries, dtype=torch.int64).to(device)
        self._tables = (entry_table, levels if fmt is None else table(fmt, str(device)), levels)
        self._numbers = (group.rows, group.width, group.rank, tiles, b_tiles)  # fmt: skip
        self._constants = {
            "MEMBERS": len(entries), "ALIGNED": group.width % 8 == 0, "MASTER": MASTERS[loras[0].a.dtype] if rank else tl.float32,
            "A_WIDTH": A_WIDTH, "B_ROWS": b_rows, "B_COLUMNS": b_columns,
            "ZERO": fmt.zero if fmt else "none", "NESTED": fmt is not None and fmt.nested, "BLOCK": fmt.block if fmt else 64,
            "ROWS": tile_rows, "COLUMNS": columns, "EVEN": group.width % columns == 0,
            "LOOKUP": tiling.lookup, "POLICY": tiling.policy, "DEPENDENT": tiling.dependent, "INTERPRETED": INTERPRETED,
        }  # fmt: skip
        self._options: dict[str, Any] = {"num_warps": tiling.warps, "enable_fp_fusion": False}
        if tiling.dependent:
            self._options["launch_pdl"] = True
        self._small_tiles, self._w_tiles = b_tiles + a_tiles, w_tiles
        self._runs: dict[tuple[torch.dtype, bool], tuple[Any, tuple[Any, ...]]] = {}

    def fits(self) -> bool:
        """Whether every tensor still is where it was."""
        return [t.data_ptr() for t in self._tensors] == self._where

    def launch(self, out: Tensor, weights: bool) -> None:
        """The one launch; a second of its kind goes straight to the compiled kernel (Triton's look-up takes 30 us and more)."""
        known = self._runs.get((out.dtype, weights))
        if known is not None:
            known[0](out.data_ptr(), *known[1])
        else:
            self._first_launch(out, weights)
        if weights and self._slow:
            self._write_slow(out)

    def _first_launch(self, out: Tensor, weights: bool) -> None:
        w_tiles = self._w_tiles if weights else 0
        if not w_tiles + self._small_tiles:
            return
        grid = (w_tiles + self._small_tiles, 1, 1)
        compiled = _augmented[grid](out, *self._tables, *self._numbers, w_tiles, **self._constants, **self._options)
        if compiled is not None:
            # Addresses in place of tensors: the launcher would ask the driver about each.
            addresses = [t.data_ptr() for t in self._tables]
            self._runs[out.dtype, weights] = (compiled[grid], (*addresses, *self._numbers, w_tiles, *self._constants.values()))

    def _write_slow(self, out: Tensor) -> None:
        width = self._numbers[1]
        for weight, rows in self._slow:
            reference.write_weight(weight, out[rows, :width])


def _uniform(loras: list[LowRank]) -> bool:
    """Whether one launch can read all masters: one known dtype, rows without gaps."""
    tensors = [t for lora in loras for t in (lora.a, lora.b)]
    return all(t.dtype == tensors[0].dtype and t.dtype in MASTERS and t.is_contiguous() for t in tensors)


def _fits(weight: Packed, width: int) -> bool:
    aligned = weight.scales.data_ptr() % 4 == 0 or weight.format.nested
    return suits(weight.format, width) and aligned and weight.codes.data_ptr() % 4 == 0


def write(group: Group, out: Tensor, weights: bool) -> None:
    """W (if `weights`), s*B and A into `out` `[N + R, K + R]`, contiguous."""
    plan = group.plan
    if not isinstance(plan, Plan) or not plan.fits():
        plan = group.plan = Plan(group)
    plan.launch(out, weights)
    if plan.reference_adapters:
        reference.write_adapters(group, out)
