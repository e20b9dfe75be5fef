"""The formula in torch, every product and sum rounded by itself; in tiles, so that temporaries of a tile stay small.

What is new is computed whole before anything changes: a step that finds no memory has done nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from halfbyte.formats.dynamic8 import dequantize_blockwise, quantize_blockwise
from halfbyte.formats.tiling import flat_tiles
from halfbyte.kernels.adamw.parts import BLOCK, Moments, Part, Rule, Scratch

ZERO = 127
"""The code of 0 in the signed map."""


def measure(grads: Tensor, loss: Tensor, scale: Tensor, largest: float, kept: Scratch) -> Tensor:
    """Norm, finite flag, factor and the corrections of the step to come."""
    norm = torch.linalg.vector_norm(grads) / scale
    found_inf = 1.0 - (torch.isfinite(norm) & torch.isfinite(loss)).float()
    factor = ((largest / (norm + 1e-6)).clamp(max=1.0) if largest > 0 else 1.0) / scale
    t = kept.count + 1
    c1, c2 = (-torch.expm1(t.double() * kept.logs)).unbind()
    kept.scalars.copy_(torch.stack([factor, found_inf, (1 / c1).float(), c2.rsqrt().float(), t]))
    return torch.stack([loss.float(), norm, found_inf, scale])


def step(values: Tensor, grads: Tensor, state: Moments, lr: float, rule: Rule, kept: Scratch) -> None:
    """Where found_inf is set, every tile is written back as it was."""
    factor, found_inf, inverse, root, t = kept.scalars.unbind()
    skip = found_inf > 0
    changes = [(kept.count, torch.where(skip, kept.count, t))]
    for part, tile in _tiles(rule, values.device):
        x, g = values[tile], grads[tile] * factor
        m, v = _load(state, tile)
        m = rule.beta1 * m + (1 - rule.beta1) * g
        v = rule.beta2 * v + (1 - rule.beta2) * g * g
        rate = inverse * (lr * part.rate)
        new = x * (1 - lr * part.rate * part.decay) - rate * m / (v.sqrt() * root + rule.eps)
        fields = state.part(tile).fields()
        changes += [
            (old, torch.where(skip, old, made)) for old, made in zip([x, *fields], [new, *_stored(state, m, v)], strict=True)
        ]
    for old, fresh in changes:
        old.copy_(fresh)
    grads.zero_()


def _tiles(rule: Rule, device: torch.device) -> Iterator[tuple[Part, slice]]:
    start = 0
    for part in rule.parts:
        for tile in flat_tiles((part.end - start) * BLOCK, BLOCK, device):
            yield part, slice(start * BLOCK + tile.start, start * BLOCK + tile.stop)
        start = part.end


def _load(state: Moments, tile: slice) -> tuple[Tensor, Tensor]:
    if state.first_scales is None or state.second_scales is None:
        return state.first[tile], state.second[tile]
    blocks = slice(tile.start // BLOCK, tile.stop // BLOCK)
    first = dequantize_blockwise(state.first[tile], state.first_scales[blocks], BLOCK, signed=True)
    return first, dequantize_blockwise(state.second[tile], state.second_scales[blocks], BLOCK, signed=False)


def _stored(state: Moments, m: Tensor, v: Tensor) -> list[Tensor]:
    """The moments as `Moments.fields` has them."""
    if state.first_scales is None:
        return [m, v]
    first, first_scales = quantize_blockwise(m, BLOCK, signed=True)
    second, second_scales = quantize_blockwise(v, BLOCK, signed=False)
    first -= ((m < 0) & (first == ZERO)).to(torch.uint8)
    return [first, second, first_scales, second_scales]
