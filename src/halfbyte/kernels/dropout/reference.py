"""Philox4x32-10 in 64-bit integer arithmetic of plain torch.

Cost on a CPU: about 10 ns an element. Products of two 32-bit words wrap in int64, which leaves the bits that are kept unharmed.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
CHUNK = 1 << 14
"""Counters at a time: the state stays in the second-level cache, and torch wakes no threads for a single step."""


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds. Every word is int64 holding 32 bits; shapes broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        # Only what is multiplied next is cut to 32 bits; c1 and c3 keep their high bits until the xor of the next round is cut.
        c0, c2 = ((p1 >> 32) ^ c1 ^ k0).bitwise_and_(MASK), ((p0 >> 32) ^ c3 ^ k1).bitwise_and_(MASK)
        c1, c3 = p1, p0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1 & MASK, c2, c3 & MASK


def threshold(p: float) -> int:
    """A 32-bit word below this is dropped."""
    assert 0.0 <= p < 1.0, "dropout lies in [0, 1)"
    return min(round(p * 2**32), MASK)


def keep(shape: tuple[int, int], state: Tensor, p: float, tokens: int, layer: int) -> Tensor:
    """The mask, bool `[T, K]`."""
    rows, width = -(-shape[0] // tokens), shape[1]
    quads = -(-min(tokens, shape[0]) * width // 4)
    seed, step, first_row = state.unbind()
    key = (seed & MASK, seed >> 32 & MASK)
    mask = torch.empty((rows, quads, 4), dtype=torch.bool, device=state.device)
    for row in range(rows):
        for start in range(0, quads, CHUNK):
            quad = torch.arange(start, min(start + CHUNK, quads), device=state.device)
            words = philox((quad, first_row + row & MASK, torch.full_like(seed, layer), step & MASK), key)
            for i, word in enumerate(words):
                torch.ge(word, threshold(p), out=mask[row, start : start + quad.numel(), i])
    flat = mask.view(rows, -1)[:, : min(tokens, shape[0]) * width]
    return flat.reshape(-1, width)[: shape[0]]


def masked(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """x / (1 - p) where the mask keeps it, else 0."""
    return torch.where(mask, x * (1.0 / (1.0 - p)), 0.0)


def keep_from(start: int, shape: tuple[int, int], state: Tensor, p: float, tokens: int, layer: int) -> Tensor:
    """The mask, bool `[T, K]`, of positions `start` and following. What lies before them in their row is computed too."""
    rows, skipped = divmod(start, tokens)
    if rows:
        state = torch.stack([state[0], state[1], state[2] + rows])
    return keep((skipped + shape[0], shape[1]), state, p, tokens, layer)[skipped:]


def dropout(x: Tensor, state: Tensor, p: float, tokens: int, layer: int, start: int = 0) -> Tensor:
    """drop(x) `[T, K]`."""
    return masked(x, keep_from(start, (x.shape[0], x.shape[1]), state, p, tokens, layer), p)
