"""What is: free and used memory of the device and of this process, in bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from halfbyte.machine import Device, ram
from halfbyte.shortage import cuda_device

__all__ = ["Device", "cuda_device", "peak", "peak_rss", "ram", "rss"]


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
