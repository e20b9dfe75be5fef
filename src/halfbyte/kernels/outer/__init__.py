"""`outer`: gradients of several low-rank factors B at once, total += s dYᵀ XA for each.

Why: one such product does next to no arithmetic and ends with the reading of dY; as products of their own, those of narrow members
(k, v) leave most of a GPU idle, and each costs a launch with a fill and a reduction beside it (cuBLAS splits along the tokens).
Together they are one launch: for q, k and v 44 us instead of 56 on an H200. For a lone product cuBLAS stays ahead.
Cost: each `big` is read once; fp32 scratch of a few MB.

Letters: T tokens, n columns of a member, r its rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.kernels.dispatch import twin
from halfbyte.kernels.gemm.reference import NARROW
from halfbyte.kernels.outer import reference
from halfbyte.kernels.outer.reference import Outer

__all__ = ["Outer", "outer"]

WIDEST = 64
"""Ranks up to which a program's sums stay in registers."""


def outer(products: Sequence[Outer]) -> None:
    """total += scale * bigᵀ small for each, exact in fp32 but for the order of the sum, which is the same in every run."""
    together = [p for p in products if p.small.shape[1] <= WIDEST and p.big.dtype in NARROW and p.total.is_contiguous()]
    if len(together) < 2 or twin(products[0].big.device) != "fused":
        reference.outer(products)
        return
    from halfbyte.kernels.outer import fused

    fused.outer(together)
    if len(together) < len(products):
        reference.outer([p for p in products if not any(p is one for one in together)])
