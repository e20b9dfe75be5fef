"""Which of a product's algorithms runs: measured once a shape on the operands themselves, and remembered on disk.

Why in turn and on real numbers: the chip is limited by its power, so it runs a product faster when it is cold, or when the numbers
are zeros, and another algorithm may then be the best. Cost: at most about `BUDGET` and one run of each, at a shape's first sight.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.cachefile import replacing
from halfbyte.machine import cache_root

log = logging.getLogger("halfbyte.kernels")

BUDGET = 0.045
"""Seconds for the measurement of one shape, behind a first run of each algorithm."""
ROUNDS = 20
FINALISTS = 4
NEAR = 1.05
"""After one round, who took longer than the best by this factor is out."""
GAIN = 0.015
"""Another algorithm than the first must be faster by this share."""

Run = Callable[[], int]
"""One product; 0 for success."""
Stopwatch = Callable[[Sequence[Run]], list[float]]
"""Runs each once, in this order; milliseconds, infinitely many for one that fails."""


def on_device(scratch: Tensor | None, runs: Sequence[Run]) -> list[float]:
    """The stopwatch of the current CUDA stream. scratch: larger than the L2 cache, written before each run.

    In training an operand comes from memory, not from the run before; and while the device writes, the host gets ahead of it.
    """
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in runs]  # type: ignore[no-untyped-call]
    statuses = []
    for run, (start, stop) in zip(runs, events, strict=True):
        if scratch is not None:
            scratch.zero_()
        start.record()
        statuses.append(run())
        stop.record()
    events[-1][1].synchronize()
    spans = [start.elapsed_time(stop) for start, stop in events]
    return [math.inf if status else ms for status, ms in zip(statuses, spans, strict=True)]


def fastest(runs: Sequence[Run], stopwatch: Stopwatch, budget: float = BUDGET) -> tuple[int, list[float]]:
    """The number of the run to take, and the median milliseconds of each: the first, unless another is faster by `GAIN`.

    All in one round, then the first and the best few in turn while `budget` seconds last. The kernels must be loaded already.
    """
    end = time.perf_counter() + budget
    samples = [[ms] for ms in stopwatch(runs)]
    order = sorted(range(len(runs)), key=lambda i: samples[i][0])
    able = [i for i in order[:FINALISTS] if samples[i][0] <= NEAR * samples[order[0]][0]]
    able = able if 0 in able else [0, *able]
    cost = sum(samples[i][0] for i in able) / 1e3
    for _ in range(ROUNDS):
        if len(able) == 1 or time.perf_counter() + cost > end:
            break
        able.reverse()
        for i, ms in zip(able, stopwatch([runs[i] for i in able]), strict=True):
            samples[i].append(ms)
    medians = [statistics.median(one) for one in samples]
    best = min(able, key=lambda i: medians[i])
    return best if medians[best] < medians[0] * (1 - GAIN) else 0, medians


class Memory:
    """Choices by the name of the problem, in one file: an algorithm's text, or "" for the library's first.

    A file that cannot be read is left aside, and one that cannot be written costs the next run its shortcut; both are logged.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.entries = self._read()

    @classmethod
    def of(cls, version: int, device: int) -> Memory:
        """For a GPU and the versions that decide what an algorithm means and how fast it is."""
        name = torch.cuda.get_device_name(device)
        driver = getattr(torch._C, "_cuda_getDriverVersion", int)()
        file = f"{name}-driver{driver}-cublaslt{version}-torch{torch.__version__}.json"
        return cls(cache_root() / "gemm" / "".join(ch if ch.isalnum() or ch in ".+-" else "_" for ch in file))

    def _read(self) -> dict[str, str]:
        if not self.file.is_file():
            return {}
        try:
            found = json.loads(self.file.read_text("utf-8"))
            if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
                raise ValueError("not a table of texts")
        except (OSError, ValueError) as error:
            log.warning("gemm: the choices in %s cannot be read (%s): measuring again", self.file, error)
            return {}
        return found

    def keep(self, name: str, algorithm: str) -> None:
        """One more choice, with what other processes have written since."""
        self.entries = self._read() | self.entries | {name: algorithm}
        try:
            with replacing(self.file) as stream:
                stream.write(json.dumps(self.entries, indent=0, sort_keys=True).encode())
        except OSError as error:
            log.warning("gemm: the choices are not kept: %s", error)
