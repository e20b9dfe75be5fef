"""cuBLASLt by ctypes, on the library that torch has loaded: a product's descriptors, its algorithms, and the call itself.

Why: torch takes the library's first guess at an algorithm, and the best of the eight that it offers is up to 9 % faster on the
shapes of a decoder layer (H200). A foreign call on prepared descriptors is also less host time than torch's own way there.
Reductions between parts of K (split-K) are asked for in fp32 and as a separate step: one rounding at the end, and the same bits
in every run of the same algorithm.

The library is column-major. A row-major matrix is its column-major transpose, so D = A B is given to it as Dᵀ = Bᵀ Aᵀ: b is its
first operand, a its second, and its rows are our columns.
"""

from __future__ import annotations

import ctypes as c
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# From cublasLt.h and library_types.h, which do not change between versions.
COMPUTE_32F = 68
E4M3 = torch.float8_e4m3fn
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14, E4M3: 28}
TRANSA, TRANSB, EPILOGUE, BIAS_POINTER = 3, 4, 7, 8
SCALE_POINTERS, SCALE_MODES, FAST_ACCUMULATION, BIAS_TYPE = (17, 18), (31, 32), 25, 26
SCALE_A_ROW = 3
EPILOGUE_BIAS = 4
MAX_WORKSPACE, REDUCTIONS, ALIGNMENTS = 1, 3, (5, 6, 7, 8)
REDUCED_IN_FP32 = 2
WORKSPACE = 32 << 20
"""Bytes; what torch gives cuBLAS on Hopper as well."""
ALIGNED = 256
"""More alignment than this is of no use to any algorithm."""

Call = Callable[..., int]
"""Addresses of a, b, c and out, and for e4m3 of both scales; returns the library's status, 0 for success."""


class Refused(RuntimeError):
    """The library has no way to do this product, or is not there."""


class Algorithm(c.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", c.c_uint64 * 8),
        ("workspace", c.c_size_t),
        ("state", c.c_int),
        ("waves", c.c_float),
        ("reserved", c.c_int * 4),
    )

    def text(self) -> str:
        """To keep; good for the same version of the library."""
        return bytes(self.algo).hex()

    @classmethod
    def of(cls, text: str) -> Algorithm:
        """What `text` was made of. Raises ValueError for anything else."""
        found, raw = cls(), bytes.fromhex(text)
        if len(raw) != c.sizeof(found.algo):
            raise ValueError(f"{len(raw)} bytes are no algorithm")
        c.memmove(found.algo, raw, len(raw))
        return found


class Stored(NamedTuple):
    """How a matrix lies in memory: row by row, or (transposed) column by column; numbers between two rows (columns)."""

    transposed: bool
    ld: int


def stored(t: Tensor) -> Stored | None:
    """None where neither rows nor columns are contiguous, or where they overlap."""
    (rows, columns), (down, across) = t.shape, t.stride()
    if (across == 1 or columns == 1) and (rows == 1 or down >= columns):
        return Stored(False, columns if rows == 1 else down)
    if (down == 1 or rows == 1) and (columns == 1 or across >= rows):
        return Stored(True, rows if columns == 1 else across)
    return None


@dataclass(frozen=True)
class Problem:
    """D [m, n] = alpha · a [m, k] b [k, n] + beta · C + bias. accumulate: beta is not 0. in_place: C is D. aligned: bytes.

    Where dtype is e4m3, every row of a and every column of b has an fp32 scale.
    """

    m: int
    n: int
    k: int
    a: Stored
    b: Stored
    ldc: int
    ldd: int
    dtype: torch.dtype
    out: torch.dtype
    bias: bool
    accumulate: bool
    in_place: bool
    aligned: int

    @classmethod
    def of(cls, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, source: Tensor, beta: float, aligned: int) -> Problem:
        """source: C, which is `out` itself if there is no other. Raises Refused with the reason."""
        left, right, target, added = stored(a), stored(b), stored(out), stored(source)
        if left is None or right is None:
            raise Refused("an operand has no contiguous dimension")
        if target is None or target.transposed or added is None or added.transposed:
            raise Refused("the rows of the output are not contiguous")
        outs = (torch.bfloat16, torch.float16, torch.float32) if a.dtype == E4M3 else (a.dtype, torch.float32)
        if b.dtype != a.dtype or source.dtype != out.dtype or out.dtype not in outs:
            raise Refused(f"{a.dtype} times {b.dtype} plus {source.dtype} to {out.dtype}")
        if bias is not None and (bias.dtype != out.dtype or bias.stride(0) != 1):
            raise Refused(f"a bias of {bias.dtype} under {out.dtype}, or strided")
        (m, k), n = a.shape, b.shape[1]
        return cls(
            m, n, k, left, right, added.ld, target.ld, a.dtype, out.dtype,
            bias is not None, beta != 0.0, source.data_ptr() == out.data_ptr(), aligned,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """One line that says everything."""
        kinds = f"{str(self.dtype)[6:]}>{str(self.out)[6:]}"
        order = "".join("NT"[s.transposed] for s in (self.a, self.b))
        leading = f"{self.a.ld},{self.b.ld},{self.ldc},{self.ldd}"
        more = f"{' +bias' * self.bias}{' +C' * self.accumulate}{' in place' * (self.accumulate and self.in_place)}"
        return f"{self.m}x{self.n}x{self.k} {kinds} {order} {leading} aligned {self.aligned}{more}"


def check(status: int) -> None:
    if status:
        raise Refused(f"cuBLASLt status {status}")


class Library:
    """cuBLASLt and one handle a device. lib: the loaded library, or what behaves like it."""

    def __init__(self, lib: Any) -> None:
        self.lib = lib
        self.handles: dict[int, c.c_void_p] = {}

    @property
    def version(self) -> int:
        """Of the library, such as 130100."""
        return int(self.lib.cublasLtGetVersion())

    def handle(self, device: int) -> c.c_void_p:
        """Of a device, which must be the current one when it is first asked for."""
        if device not in self.handles:
            handle = c.c_void_p()
            check(self.lib.cublasLtCreate(c.byref(handle)))
            self.handles[device] = handle
        return self.handles[device]


@functools.cache
def load() -> Library:
    """The library of this process. Raises Refused where there is none."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    loaded = sorted({line.split()[-1] for line in lines if "libcublasLt.so" in line})
    if not loaded:
        raise Refused("torch has loaded no libcublasLt")
    try:
        lib = c.CDLL(loaded[0])
        lib.cublasLtGetVersion.restype = c.c_size_t
        # Everything is a pointer but the size of the workspace, which is as wide as one.
        lib.cublasLtMatmul.argtypes = [c.c_void_p] * 16
    except (OSError, AttributeError) as error:
        raise Refused(str(error)) from error
    return Library(lib)


class Plan:
    """The library's descriptors of a problem; freed with this object. Raises Refused.

    bias, scales (of a and of b): addresses; those of scales are given anew with every call.
    """

    def __init__(self, library: Library, device: int, problem: Problem, bias: int, scales: tuple[int, int] = (0, 0)) -> None:
        self.library, self.lib, self.problem, self.device = library, library.lib, problem, device
        self.handle = library.handle(device)
        self._layouts: list[c.c_void_p] = []
        self._description = c.c_void_p()
        p, lib = problem, self.lib
        check(lib.cublasLtMatmulDescCreate(c.byref(self._description), COMPUTE_32F, TYPES[torch.float32]))
        self._set(TRANSA, c.c_int32(p.b.transposed))
        self._set(TRANSB, c.c_int32(p.a.transposed))
        if p.bias:
            self._set(EPILOGUE, c.c_int32(EPILOGUE_BIAS))
            self._set(BIAS_POINTER, c.c_void_p(bias))
            self._set(BIAS_TYPE, c.c_int32(TYPES[p.out]))
        if p.dtype == E4M3:
            self._set(FAST_ACCUMULATION, c.c_int8(1))
            for mode, pointer, scale in zip(SCALE_MODES, SCALE_POINTERS, reversed(scales), strict=True):
                self._set(mode, c.c_int32(SCALE_A_ROW))
                self._set(pointer, c.c_void_p(scale))
        for dtype, rows, columns, transposed, ld in (
            (p.dtype, p.k, p.n, *p.b),
            (p.dtype, p.m, p.k, *p.a),
            (p.out, p.m, p.n, False, p.ldc),
            (p.out, p.m, p.n, False, p.ldd),
        ):
            layout = c.c_void_p()
            across, down = (rows, columns) if transposed else (columns, rows)
            check(
                lib.cublasLtMatrixLayoutCreate(c.byref(layout), TYPES[dtype], c.c_uint64(across), c.c_uint64(down), c.c_int64(ld))
            )
            self._layouts.append(layout)

    def _set(self, attribute: int, value: Any) -> None:
        size = c.c_size_t(c.sizeof(value))
        check(self.lib.cublasLtMatmulDescSetAttribute(self._description, attribute, c.byref(value), size))

    def __del__(self) -> None:
        for layout in self._layouts:
            self.lib.cublasLtMatrixLayoutDestroy(layout)
        if self._description:
            self.lib.cublasLtMatmulDescDestroy(self._description)

    def algorithms(self, wanted: int, workspace: int = WORKSPACE) -> list[Algorithm]:
        """Up to `wanted`, the library's favourite first. Raises Refused where there is none."""
        preference, found, count = c.c_void_p(), (Algorithm * wanted)(), c.c_int()
        check(self.lib.cublasLtMatmulPreferenceCreate(c.byref(preference)))
        try:
            alignments = [(name, c.c_uint32(self.problem.aligned)) for name in ALIGNMENTS]
            wishes = [(MAX_WORKSPACE, c.c_uint64(workspace)), (REDUCTIONS, c.c_uint32(REDUCED_IN_FP32)), *alignments]
            for attribute, value in wishes:
                size = c.c_size_t(c.sizeof(value))
                check(self.lib.cublasLtMatmulPreferenceSetAttribute(preference, attribute, c.byref(value), size))
            check(
                self.lib.cublasLtMatmulAlgoGetHeuristic(
                    self.handle, self._description, *self._layouts, preference, wanted, found, c.byref(count)
                )
            )
        finally:
            self.lib.cublasLtMatmulPreferenceDestroy(preference)
        usable = [found[i] for i in range(count.value) if found[i].state == 0 and found[i].workspace <= workspace]
        if not usable:
            raise Refused("no algorithm")
        return usable

    def takes(self, algorithm: Algorithm) -> bool:
        """Whether an algorithm from elsewhere does this problem."""
        found = Algorithm()
        status = self.lib.cublasLtMatmulAlgoCheck(
            self.handle, self._description, *self._layouts, c.byref(algorithm.algo), c.byref(found)
        )
        return bool(status == 0 and found.workspace <= WORKSPACE)

    def bound(self, algorithm: Algorithm, alpha: float, beta: float, workspace: int, stream: int) -> Call:
        """The product as a call with nothing left to look up."""
        matmul, handle, description = self.lib.cublasLtMatmul, self.handle, self._description
        for_b, for_a, for_c, for_out = self._layouts
        alpha_, beta_ = c.byref(c.c_float(alpha)), c.byref(c.c_float(beta))
        algo, room, size, stream_ = c.byref(algorithm.algo), c.c_void_p(workspace), c.c_void_p(WORKSPACE), c.c_void_p(stream)

        # `plan` and `held` own what the descriptors and the pointers above belong to.
        def call(a: int, b: int, source: int, out: int, plan: Plan = self, held: Algorithm = algorithm) -> int:
            status: int = matmul(
                handle, description, alpha_, b, for_b, a, for_a, beta_, source, for_c, out, for_out, algo, room, size, stream_
            )
            return status

        if self.problem.dtype != E4M3:
            return call
        change, size_of_one = self.lib.cublasLtMatmulDescSetAttribute, c.c_size_t(c.sizeof(c.c_void_p))
        first, second = c.c_void_p(), c.c_void_p()
        for_first, for_second = c.byref(first), c.byref(second)

        def scaled(a: int, b: int, source: int, out: int, scale_a: int, scale_b: int) -> int:
            first.value, second.value = scale_b, scale_a
            status: int = change(description, SCALE_POINTERS[0], for_first, size_of_one)
            status = status or change(description, SCALE_POINTERS[1], for_second, size_of_one)
            return status or call(a, b, source, out)

        return scaled
