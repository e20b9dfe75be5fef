"""cuBLASLt's own list of algorithms for a product, each timed: whether the first guess, which torch takes, is the best.

Called through ctypes on the library that torch has loaded. Plain bf16 products with fp32 accumulation only. A row-major matrix is
here the column-major one with rows and columns exchanged: Y [T, N] = X W^T becomes Y^T = W X^T.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gputime import CUDA, DEVICE, load, turns
from torch import Tensor

if TYPE_CHECKING:
    from facts_gpu import Group

# From cublasLt.h and library_types.h.
COMPUTE_32F, R_32F, R_16BF = 68, 0, 14
TRANSA, TRANSB, MAX_WORKSPACE = 3, 4, 1
WORKSPACE = 64 << 20
TRIED = 16
WORTH = 1.02
"""A gain in turn from which on a second look is taken, each algorithm by itself."""


class Algorithm(c.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", c.c_uint64 * 8),
        ("workspace", c.c_size_t),
        ("state", c.c_int),
        ("waves", c.c_float),
        ("reserved", c.c_int * 4),
    )


def _library() -> c.CDLL:
    """The libcublasLt of this process."""
    torch.mm(*(torch.zeros(16, 16, device=DEVICE, dtype=torch.bfloat16),) * 2)
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcublasLt.so" in line}
    return c.CDLL(sorted(loaded)[0])


class Lt:
    """A handle, a workspace, and the algorithms for one product."""

    def __init__(self) -> None:
        self.lib = _library()
        self.handle = c.c_void_p()
        self.check(self.lib.cublasLtCreate(c.byref(self.handle)))
        self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=DEVICE)
        self.one, self.zero = c.c_float(1.0), c.c_float(0.0)

    @staticmethod
    def check(status: int) -> None:
        if status:
            raise RuntimeError(f"cuBLASLt status {status}")

    def _layout(self, matrix: Tensor) -> c.c_void_p:
        """A row-major matrix as the column-major one with rows and columns exchanged."""
        layout = c.c_void_p()
        rows, columns = matrix.shape
        self.check(
            self.lib.cublasLtMatrixLayoutCreate(
                c.byref(layout), R_16BF, c.c_uint64(columns), c.c_uint64(rows), c.c_int64(matrix.stride(0))
            )
        )
        return layout

    def ways(self, x: Tensor, w: Tensor, out: Tensor, transposed: bool) -> list[Callable[[], Any]]:
        """out = x @ w.T if `transposed` else x @ w: one function an algorithm, the library's favourite first."""
        description, preference = c.c_void_p(), c.c_void_p()
        self.check(self.lib.cublasLtMatmulDescCreate(c.byref(description), COMPUTE_32F, R_32F))
        for attribute, value in ((TRANSA, int(transposed)), (TRANSB, 0)):
            operation = c.c_int32(value)
            self.check(self.lib.cublasLtMatmulDescSetAttribute(description, attribute, c.byref(operation), c.c_size_t(4)))
        self.check(self.lib.cublasLtMatmulPreferenceCreate(c.byref(preference)))
        size = c.c_uint64(WORKSPACE)
        self.check(self.lib.cublasLtMatmulPreferenceSetAttribute(preference, MAX_WORKSPACE, c.byref(size), c.c_size_t(8)))
        layouts = [self._layout(t) for t in (w, x, out)]
        found, count = (Algorithm * TRIED)(), c.c_int()
        self.check(
            self.lib.cublasLtMatmulAlgoGetHeuristic(
                self.handle, description, *layouts, layouts[2], preference, TRIED, found, c.byref(count)
            )
        )

        def way(algorithm: Algorithm) -> Callable[[], Any]:
            stream = c.c_void_p(torch.cuda.current_stream().cuda_stream)
            pointers = [c.c_void_p(t.data_ptr()) for t in (w, x, out)]

            def run() -> None:
                self.check(
                    self.lib.cublasLtMatmul(
                        self.handle, description, c.byref(self.one), pointers[0], layouts[0], pointers[1], layouts[1],
                        c.byref(self.zero), pointers[2], layouts[2], pointers[2], layouts[2], c.byref(algorithm.algo),
                        c.c_void_p(self.workspace.data_ptr()), c.c_size_t(WORKSPACE), stream,
                    )
                )  # fmt: skip

            return run

        return [way(found[i]) for i in range(count.value) if found[i].state == 0]


def algorithms(report: Callable[..., None], tokens: int, groups: Sequence[Group]) -> None:
    """The eight GEMMs, plain and augmented: torch's call, the favourite of cuBLASLt and the best of its first 16, hot."""
    if not CUDA:
        return
    lt = Lt()
    for g in groups:
        for rank in (0, g.rank):
            s = torch.randn(g.rows + rank, g.width + rank, device=DEVICE, dtype=torch.bfloat16) * 0.02
            x = torch.randn(tokens, g.width + rank, device=DEVICE, dtype=torch.bfloat16)
            dy = torch.randn(tokens, g.rows + rank, device=DEVICE, dtype=torch.bfloat16)
            y = torch.empty(tokens, g.rows, device=DEVICE, dtype=torch.bfloat16)
            dx = torch.empty(tokens, g.width, device=DEVICE, dtype=torch.bfloat16)
            for direction, left, right, out in (("forward", x, s[: g.rows], y), ("dX", dy, s[:, : g.width], dx)):
                forward = direction == "forward"
                matrix = right.t() if forward else right
                ways = lt.ways(left, right, out, forward)
                truth = torch.mm(left, matrix)
                functions: dict[str, Callable[[], Any]] = {"torch": lambda a=left, b=matrix, o=out: torch.mm(a, b, out=o)}
                for i, f in enumerate(ways):
                    out.zero_()
                    f()
                    if torch.allclose(out, truth, rtol=0.05, atol=0.05 * float(truth.abs().max())):
                        functions[str(i)] = f
                load(functions, 0.3)
                ms = turns(functions, 10)
                best = min(ms, key=lambda name: ms[name])
                lasting = sustained(functions["torch"], functions[best]) if ms["torch"] / ms[best] > WORTH else None
                report(
                    what="algorithms", group=g.name, direction=direction, rank=rank, algorithms=len(functions) - 1,
                    torch_ms=round(ms["torch"], 4), first_ms=round(ms.get("0", 0.0), 4), best_ms=round(ms[best], 4), best=best,
                    gain=round(ms["torch"] / ms[best] - 1, 4), sustained_gain=lasting,
                )  # fmt: skip


def sustained(one: Callable[[], Any], other: Callable[[], Any], seconds: float = 0.6) -> float:
    """Gain of `other` over `one`, each alone for a while, twice: a chip at its power limit slows what draws more."""
    totals = [0.0, 0.0]
    once = turns({"one": one}, 5)["one"]
    count = max(1, round(seconds * 1e3 / once))
    for _ in range(2):
        for i, f in enumerate((one, other)):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for j in range(count):
                # The first third only brings the chip to its own temperature and clock.
                if j == count // 3:
                    first.record()
                f()
            last.record()
            torch.cuda.synchronize()
            totals[i] += first.elapsed_time(last)
    return round(totals[0] / totals[1] - 1, 4)
