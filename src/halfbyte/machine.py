"""This machine, as everything that decides by it must see it: its memory, a container's limit respected; where we keep files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Device:
    """name, and bytes free now and in all."""

    name: str
    free: int
    total: int


def cache_root() -> Path:
    """HALFBYTE_CACHE, or ~/.cache/halfbyte."""
    return Path(os.environ.get("HALFBYTE_CACHE") or "~/.cache/halfbyte").expanduser()


def ram() -> Device:
    """This machine's memory: available without swapping, a container's limit respected."""
    fields = _meminfo()
    free, total = fields.get("MemAvailable", 0), fields.get("MemTotal", 0)
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None and limit < total:
        # Page cache counts as used there, and is given back on demand: only what is left at worst is promised.
        free, total = min(free, limit - used), limit
    return Device("CPU", max(0, free), total)


def _meminfo() -> dict[str, int]:
    file = Path("/proc/meminfo")
    if not file.exists():
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return {"MemAvailable": pages, "MemTotal": pages}
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in file.read_text().splitlines() if line.endswith("kB")}


def _cgroup(name: str) -> int | None:
    file = Path("/sys/fs/cgroup") / name
    text = file.read_text().strip() if file.exists() else "max"
    return int(text) if text.isdigit() else None
