"""What waits in pinned host memory between a layer's forward and backward.

Why: the bus is idle during training. What a layer keeps can cross it twice for nothing, as long as a copy takes no longer than the
layer's own work: 36 KB a token for all but gate and up at 8B, which 55 GB/s move in the time of an H200's forward.
Copies run on a stream of their own: out behind the layer that made the tensors, in one layer ahead of the backward that needs
them (layers that keep everything here start the copies of the next below). Host buffers are pinned in their own size, kept and used
again. On a CPU nothing moves.
Cost: twice a layer's share on the GPU, host memory for all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.pinned import Arena

UNDER_WAY = 2
"""Layers whose tensors may still be on their way out when the next one sends."""


class Lane:
    """The copy stream of one device, free host buffers, and what is away, in the order of the layers."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self.away: list[Away] = []
        self.arenas: list[Arena] = []

    def buffer(self, like: Tensor) -> Tensor:
        """Pinned memory for a copy."""
        free = self.free[like.shape, like.dtype]
        if free:
            return free.pop()
        self.arenas.append(Arena([(like.numel(), like.dtype)], self.stream.device))
        return self.arenas[-1].tensors[0].view(like.shape)


_LANES: dict[torch.device, Lane] = {}


def forget() -> None:
    """Drops what is away, of a step that did not end, and the free buffers, which may never be of that size again."""
    for lane in _LANES.values():
        lane.stream.synchronize()
        lane.away.clear()
        lane.free.clear()
        lane.arenas.clear()


@dataclass
class Away:
    """One layer's tensors. sources: kept until their copies are done. back: the copies on their way in."""

    lane: Lane | None
    host: list[Tensor]
    sources: list[Tensor]
    done: torch.cuda.Event | None = None
    back: list[Tensor] | None = None
    arrived: torch.cuda.Event | None = None

    def let_go(self) -> None:
        """The sources' memory may be given away once the current stream is past the copies."""
        if self.sources and self.lane is not None and self.done is not None:
            torch.cuda.current_stream(self.lane.stream.device).wait_event(self.done)
            self.sources = []

    def call_back(self) -> None:
        """Starts the copies in."""
        if self.lane is None or self.back is not None:
            return
        self.let_go()
        device = self.lane.stream.device
        self.back = [torch.empty(h.shape, dtype=h.dtype, device=device) for h in self.host]
        self.lane.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.lane.stream):
            for target, h in zip(self.back, self.host, strict=True):
                target.copy_(h, non_blocking=True)
            self.arrived = self.lane.stream.record_event()

    def fetch(self) -> list[Tensor]:
        """The tensors on their device, once; starts the copies of the layer below."""
        if self.lane is None:
            return self.host
        self.call_back()
        lane = self.lane
        while lane.away and lane.away.pop() is not self:
            pass
        if lane.away:
            lane.away[-1].call_back()
        back, self.back = self.back, None
        assert back is not None and self.arrived is not None
        torch.cuda.current_stream(lane.stream.device).wait_event(self.arrived)
        for h in self.host:
            lane.free[h.shape, h.dtype].append(h)
        return back


def send(tensors: Sequence[Tensor]) -> Away:
    """Starts the copies to the host; what was sent UNDER_WAY layers ago is let go of."""
    if not tensors[0].is_cuda:
        return Away(None, list(tensors), [])
    device = tensors[0].device
    if device not in _LANES:
        _LANES[device] = Lane(device)
    lane = _LANES[device]
    if len(lane.away) >= UNDER_WAY:
        lane.away[-UNDER_WAY].let_go()
    away = Away(lane, [lane.buffer(t) for t in tensors], list(tensors))
    lane.stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(lane.stream):
        for h, t in zip(away.host, tensors, strict=True):
            h.copy_(t, non_blocking=True)
        away.done = lane.stream.record_event()
    lane.away.append(away)
    return away


def ahead(device: torch.device) -> None:
    """Starts the copies in of what was sent last, called in the backward of a layer that itself has nothing away. What was sent
    before that is let go of too: the loss has given its copies their time, and it may be long until it is called back."""
    lane = _LANES.get(device)
    if lane is not None and lane.away:
        for one in lane.away[-UNDER_WAY:]:
            one.let_go()
        lane.away[-1].call_back()
