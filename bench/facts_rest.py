"""The smaller facts of `facts_gpu.py`: rank products, host copies beside GEMMs, and what a call costs the host.

Letters: T = tokens, N = outputs and K = inputs of a group, R = ranks of its adapters together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from gputime import CUDA, DEVICE, error, kernels, sync, turns
from torch import Tensor

if TYPE_CHECKING:
    from facts_gpu import Group

Report = Callable[..., None]
UNSUPPORTED = (RuntimeError, NotImplementedError, TypeError, ValueError)


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16) * scale


def skinny(report: Report, tokens: int, groups: Sequence[Group]) -> None:
    """XA, dYB, dA and dB: time against the bytes they must move at copy speed, kernels, and whether fp32 accumulation is right."""
    copied = random(1 << (28 if CUDA else 16))
    target = torch.empty_like(copied)
    copy = 2 * copied.nbytes / turns({"copy": lambda: target.copy_(copied)}, 5)["copy"] / 1e6
    report(what="copy", gb_per_s=round(copy))
    for g in groups:
        ways: dict[str, tuple[Callable[[], Any], int]] = {}
        for name, (f, got, truth, nbytes) in _small_products(g, tokens).items():
            try:
                f()
                wrong = error(got(), truth())
            except UNSUPPORTED as failure:
                report(what="skinny", group=g.name, way=name, failed=str(failure).split("\n")[0][:200])
                continue
            if wrong < (1e-4 if "fp32" in name else 1e-2):
                ways[name] = (f, nbytes)
            report(what="skinny check", group=g.name, way=name, error=float(f"{wrong:.2g}"), right=name in ways)
        functions = {name: f for name, (f, _) in ways.items()}
        launched = kernels(functions)
        for _ in range(2):
            milliseconds = turns(functions, 10, lead=True)
        for name, ms in milliseconds.items():
            floor = ways[name][1] / copy / 1e3
            seen = {"launches": len(launched[name]), "kernels": launched[name]}
            report(what="skinny", group=g.name, way=name, us=round(ms * 1e3, 1), floor_us=round(floor, 1), **seen)


Product = tuple[Callable[[], Any], Callable[[], Tensor], Callable[[], Tensor], int]


def _small_products(g: Group, tokens: int) -> dict[str, Product]:
    """name -> (run, its result, the truth in float64, bytes it must move)."""
    n, k, r = g.rows, g.width, g.rank
    x, dy, s = random(tokens, k + r), random(tokens, n + r), random(n + r, k + r, scale=0.02)
    x_, dy_, a, b = x[:, :k], dy[:, :n], s[n:, :k], s[:n, k:]
    a_c, b_c, b_t = a.contiguous(), b.contiguous(), b.t().contiguous()
    xa, dyb = random(tokens, r), random(tokens, r)
    low, low_y = torch.empty_like(xa), torch.empty_like(dyb)
    rows = slice(tokens - 64, tokens)
    read_x, read_dy = 2 * tokens * (k + r), 2 * tokens * (n + r)
    products: dict[str, Product] = {}

    def narrow(name: str, out: Tensor, left: Tensor, right: Tensor, nbytes: int) -> None:
        def truth() -> Tensor:
            return left[rows].double() @ right.double()

        products[name] = (lambda: torch.mm(left, right, out=out), lambda: out[rows], truth, nbytes)

    narrow("XA into the tail, A of the matrix", x[:, k:], x_, a.t(), read_x)
    narrow("XA into the tail, A alone", x[:, k:], x_, a_c.t(), read_x)
    narrow("XA alone, A alone", low, x_, a_c.t(), read_x)
    narrow("dYB into the tail, B of the matrix", dy[:, n:], dy_, b, read_dy)
    narrow("dYB into the tail, B alone", dy[:, n:], dy_, b_c, read_dy)
    narrow("dYB into the tail, B^T alone", dy[:, n:], dy_, b_t.t(), read_dy)
    narrow("dYB alone, B alone", low_y, dy_, b_c, read_dy)
    products |= _gradients("dA", torch.zeros(r, k, device=DEVICE), dyb.t(), x_, read_x)
    products |= _gradients("dB", torch.zeros(n, r, device=DEVICE), dy_.t(), xa, read_dy)
    products |= _gradients("dB^T", torch.zeros(r, n, device=DEVICE), xa.t(), dy_, read_dy)
    return products


def _gradients(name: str, grad: Tensor, left: Tensor, right: Tensor, nbytes: int) -> dict[str, Product]:
    """grad (fp32) += left @ right, three ways. The truth: the gradient before plus the product."""
    start = torch.randn_like(grad)
    low = torch.empty(grad.shape, dtype=torch.bfloat16, device=grad.device)
    nbytes += 8 * grad.numel()

    def fresh(f: Callable[[], Any]) -> Callable[[], Tensor]:
        def twice() -> Tensor:
            grad.copy_(start)
            f()
            f()
            return grad

        return twice

    def truth() -> Tensor:
        return start.double() + 2 * (left.double() @ right.double())

    def in_bf16() -> None:
        torch.mm(left, right, out=low)
        grad.add_(low)

    def then_add() -> None:
        grad.add_(torch.mm(left, right, out_dtype=torch.float32))

    def accumulate() -> None:
        torch.addmm(grad, left, right, out_dtype=torch.float32, out=grad)

    ways = {"bf16, then add": in_bf16, "fp32, then add": then_add, "fp32 addmm in place": accumulate}
    return {f"{name}, {way}": (f, fresh(f), truth, nbytes) for way, f in ways.items()}


def bus(report: Report, tokens: int) -> None:
    """Pinned copies each way, alone and beside GEMMs, and what the GEMMs lose: layer inputs of 8,192 x 4,096 bf16, 16 in a row."""
    if not CUDA:
        return
    side, back = torch.cuda.Stream(), torch.cuda.Stream()
    device = [random(tokens, 4096) for _ in range(8)]
    host = [torch.empty(tokens, 4096, dtype=torch.bfloat16, pin_memory=True) for _ in range(8)]
    incoming = [torch.empty_like(t) for t in device]
    x, w = random(tokens, 4096), random(28672, 4096, scale=0.02)
    y = torch.empty(tokens, 28672, dtype=torch.bfloat16, device=DEVICE)

    def out_(times: int) -> None:
        with torch.cuda.stream(side):
            for i in range(times):
                host[i % 8].copy_(device[i % 8], non_blocking=True)

    def in_(times: int) -> None:
        with torch.cuda.stream(back):
            for i in range(times):
                incoming[i % 8].copy_(host[i % 8], non_blocking=True)

    def multiply(times: int) -> None:
        for _ in range(times):
            torch.mm(x, w.t(), out=y)

    def elapsed(stream: torch.cuda.Stream, work: Callable[[], Any]) -> Callable[[], float]:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record(stream)
        work()
        last.record(stream)
        return lambda: first.elapsed_time(last)

    nbytes, copies, gemms = device[0].nbytes, 32, 20
    main = torch.cuda.current_stream()
    multiply(400)
    for kinds in ((), ("out",), ("in",), ("out", "in")):
        for beside in (False, True):
            if not kinds and not beside:
                continue
            # The same load before each, so that the chip is equally hot.
            multiply(150)
            sync()
            ms = {}
            if "out" in kinds:
                ms["d2h"] = elapsed(side, lambda: out_(copies))
            if "in" in kinds:
                ms["h2d"] = elapsed(back, lambda: in_(copies))
            if beside:
                ms["gemm"] = elapsed(main, lambda: multiply(gemms))
            sync()
            read = {name: f() for name, f in ms.items()}
            rates = {f"{name}_gb_per_s": round(copies * nbytes / t / 1e6, 1) for name, t in read.items() if name != "gemm"}
            slow = {"gemm_ms": round(read["gemm"] / gemms, 4)} if beside else {}
            report(what="bus", copies="+".join(kinds) or "none", beside_gemms=beside, **rates, **slow)


# Kernels that do nothing, with as many arguments as real ones have.
@triton.jit
def _five(a, b, c, n, BLOCK: tl.constexpr):
    pass


@triton.jit
def _fifteen(a, b, c, d, e, f, g, h, n1, n2, n3, n4, n5, eps, BLOCK: tl.constexpr):
    pass


@triton.jit
def _twentyfive(
    a, b, c, d, e, f, g, h, i, j, k, m, n1, n2, n3, n4, n5, n6, n7, n8, n9, eps, scale, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    pass


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def calls(report: Report) -> None:
    """Microseconds of host time a call, best of five batches of 200; the GPU's work is tiny and never the limit."""
    x, w = random(128, 128), random(128, 128)
    y, big = torch.empty_like(x), random(256, 256)
    leaf = x.clone().requires_grad_()
    t = [random(16) for _ in range(12)]
    numbers = list(range(17, 26))
    functions: dict[str, Callable[[], Any]] = {
        "mm out": lambda: torch.mm(x, w, out=y),
        "mm out, strided views made each time": lambda: torch.mm(big[:128, :128], w.t(), out=big[128:, :128]),
        "mm": lambda: torch.mm(x, w),
        "addmm_": lambda: y.addmm_(x, w),
        "empty": lambda: torch.empty(128, 128, dtype=torch.bfloat16, device=DEVICE),
        "empty_strided": lambda: torch.empty_strided((128, 128), (144, 1), dtype=torch.bfloat16, device=DEVICE),
        "view": lambda: x.view(64, 256),
        "slice columns": lambda: big[:, :128],
        "t": lambda: x.t(),
        "add_": lambda: y.add_(x),
        "autograd function, forward": lambda: _Nothing.apply(leaf),
        "sdpa op": lambda: torch.nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    }
    if CUDA:
        functions |= {
            "triton, 5 arguments": lambda: _five[(1,)](t[0], t[1], t[2], 17, BLOCK=64),
            "triton, 15 arguments": lambda: _fifteen[(1,)](*t[:8], *numbers[:5], 1e-5, BLOCK=64),
            "triton, 25 arguments": lambda: _twentyfive[(1,)](*t, *numbers, 1e-5, 2.0, BLOCK=64, ROWS=1),
            "current_stream": lambda: torch.cuda.current_stream(),
            "event record": torch.cuda.Event().record,
        } | _compiled(t, numbers)
    for name, f in functions.items():
        try:
            f()
        except UNSUPPORTED as failure:
            report(what="call", call=name, failed=str(failure).split("\n")[0][:200])
            continue
        best = min(_batch(f) for _ in range(5))
        report(what="call", call=name, us=round(best * 1e6, 2))


def _compiled(t: list[Tensor], numbers: list[int]) -> dict[str, Callable[[], Any]]:
    """The same kernels called through their compiled handle, and a CUDA graph of 64 kernels."""
    handle = _twentyfive[(1,)](*t, *numbers, 1e-5, 2.0, BLOCK=64, ROWS=1)
    arguments = (*t, *numbers, 1e-5, 2.0, 64, 1)
    x = random(128, 128)
    x.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(64):
            x.add_(1)
    return {
        "triton, 25 arguments, compiled handle": lambda: handle[(1, 1, 1)](*arguments),
        "graph of 64 kernels": graph.replay,
    }


def _batch(f: Callable[[], Any], count: int = 200) -> float:
    sync()
    start = time.perf_counter()
    for _ in range(count):
        f()
    return (time.perf_counter() - start) / count
