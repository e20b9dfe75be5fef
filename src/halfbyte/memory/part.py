"""A part of a run's memory: a name, bytes on the device and in host memory."""

from __future__ import annotations

from dataclasses import dataclass

NOBODYS = frozenset({"context", "gaps"})
"""Parts of a GPU's memory that its allocator has given to nobody."""


@dataclass(frozen=True)
class Part:
    """bytes: on the device. note: what it is. grows: with the microbatch. host: bytes of host memory besides."""

    name: str
    bytes: int
    note: str
    grows: bool = False
    host: int = 0
