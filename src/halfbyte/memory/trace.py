"""The memory of one step as it really was: torch's memory history on a GPU, samples of the process's size on a CPU.

Recorded only when asked for: the history takes the Python stack of every allocation, a few microseconds each, in that one step.
Whatever is asked of the allocator here is a counter on the host; nothing waits for the device.
An allocation made in forward that is still there when the loss begins is an activation; weights decoded for a product are scratch,
by the file that asked for them; everything else is its phase's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch

from halfbyte.memory import measure
from halfbyte.memory.curve import PHASES, Curve, begins, made
from halfbyte.memory.tape import SCRATCH

ENTRIES = 200_000
"""Allocations that are remembered; a step has some thousands."""
EVERY = 0.004
"""Seconds between two samples."""
DECODES = ("kernels/augmented/", "kernels/dequantize/", "kernels/fp8/decode")
"""Files that ask for decoded weights."""
OTHER = "other"
Mark = tuple[str, float]


class Recorder(Protocol):
    """One step: `mark` at the beginning of each phase, then `curve`, which ends it; None of a step that was given up. always: bytes
    by part that are there all the time."""

    def mark(self, phase: str) -> None: ...
    def curve(self, always: Mapping[str, int]) -> Curve | None: ...


def recorder(device: torch.device) -> Recorder:
    """Begins to record."""
    return History(device) if device.type == "cuda" else Samples()


class History:
    """Of a GPU's allocator. A mark is the number of allocations so far, so that no clock has to agree with another."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = torch.cuda.memory_allocated(device)
        self.counted = self._count()
        self.marks: list[Mark] = []
        torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=ENTRIES)

    def _count(self) -> int:
        return int(torch.cuda.memory_stats_as_nested_dict(self.device)["allocation"]["all"]["allocated"])

    def mark(self, phase: str) -> None:
        self.marks.append((phase, self._count() - self.counted))

    def curve(self, always: Mapping[str, int]) -> Curve | None:
        self.mark("end")
        marks = last_microbatch(self.marks)
        events = torch.cuda.memory._snapshot(self.device)["device_traces"][self.device.index or 0] if marks else []
        torch.cuda.memory._record_memory_history(None)
        return from_history(events, marks, self.before, always) if marks else None


def last_microbatch(marks: Sequence[Mark]) -> dict[str, float]:
    """Where the phases of the last microbatch begin, and `end`: a step has many, and may begin anew. Empty where one is missing."""
    first = max((i for i, (phase, _) in enumerate(marks) if phase == "forward"), default=len(marks))
    found = dict(marks[first:])
    return found if list(found) == [*PHASES, "end"] else {}


def from_history(events: Sequence[Mapping[str, Any]], marks: Mapping[str, float], before: int, always: Mapping[str, int]) -> Curve:
    """events: of torch's history, from the moment when `before` bytes were allocated. marks: allocations before each phase."""
    kinds = ("alloc", "free_requested")
    found = [e for e in events if e["action"] in kinds]
    phase_of = _phases(found, marks)
    loss = next((i for i, phase in enumerate(phase_of) if phase not in ("", "forward")), len(found))
    death: dict[int, int] = {}
    alive: dict[int, int] = {}
    for i, e in enumerate(found):
        if e["action"] == "alloc":
            alive[e["addr"]] = i
        elif e["addr"] in alive:
            death[alive.pop(e["addr"])] = i
    now: dict[str, int] = {OTHER: max(0, before - sum(always.values()))}
    names: dict[int, str] = {}
    moments: list[tuple[float, dict[str, int]]] = [(0.0, dict(now))]
    counts = {phase: phase_of.count(phase) for phase in PHASES}
    passed = dict.fromkeys(PHASES, 0)
    for i, e in enumerate(found):
        phase = phase_of[i]
        if e["action"] == "alloc":
            kept = phase in ("", "forward") and death.get(i, len(found)) >= loss
            names[e["addr"]] = "activations" if kept else _owner(e, phase)
            now[names[e["addr"]]] = now.get(names[e["addr"]], 0) + e["size"]
        else:
            name = names.pop(e["addr"], OTHER)
            now[name] = max(0, now[name] - e["size"])
        if phase:
            moments.append((begins(phase) + PHASES[phase] * passed[phase] / counts[phase], dict(now)))
            passed[phase] += 1
        else:
            moments[0] = (0.0, dict(now))
    return made(moments, always)


def _phases(events: Sequence[Mapping[str, Any]], marks: Mapping[str, float]) -> list[str]:
    """Of each event; "" before the first and behind the last."""
    found, made_so_far = [], 0
    for e in events:
        made_so_far += e["action"] == "alloc"
        inside = [phase for phase, count in marks.items() if made_so_far > count]
        found.append("" if not inside or inside[-1] == "end" else inside[-1])
    return found


def _owner(event: Mapping[str, Any], phase: str) -> str:
    files = [frame["filename"] for frame in event.get("frames", ())]
    if any(part in file for part in DECODES for file in files):
        return SCRATCH
    return phase or OTHER


class Samples:
    """Of the process: resident bytes, sampled by a thread. What a phase has is not told apart."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []
        self.samples: list[tuple[float, int]] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def _sample(self) -> None:
        while not self.over.wait(EVERY):
            self.samples.append((time.perf_counter(), measure.rss()))

    def mark(self, phase: str) -> None:
        self.marks.append((phase, time.perf_counter()))
        self.samples.append((time.perf_counter(), measure.rss()))

    def curve(self, always: Mapping[str, int]) -> Curve | None:
        self.mark("end")
        self.over.set()
        self.thread.join()
        if not (marks := last_microbatch(self.marks)):
            return None
        standing = sum(always.values())
        return made([(x, {OTHER: max(0, size - standing)}) for x, size in _placed(sorted(self.samples), marks)], always)


def _placed(samples: Sequence[tuple[float, int]], marks: Mapping[str, float]) -> Iterator[tuple[float, int]]:
    """Samples on the axis of the phases; the first one stands for what was before it."""
    times = list(marks.items())
    for (phase, begin), (_, end) in pairwise(times):
        inside = [(t, size) for t, size in samples if begin <= t < end]
        for t, size in inside:
            yield begins(phase) + PHASES[phase] * (t - begin) / max(end - begin, 1e-9), size
