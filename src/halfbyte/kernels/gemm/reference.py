"""The product by torch: what CPUs take, other dtypes, and whatever the library in `cublaslt` refuses."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)
_scaled_mm = torch.ops.aten._scaled_mm.out


def matmul(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, c: Tensor | None, beta: float, alpha: float) -> None:
    """out = alpha · a b + beta · c + bias. c: None for `out` itself, if beta is not 0."""
    if beta == 0.0:
        c = None
    elif c is None:
        c = out
    if a.dtype != out.dtype:
        _widened(a, b, out, bias, c, beta, alpha)
    elif c is None and bias is None and alpha == 1.0:
        torch.mm(a, b, out=out)
    elif c is None:
        torch.addmm(out if bias is None else bias, a, b, beta=0.0 if bias is None else 1.0, alpha=alpha, out=out)
    else:
        torch.addmm(c, a, b, beta=beta, alpha=alpha, out=out)
        if bias is not None:
            out.add_(bias)


def _widened(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, c: Tensor | None, beta: float, alpha: float) -> None:
    """16 bits times 16 bits to fp32, never rounded to 16 bits."""
    assert out.dtype == torch.float32 and a.dtype in NARROW, f"{a.dtype} to {out.dtype}"
    if a.is_cuda:
        source = out if c is None else c
        torch.ops.aten.addmm.dtype_out(source, a, b, torch.float32, beta=0.0 if c is None else beta, alpha=alpha, out=out)
    elif c is None:
        torch.mul(a.float() @ b.float(), alpha, out=out)
    else:
        # In this order: c may be out.
        torch.add(c if beta == 1.0 else c * beta, a.float() @ b.float(), alpha=alpha, out=out)
    if bias is not None:
        out.add_(bias)


def scaled(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out: Tensor, bias: Tensor | None, c: Tensor | None) -> None:
    """out = (a b) · scale_a · scale_b + bias + c."""
    left, right, found = (a, b, out) if strides_count(a.device) else packed(a, b, out)
    _scaled_mm(left, right, scale_a, scale_b, bias, None, out.dtype, use_fast_accum=True, out=found)
    if found is not out:
        out.copy_(found)
    if c is not None:
        out.add_(c)


@functools.cache
def strides_count(device: torch.device) -> bool:
    """Whether torch's product with a scale a row reads and writes rows by their strides. Its kernel for sm_89 takes K and N for
    them: rows with room behind them, as ours have, would be read and written at wrong places."""
    return torch.cuda.get_device_capability(device) != (8, 9)


def packed(a: Tensor, b: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a `[M, K]`, b `[K, N]` (transposed) and a place for out `[M, N]` without room behind their rows: themselves or copies."""
    return a.contiguous(), b.t().contiguous().t(), out if out.is_contiguous() else out.new_empty(out.shape)
