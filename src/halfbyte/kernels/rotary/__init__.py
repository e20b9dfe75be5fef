"""Rotary positions of queries and keys, with the norm of each head where a model has one (Qwen 3, Gemma 3): one launch a call.

Why: `rotate` turns q and k where the projection wrote them; `gather_backward` turns dq and dk back on their way into the packed
gradient that the projections' backward product reads, so neither costs a pass of its own.
Cost: every element is read once and written once; tables are read once a token.

Letters: T tokens, Hq and Hk heads, d head size, r <= d elements that turn. Heads are `[T, heads, d]` with stride 1 along d and any
other strides. cos, sin: `[T, r]` of one float dtype; None for rotation "none".
"""

from __future__ import annotations

from torch import Tensor

from halfbyte.kernels.dispatch import twin
from halfbyte.kernels.norm.reference import NormSpec
from halfbyte.kernels.rotary import reference
from halfbyte.kernels.rotary.reference import Rotation

__all__ = ["Rotation", "gather_backward", "norm_gather_backward", "norm_rotate", "rotate"]


def rotate(q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, rotation: Rotation, inverse: bool = False) -> None:
    """Turns q `[T, Hq, d]` and k `[T, Hk, d]` in place; `inverse` applies the transposed map (backward)."""
    if twin(q.device) == "fused":
        from halfbyte.kernels.rotary import fused

        fused.rotate(q, k, cos, sin, rotation, inverse)
    else:
        reference.rotate(q, k, cos, sin, rotation, inverse)


def gather_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor | None, sin: Tensor | None, rotation: Rotation, out: Tensor
) -> None:
    """out `[T, (Hq + 2 Hk) d]` (rows of any stride) = [dq turned back | dk turned back | dv]."""
    if twin(dq.device) == "fused":
        from halfbyte.kernels.rotary import fused

        fused.gather_backward(dq, dk, dv, cos, sin, rotation, out)
    else:
        reference.gather_backward(dq, dk, dv, cos, sin, rotation, out)


def norm_rotate(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    spec: NormSpec,
    cos: Tensor | None,
    sin: Tensor | None,
    rotation: Rotation,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q_out, k_out, q_rstd, k_rstd): RMS norm of each head, weights `[d]`, then rotation.

    The outputs are fresh and contiguous; rstd is fp32 `[T, heads]`.
    """
    if twin(q.device) == "fused":
        from halfbyte.kernels.rotary import fused

        return fused.norm_rotate(q, k, q_weight, k_weight, spec, cos, sin, rotation)
    return reference.norm_rotate(q, k, q_weight, k_weight, spec, cos, sin, rotation)


def norm_gather_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    spec: NormSpec,
    cos: Tensor | None,
    sin: Tensor | None,
    rotation: Rotation,
    out: Tensor,
) -> None:
    """`gather_backward` through the norm too; q and k are the inputs of `norm_rotate`. `out` must not be their memory."""
    if twin(dq.device) == "fused":
        from halfbyte.kernels.rotary import fused

        fused.norm_gather_backward(dq, dk, dv, q, k, q_rstd, k_rstd, q_weight, k_weight, spec, cos, sin, rotation, out)
    else:
        reference.norm_gather_backward(dq, dk, dv, q, k, q_rstd, k_rstd, q_weight, k_weight, spec, cos, sin, rotation, out)
