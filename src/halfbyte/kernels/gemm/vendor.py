"""The CUDA twin: one dict lookup and one foreign call a product, once its descriptors and its algorithm are known.

What is known is kept for (device, stream, shapes, strides, dtypes, bias, factors, alignment). The workspace belongs to a device and
a stream, so products of different streams may overlap. Nothing is allocated, measured or waited for on a known product, so it can
be captured in a graph; a product that is new under capture takes the library's first algorithm and is measured the next time.

Where bit-equal runs are asked for (`torch.use_deterministic_algorithms`) nothing is chosen by the clock: the first algorithm runs.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import twin
from halfbyte.kernels.gemm.choice import Memory, fastest, on_device
from halfbyte.kernels.gemm.cublaslt import ALIGNED, WORKSPACE, Algorithm, Call, Library, Plan, Problem, Refused, load

log = logging.getLogger("halfbyte.kernels")

MEASURED_FROM = 1 << 37
"""Products m · n · k; smaller ones take the library's first algorithm."""
CANDIDATES = 16
SIMILAR = 1.25
"""Rows may differ by this factor from a measured product, for its algorithm to be taken over: packed batches differ in length."""
KEPT = 4096
"""Prepared calls."""

Operands = tuple[Tensor, ...]
"""a, b, C and out, and for e4m3 the scales of a and b."""

_calls: dict[tuple[object, ...], Call] = {}
_workspaces: dict[tuple[int, int], Tensor] = {}
_measured: dict[tuple[int, Problem], list[tuple[int, str]]] = {}
_said: set[str] = set()
_news: list[tuple[bool, float]] = []
_lock = threading.RLock()
stream_of: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


def refused(*addresses: int) -> int:
    """Stands for a product that is torch's."""
    return -1


def matmul(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias: Tensor | None,
    c: Tensor | None,
    beta: float,
    alpha: float,
    scales: tuple[Tensor, Tensor] | tuple[()] = (),
) -> bool:
    """out = alpha · a b + beta · c + bias; False where it is torch's to do. scales: of the rows of a and the columns of b."""
    source = out if c is None else c
    pa, pb, pc, pd = a.data_ptr(), b.data_ptr(), source.data_ptr(), out.data_ptr()
    device = a.get_device()
    key = (
        device, stream_of(device), a.dtype, b.dtype, out.dtype, a.shape, a.stride(), b.shape, b.stride(), out.shape, out.stride(),
        c if c is None else (c.dtype, c.shape, c.stride(), pc == pd), bias if bias is None else (bias.data_ptr(), bias.dtype),
        beta, alpha, (pa | pb | pc | pd) % ALIGNED, torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    call = _calls.get(key)
    if call is None:
        call = _prepare(key, (a, b, source, out, *scales), bias, beta, alpha)
    if call is refused:
        return False
    status = call(pa, pb, pc, pd, *[t.data_ptr() for t in scales])
    if status:
        log.warning("gemm: a product of %s and %s is torch's: cuBLASLt status %d", tuple(a.shape), tuple(b.shape), status)
        _calls[key] = refused
    return not status


def _prepare(key: tuple[object, ...], operands: Operands, bias: Tensor | None, beta: float, alpha: float) -> Call:
    """The call for operands like these."""
    a, b, source, out, *scales = operands
    m, n = a.shape[0], b.shape[1]
    assert a.shape[1] == b.shape[0] and out.shape == (m, n) and source.shape == (m, n), "shapes do not fit"
    assert bias is None or bias.shape == (n,), "shapes do not fit"
    device, stream = a.get_device(), stream_of(a.get_device())
    capturing = torch.cuda.is_current_stream_capturing()
    if not a.numel() or not out.numel() or twin(a.device) != "fused":
        _calls[key] = refused
        return refused
    with _lock, torch.cuda.device(device):
        try:
            low = a.data_ptr() | b.data_ptr() | source.data_ptr() | out.data_ptr() | ALIGNED
            problem = Problem.of(a, b, out, bias, source, beta, low & -low)
            by = (scales[0].data_ptr(), scales[1].data_ptr()) if scales else (0, 0)
            plan = Plan(_library(), device, problem, 0 if bias is None else bias.data_ptr(), by)
            room = _workspace(device, stream)

            def bind(algorithm: Algorithm) -> Call:
                return plan.bound(algorithm, alpha, beta, room, stream)

            if capturing or problem.m * problem.n * problem.k < MEASURED_FROM or torch.are_deterministic_algorithms_enabled():
                algorithm = plan.algorithms(1)[0]
            else:
                algorithm = _chosen(plan, bind, operands)
            call = _guarded(bind(algorithm), device)
        except Refused as error:
            call = refused
            if str(error) not in _said:
                _said.add(str(error))
                log.warning("gemm: products like %s times %s are torch's: %s", tuple(a.shape), tuple(b.shape), error)
        if not capturing or call is refused:
            while len(_calls) >= KEPT:
                del _calls[next(iter(_calls))]
            _calls[key] = call
    return call


def _guarded(call: Call, device: int) -> Call:
    """The library launches on the current device: where there are several, it is made that of the operands."""
    if torch.cuda.device_count() == 1:
        return call

    def guarded(*addresses: int) -> int:
        with torch.cuda.device(device):
            return call(*addresses)

    return guarded


def _workspace(device: int, stream: int) -> int:
    """Address of the scratch of a stream. One that is first seen under capture gets it from the graph's pool, for good."""
    if (device, stream) not in _workspaces:
        _workspaces[device, stream] = torch.empty(WORKSPACE, dtype=torch.uint8, device=f"cuda:{device}")
    return _workspaces[device, stream].data_ptr()


@functools.cache
def _library() -> Library:
    library = load()
    log.debug("gemm: cuBLASLt %d", library.version)
    return library


@functools.cache
def _memory(device: int) -> Memory:
    return Memory.of(_library().version, device)


def _chosen(plan: Plan, bind: Callable[[Algorithm], Call], operands: Operands) -> Algorithm:
    """Of a product that is worth it: what is remembered, what a similar one measured, or a measurement."""
    problem, device = plan.problem, plan.device
    known = _memory(device).entries.get(problem.name)
    family = _measured.setdefault((device, replace(problem, m=0)), [])
    if known is None:
        near = [(abs(m - problem.m), text) for m, text in family if max(m, problem.m) <= SIMILAR * min(m, problem.m)]
        known = min(near)[1] if near else None
    if known is not None:
        found = _recalled(plan, known)
        if found is not None:
            return found
    started = time.perf_counter()
    algorithms = plan.algorithms(CANDIDATES)
    measured = _measure(plan, algorithms, bind, operands)
    if measured is None:  # nothing is known, so nothing is remembered
        return algorithms[0]
    number, ms = measured
    seconds = time.perf_counter() - started
    text = algorithms[number].text() if number else ""
    family.append((problem.m, text))
    _memory(device).keep(problem.name, text)
    _news.append((number > 0, seconds))
    listed = " ".join(f"{one:.3f}" for one in ms)
    log.debug("gemm: %s takes number %d of %d (%s ms), found in %.0f ms", problem.name, number, len(ms), listed, seconds * 1e3)
    return algorithms[number]


def _recalled(plan: Plan, text: str) -> Algorithm | None:
    """The algorithm of a choice that was made before; None if it does not do here."""
    if not text:
        return plan.algorithms(1)[0]
    try:
        found = Algorithm.of(text)
    except ValueError as error:
        log.warning("gemm: a remembered choice is damaged (%s): measuring again", error)
        return None
    return found if plan.takes(found) else None


def _measure(
    plan: Plan, algorithms: list[Algorithm], bind: Callable[[Algorithm], Call], operands: Operands
) -> tuple[int, list[float]] | None:
    """The number of the algorithm to take, and what was measured; None where there is no memory for it. Writes `out` many times;
    where that is C too, a scratch."""
    problem = plan.problem
    a, b, source, out, *scales = operands
    try:
        target = out
        if problem.accumulate and problem.in_place:
            target = torch.empty(problem.m, problem.ldd, dtype=out.dtype, device=out.device)
        cache = torch.cuda.get_device_properties(plan.device).L2_cache_size
        scratch = torch.empty(2 * cache, dtype=torch.uint8, device=out.device)
    except torch.OutOfMemoryError:
        log.info("gemm: %s is not measured in this run: no memory for it", problem.name)
        return None
    addresses = [t.data_ptr() for t in (a, b, source, target, *scales)]
    calls = [functools.partial(bind(algorithm), *addresses) for algorithm in algorithms]
    for call in calls:  # the driver loads a kernel when it is first asked for
        call()
    return fastest(calls, functools.partial(on_device, scratch))


def report() -> None:
    """Says in one line what was measured since the last report, if anything was."""
    if _news:
        seconds, others = sum(s for _, s in _news), sum(other for other, _ in _news)
        log.info(
            "gemm: %d shapes measured in %.1f s; %d take another algorithm than cuBLAS's first guess (kept in %s)",
            len(_news), seconds, others, _memory(torch.cuda.current_device()).file,
        )  # fmt: skip
        _news.clear()
