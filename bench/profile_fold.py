"""A profile of repeated layers folded into one: which launch stands where in a layer, and what it costs there.

Launches are told apart by their position, since one kernel serves several products. How many launches a layer has is found in the
order of the names, so other kernels need no change here.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Event = tuple[float, float, str]
"""Start and end in microseconds, and the kernel's name."""


def period(names: Sequence[str], layers: int) -> tuple[int, int, int]:
    """(first, launches a layer, layers) of the shortest cycle that nearly all layers repeat. Raises ValueError without one."""
    for launches in range(1, len(names) // max(layers - 2, 1) + 1):
        same = [a == b for a, b in zip(names, names[launches:], strict=False)]
        start, best, length = 0, 0, 0
        for i, equal in enumerate([*same, False]):
            if not equal:
                if i - start > length:
                    best, length = start, i - start
                start = i + 1
        if length >= max(layers - 2, 1) * launches:
            cycles = min((length + launches) // launches, layers)
            return best, launches, cycles
    raise ValueError(f"no cycle of {layers} layers among {len(names)} launches")


def fold(events: Sequence[Event], tokens: int, layers: int) -> list[dict[str, Any]]:
    """Events of `tokens` equal runs, in order, as lines to report."""
    each = len(events) // tokens
    names = [name for _, _, name in events[:each]]
    first, launches, cycles = period(names, layers)
    own: list[list[float]] = [[] for _ in range(launches)]
    adds: list[list[float]] = [[] for _ in range(launches)]
    outside = [0.0, 0.0]
    for token in range(tokens):
        one = events[token * each : (token + 1) * each]
        last = one[0][0]
        for i, (start, end, _) in enumerate(one):
            moved, last = max(end - last, 0.0), max(end, last)
            if first <= i < first + launches * cycles:
                own[(i - first) % launches].append(end - start)
                adds[(i - first) % launches].append(moved)
            else:
                outside[i >= first] += moved / tokens
    lines: list[dict[str, Any]] = [
        {"what": "layer", "position": i, "kernel": names[first + i][:60], "us": round(statistics.median(own[i]), 2),
         "adds_us": round(statistics.median(adds[i]), 2)}
        for i in range(launches)
    ]  # fmt: skip
    lines.append({
        "what": "outside", "launches": each, "launches_a_layer": launches, "layers": cycles, "us_before": round(outside[0], 1),
        "us_behind": round(outside[1], 1), "us_a_layer": round(sum(line["adds_us"] for line in lines), 2),
        "behind": [name[:40] for name in names[first + launches * cycles :]],
    })  # fmt: skip
    return lines
