"""How long a microbatch takes whose layers send what they keep over the bus: layers and copies in their order.

The copies are `layers.fused.host`'s: out behind the layer that made the tensors, in while the layer above runs backward. A layer
waits for the copies out of the one that sent `UNDER_WAY` layers before it, and for its own to come in. So the bus and the layers
hide each other only where their work is even, and backward begins with a wait where the last layer has something away.
"""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.layers.fused.host import UNDER_WAY


def seconds(forward: float, backward: Sequence[float], copies: Sequence[float], between: float) -> float:
    """Of a microbatch. forward: of a layer; backward: of each; copies: of what each sends, one way; between: of the loss."""
    now = lane = 0.0  # when the layers, and the bus, are done with what they have
    left: dict[int, float] = {}  # when a layer's tensors are out, and when they are back
    back: dict[int, float] = {}

    def call_back(i: int) -> None:
        nonlocal now, lane
        if i not in back:
            now = max(now, left[i])
            back[i] = lane = max(lane, now) + copies[i]

    for i, copy in enumerate(copies):
        now += forward
        if copy:
            if len(left) >= UNDER_WAY:
                now = max(now, list(left.values())[-UNDER_WAY])
            left[i] = lane = max(lane, now) + copy
    now += between
    away = list(left)
    for i in range(len(copies) - 1, -1, -1):
        if away and away[-1] == i:
            call_back(away.pop())
        if away:
            call_back(away[-1])
        now = max(now, back.get(i, 0.0)) + backward[i]
    return now
