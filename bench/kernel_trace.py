"""A profiled step on a GPU's timeline: what every kernel computed, and for how long nothing ran.

Torch's profiler writes its trace as JSON. A kernel is the work of the operation that the driver had on record at its launch
(`External id`); where that one is no product of matrices, of the innermost product in whose time the launch lies, on its thread
or, where that one is unknown, on any. Our products reach cuBLASLt past torch, which sees no operation: `named_products` makes one
of each, `gemm MxNxK`. What a CUDA graph launches is the graph's and stays without a product.

Idle is read off the timeline: the profiler changes the chip's clock, so a step without it less the kernels under it is no time.
"""

from __future__ import annotations

import json
import re
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

Event = Mapping[str, Any]
Product = tuple[int, int, int]
"""M, N and K of `[M, K] [K, N]`."""

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("cpu_op", "user_annotation")
LAUNCHES = ("cuda_runtime", "cuda_driver")
NAMED = re.compile(r"^gemm (\d+)x(\d+)x(\d+)$")
NESTED = 16
"""Products that may stand between a launch and the one around it."""


@dataclass(frozen=True)
class Kernel:
    """A kernel or a copy. start, us: microseconds. product: what it computes if it is a GEMM; call: a number for the call of it."""

    name: str
    start: float
    us: float
    product: Product | None = None
    call: int = -1

    @property
    def end(self) -> float:
        return self.start + self.us


@contextmanager
def named_products() -> Iterator[None]:
    """Every product of `halfbyte.kernels.gemm` on a GPU is an operation `gemm MxNxK`: all of them go through this one function."""
    import torch

    from halfbyte.kernels.gemm import vendor

    matmul = vendor.matmul

    # Not `record_function`: that is an annotation, which the driver does not link with kernels.
    def named(a: Any, b: Any, *rest: Any) -> bool:
        with torch._C._profiler._RecordFunctionFast(f"gemm {a.shape[0]}x{b.shape[1]}x{a.shape[1]}"):
            return matmul(a, b, *rest)

    with mock.patch.object(vendor, "matmul", named):
        yield


def profiled(work: Callable[[], Any], host: bool) -> list[dict[str, Any]]:
    """The profiler's events of `work`, which waits for the GPU at its end. host: operations and shapes too, for more host time."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    if host or not activities:
        activities.append(ProfilerActivity.CPU)
    with profile(activities=activities, record_shapes=host) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return list(json.loads(file.read_text(encoding="utf-8", errors="replace"), strict=False)["traceEvents"])


def product_of(event: Event) -> Product | None:
    """The product that an operation is, if it is one."""
    named = NAMED.match(event["name"])
    if named:
        m, n, k = map(int, named.groups())
        return m, n, k
    if not re.search(r"mm|matmul", event["name"]):
        return None
    given = event.get("args", {}).get("Input Dims", ())
    shapes = [s for s in given if isinstance(s, list) and len(s) >= 2 and all(isinstance(x, int) for x in s)]
    for a, b in pairwise(shapes):
        if a[-1] == b[-2]:
            return prod(a[:-1]), b[-1], a[-1]
    return None


class _Products:
    """The products of a trace, by their number and by time."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.by_number: dict[int, Product] = {}
        self.by_thread: dict[Any, list[tuple[float, float, Product, int]]] = {}
        for e in events:
            product = product_of(e) if e.get("cat") in ON_HOST else None
            if product is not None:
                number = int(e.get("args", {}).get("External id", -1))
                if e["cat"] == "cpu_op":
                    self.by_number[number] = product
                for thread in (e.get("tid"), None):  # None: of all threads
                    self.by_thread.setdefault(thread, []).append((e["ts"], e["ts"] + e["dur"], product, number))
        for spans in self.by_thread.values():
            spans.sort()

    def around(self, launch: Event) -> tuple[Product, int] | None:
        """The innermost product at the time of a launch."""
        middle = launch["ts"] + launch.get("dur", 0) / 2
        spans = self.by_thread.get(launch.get("tid"), self.by_thread.get(None, []))
        at = bisect_right(spans, middle, key=lambda span: span[0])
        for start, end, product, number in reversed(spans[max(0, at - NESTED) : at]):
            if start <= middle <= end:
                return product, number
        return None


def kernels(events: Iterable[Event]) -> list[Kernel]:
    """What ran on the GPU, in the order of its start; each with its product, if it was launched by one."""
    timed = [e for e in events if e.get("ph") == "X"]
    products = _Products(timed)
    launches = {e["args"]["correlation"]: e for e in timed if e.get("cat") in LAUNCHES and "correlation" in e.get("args", {})}
    found = []
    for e in timed:
        if e.get("cat") not in ON_DEVICE:
            continue
        args = e.get("args", {})
        number, launch = int(args.get("External id", -1)), launches.get(args.get("correlation"))
        product = products.by_number.get(number)
        by: tuple[Product, int] | None = (product, number) if product is not None else None
        if by is None and launch is not None:
            by = products.around(launch)
        found.append(Kernel(e["name"], e["ts"], e["dur"], *(by or (None, -1))))
    return sorted(found, key=lambda kernel: kernel.start)


def busy(found: Iterable[Kernel]) -> float:
    """Microseconds in which any of them ran."""
    total, until = 0.0, float("-inf")
    for kernel in sorted(found, key=lambda k: k.start):
        total += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return total


def steady(found: Iterable[Kernel], marker: str) -> dict[str, float]:
    """{steps, span_ms, idle_ms} of a step, of several in a row that each begin with a kernel `marker`.

    The first one is left out: the host is not ahead of it yet.
    """
    found = list(found)
    marks = sorted(k.end for k in found if marker in k.name)
    assert len(marks) >= 2, f"{len(marks)} kernels `{marker}` in the trace: where does a step begin?"
    inside = [k for k in found if k.start >= marks[1]]
    steps, span = len(marks) - 1, max((k.end for k in inside), default=marks[1]) - marks[1]
    return {"steps": steps, "span_ms": span / steps / 1e3, "idle_ms": (span - busy(inside)) / steps / 1e3}


def by_product(found: Iterable[Kernel]) -> dict[str, dict[str, float]]:
    """MxNxK -> {ms, calls, tflops} of the kernels that compute a product, the longest first."""
    sums: dict[Product, tuple[float, set[int]]] = {}
    for kernel in found:
        if kernel.product is not None:
            us, calls = sums.setdefault(kernel.product, (0.0, set()))
            sums[kernel.product] = us + kernel.us, calls | {kernel.call}
    lines = {}
    for product, (us, calls) in sorted(sums.items(), key=lambda item: -item[1][0]):
        rate = round(2 * prod(product) * len(calls) / us / 1e6, 1) if us else 0.0
        lines["x".join(map(str, product))] = {"ms": round(us / 1e3, 3), "calls": len(calls), "tflops": rate}
    return lines
