"""Supervised fine-tuning: the mean cross-entropy of the trained tokens of a batch.

Why a mean over the whole batch, not over microbatches: examples differ in length, and a mean of means would weight a token by
the company it keeps and change with the microbatch. Here every trained token of the batch weighs the same, whatever m is.
Cost: the batch's trained tokens must be counted before its first forward pass (the loader does).

Where tokens have weights, the mean is a weighted one: sum(w * loss) / sum(w). The head is applied once for each weight that occurs
in a microbatch, to the tokens that have it, so the arithmetic is that of one pass.

Letters: S = tokens of a microbatch (m rows), H = hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.cross_entropy import CHUNK_BYTES, IGNORE, PLAIN, Extras, Head, Method, cross_entropy
from halfbyte.objectives.config import LossConfig
from halfbyte.pinned import to_device

DEFAULT = LossConfig()


def sums(
    hidden: Tensor, labels: Tensor, head: Head, extras: Extras = PLAIN, method: Method = "auto", chunks: float = 1
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy (fp32) and number of tokens predicted right (argmax), scalars, over labels that are not -100.

    hidden: `[1, S, H]` after the final norm. labels: int64 `[1, S]`, already shifted; best on the CPU, where they are counted
    without a sync of the device. Logits are never all materialised. extras: label smoothing and z-loss, of training only.
    chunks: how many times smaller than usual the chunks of logits are (below 1: larger).
    """
    labelled = int((labels != IGNORE).sum()) if labels.device.type == "cpu" else None
    on_device = to_device(labels, hidden.device)
    size = int(CHUNK_BYTES[hidden.device.type] / chunks)
    return cross_entropy(hidden, on_device, head, labelled=labelled, extras=extras, chunk_bytes=size, method=method)


def loss(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    total: float,
    config: LossConfig = DEFAULT,
    chunks: float = 1,
    weights: Tensor | None = None,
) -> Tensor:
    """A microbatch's share of the batch's mean loss, fp32 scalar: the shares of all microbatches add up to the mean.

    total: the batch's trained tokens, or the sum of their weights. weights: float `[1, S]` on the CPU, of each label; None where
    all weigh 1. Label smoothing and z-loss are part of each token's loss, so they too are means over the whole batch.
    """
    extras = Extras(config.label_smoothing, config.z_loss)
    divisor = total if total > 0 else 1
    if weights is None:
        return sums(hidden, labels, head, extras, config.method, chunks)[0] / divisor
    cpu = labels.cpu()
    found = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for weight in torch.unique(weights[cpu != IGNORE]).tolist() or [1.0]:  # without labels too, so that there is a graph
        own = torch.where(weights == weight, cpu, IGNORE)
        found = found + weight * sums(hidden, own, head, extras, config.method, chunks)[0]
    return found / divisor
