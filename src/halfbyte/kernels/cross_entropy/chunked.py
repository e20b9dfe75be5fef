"""The twin of plain torch operations, which a CPU takes: labelled rows only, logits in chunks, the gradient in the same pass.

Why: at 8,192 tokens and a vocabulary of 128,256 the logits alone are 4.2 GB in fp32, and most rows of a chat carry no loss. A chunk
of logits turns into its own gradient in place and is gone.
Cost: the chunk in fp32 and in the compute dtype (CPU: the latter twice), a packed head decoded for the time of the call, the
gradient of the labelled rows; one product more than the forward alone, which backward then saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.cross_entropy.parts import Extras, Head, Results, Task

SLICE_BYTES = 1 << 22
"""fp32 logits that a CPU turns into a gradient at a time: a dozen passes over them stay in the cache."""


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y; on CUDA in fp32, never rounded to 16 bits."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x, y, out_dtype=torch.float32)
    return x @ y


def _slice(z: Tensor, target: Tensor, head: Head, extras: Extras, d: Tensor | None) -> tuple[Tensor, Tensor]:
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
    mean = z.mean(1) if extras.smoothing else None
    total = z.sub_(top[:, None]).exp_().sum(1)
    lse = total.log() + top
    losses = lse - at_target
    if mean is not None:
        losses += extras.smoothing * (at_target - mean)
    if extras.z:
        losses += extras.z * lse.square()
    if d is not None:
        z /= total[:, None]
        if extras.z:
            z *= (1 + 2 * extras.z * lse)[:, None]
        z[torch.arange(len(target), device=z.device), target] -= 1.0 - extras.smoothing
        if extras.smoothing:
            z -= extras.smoothing / z.shape[1]
        if slope is not None:
            z *= slope
        if head.scale != 1.0:
            z *= head.scale
        d.copy_(z)
    return losses, best == target


def cross_entropy(task: Task) -> Results:
    """Sum of losses, correct tokens, and the gradients of the sum."""
    hidden, head, wants, rows = task.hidden, task.head, task.wants, task.rows()
    weight = head.dense(hidden.dtype)
    size = max(task.chunk_bytes // (4 * weight.shape[0]), 1)
    losses = torch.empty(rows.shape[0], dtype=torch.float32, device=hidden.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    dh = hidden.new_empty(rows.shape[0], hidden.shape[1]) if wants.hidden else None
    dw = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants.weight else None
    db = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if wants.bias else None
    grad = wants.hidden or wants.weight or wants.bias
    narrow = size if hidden.is_cuda else max(SLICE_BYTES // (4 * weight.shape[0]), 1)
    for start in range(0, rows.shape[0], size):
        part = rows[start : start + size]
        h, target = hidden[part], task.labels[part]
        z = product(h, weight.T)
        # The gradient is exact in fp32 and rounded once, to the dtype of the products that follow.
        d = torch.empty_like(z, dtype=hidden.dtype) if grad else None
        for first in range(0, len(part), narrow):
            here = slice(first, first + narrow)
            piece, dz = z[here].float(), None if d is None else d[here]
            losses[start + first : start + first + len(piece)], hits = _slice(piece, target[here], head, task.extras, dz)
            correct += hits.sum()
            if db is not None:
                db += piece.sum(0)
        if d is None:
            continue
        if dh is not None:
            torch.mm(d, weight, out=dh[start : start + size])
        if dw is not None:
            dw += product(d.T, h)
    return Results(
        losses.sum(),
        correct,
        dh,
        None if dw is None else dw.to(head.weight.dtype),
        None if db is None or head.bias is None else db.to(head.bias.dtype),
    )
