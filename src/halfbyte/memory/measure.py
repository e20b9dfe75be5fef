"""What is: free and used memory of the device and of this process, in bytes."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Device:
    """name, and bytes free now and in all."""

    name: str
    free: int
    total: int


def cuda_device() -> Device | None:
    """The first CUDA device, or None."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(0)
    return Device(torch.cuda.get_device_name(0), free, total)


def ram() -> Device:
    """This machine's memory: available without swapping, a container's limit respected."""
    fields = _meminfo()
    free, total = fields.get("MemAvailable", 0), fields.get("MemTotal", 0)
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None and limit < total:
        # Page cache counts as used there, and is given back on demand: only what is left at worst is promised.
        free, total = min(free, limit - used), limit
    return Device("CPU", max(0, free), total)


def rss() -> int:
    """Resident bytes of this process now."""
    return _status("VmRSS") or peak_rss()


def peak_rss() -> int:
    """Most resident bytes that this process ever had; 0 on Windows.

    Linux tells it per program; `getrusage` there also counts what the parent held before this program was started.
    """
    if high := _status("VmHWM"):
        return high
    if sys.platform == "win32":
        return 0
    import resource

    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else 1024 * found


def _status(name: str) -> int | None:
    """Bytes from /proc/self/status, where there is one."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="ignore").splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def peak(device: torch.device) -> int:
    """Peak bytes of a run so far: the allocator's on a CUDA device, the process's resident ones on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()


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
