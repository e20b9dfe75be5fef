"""`add_norm`: the residual add and the norm after it as one pass; `norm_backward`: its gradient with the residual stream's added.

Why: both are bound by memory, and the sum is in registers when the norm needs it. The normed rows go straight into the layout that
the next product reads (`out`, rows of any stride: columns beyond H are never touched).
Cost: forward reads x and delta, writes residual and out; backward reads three, writes one; two fp32 numbers a row are kept.

Letters: T tokens, H hidden. Activations are 2-D with stride 1 along H and any row stride.
"""

from __future__ import annotations

from torch import Tensor

from halfbyte.kernels.dispatch import twin
from halfbyte.kernels.norm import reference
from halfbyte.kernels.norm.reference import NormSpec

__all__ = ["NormSpec", "add_norm", "norm_backward"]


def add_norm(
    x: Tensor, delta: Tensor | None, spec: NormSpec, weight: Tensor | None, bias: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(residual, rstd, mean): residual = x + delta, fresh and contiguous `[T, H]`, or x itself without delta; out = norm(residual).

    weight, bias: `[H]` of any float dtype, or None. rstd, mean: fp32 `[T]`, mean None for kind rms.
    """
    if twin(x.device) == "fused":
        from halfbyte.kernels.norm import fused

        return fused.add_norm(x, delta, spec, weight, bias, out)
    return reference.add_norm(x, delta, spec, weight, bias, out)


def norm_backward(
    d_out: Tensor,
    residual: Tensor,
    rstd: Tensor,
    mean: Tensor | None,
    spec: NormSpec,
    weight: Tensor | None,
    add: Tensor | None,
    out: Tensor,
) -> None:
    """out = (d norm / d residual)ᵀ d_out + add. `out` may be the memory of `d_out` or `add`; the weight is taken as frozen."""
    if twin(d_out.device) == "fused":
        from halfbyte.kernels.norm import fused

        fused.norm_backward(d_out, residual, rstd, mean, spec, weight, add, out)
    else:
        reference.norm_backward(d_out, residual, rstd, mean, spec, weight, add, out)
