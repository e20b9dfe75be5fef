"""AdamW's moments in pinned host memory, brought to the GPU and back chunk by chunk, two chunks there at a time.

Why: they are needed once a step, when nothing else is, and are a large part of a run's memory that can wait elsewhere whatever the
model (arXiv 2305.14314, section 3). Why explicit copies: managed memory moves by page faults, of which the GPU waits for each, and
not every system has it. Three streams: one brings, one takes back, the step's own computes; a chunk is read when its `ready`
event is over, its slot is written again when its `free` event is. The bus works in both directions at once, and the first two
chunks arrive while backward still runs.
Cost: 8 bytes a trained number each way a step (2 with 8 bits), two slots of CHUNK numbers on the GPU. The bits are those of one
launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from halfbyte.kernels import adamw
from halfbyte.kernels.adamw import BLOCK, CHUNK, SLOTS, Moments
from halfbyte.pinned import Arena


class Event(Protocol):
    """A point in a lane's work."""


class Lane(Protocol):
    """Work in order. run: adds to it. record: the point that it has reached. wait: what follows begins behind that point of
    another lane. finish: returns when all is done."""

    def run(self, work: Callable[[], None]) -> None: ...
    def record(self) -> Event: ...
    def wait(self, event: Event) -> None: ...
    def finish(self) -> None: ...


class Stream:
    """A CUDA stream as a lane; None is the current one, whichever that is."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self.device, self.stream = device, stream

    def _stream(self) -> torch.cuda.Stream:
        return self.stream or torch.cuda.current_stream(self.device)

    def run(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream()):
            work()

    def record(self) -> torch.cuda.Event:
        event: torch.cuda.Event = self._stream().record_event()
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        self._stream().wait_event(event)

    def finish(self) -> None:
        self._stream().synchronize()


class AtOnce:
    """A lane of a CPU: work is done when it is added."""

    def run(self, work: Callable[[], None]) -> None:
        work()

    def record(self) -> Event:
        return self

    def wait(self, event: Event) -> None:
        pass

    def finish(self) -> None:
        pass


Lanes = tuple[Lane, Lane, Lane]
"""The step's own, the one that brings, the one that takes back."""


def lanes_of(device: torch.device) -> Lanes:
    """Streams where the device has them."""
    if device.type != "cuda":
        return AtOnce(), AtOnce(), AtOnce()
    inward, outward = (Stream(device, torch.cuda.Stream(device)) for _ in range(2))  # type: ignore[no-untyped-call]
    return Stream(device), inward, outward


class Pages:
    """The moments of n elements. moments: the host's, whole; read or write them after `finish` only."""

    def __init__(self, n: int, bits: int, device: torch.device, chunk: int = CHUNK, lanes: Lanes | None = None) -> None:
        """chunk: elements, a multiple of 256."""
        assert chunk % BLOCK == 0 and n % BLOCK == 0, "an 8-bit block would be cut"
        self.arena = Arena(adamw.layout(n, bits), device)
        self.moments = adamw.cleared(Moments(*self.arena.tensors))
        self.spans = [slice(a, min(a + chunk, n)) for a in range(0, n, chunk)]
        self.main, self.inward, self.outward = lanes or lanes_of(device)
        self.device, self.fields = device, adamw.layout(min(chunk, n), bits)
        self.slots: list[Moments] = []
        self.free: list[Event] = []
        self.ready: list[Event] = []

    def open(self) -> None:
        """Allocates the slots, once."""
        if not self.slots:
            made = [[torch.empty(n, dtype=dtype, device=self.device) for n, dtype in self.fields] for _ in range(SLOTS)]
            # Their memory may have had another owner, whose work is still queued.
            self.free, self.ready = [self.main.record()] * SLOTS, [self.main.record()] * SLOTS
            self.slots = [Moments(*fields) for fields in made]

    def walk(self, first: int, update: Callable[[int, Moments], None]) -> None:
        """update(i, moments of span i, on the device) for every span from the `first` on; nothing waits for the device."""
        self.open()
        for i in range(first, len(self.spans)):
            for ahead in range(i if i == first else i + SLOTS - 1, min(i + SLOTS, len(self.spans))):
                self._bring(ahead)
            self.main.wait(self.ready[i % SLOTS])
            there = self._slot(i)
            self.main.run(lambda i=i, there=there: update(i, there))  # type: ignore[misc]
            self.outward.wait(self.main.record())
            self._copy(self.outward, self.moments.part(self.spans[i]), there)
            self.free[i % SLOTS] = self.outward.record()

    def finish(self) -> None:
        """Returns when the host's moments are those of the last step."""
        self.main.finish()
        self.inward.finish()
        self.outward.finish()

    def _bring(self, i: int) -> None:
        self.inward.wait(self.free[i % SLOTS])
        self._copy(self.inward, self._slot(i), self.moments.part(self.spans[i]))
        self.ready[i % SLOTS] = self.inward.record()

    def _slot(self, i: int) -> Moments:
        """The slot of span i, as long as the span."""
        return self.slots[i % SLOTS].part(slice(0, self.spans[i].stop - self.spans[i].start))

    def _copy(self, lane: Lane, target: Moments, source: Moments) -> None:
        def work() -> None:
            for to, at in zip(target.fields(), source.fields(), strict=True):
                to.copy_(at, non_blocking=True)

        lane.run(work)

    def __del__(self) -> None:
        """The slots' memory goes back to the allocator, which knows nothing of the copies."""
        if self.__dict__.get("slots"):
            self.inward.finish()
            self.outward.finish()
