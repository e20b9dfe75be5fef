"""The Triton twin: one pass over the gradient and a reduction of 1,024 sums for the norm, one pass over everything for the step.

Products and sums are not contracted, quotients and roots are rounded to nearest, so that moments, scales, codes and weights are
the reference's bits. Tiles run from the end of the buffer: what `measure` read last is in the L2 cache and is read first.

8-bit codes are not searched for (eight dependent loads): inside a decade the levels of the dynamic maps are evenly spaced, so the
decade and a product give a code that is the right one or one too low, and one comparison with a threshold decides. Candidates are
taken half a spacing low and no threshold of a decade lies further than 0.2 from a whole number of spacings, so rounding, a
thousandth of that at most, cannot matter.

Letters: n = elements, B = blocks of 256, R = blocks a program.
"""

# Kernels are typed by Triton, whose decorator is not.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.formats.dynamic8 import dynamic_map
from halfbyte.kernels.adamw.parts import BLOCK, LARGEST_PARTS, PARTIALS, Moments, Rule, Scratch
from halfbyte.kernels.dequantize.fused import INTERPRETED

SUM_TILE, SUM_WARPS = 4096, 8
ROWS = {32: 4, 8: 1}
"""R by bits."""
WARPS = {32: 4, 8: 1}


@triton.jit
def _sums(partials, grads, n, TILES: tl.constexpr, TILE: tl.constexpr):
    """Each program adds the squares of TILES tiles, as many apart as there are programs."""
    total = tl.zeros([TILE], tl.float32)
    for i in range(TILES):
        at = (i * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * TILE + tl.arange(0, TILE)
        g = tl.load(grads + at, mask=at < n, other=0.0)
        total += g * g
    tl.store(partials + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _finish(report, scalars, partials, count, logs, loss, scale, largest, PARTIALS: tl.constexpr):
    """The norm and all that follows from it, by one program."""
    s = tl.load(scale)
    at_loss = tl.load(loss).to(tl.float32)
    norm = tl.div_rn(tl.sqrt_rn(tl.sum(tl.load(partials + tl.arange(0, PARTIALS)), 0)), s)
    # NaN compares false with everything, inf is not below inf.
    finite = (norm < float("inf")) & (tl.abs(at_loss) < float("inf"))
    found_inf = tl.where(finite, 0.0, 1.0)
    clipped = tl.minimum(tl.div_rn(largest, norm + 1e-6), 1.0)
    factor = tl.div_rn(tl.where(largest > 0, clipped, 1.0), s)
    t = tl.load(count) + 1.0
    c1 = 1.0 - tl.exp(t.to(tl.float64) * tl.load(logs))
    c2 = 1.0 - tl.exp(t.to(tl.float64) * tl.load(logs + 1))
    tl.store(report, at_loss)
    tl.store(report + 1, norm)
    tl.store(report + 2, found_inf)
    tl.store(report + 3, s)
    tl.store(scalars, factor)
    tl.store(scalars + 1, found_inf)
    tl.store(scalars + 2, (1.0 / c1).to(tl.float32))
    tl.store(scalars + 3, (1.0 / tl.sqrt(c2)).to(tl.float32))
    tl.store(scalars + 4, t)


@triton.jit
def _encode(x, thresholds, SIGNED: tl.constexpr):
    """Codes of x in [-1, 1] (int32); thresholds fp32 `[255]`, the i-th between levels i and i + 1."""
    magnitude = tl.abs(x)
    first: tl.constexpr = 1.0 if SIGNED else 2.0
    spacings = tl.full(x.shape, first, tl.float32)  # levels in the decade of magnitude: 1 to 64, or 2 to 128
    factor = tl.full(x.shape, first * 1e6 / 0.9, tl.float32)  # one over the spacing
    for i in tl.static_range(6):
        above = magnitude >= 10.0 ** (i - 6)
        spacings = tl.where(above, first * 2.0 ** (i + 1), spacings)
        factor = tl.where(above, first * 2.0 ** (i + 1) * 10.0 ** (5 - i) / 0.9, factor)
    place = magnitude * factor - spacings * (1 / 9)
    code = (tl.floor(place - 0.5) + spacings).to(tl.int32) + (127 if SIGNED else -1)
    if SIGNED:
        code = tl.where(x < 0, 253 - code, code)
    code = tl.minimum(tl.maximum(code, 0), 254)
    code += (x > tl.load(thresholds + code)).to(tl.int32)
    if SIGNED:
        code = tl.where((x < 0) & (code == 127), 126, code)
    return code


@triton.jit
def _decode(codes, scales, levels, at, row, inside):
    """fp32 moments `[R, 256]` of stored codes."""
    alive = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    return tl.load(levels + alive) * tl.load(scales + row, mask=inside, other=0.0)


@triton.jit
def _store_8(codes, scales, thresholds, moment, at, row, inside, SIGNED: tl.constexpr, INTERPRETED: tl.constexpr):
    largest = tl.max(tl.abs(moment), 1)[:, None]
    below = tl.where(largest > 1e-38, largest, 1.0)
    if INTERPRETED:  # its fused product and sum are rounded twice
        x = moment / below
    else:  # the rounded quotient from a reciprocal and what it lacks (Markstein): three operations, not ten and a branch
        inverse = tl.div_rn(1.0, below)
        x = moment * inverse
        x = tl.fma(tl.fma(-x, below, moment), inverse, x)
    tl.store(codes + at, _encode(x, thresholds, SIGNED).to(tl.uint8), mask=inside)
    tl.store(scales + row, largest, mask=inside)


# Compiled once for all parts of a buffer, whatever their sizes: these are only compared with.
@triton.jit(do_not_specialize=["blocks", "end0", "end1", "end2"])
def _step(
    values, grads, first, second, first_scales, second_scales, tables, scalars, count, blocks,
    end0, end1, end2, rate0, rate1, rate2, rate3, keep0, keep1, keep2, keep3,
    beta1, rest1, beta2, rest2, eps, BITS: tl.constexpr, R: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """R blocks. Four parts at most: part i ends at block `end i`, learns at `rate i` and keeps `keep i` of a weight."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (program * R + tl.arange(0, R))[:, None]
    inside = row < blocks
    at = (program.to(tl.int64) * (R * 256)) + (tl.arange(0, R)[:, None] * 256 + tl.arange(0, 256)[None, :])
    if tl.load(scalars + 1) > 0:
        tl.store(grads + at, tl.zeros([R, 256], tl.float32), mask=inside)
    else:
        rate = tl.where(row < end0, rate0, tl.where(row < end1, rate1, tl.where(row < end2, rate2, rate3)))
        keep = tl.where(row < end0, keep0, tl.where(row < end1, keep1, tl.where(row < end2, keep2, keep3)))
        g = tl.load(grads + at, mask=inside, other=0.0) * tl.load(scalars)
        x = tl.load(values + at, mask=inside, other=0.0)
        if BITS == 8:
            m = _decode(first, first_scales, tables, at, row, inside)
            v = _decode(second, second_scales, tables + 256, at, row, inside)
        else:
            m = tl.load(first + at, mask=inside, other=0.0)
            v = tl.load(second + at, mask=inside, other=0.0)
        m = m * beta1 + g * rest1
        v = v * beta2 + (g * rest2) * g
        below = tl.sqrt_rn(v) * tl.load(scalars + 3) + eps
        tl.store(values + at, x * keep - tl.div_rn((rate * tl.load(scalars + 2)) * m, below), mask=inside)
        tl.store(grads + at, tl.zeros([R, 256], tl.float32), mask=inside)
        if BITS == 8:
            _store_8(first, first_scales, tables + 512, m, at, row, inside, True, INTERPRETED)
            _store_8(second, second_scales, tables + 768, v, at, row, inside, False, INTERPRETED)
        else:
            tl.store(first + at, m, mask=inside)
            tl.store(second + at, v, mask=inside)
        tl.store(count, tl.load(scalars + 4), mask=program == 0)


@functools.cache
def _tables(device: str) -> Tensor:
    """fp32 `[4, 256]`: levels of the signed and the unsigned map, then their thresholds (255, and one never read)."""
    maps = [dynamic_map(signed) for signed in (True, False)]
    thresholds = [torch.cat([(m[1:] + m[:-1]) * 0.5, m[-1:]]) for m in maps]
    return torch.stack([*maps, *thresholds]).to(device)


def measure(grads: Tensor, loss: Tensor, scale: Tensor, largest: float, kept: Scratch) -> Tensor:
    """Two launches: partial sums, then everything that follows from them. Fixed order, so same input, same bits."""
    n = grads.numel()
    report = torch.empty(4, dtype=torch.float32, device=grads.device)
    tiles = triton.cdiv(n, SUM_TILE)
    programs = min(tiles, PARTIALS)  # the sums that no program writes stay 0
    _sums[(programs,)](kept.partials, grads, n, TILES=triton.cdiv(tiles, programs), TILE=SUM_TILE, num_warps=SUM_WARPS)
    _finish[(1,)](report, kept.scalars, kept.partials, kept.count, kept.logs, loss, scale, float(largest), PARTIALS=PARTIALS)
    return report


def step(
    values: Tensor,
    grads: Tensor,
    state: Moments,
    lr: float,
    rule: Rule,
    kept: Scratch,
    rows: int | None = None,
    warps: int | None = None,
) -> None:
    """One launch. rows, warps: R and the warps a program, where they are not the default."""
    bits = 32 if state.first_scales is None else 8
    blocks = values.numel() // BLOCK
    rows = rows or ROWS[bits]
    parts = [*rule.parts, *[rule.parts[-1]] * (LARGEST_PARTS - len(rule.parts))]
    first_scales = state.first if state.first_scales is None else state.first_scales
    second_scales = state.second if state.second_scales is None else state.second_scales
    _step[(triton.cdiv(blocks, rows),)](
        values, grads, state.first, state.second, first_scales, second_scales,
        kept.scalars if bits == 32 else _tables(str(values.device)), kept.scalars, kept.count, blocks,
        *[part.end for part in parts[:-1]],
        *[float(lr * part.rate) for part in parts],
        *[1 - lr * part.rate * part.decay for part in parts],
        rule.beta1, 1 - rule.beta1, rule.beta2, 1 - rule.beta2, rule.eps,
        BITS=bits, R=rows, INTERPRETED=INTERPRETED, num_warps=warps or WARPS[bits], enable_fp_fusion=False,
    )  # fmt: skip
