"""Proofs of `kernels.outer` on one device, as `checks.py`: against float64.

PYTHONPATH=src:tests python -m kernels.checks_outer cpu | cuda
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from halfbyte.kernels.outer import Outer, outer
from kernels.checks import as_wrong_as_honest, poisoned
from kernels.checks_elementwise import Windows
from kernels.runner import main, named

# Tokens, and columns and rank of each member. Kernels split tokens into a power of two of parts: with 1,000 none of them is empty.
CASES: tuple[tuple[int, tuple[tuple[int, int], ...]], ...] = (
    (63, ((130, 16), (64, 3), (17, 20))),
    (300, ((257, 16),)),
    (5, ((8, 48), (600, 40))),
    (1000, ((128, 16), (256, 16), (60, 16), (431, 16))),
    (33, ((40, 8), (40, 8), (24, 80), (24, 8), (24, 8), (24, 8))),
)


def _products(w: Windows, tokens: int, members: tuple[tuple[int, int], ...]) -> list[Outer]:
    """Members 0 and 1 lie in one tensor each, the others in tensors of their own."""
    bigs = w.normal(tokens, members[0][0] + (members[1][0] if len(members) > 1 else 0))
    found, at = [], 0
    for i, (n, r) in enumerate(members):
        big = bigs[:, at : at + n] if i < 2 else w.normal(tokens, n)
        at += n
        found.append(Outer(torch.randn(n, r, generator=w.generator).to(w.device), big, w.normal(tokens, r), 0.7 - 0.2 * i))
    return found


def check_outer(device: str) -> None:
    """Several members of different strides in one call, added to what is there; twice the same bits."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tokens, members in CASES if dtype is torch.bfloat16 else CASES[:1]:
            w = Windows(device, dtype)
            products = _products(w, tokens, members)
            before = [p.total.clone() for p in products]
            results: list[list[Tensor]] = []
            for _ in range(2):
                for p, start in zip(products, before, strict=True):
                    p.total.copy_(start)
                with poisoned():
                    outer(products)
                results.append([p.total.clone() for p in products])
            for p, start, again in zip(products, before, results[0], strict=True):
                assert torch.equal(p.total, again), f"{dtype} {tokens} {members}: another run, other bits"
                truth = start.double() + p.scale * p.big.double().T @ p.small.double()
                honest = start + p.scale * (p.big.float().T @ p.small.float())
                as_wrong_as_honest(f"{dtype} {tokens} {members}", p.total, honest, truth)
            w.untouched()


CHECKS = named(globals())


if __name__ == "__main__":
    sys.exit(main(CHECKS))
