"""The products of a decoder layer on a CUDA GPU: `kernels.gemm` against torch.mm, hot and in turn. Needs torch and cuBLAS.

    python bench/gemm_gpu.py --out DIR          # about half a minute; writes DIR/gemm_gpu.jsonl and DIR/gemm_gate.json

The gate: `tests/kernels/checks_gemm.py`; if a check is off, nothing is reported and the exit code is 1.
Shapes are those of an 8B Llama 3 with adapters of rank 16: of each group XA and Y forward, s dY B and dX backward (sixteen
products), and dA and dB. Choices are made anew, in a directory of the run. The profiler comes last: it slows every later launch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "bench")]
os.environ["HALFBYTE_CACHE"] = tempfile.mkdtemp()

import torch  # noqa: E402
from gputime import CUDA, DEVICE, kernels, load, sync, turns  # noqa: E402
from torch import Tensor  # noqa: E402

from halfbyte.kernels.gemm import choice, matmul, reference, vendor  # noqa: E402
from halfbyte.kernels.gemm.cublaslt import Plan, Problem  # noqa: E402
from halfbyte.kernels.outer import Outer, outer  # noqa: E402
from kernels import checks_gemm  # noqa: E402
from kernels.runner import outcomes  # noqa: E402

GROUPS = {"qkv": (6144, 4096, 48), "o": (4096, 4096, 16), "gate+up": (28672, 4096, 32), "down": (4096, 14336, 16)}
BF16 = torch.bfloat16
Product = tuple[Tensor, Tensor, Tensor, float]


class Report:
    """JSON lines, flushed at once, and the log of the package among them."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("w", encoding="utf-8")
        self.start = time.perf_counter()

    def __call__(self, **line: Any) -> None:
        text = json.dumps(line | {"at_s": round(time.perf_counter() - self.start, 1)})
        print(text, flush=True)
        print(text, file=self.file, flush=True)


class ToReport(logging.Handler):
    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report

    def emit(self, record: logging.LogRecord) -> None:
        self.report(what="log", level=record.levelname, text=record.getMessage())


def products(tokens: int) -> tuple[dict[str, Product], dict[str, Product]]:
    """The sixteen as a, b, out, beta; and dA, dB, which are added to fp32."""
    found: dict[str, Product] = {}
    gradients: dict[str, Product] = {}
    for name, (n, k, r) in GROUPS.items():
        x, dy, s = (
            torch.randn(rows, columns, device=DEVICE, dtype=BF16) * factor
            for rows, columns, factor in ((tokens, k + r, 1.0), (tokens, n + r, 1.0), (n + r, k + r, 0.02))
        )
        y, dx = torch.empty_like(dy)[:, :n], torch.empty(tokens, k, device=DEVICE, dtype=BF16)
        found[f"{name} XA"] = (x[:, :k], s[n:, :k].T, x[:, k:], 0.0)
        found[f"{name} Y"] = (x, s[:n].T, y, 0.0)
        found[f"{name} dYB"] = (dy[:, :n], s[:n, k:], dy[:, n:], 0.0)
        found[f"{name} dX"] = (dy, s[:, :k], dx, 0.0)
        gradients[f"{name} dA"] = (dy[:, n:].T, x[:, :k], torch.zeros(r, k, device=DEVICE), 1.0)
        gradients[f"{name} dB"] = (dy[:, :n].T, x[:, k : k + 16], torch.zeros(n, 16, device=DEVICE), 1.0)
    return found, gradients


def ours(product: Product) -> Callable[[], Any]:
    a, b, out, beta = product
    return lambda: matmul(a, b, out, beta=beta)


def torchs(product: Product) -> Callable[[], Any]:
    a, b, out, beta = product
    return lambda: reference.matmul(a, b, out, None, None, beta, 1.0)


def forget() -> None:
    """As in a new process on a new machine."""
    vendor._calls.clear()
    vendor._measured.clear()
    vendor._memory.cache_clear()
    os.environ["HALFBYTE_CACHE"] = tempfile.mkdtemp()


def choose(report: Report, found: dict[str, Product], **note: Any) -> None:
    """The first call of each."""
    forget()
    for name, product in found.items():
        sync()
        start = time.perf_counter()
        ours(product)()
        sync()
        report(what="first call", product=name, ms=round((time.perf_counter() - start) * 1e3, 1), **note)


def compare(report: Report, found: dict[str, Product], repeats: int, **note: Any) -> None:
    """Every product both ways, in turn."""
    functions = {f"{name}|{way}": make(p) for name, p in found.items() for way, make in (("torch", torchs), ("ours", ours))}
    load(functions, 0.4)
    ms = turns(functions, repeats)
    for name in found:
        before, after = ms[f"{name}|torch"], ms[f"{name}|ours"]
        report(
            what="product",
            product=name,
            torch_ms=round(before, 4),
            ours_ms=round(after, 4),
            gain=round(before / after - 1, 4),
            **note,
        )
    for way in ("torch", "ours"):
        report(what="sum", way=way, ms=round(sum(ms[f"{name}|{way}"] for name in found), 3), **note)


def layers(report: Report, functions: dict[str, list[Callable[[], Any]]], **note: Any) -> None:
    """All products of a layer in a row, a fifth of a second one way, then the next: each pays for its own heat."""
    taken: dict[str, list[float]] = {way: [] for way in functions}
    ways = list(functions)
    for _ in range(4):
        for way in ways:
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < 0.2:
                for f in functions[way]:
                    f()
                count += 1
                if count % 4 == 0:
                    sync()
            sync()
            taken[way].append((time.perf_counter() - start) / count * 1e3)
        ways.reverse()
    ms = {way: round(statistics.median(one[1:]), 3) for way, one in taken.items()}
    report(what="layer", **ms, **note)


class Candidates:
    """Every algorithm of a product as a call, the library's favourite first; `texts` are what is remembered of them."""

    def __init__(self, product: Product) -> None:
        a, b, out, beta = product
        self.name = (problem := Problem.of(a, b, out, None, out, beta, 256)).name
        plan = Plan(vendor._library(), 0, problem, 0)
        algorithms = plan.algorithms(vendor.CANDIDATES)
        room, stream = vendor._workspace(0, vendor.stream_of(0)), vendor.stream_of(0)
        pointers = (a.data_ptr(), b.data_ptr(), out.data_ptr(), out.data_ptr())
        self.calls = [partial(plan.bound(x, 1.0, beta, room, stream), *pointers) for x in algorithms]
        self.texts = [x.text() for x in algorithms]


def sustained(calls: list[Callable[[], Any]], scratch: Tensor, seconds: float = 0.05) -> list[float]:
    """Milliseconds of each alone at the clock that it earns itself: so long of each, there and back, L2 swept between."""
    totals = [0.0] * len(calls)
    order = list(range(len(calls)))
    for i in order + order[::-1]:
        start, events = time.perf_counter(), []
        while time.perf_counter() - start < seconds:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            scratch.zero_()
            pair[0].record()
            calls[i]()
            pair[1].record()
            events.append(pair)
            if len(events) % 8 == 0:
                pair[1].synchronize()
        sync()
        late = [a.elapsed_time(b) for a, b in events[len(events) // 3 :]]
        totals[i] += sum(late) / len(late) / 2
    return totals


def rules(report: Report, found: dict[str, Product], tokens: int) -> None:
    """Which choice makes the fastest layer: the first guess, our short measurement, or a long one of each algorithm alone."""
    scratch = torch.empty(128 << 20, dtype=torch.uint8, device=DEVICE)
    load({name: torchs(p) for name, p in found.items()}, 0.4)
    ways: dict[str, list[Callable[[], Any]]] = {"torch": [], "first": [], "short": [], "long": []}
    for name, product in found.items():
        candidates = Candidates(product)
        small = product[0].shape[0] * product[1].numel() < vendor.MEASURED_FROM
        number, brief = (0, [0.0]) if small else choice.fastest(candidates.calls, partial(choice.on_device, scratch))
        ms = [0.0] if small else sustained(candidates.calls, scratch)
        best = min(range(len(ms)), key=lambda i: ms[i])
        best = best if ms[best] < ms[0] * (1 - choice.GAIN) else 0
        ways["torch"].append(torchs(product))
        for way, index in (("first", 0), ("short", number), ("long", best)):
            ways[way].append(candidates.calls[index])
        if not small:
            report(
                what="rule", product=name, tokens=tokens, short=number, long=best, short_ms=[round(x, 4) for x in brief],
                long_ms=[round(x, 4) for x in ms],
            )  # fmt: skip
    layers(report, ways, tokens=tokens)
    # Other work between the products, as in training: the clock is not the products' alone.
    gap = partial(torch.Tensor.zero_, scratch)
    layers(
        report,
        {way: [g for f in all_of_them for g in (f, gap)] for way, all_of_them in ways.items()},
        tokens=tokens,
        between="zeros",
    )


def host(report: Report) -> None:
    """Host time of a call on matrices that cost the GPU nothing."""
    a, b, out = (torch.randn(64, 64, device=DEVICE, dtype=BF16) for _ in range(3))
    total, bias = torch.zeros(64, 64, device=DEVICE), out[0].clone()
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: matmul(a, b, out),
        "ours bias": lambda: matmul(a, b, out, bias=bias),
        "ours outer": lambda: outer([Outer(total, a, b)]),
        "torch.mm": lambda: torch.mm(a, b, out=out),
        "torch.addmm bias": lambda: torch.addmm(bias, a, b, out=out),
        "torch addmm fp32": lambda: torch.ops.aten.addmm.dtype_out(total, a.T, b, torch.float32, out=total),
    }
    matmul(a, b, out)
    if CUDA:
        # The foreign call alone, without what finds it.
        call = next(reversed(vendor._calls.values()))
        pointers = (a.data_ptr(), b.data_ptr(), out.data_ptr(), out.data_ptr())
        ways["cublasLtMatmul alone"] = lambda: call(*pointers)
    for name, f in ways.items():
        best = []
        for _ in range(7):
            f()
            sync()
            start = time.perf_counter()
            for _ in range(200):
                f()
            best.append((time.perf_counter() - start) / 200 * 1e6)
            sync()
        report(what="host", way=name, us=round(statistics.median(best), 2), least=round(min(best), 2))


def launches(report: Report, found: dict[str, Product], **note: Any) -> None:
    """Kernels and memsets of one call."""
    for way, make in (("torch", torchs), ("ours", ours)):
        for name, names in kernels({name: make(p) for name, p in found.items()}).items():
            report(what="launches", way=way, product=name, count=len(names), names=[n[:80] for n in names], **note)


def residual(report: Report, tokens: int) -> None:
    """mid + h Wᵀ of `down`: torch.mm and add_, against C in the product."""
    n, k, r = GROUPS["down"]
    h, s, mid = (torch.randn(*shape, device=DEVICE, dtype=BF16) for shape in ((tokens, k + r), (n, k + r), (tokens, n)))
    out = torch.empty_like(mid)
    functions: dict[str, Callable[[], Any]] = {
        "mm, add_": lambda: torch.mm(h, s.T, out=out).add_(mid),
        "ours, add_": lambda: (matmul(h, s.T, out), out.add_(mid)),
        "ours, c": lambda: matmul(h, s.T, out, c=mid, beta=1.0),
    }
    load(functions, 0.2)
    report(what="residual", tokens=tokens, **{name: round(ms, 4) for name, ms in turns(functions, 12).items()})


def measure(report: Report, limit: float) -> None:
    version = vendor._library().version if CUDA else None
    report(what="machine", device=torch.cuda.get_device_name() if CUDA else "cpu", torch=torch.__version__, cublaslt=version)
    host(report)
    for tokens in (2048, 8192) if CUDA else (8,):
        if time.perf_counter() - report.start > limit:
            report(what="left out", tokens=tokens)
            break
        found, gradients = products(tokens)
        if CUDA:
            rules(report, found, tokens)
        choose(report, found, tokens=tokens, state="hot")
        compare(report, found, 12 if CUDA else 1, tokens=tokens)
        compare(report, gradients, 12 if CUDA else 1, tokens=tokens)
        residual(report, tokens)
        if tokens == 8192:
            launches(report, found, tokens=tokens)
        forget()
        del found, gradients


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=60, help="seconds after which 8,192 tokens are not begun")
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out / "gemm_gpu.jsonl")
    logger = logging.getLogger("halfbyte.kernels")
    logger.addHandler(ToReport(report))
    logger.setLevel(logging.INFO)
    gate = outcomes(checks_gemm.CHECKS, DEVICE)
    (out / "gemm_gate.json").write_text(json.dumps(gate, indent=1), encoding="utf-8")
    report(what="gate", failed=[name for name, fault in gate.items() if fault])
    if any(gate.values()):
        print("\n".join(fault for fault in gate.values() if fault), file=sys.stderr)
        return 1
    logger.setLevel(logging.DEBUG)
    with torch.no_grad():
        measure(report, args.limit)
    report(what="budget of a measurement", seconds=choice.BUDGET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
