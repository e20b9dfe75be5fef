"""`cross_entropy`: a linear head and softmax cross-entropy in one, without ever holding all logits.

The result is the SUM of losses over labelled positions (divide by the tokens of the whole batch, so that every microbatch size
gives one gradient) and the number of tokens predicted right. Gradients are computed in the forward pass, where the logits are,
and kept, that of the hidden states for the labelled rows alone; backward multiplies them by a scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.formats.packed import Packed
from halfbyte.kernels.cross_entropy import choice, chunked, reference
from halfbyte.kernels.cross_entropy.choice import Method
from halfbyte.kernels.cross_entropy.parts import IGNORE, PLAIN, Extras, Head, Results, Task, Wants
from halfbyte.kernels.dispatch import twin

__all__ = ["CHUNK_BYTES", "IGNORE", "PLAIN", "Extras", "Head", "Method", "cross_entropy"]

CHUNK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}
"""Logits at a time, by device (a CPU's are fp32, a GPU's in the compute dtype): large enough for the GEMMs to run at full rate."""


def _run(method: Method, device: torch.device) -> Callable[[Task], Results]:
    which = twin(device)
    if which == "fused":
        return lambda task: choice.run(method, task)
    return reference.cross_entropy if which == "reference" else chunked.cross_entropy


@torch.library.custom_op("halfbyte::cross_entropy", mutates_args=())
def cross_entropy_op(
    hidden: Tensor,
    weight: Tensor | None,
    packed: list[Tensor],
    spec: str,
    bias: Tensor | None,
    labels: Tensor,
    numbers: list[float],
    chunk_bytes: int,
    labelled: int,
    wants: list[bool],
    method: str,
) -> list[Tensor]:
    """loss, correct, then the wanted gradients of hidden (labelled rows), weight, bias. hidden `[T, H]`, labels `[T]`.

    weight, or else the tensors and the spec of a packed one. numbers: scale, cap, smoothing, z. labelled: of the labels.
    """
    scale, cap, smoothing, z = numbers
    head = Head(Packed.from_spec(spec, packed) if weight is None else weight, bias, scale, cap)
    task = Task(hidden, labels, head, Extras(smoothing, z), Wants(*wants), labelled, chunk_bytes)
    r = _run(method, hidden.device)(task)  # type: ignore[arg-type]
    return [r.loss, r.correct, *(g for g in (r.hidden, r.weight, r.bias) if g is not None)]


@cross_entropy_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor | None,
    packed: list[Tensor],
    spec: str,
    bias: Tensor | None,
    labels: Tensor,
    numbers: list[float],
    chunk_bytes: int,
    labelled: int,
    wants: list[bool],
    method: str,
) -> list[Tensor]:
    out = [hidden.new_empty((), dtype=torch.float32), hidden.new_empty((), dtype=torch.int64)]
    out += [hidden.new_empty(labelled, hidden.shape[1])] if wants[0] else []
    return out + [torch.empty_like(t) for t, want in zip((weight, bias), wants[1:], strict=True) if want and t is not None]


@torch.library.custom_op("halfbyte::expand_rows", mutates_args=())
def expand_rows_op(compact: Tensor, labels: Tensor, factor: Tensor) -> Tensor:
    """`[T, H]`: the rows of compact `[n, H]` times factor (a scalar) where labels `[T]` carry a loss, zeros elsewhere."""
    if len(compact) == len(labels):
        return compact * factor
    kept = labels != IGNORE
    if twin(compact.device) == "fused":
        from halfbyte.kernels.cross_entropy import fused

        return fused.expand(compact, kept, factor)
    out = compact.new_zeros(len(labels), compact.shape[1])
    out[torch.nonzero_static(kept, size=len(compact))[:, 0]] = compact * factor
    return out


@expand_rows_op.register_fake
def _(compact: Tensor, labels: Tensor, factor: Tensor) -> Tensor:
    return compact.new_empty(labels.shape[0], compact.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.wants = inputs[9]
    ctx.packed = len(inputs[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(inputs[5], *output[2:])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    labels, *stored = ctx.saved_tensors
    left = iter(stored)
    dh = expand_rows_op(next(left), labels, grads[0]) if ctx.wants[0] else None
    dw, db = (next(left) * grads[0] if want else None for want in ctx.wants[1:])
    return dh, dw, [None] * ctx.packed, None, db, None, None, None, None, None, None


cross_entropy_op.register_autograd(_backward, setup_context=_setup)


def cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    *,
    labelled: int | None = None,
    extras: Extras = PLAIN,
    chunk_bytes: int | None = None,
    method: Method = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum of losses (fp32 scalar) and correct predictions (int64 scalar) over the labelled positions.

    hidden `[..., H]` in the compute dtype. labels int64 `[...]`: labels[t] must follow position t, -100 carries no loss.
    labelled: how many positions have a label, if known on the host: saves a sync of the GPU. extras: label smoothing, z-loss.
    chunk_bytes: of logits, see `CHUNK_BYTES`. method: of a GPU, see `choice`.
    """
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    grad = torch.is_grad_enabled()
    weight, packed, spec = (
        (None, list(head.weight.tensors()), head.weight.spec) if isinstance(head.weight, Packed) else (head.weight, [], "")
    )
    wants = [grad and t is not None and t.requires_grad for t in (rows, weight, head.bias)]
    size = chunk_bytes or CHUNK_BYTES.get(hidden.device.type, 1 << 26)
    known = int((flat != IGNORE).sum()) if labelled is None else labelled
    numbers = [head.scale, head.cap, extras.smoothing, extras.z]
    out = cross_entropy_op(rows, weight, packed, spec, head.bias, flat, numbers, size, known, wants, method)
    return out[0], out[1]
