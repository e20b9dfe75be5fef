"""`gemm`: a product of two matrices into rows that are there already, with what is added to it on the way out.

    out = alpha · a b + beta · c + bias          a [M, K], b [K, N], c and out [M, N], bias [N]

Why not torch.mm: it takes the first algorithm that cuBLAS guesses, and the best that cuBLAS has is 3 % faster over a decoder layer
(H200, 8,192 tokens; up to 9 % for one product); its call is 15 to 25 us of host time on that machine; it adds `c` of another place
only by copying it first.
Cost: a measurement at the first sight of a large shape (`choice.BUDGET`), remembered on disk; 32 MiB a stream.

CUDA: 16-bit operands, and e4m3 ones with their scales, through cuBLASLt (`vendor`), everything else through torch, like all CPUs
(`reference`).
"""

from __future__ import annotations

from torch import Tensor

from halfbyte.kernels.gemm import reference

__all__ = ["matmul", "report", "scaled"]


def matmul(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    c: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> None:
    """out = alpha · a b + beta · c + bias, rounded once.

    a `[M, K]`, b `[K, N]`: each may be a transposed view. out `[M, N]`: rows may be strided; the operands' dtype, or fp32 for
    16-bit ones. c: like out; None is out itself, read only where beta is not 0. bias `[N]`.
    """
    if a.is_cuda and a.dtype in reference.NARROW:
        from halfbyte.kernels.gemm import vendor

        if vendor.matmul(a, b, out, bias, c, beta, alpha):
            return
    reference.matmul(a, b, out, bias, c, beta, alpha)


def scaled(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out: Tensor, bias: Tensor | None = None, c: Tensor | None = None
) -> None:
    """out = (a b) · scale_a · scale_b + bias + c. CUDA only.

    a e4m3 `[M, K]`, b e4m3 `[K, N]`, the transposed view of a matrix by rows; scale_a fp32 `[M, 1]`, scale_b fp32 `[1, N]`; out
    `[M, N]` 16-bit, rows may be strided; c: like out. Where torch does it, c is added by a pass of its own.
    """
    from halfbyte.kernels.gemm import vendor

    if not vendor.matmul(a, b, out, bias, c, 0.0 if c is None else 1.0, 1.0, (scale_a, scale_b)):
        reference.scaled(a, b, scale_a, scale_b, out, bias, c)


def report() -> None:
    """Logs what was measured since the last report in one line, if anything was."""
    from halfbyte.kernels.gemm import vendor

    vendor.report()
