"""The reference: softmax cross-entropy of a linear head, with all logits at once.

Letters: T = positions, n = labelled ones, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import torch

from halfbyte.kernels.cross_entropy.parts import Results, Task


def cross_entropy(task: Task) -> Results:
    """Sum of losses, correct tokens, and the gradients of the sum."""
    head, extras, wants, rows = task.head, task.extras, task.wants, task.rows()
    hidden, target = task.hidden[rows], task.labels[rows]
    z = head.logits(hidden)  # [n, V]
    lse = torch.logsumexp(z, 1)
    at_target = z.gather(1, target[:, None])[:, 0]
    loss = lse + extras.z * lse**2 - (1 - extras.smoothing) * at_target - extras.smoothing * z.mean(1)
    dz = torch.softmax(z, 1) * (1 + 2 * extras.z * lse)[:, None]
    dz = dz - (1 - extras.smoothing) * torch.nn.functional.one_hot(target, head.vocabulary) - extras.smoothing / head.vocabulary
    if head.cap != 0.0:
        dz = dz * (1 - (z / head.cap) ** 2)
    dz = head.scale * dz
    d = dz.to(hidden.dtype)
    return Results(
        loss.sum(),
        (z.argmax(1) == target).sum(),
        d @ head.dense(d.dtype) if wants.hidden else None,
        (d.T @ hidden).to(head.weight.dtype) if wants.weight else None,
        dz.sum(0).to(head.bias.dtype) if wants.bias and head.bias is not None else None,
    )
