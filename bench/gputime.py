"""How the benchmarks measure on a GPU: kernels timed in turn, the chip's clock read meanwhile, kernels counted by the profiler.

Everything also runs on a CPU (host clock, no clock of a chip, no kernels), so that the scripts themselves can be tested anywhere.
The clock and the power are only ever read, through NVML.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
MARKER = "spin_kernel"
"""The kernel of `torch.cuda._sleep`: it separates what is counted."""


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


class Watch:
    """Reads SM clock (MHz), power (W) and temperature (C) every 20 ms in a thread. Times are those of time.perf_counter."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int, float, int]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        if CUDA:
            self._thread.start()

    def _read(self) -> None:
        import pynvml  # type: ignore[import-untyped,import-not-found,unused-ignore]

        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        while not self._done.wait(0.02):
            clock = pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM)
            power = pynvml.nvmlDeviceGetPowerUsage(device) / 1e3
            heat = pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU)
            self.samples.append((time.perf_counter(), clock, power, heat))

    def between(self, start: float, end: float) -> dict[str, Any]:
        if not self.samples:
            return {"sm_mhz": None}
        nearest = min(self.samples, key=lambda s: abs(s[0] - (start + end) / 2))
        inside = [s for s in self.samples if start <= s[0] <= end] or [nearest]
        clocks = [s[1] for s in inside]
        return {
            "sm_mhz": round(statistics.mean(clocks)),
            "sm_mhz_least": min(clocks),
            "watts": round(statistics.mean(s[2] for s in inside)),
            "celsius": inside[-1][3],
        }

    def close(self) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()


def turns(functions: Mapping[str, Callable[[], Any]], repeats: int = 10, lead: bool = False) -> dict[str, float]:
    """Median milliseconds of each, measured in turn without a pause, so that a chip that heats up slows all alike.

    lead: let the GPU spin for two milliseconds before each round, so that the host is ahead of kernels of a few microseconds.
    """
    if not CUDA:
        return {name: _host_ms(f) for name, f in functions.items()}
    events = {name: [(_event(), _event()) for _ in range(repeats)] for name in functions}
    for i in range(repeats):
        if lead:
            torch.cuda._sleep(4_000_000)
        for name, f in functions.items():
            events[name][i][0].record()
            f()
            events[name][i][1].record()
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _host_ms(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    f()
    return (time.perf_counter() - start) * 1e3


def load(functions: Mapping[str, Callable[[], Any]], seconds: float) -> None:
    """Keep the chip busy with `functions` for about so long, so that its clock is that of a long run."""
    end = time.perf_counter() + (seconds if CUDA else 0.0)
    while time.perf_counter() < end:
        for f in functions.values():
            f()
        sync()


def kernels(functions: Mapping[str, Callable[[], Any]]) -> dict[str, list[str]]:
    """The kernels, copies and memsets each function launches, by name and in order; empty lists without a GPU."""
    if not CUDA:
        return {name: [] for name in functions}
    # The first session of a process can miss kernels while the profiler loads.
    groups = _profiled(functions)
    if len(groups) != len(functions):
        groups = _profiled(functions)
    assert len(groups) == len(functions), f"{len(groups)} groups of kernels for {len(functions)} functions"
    return dict(zip(functions, groups, strict=True))


def _profiled(functions: Mapping[str, Callable[[], Any]]) -> list[list[str]]:
    """Names of what ran between the markers."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for f in functions.values():
            torch.cuda._sleep(100)
            f()
        torch.cuda.synchronize()
    launched = sorted((e.time_range.start, e.name) for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    groups: list[list[str]] = []
    for _, name in launched:
        if MARKER in name:
            groups.append([])
        elif groups:
            groups[-1].append(name)
    return groups


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative Frobenius error against float64 truth."""
    return float((got.double() - truth).norm() / truth.norm())
