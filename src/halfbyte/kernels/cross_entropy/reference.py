"""The reference: softmax cross-entropy of a linear head, with all logits at once.

Letters: T = positions, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.cross_entropy.parts import IGNORE, Head, Results, Wants


def cross_entropy(hidden: Tensor, labels: Tensor, head: Head, wants: Wants, _chunk_bytes: int, _labelled: int) -> Results:
    """Sum of losses, correct tokens, and the gradients of the sum."""
    kept = labels != IGNORE
    target = torch.where(kept, labels, 0)
    z = head.logits(hidden)
    loss = (torch.logsumexp(z, 1) - z.gather(1, target[:, None])[:, 0]) * kept
    correct = ((z.argmax(1) == target) & kept).sum()
    dz = (torch.softmax(z, 1) - torch.nn.functional.one_hot(target, z.shape[1])) * kept[:, None]
    if head.cap != 0.0:
        dz = dz * (1 - (z / head.cap) ** 2)
    dz = head.scale * dz
    d = dz.to(hidden.dtype)
    return Results(
        loss.sum(),
        correct,
        d @ head.weight.to(d.dtype) if wants.hidden else None,
        (d.T @ hidden).to(head.weight.dtype) if wants.weight else None,
        dz.sum(0).to(head.bias.dtype) if wants.bias and head.bias is not None else None,
    )
