"""The reference: one product each, in fp32 (on CUDA inside the product, without a copy of its operands)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from halfbyte.kernels.gemm import matmul
from halfbyte.kernels.gemm.reference import NARROW


class Outer(NamedTuple):
    """total `[n, r]` (fp32) += scale * bigᵀ small, with big `[T, n]` and small `[T, r]`, rows of any stride."""

    total: Tensor
    big: Tensor
    small: Tensor
    scale: float = 1.0


def outer(products: Sequence[Outer]) -> None:
    """See `halfbyte.kernels.outer.outer`."""
    for total, big, small, scale in products:
        if total.is_cuda and big.dtype in NARROW:
            matmul(big.T, small, total, beta=1.0, alpha=scale)
        else:
            total.add_(big.T.float() @ small.float(), alpha=scale)
