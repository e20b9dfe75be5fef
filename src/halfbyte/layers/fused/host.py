"""Layer inputs that wait in pinned host memory between forward and backward.

Why: with everything else recomputed, the inputs of the layers are what grows with depth: 8 KB a token and layer at 8B, 2 GB for
8,192 tokens. The bus is idle meanwhile. Copies run on a stream of their own: out behind the layer that made the tensor, in one
layer ahead of the backward that needs it. Host buffers are kept and used again. On a CPU nothing moves.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor


class Lane:
    """The copy stream of one device, the free host buffers, and the tensors that are away in the order of their layers."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self.away: list[Away] = []


_LANES: dict[torch.device, Lane] = {}


@dataclass
class Away:
    """One tensor on the host. source: kept until its copy is done. back: the copy on its way in."""

    lane: Lane | None
    host: Tensor
    source: Tensor | None
    done: torch.cuda.Event | None
    back: Tensor | None = None
    arrived: torch.cuda.Event | None = None

    def call_back(self) -> None:
        """Starts the copy in."""
        if self.lane is None or self.back is not None:
            return
        self.source = None
        device = self.lane.stream.device
        self.back = torch.empty(self.host.shape, dtype=self.host.dtype, device=device)
        self.lane.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.lane.stream):
            self.back.copy_(self.host, non_blocking=True)
            self.arrived = self.lane.stream.record_event()

    def fetch(self) -> Tensor:
        """The tensor, on its device; starts the copy of the layer below."""
        if self.lane is None:
            return self.host
        self.call_back()
        lane = self.lane
        while lane.away and lane.away.pop() is not self:
            pass
        if lane.away:
            lane.away[-1].call_back()
        assert self.back is not None and self.arrived is not None
        torch.cuda.current_stream(self.back.device).wait_event(self.arrived)
        lane.free[self.host.shape, self.host.dtype].append(self.host)
        return self.back


def send(x: Tensor) -> Away:
    """Starts the copy of x to the host. The tensor sent before is let go of as soon as its copy is done."""
    if not x.is_cuda:
        return Away(None, x, None, None)
    lane = _LANES.setdefault(x.device, Lane(x.device)) if x.device not in _LANES else _LANES[x.device]
    if lane.away and (before := lane.away[-1]).source is not None and before.done is not None:
        # The allocator may give its memory away once the current stream is past the copy.
        torch.cuda.current_stream(x.device).wait_event(before.done)
        before.source = None
    free = lane.free[x.shape, x.dtype]
    host = free.pop() if free else torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    lane.stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(lane.stream):
        host.copy_(x, non_blocking=True)
        done = lane.stream.record_event()
    away = Away(lane, host, x, done)
    lane.away.append(away)
    return away
