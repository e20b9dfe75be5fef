"""Which of a product's algorithms runs: measured once a shape on the operands themselves, and remembered on disk.

Why in turn and on real numbers: the chip is limited by its power, so it runs a product faster when it is cold, or when the numbers
are zeros, and another algorithm may then be the best. Cost: at most about `BUDGET` a shape, at its first sight.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from halfbyte.machine import cache_root

log = logging.getLogger("halfbyte.kernels")

BUDGET = 0.060
"""Seconds for the measurement of one shape."""
ROUNDS = 12
FINALISTS = 4
NEAR = 1.05
"""After one round, who took longer than the best by this factor is out."""
GAIN = 0.01
"""Another algorithm than the first must be faster by this share."""
SAMPLE_MS = 0.3
"""A sample is as many calls as take about so long, so that the gaps in front of it do not count."""

Run = Callable[[], int]
"""One product; 0 for success."""
Stopwatch = Callable[[Sequence[Run], Sequence[int]], list[float]]
"""Runs each as often as it says, in this order; milliseconds a call, infinitely many for one that fails."""


def on_device(runs: Sequence[Run], repeats: Sequence[int]) -> list[float]:
    """The stopwatch of the current CUDA stream."""
    failed = [False] * len(runs)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in runs]  # type: ignore[no-untyped-call]
    for i, (run, times, (start, stop)) in enumerate(zip(runs, repeats, events, strict=True)):
        start.record()
        for _ in range(times):
            failed[i] |= run() != 0
        stop.record()
    events[-1][1].synchronize()
    spans = [start.elapsed_time(stop) / times for times, (start, stop) in zip(repeats, events, strict=True)]
    return [math.inf if bad else ms for bad, ms in zip(failed, spans, strict=True)]


def fastest(runs: Sequence[Run], stopwatch: Stopwatch, budget: float = BUDGET) -> tuple[int, list[float]]:
    """The number of the run to take, and the median milliseconds of each: the first, unless another is faster by `GAIN`.

    All in one round, then the first and the best few in turn while `budget` seconds last. The kernels must be loaded already.
    """
    end = time.perf_counter() + budget
    ones = [1] * len(runs)
    rough = stopwatch(runs, ones)
    repeats = [max(1, min(50, round(SAMPLE_MS / max(ms, 1e-4)))) for ms in rough]
    # What was gathered with one call a sample counts only where one call is a sample.
    samples = [[ms] if times == 1 else [] for ms, times in zip(rough, repeats, strict=True)]
    if max(repeats) > 1:
        for one, ms in zip(samples, stopwatch(runs, repeats), strict=True):
            one.append(ms)
    order = sorted(range(len(runs)), key=lambda i: statistics.median(samples[i]))
    limit = NEAR * statistics.median(samples[order[0]])
    able = [i for i in order[:FINALISTS] if statistics.median(samples[i]) <= limit]
    able = able if 0 in able else [0, *able]
    cost = sum(samples[i][0] * repeats[i] for i in able) / 1e3
    for turn in range(ROUNDS):
        if len(able) == 1 or time.perf_counter() + cost > end:
            break
        able = able[::-1] if turn else able
        for i, ms in zip(able, stopwatch([runs[i] for i in able], [repeats[i] for i in able]), strict=True):
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
        scratch = self.file.with_suffix(f".{os.getpid()}")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps(self.entries, indent=0, sort_keys=True), "utf-8")
            os.replace(scratch, self.file)
        except OSError as error:
            log.warning("gemm: the choices are not kept: %s", error)
