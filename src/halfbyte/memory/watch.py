"""What a run uses while it goes on, beside what was planned for it; and one step of it recorded, where that is asked for.

On a GPU three figures: what tensors take (`allocated`), what the allocator holds for them (`reserved`), what the device has given
to this run and everybody else (`driver`). All are counters on the host, read when a log line is written: no step waits for them. On
a CPU the process's resident memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from halfbyte.memory import measure, trace
from halfbyte.memory.curve import Curve
from halfbyte.memory.rungs import Rung

MIB = 1 << 20


def _unknown(rung: Rung) -> int:
    return 0


def _nothing() -> Mapping[str, int]:
    return {}


@dataclass
class Watch:
    """planned: a rung -> bytes of its largest moment, counted as `peak` is, 0 if not known. standing: bytes by part that are there
    all the time. record: the step that is recorded, counted from the first of this process, or None.

    peak: of steps, on a GPU of those on the present rung, without what evaluation and samples took. whole: of the whole run.
    recorded: the curve.
    """

    device: torch.device
    planned: Callable[[Rung], int] = _unknown
    standing: Callable[[], Mapping[str, int]] = _nothing
    record: int | None = None
    recorded: Curve | None = None
    recorder: trace.Recorder | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.steps = self.whole = self.peak = 0

    def read(self) -> None:
        """Takes the peaks since the last reading."""
        now = measure.peak(self.device)
        self.peak, self.whole = max(self.peak, now), max(self.whole, now)

    def event(self, rung: Rung) -> dict[str, float]:
        """For a log line, in MiB."""
        self.read()
        found = {"memory_mib": self.peak, "planned_mib": self.planned(rung)}
        if self.device.type == "cuda":
            found["allocated_mib"] = torch.cuda.memory_allocated(self.device)
            found["reserved_mib"], found["driver_mib"] = self.outer()
        else:
            found["resident_mib"] = measure.rss()
        return {name: round(size / MIB, 1) for name, size in found.items()}

    def outer(self) -> tuple[int, int]:
        """The most that the allocator held, and what is taken of the device now, by this run and others. 0, 0 on a CPU."""
        if self.device.type != "cuda":
            return 0, 0
        free, total = torch.cuda.mem_get_info(self.device)
        return torch.cuda.max_memory_reserved(self.device), total - free

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Evaluation and samples: no step, so no part of `peak` on a GPU, where peaks can be read apart."""
        self.read()
        try:
            yield
        finally:
            self.whole = max(self.whole, measure.peak(self.device))
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)

    def anew(self) -> None:
        """Another rung from here on: on a GPU, `peak` is of its steps, so that plan and truth are of the same thing."""
        self.read()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.peak = 0

    def step(self) -> AbstractContextManager[None]:
        """Around a step."""
        self.steps += 1
        return self._recording() if self.steps == self.record else nullcontext()

    @contextmanager
    def _recording(self) -> Iterator[None]:
        self.recorder = trace.recorder(self.device)
        try:
            yield
        finally:
            recorder, self.recorder = self.recorder, None
            self.recorded = recorder.curve(self.standing())

    def mark(self, phase: str) -> None:
        """A phase of a step begins."""
        if self.recorder is not None:
            self.recorder.mark(phase)
