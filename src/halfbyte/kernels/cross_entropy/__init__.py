"""`cross_entropy`: a linear head and softmax cross-entropy in one, without ever holding all logits.

The result is the SUM of losses over labelled positions (divide by the tokens of the whole batch, so that every microbatch size
gives one gradient) and the number of tokens predicted right. Gradients are computed in the forward pass, where the logits are,
and kept; backward multiplies them by a scalar.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.cross_entropy import chunked, reference
from halfbyte.kernels.cross_entropy.parts import IGNORE, Head, Wants
from halfbyte.kernels.dispatch import twin

__all__ = ["CHUNK_BYTES", "IGNORE", "Head", "cross_entropy"]

CHUNK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}
"""fp32 logits at a time, by device: large enough for the GEMM to run at full rate, small beside a model."""


@torch.library.custom_op("halfbyte::cross_entropy", mutates_args=())
def cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    cap: float,
    chunk_bytes: int,
    labelled: int,
    wants: list[bool],
) -> list[Tensor]:
    """loss, correct, then the wanted gradients of hidden, weight, bias. hidden `[T, H]`, labels `[T]`."""
    run = reference.cross_entropy if twin(hidden.device) == "reference" else chunked.cross_entropy
    r = run(hidden, labels, Head(weight, bias, scale, cap), Wants(*wants), chunk_bytes, labelled)
    return [r.loss, r.correct, *(g for g in (r.hidden, r.weight, r.bias) if g is not None)]


@cross_entropy_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    cap: float,
    chunk_bytes: int,
    labelled: int,
    wants: list[bool],
) -> list[Tensor]:
    sums = [hidden.new_empty((), dtype=torch.float32), hidden.new_empty((), dtype=torch.int64)]
    return sums + [torch.empty_like(t) for t, want in zip((hidden, weight, bias), wants, strict=True) if want and t is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.wants = inputs[8]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    stored = iter(ctx.saved_tensors)
    dh, dw, db = (next(stored) * grads[0] if want else None for want in ctx.wants)
    return dh, dw, db, None, None, None, None, None, None


cross_entropy_op.register_autograd(_backward, setup_context=_setup)


def cross_entropy(
    hidden: Tensor, labels: Tensor, head: Head, *, labelled: int | None = None, chunk_bytes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of losses (fp32 scalar) and correct predictions (int64 scalar) over the labelled positions.

    hidden `[..., H]` in the compute dtype. labels int64 `[...]`: labels[t] must follow position t, -100 carries no loss.
    labelled: how many positions have a label, if known on the host: saves a sync of the GPU. chunk_bytes: of fp32 logits.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    grad = torch.is_grad_enabled()
    wants = [grad and t is not None and t.requires_grad for t in (rows, head.weight, head.bias)]
    size = chunk_bytes or CHUNK_BYTES.get(hidden.device.type, 1 << 26)
    known = -1 if labelled is None else labelled
    out = cross_entropy_op(rows, head.weight, head.bias, labels.reshape(-1), head.scale, head.cap, size, known, wants)
    return out[0], out[1]
