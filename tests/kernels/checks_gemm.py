"""Proofs of `gemm` on one device, without pytest: every layout against float64, what is measured, and graphs.

python tests/kernels/checks_gemm.py cuda
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

if __name__ == "__main__":
    ROOT = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch
from torch import Tensor

from halfbyte.kernels.gemm import matmul, reference
from kernels.checks import as_wrong_as_honest, poisoned
from kernels.runner import main, named

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = ((64, 48, 80), (63, 60, 431), (1, 16, 24), (24, 1, 16), (5, 16, 1), (256, 128, 512))
"""m, n, k; the odd ones have rows at addresses that no tensor core likes."""


def matrix(rows: int, columns: int, dtype: torch.dtype, device: str, transposed: bool, seed: int, behind: int = 16) -> Tensor:
    """Random, with `behind` NaN columns behind every row (of the transposed one)."""
    generator = torch.Generator().manual_seed(seed)
    down, across = (columns, rows) if transposed else (rows, columns)
    whole = torch.full((down, across + behind), float("nan"), dtype=dtype, device=device)
    whole[:, :across] = torch.randn(down, across, generator=generator).to(device, dtype)
    return whole[:, :across].T if transposed else whole[:, :across]


def check_layouts(device: str) -> None:
    """Every dtype, transposition, kind of addend and bias, rows strided; nothing outside of the output is touched."""
    shapes = SHAPES[:-1] if device == "cpu" else SHAPES
    for dtype, shape in itertools.product((torch.bfloat16, torch.float16, torch.float32), shapes):
        for left, right in itertools.product((False, True), repeat=2):
            for wide, addend, biased in itertools.product((False, True), ("none", "own", "other"), (False, True)):
                out_dtype = torch.float32 if wide else dtype
                if wide and dtype == torch.float32:
                    continue
                prove(device, dtype, out_dtype, shape, left, right, addend, biased)


def prove(
    device: str, dtype: torch.dtype, out_dtype: torch.dtype, shape: Shape, left: bool, right: bool, addend: str, biased: bool
) -> None:
    m, n, k = shape
    a, b = matrix(m, k, dtype, device, left, 1), matrix(k, n, dtype, device, right, 2)
    bias = matrix(1, n, out_dtype, device, False, 3)[0] if biased else None
    c = matrix(m, n, out_dtype, device, False, 4) if addend != "none" else None
    beta, alpha = (0.0, 1.0) if c is None else (1.0, 0.5)
    truth = alpha * (a.double() @ b.double())
    if c is not None:
        truth = truth + beta * c.double()
    if bias is not None:
        truth = truth + bias.double()
    honest = torch.full((m, n), float("nan"), dtype=out_dtype, device=device)
    reference.matmul(a, b, honest, bias, c, beta, alpha)
    with poisoned():
        whole = torch.empty(m, n + 16, dtype=out_dtype, device=device)
        out = whole[:, :n]
        if addend == "own":
            assert c is not None
            out.copy_(c)
            c = None
        matmul(a, b, out, bias=bias, c=c, beta=beta, alpha=alpha)
    assert whole[:, n:].isnan().all(), "wrote behind its rows"
    name = f"{dtype}>{out_dtype} {shape} {'NT'[left]}{'NT'[right]} c={addend} bias={biased}"
    as_wrong_as_honest(name, out, honest, truth)


def check_measured(device: str) -> None:
    """A shape that is measured (a GPU only): right at once and ever after, also where its output is what it adds to."""
    if device == "cpu":
        return
    size = 2048
    for addend, right in itertools.product(("none", "own", "other"), (False, True)):
        a, b = (matrix(size, size, torch.bfloat16, device, flag, i) for i, flag in enumerate((False, right)))
        c = matrix(size, size, torch.bfloat16, device, False, 4)
        beta = 0.0 if addend == "none" else 1.0
        truth = a.double() @ b.double() + beta * c.double()
        honest, whole = torch.empty_like(c), torch.empty(size, size + 64, dtype=torch.bfloat16, device=device)
        reference.matmul(a, b, honest, None, c, beta, 1.0)
        outs = []
        for _ in range(3):
            out = whole[:, :size].copy_(c) if addend == "own" else whole[:, :size].fill_(float("nan"))
            matmul(a, b, out, c=c if addend == "other" else None, beta=beta)
            as_wrong_as_honest(f"measured, c={addend}", out, honest, truth)
            outs.append(out.clone())
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[1], outs[2]), "two calls differ"


def check_graph(device: str) -> None:
    """Captured (a GPU only): a known product, a small new one and a large new one, with other numbers when it is played again."""
    if device == "cpu":
        return
    for size, known in ((256, True), (320, False), (2304, False)):
        a, b = (matrix(size, size, torch.bfloat16, device, False, i) for i in range(2))
        out = torch.empty(size, size, dtype=torch.bfloat16, device=device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if known:
                matmul(a, b, out)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            matmul(a, b, out)
        a.copy_(a.flip(0).clone())
        out.fill_(float("nan"))
        graph.replay()
        as_wrong_as_honest(f"graph {size}", out, torch.mm(a, b), a.double() @ b.double())


CHECKS = named(globals())

if __name__ == "__main__":
    sys.exit(main(CHECKS))
