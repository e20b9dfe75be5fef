"""The fast twin, on any device: labelled rows only, logits in chunks, the gradient in the same pass.

Why: at 8,192 tokens and a vocabulary of 128,256 the logits alone are 4.2 GB in fp32, and most rows of a chat carry no loss. A chunk
of logits turns into its own gradient in place and is gone.
Cost: the chunk in fp32 and in the compute dtype (CPU: the latter twice), the gradient of hidden `[T, H]`; one product more than the
forward alone, which backward then saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.cross_entropy.parts import IGNORE, Head, Results, Wants

SLICE_BYTES = 1 << 22
"""fp32 logits that a CPU turns into a gradient at a time: a dozen passes over them stay in the cache."""


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y; on CUDA in fp32, never rounded to 16 bits."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x, y, out_dtype=torch.float32)
    return x @ y


def _labelled_rows(labels: Tensor, labelled: int) -> Tensor:
    """Indices of the rows with a label; without a sync of the device where their number is known."""
    kept = labels != IGNORE
    return kept.nonzero()[:, 0] if labelled < 0 else torch.nonzero_static(kept, size=labelled)[:, 0]


def _slice(z: Tensor, target: Tensor, head: Head, d: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses fp32 `[c]` and hits bool `[c]` of products z = h Wᵀ, fp32 `[c, V]`, which become
    their own gradient if `d` is given, the same in the compute dtype."""
    if head.bias is not None:
        z += head.bias
    if head.scale != 1.0:
        z *= head.scale
    if head.cap != 0.0:
        z = z.div_(head.cap).tanh_().mul_(head.cap)
    slope = 1 - (z / head.cap).square_() if d is not None and head.cap != 0.0 else None
    top, best = z.max(1)
    at_target = z.gather(1, target[:, None])[:, 0]
    total = z.sub_(top[:, None]).exp_().sum(1)
    losses = total.log() + top - at_target
    if d is not None:
        z /= total[:, None]
        z[torch.arange(len(target), device=z.device), target] -= 1.0
        if slope is not None:
            z *= slope
        if head.scale != 1.0:
            z *= head.scale
        d.copy_(z)
    return losses, best == target


def cross_entropy(hidden: Tensor, labels: Tensor, head: Head, wants: Wants, chunk_bytes: int, labelled: int) -> Results:
    """Sum of losses, correct tokens, and the gradients of the sum."""
    rows = _labelled_rows(labels, labelled)
    weight = head.weight.to(hidden.dtype)
    size = max(chunk_bytes // (4 * weight.shape[0]), 1)
    losses = torch.empty(rows.shape[0], dtype=torch.float32, device=hidden.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    dh = torch.zeros_like(hidden) if wants.hidden else None
    dw = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants.weight else None
    db = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if wants.bias else None
    grad = wants.hidden or wants.weight or wants.bias
    narrow = size if hidden.is_cuda else max(SLICE_BYTES // (4 * weight.shape[0]), 1)
    for start in range(0, rows.shape[0], size):
        part = rows[start : start + size]
        h, target = hidden[part], labels[part]
        z = _product(h, weight.T)
        # The gradient is exact in fp32 and rounded once, to the dtype of the products that follow.
        d = torch.empty_like(z, dtype=hidden.dtype) if grad else None
        for first in range(0, len(part), narrow):
            here = slice(first, first + narrow)
            piece, dz = z[here].float(), None if d is None else d[here]
            losses[start + first : start + first + len(piece)], hits = _slice(piece, target[here], head, dz)
            correct += hits.sum()
            if db is not None:
                db += piece.sum(0)
        if d is None:
            continue
        if dh is not None:
            dh[part] = d @ weight
        if dw is not None:
            dw += _product(d.T, h)
    return Results(
        losses.sum(),
        correct,
        dh,
        None if dw is None else dw.to(head.weight.dtype),
        None if db is None or head.bias is None else db.to(head.bias.dtype),
    )
