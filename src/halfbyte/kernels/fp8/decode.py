"""The Triton twin of decoding straight to e4m3, as stored or transposed: a launch for a group's adapters, one for its weights.

How: 64 weights share a scale, so a thread first makes the 16 bytes that its codes can become (16 products, 8 conversions), four
registers; a byte permutation then looks four codes up at once (`prmt`, 2 instructions a weight in all). Transposed, four rows are
looked up side by side and their 4 x 4 bytes are turned in registers, so that only whole words go through shared memory.
Bound: copy speed, 0.516 bytes read and 1 written a weight. Offsets are int64.

Letters: N = rows of all members, K = width, R = ranks (padded), span = neighbouring weights that share a factor.
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.formats.packed import NESTED_BLOCK, Packed
from halfbyte.formats.quantize import BOOKS
from halfbyte.kernels.dequantize import decode as decode_any
from halfbyte.kernels.dequantize.fused import INTERPRETED
from halfbyte.kernels.dequantize.levels import levels, nested_levels
from halfbyte.kernels.fp8 import fused
from halfbyte.kernels.fp8.parts import Plan, Weight
from halfbyte.kernels.fp8.rounding import to_bits

if TYPE_CHECKING:
    from halfbyte.kernels.augmented import Group

DENSE = 64
"""Rows and columns of a dense weight's tile."""
FIELDS = 8
"""Entries a member in the table of weights."""

# Bytes of eight codes in order: the nibbles of each byte change places, then four codes at a time choose a byte of eight, twice,
# and their high bits choose between the two.
LOOK_UP = tl.constexpr(
    """{
.reg .b32 a, b, x, s, m;
and.b32 a, $2, 0x0f0f0f0f;
shl.b32 a, a, 4;
shr.u32 b, $2, 4;
and.b32 b, b, 0x0f0f0f0f;
or.b32 x, a, b;
and.b32 s, x, 0x7777;
prmt.b32 a, $3, $4, s;
prmt.b32 b, $5, $6, s;
shr.u32 m, x, 1;
and.b32 m, m, 0x4444;
or.b32 m, m, 0x3210;
prmt.b32 $0, a, b, m;
shr.u32 x, x, 16;
and.b32 s, x, 0x7777;
prmt.b32 a, $3, $4, s;
prmt.b32 b, $5, $6, s;
shr.u32 m, x, 1;
and.b32 m, m, 0x4444;
or.b32 m, m, 0x3210;
prmt.b32 $1, a, b, m;
}"""
)
TURN = tl.constexpr(
    """{
.reg .b32 a, b, c, d;
prmt.b32 a, $4, $5, 0x5140;
prmt.b32 b, $6, $7, 0x5140;
prmt.b32 c, $4, $5, 0x7362;
prmt.b32 d, $6, $7, 0x7362;
prmt.b32 $0, a, b, 0x5410;
prmt.b32 $1, a, b, 0x7632;
prmt.b32 $2, c, d, 0x5410;
prmt.b32 $3, c, d, 0x7632;
}"""
)


@functools.cache
def table_asm(kind: str) -> str:
    """PTX: the 16 levels times $4, rounded to e4m3, in the four words $0 to $3."""
    bits = [struct.unpack("<I", struct.pack("<f", x))[0] for x in BOOKS[kind].levels.tolist()]
    lines = [".reg .f32 v<16>;", ".reg .b16 h<8>;"]
    lines += [f"mul.rn.f32 v{i}, $4, 0f{b:08X};" for i, b in enumerate(bits)]
    lines += [f"cvt.rn.satfinite.e4m3x2.f32 h{i}, v{2 * i + 1}, v{2 * i};" for i in range(8)]
    lines += [f"mov.b32 ${i}, {{h{2 * i}, h{2 * i + 1}}};" for i in range(4)]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.jit
def _scale(
    scales, nested_scales, nested_offset, nested_levels, index, mask, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr
):  # fmt: skip
    """fp32 scales of blocks: stored so, or level(code) * scale2 + offset (two roundings)."""
    if NESTED:
        code = tl.load(scales.to(tl.pointer_type(tl.uint8)) + index, mask=mask, other=0).to(tl.int32)
        outer = tl.load(nested_scales.to(tl.pointer_type(tl.float32)) + index // NESTED_BLOCK, mask=mask, other=0.0)
        return tl.load(nested_levels + code) * outer + tl.load(nested_offset.to(tl.pointer_type(tl.float32)))
    else:
        return tl.load(scales.to(tl.pointer_type(tl.float32)) + index, mask=mask, other=0.0)


@triton.jit
def _four(words, f, table, SHIFT: tl.constexpr, INTERPRETED: tl.constexpr):
    """The plain form of a look-up: codes SHIFT.. of every word, as four bytes in a word."""
    found = words.to(tl.uint32) * 0
    for i in tl.static_range(4):
        nibble = SHIFT + 8 * (i // 2) + (4 if i % 2 == 0 else 0)
        level = tl.load(table + ((words.to(tl.uint32) >> nibble) & 15).to(tl.int32))
        found = found | (to_bits(level * f, INTERPRETED).to(tl.uint32) << (8 * i))
    return found.to(tl.int32, bitcast=True)


@triton.jit
def _bytes(words, f, table, TABLE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Words of eight codes, and the factor of each (it broadcasts), to two words of four e4m3."""
    if INTERPRETED:
        return _four(words, f, table, 0, INTERPRETED), _four(words, f, table, 16, INTERPRETED)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            TABLE, "=r,=r,=r,=r,f", [f], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )
        return tl.inline_asm_elementwise(
            LOOK_UP, "=r,=r,r,r,r,r,r", [words, a, b, c, d], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )


@triton.jit
def _turned(a, b, c, d, INTERPRETED: tl.constexpr):
    """The bytes of four words as a 4 x 4 matrix, transposed."""
    if INTERPRETED:
        rows = (a.to(tl.uint32), b.to(tl.uint32), c.to(tl.uint32), d.to(tl.uint32))
        w = (rows[0] * 0, rows[0] * 0, rows[0] * 0, rows[0] * 0)
        w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
        for j in tl.static_range(4):
            w0 = w0 | ((rows[j] & 255) << (8 * j))
            w1 = w1 | (((rows[j] >> 8) & 255) << (8 * j))
            w2 = w2 | (((rows[j] >> 16) & 255) << (8 * j))
            w3 = w3 | ((rows[j] >> 24) << (8 * j))
        return w0.to(tl.int32), w1.to(tl.int32), w2.to(tl.int32), w3.to(tl.int32)
    else:
        return tl.inline_asm_elementwise(
            TURN, "=r,=r,=r,=r,r,r,r,r", [a, b, c, d], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )


@triton.jit
def _member(where, pid, COUNT: tl.constexpr, FIELDS: tl.constexpr):
    """The entry of the member that program `pid` works for."""
    member = 0
    for i in tl.static_range(1, COUNT):
        member += (pid >= tl.load(where + i * FIELDS)).to(tl.int32)
    return where + member * FIELDS


@triton.jit
def _stored(
    out, inverse, changed, where, nested_levels, table, stride16, spans,
    COUNT: tl.constexpr, FIELDS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, UNITS: tl.constexpr, TABLE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """UNITS spans of a member to e4m3 rows. out: words; changed: None, or rows that are there already are 0; stride16: row length
    in 16 bytes; spans: of a row."""
    pid = tl.program_id(0)
    entry = _member(where, pid, COUNT, FIELDS)
    first = tl.load(entry + 1).to(tl.int32) * 16
    rows = tl.load(entry + 2).to(tl.int32) * 16
    codes = tl.multiple_of(tl.load(entry + 3).to(tl.pointer_type(tl.int32)), 16)
    unit = (pid - tl.load(entry).to(tl.int32)) * UNITS + tl.arange(0, UNITS)
    row = unit // spans
    alive = row < rows
    if changed is not None:  # noqa: SIM102 (the first `if` is the compiler's)
        if tl.max(tl.load(changed + first + row, mask=alive, other=0), 0) == 0:
            return
    s = _scale(
        tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6), nested_levels, unit // (BLOCK // SPAN), alive,
        NESTED, NESTED_BLOCK,
    )  # fmt: skip
    f = s * tl.load(inverse + first + row, mask=alive, other=0.0)
    word = tl.arange(0, SPAN // 8)[None, :]
    w = tl.load(codes + unit.to(tl.int64)[:, None] * (SPAN // 8) + word, mask=alive[:, None], other=0)
    low, high = _bytes(w, f[:, None], table, TABLE, INTERPRETED)
    at = (first + row).to(tl.int64) * (stride16 * 4) + (unit % spans) * (SPAN // 4)
    tl.store(out + at[:, None] + tl.arange(0, SPAN // 4)[None, :], tl.interleave(low, high), mask=alive[:, None])


@triton.jit
def _row(
    codes, scales, nested_scales, nested_offset, nested_levels, table, inverse, row, rows, span, spans,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, TABLE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Spans of rows, `[QUADS, SPANS, SPAN / 8]` words twice. inverse: fp32 `[SPANS]`."""
    mask = (row < rows)[:, None] & (span < spans)[None, :]
    unit = row[:, None] * spans + span[None, :]
    block = unit // (BLOCK // SPAN)
    f = _scale(scales, nested_scales, nested_offset, nested_levels, block, mask, NESTED, NESTED_BLOCK) * inverse[None, :]
    word = tl.arange(0, SPAN // 8)[None, None, :]
    w = tl.load(codes + unit.to(tl.int64)[:, :, None] * (SPAN // 8) + word, mask=mask[:, :, None], other=0)
    return _bytes(w, f[:, :, None], table, TABLE, INTERPRETED)


@triton.jit
def _transposed(
    out, inverse, changed, where, nested_levels, table, stride16, spans, tiles,
    COUNT: tl.constexpr, FIELDS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, QUADS: tl.constexpr, SPANS: tl.constexpr, TABLE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """4 * QUADS rows by SPANS spans of a member, to SPANS * SPAN rows of the transposed weight. tiles: along a row."""
    pid = tl.program_id(0)
    entry = _member(where, pid, COUNT, FIELDS)
    local = pid - tl.load(entry).to(tl.int32)
    span = local % tiles * SPANS + tl.arange(0, SPANS)
    if changed is not None:  # noqa: SIM102
        if tl.max(tl.load(changed + span, mask=span < spans, other=0), 0) == 0:
            return
    first = tl.load(entry + 1).to(tl.int32) * 4
    rows = tl.load(entry + 2).to(tl.int32) * 16
    codes = tl.multiple_of(tl.load(entry + 3).to(tl.pointer_type(tl.int32)), 16)
    scales, nested_scales, nested_offset = tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6)
    quad = local // tiles * QUADS + tl.arange(0, QUADS)
    by = tl.load(inverse + span, mask=span < spans, other=0.0)

    low0, high0 = _row(codes, scales, nested_scales, nested_offset, nested_levels, table, by, quad * 4, rows, span, spans,
                       SPAN, BLOCK, NESTED, NESTED_BLOCK, TABLE, INTERPRETED)  # fmt: skip
    low1, high1 = _row(codes, scales, nested_scales, nested_offset, nested_levels, table, by, quad * 4 + 1, rows, span, spans,
                       SPAN, BLOCK, NESTED, NESTED_BLOCK, TABLE, INTERPRETED)  # fmt: skip
    low2, high2 = _row(codes, scales, nested_scales, nested_offset, nested_levels, table, by, quad * 4 + 2, rows, span, spans,
                       SPAN, BLOCK, NESTED, NESTED_BLOCK, TABLE, INTERPRETED)  # fmt: skip
    low3, high3 = _row(codes, scales, nested_scales, nested_offset, nested_levels, table, by, quad * 4 + 3, rows, span, spans,
                       SPAN, BLOCK, NESTED, NESTED_BLOCK, TABLE, INTERPRETED)  # fmt: skip
    o0, o1, o2, o3 = _turned(low0, low1, low2, low3, INTERPRETED)
    o4, o5, o6, o7 = _turned(high0, high1, high2, high3, INTERPRETED)

    # One tile [QUADS, k], so that it goes through shared memory at once; joining moves nothing.
    first_four = tl.join(tl.join(o0, o1), tl.join(o2, o3))
    last_four = tl.join(tl.join(o4, o5), tl.join(o6, o7))
    tile = tl.permute(tl.join(first_four, last_four), (0, 1, 2, 5, 4, 3)).reshape([QUADS, SPANS * SPAN])
    k = local % tiles * (SPANS * SPAN) + tl.arange(0, SPANS * SPAN)
    at = out + k.to(tl.int64)[None, :] * (stride16 * 4) + (first + quad)[:, None]
    tl.store(at, tile, mask=(quad < tl.load(entry + 2).to(tl.int32) * 4)[:, None] & (k < spans * SPAN)[None, :])


@triton.jit
def _dense(
    out, source, inverse, rows, K, first, stride, source_stride,
    BACK: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """BLOCK x BLOCK weights of a dense matrix `[rows, K]` to e4m3, transposed if BACK. out: bytes."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (k < K)[None, :]
    w = tl.load(source + row[:, None] * source_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    if BACK:
        by = tl.load(inverse + k // SPAN, mask=k < K, other=0.0)
        bits = to_bits(w * by[None, :], INTERPRETED)
        tl.store(out + k.to(tl.int64)[:, None] * stride + (first + row)[None, :], tl.trans(bits), mask=tl.trans(mask))
    else:
        by = tl.load(inverse + first + row, mask=row < rows, other=0.0)
        tl.store(out + (first + row)[:, None] * stride + k[None, :], to_bits(w * by[:, None], INTERPRETED), mask=mask)


@dataclass(frozen=True)
class Shape:
    """How much a program does: weights as stored; transposed 4 * quads rows by `spans` spans; warps of each."""

    tile: int = 8192
    quads: int = 32
    spans: int = 1
    stored_warps: int = 4
    transposed_warps: int = 4


SHAPE = Shape()


@dataclass(frozen=True)
class Tables:
    """int64 `[members, FIELDS]` on the device, of the members that decode straight: first program, first row / 16, rows / 16,
    five addresses; once for weights as stored, once transposed, with the number of programs. adapters: see `fused`."""

    adapters: Tensor
    stored: Tensor
    transposed: Tensor
    programs: tuple[int, int]
    shape: Shape


def _tables(group: Group, plan: Plan, shape: Shape) -> Tables:
    """The plan's tables, made at the first use."""
    found = plan.tables.get(shape)
    if found is None:
        stored, transposed, totals = [], [], [0, 0]
        spans = group.width // plan.span
        for m, rows, is_fast in zip(group.members, group.row_slices, plan.fast, strict=True):
            if is_fast and isinstance(m.weight, Packed):
                height = rows.stop - rows.start
                rest = [rows.start // 16, height // 16, *(t.data_ptr() for t in m.weight.tensors()[:4]), 0]
                stored.append([totals[0], *rest])
                transposed.append([totals[1], *rest])
                totals[0] += -(-height * spans // (shape.tile // plan.span))
                totals[1] += -(-height // (4 * shape.quads)) * -(-spans // shape.spans)
        first, second = (torch.tensor(t, dtype=torch.int64).to(group.device) for t in (stored, transposed))
        found = Tables(fused.adapter_table(group), first, second, (totals[0], totals[1]), shape)
        plan.tables[shape] = found
    assert isinstance(found, Tables)
    return found


def forward_weight(group: Group, plan: Plan, weight: Weight, a: Tensor, shape: Shape = SHAPE) -> None:
    """See `reference.forward_weight`."""
    tables = _tables(group, plan, shape)
    fused.adapters(group, plan, weight, a, tables.adapters, back=False)
    if plan.book is not None:
        device = str(weight.data.device)
        _stored[(tables.programs[0],)](
            weight.data.view(torch.int32), weight.inverse, weight.changed, tables.stored, nested_levels(device),
            levels(plan.book.kind, device),
            weight.data.stride(0) // 16, group.width // plan.span, **_constants(plan),
            UNITS=shape.tile // plan.span, num_warps=shape.stored_warps, enable_fp_fusion=False,
        )  # fmt: skip
    _others(group, plan, weight, back=False)


def backward_weight(group: Group, plan: Plan, weight: Weight, sb: Tensor, shape: Shape = SHAPE) -> None:
    """See `reference.backward_weight`."""
    tables = _tables(group, plan, shape)
    spans = group.width // plan.span
    fused.adapters(group, plan, weight, sb, tables.adapters, back=True)
    if plan.book is not None:
        device = str(weight.data.device)
        _transposed[(tables.programs[1],)](
            weight.data.view(torch.int32), weight.inverse, weight.changed, tables.transposed, nested_levels(device),
            levels(plan.book.kind, device),
            weight.data.stride(0) // 16, spans, -(-spans // shape.spans), **_constants(plan),
            QUADS=shape.quads, SPANS=shape.spans, num_warps=shape.transposed_warps, enable_fp_fusion=False,
        )  # fmt: skip
    _others(group, plan, weight, back=True)


def _constants(plan: Plan) -> dict[str, object]:
    book = plan.book
    assert book is not None
    return {
        "COUNT": sum(plan.fast), "FIELDS": FIELDS, "SPAN": plan.span, "BLOCK": book.block, "NESTED": book.nested,
        "NESTED_BLOCK": NESTED_BLOCK, "TABLE": table_asm(book.kind), "INTERPRETED": INTERPRETED,
    }  # fmt: skip


def _others(group: Group, plan: Plan, weight: Weight, back: bool) -> None:
    """Members of other formats, one by one by way of bf16."""
    for m, rows, is_fast in zip(group.members, group.row_slices, plan.fast, strict=True):
        if not is_fast:
            dense = decode_any(m.weight, torch.bfloat16) if isinstance(m.weight, Packed) else m.weight.detach()
            height, width = dense.shape
            _dense[(triton.cdiv(height, DENSE), triton.cdiv(width, DENSE))](
                weight.data.view(torch.uint8), dense, weight.inverse, height, width, rows.start,
                weight.data.stride(0), dense.stride(0),
                BACK=back, SPAN=plan.span, BLOCK=DENSE, INTERPRETED=INTERPRETED, enable_fp_fusion=False,
            )  # fmt: skip
