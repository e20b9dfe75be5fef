"""What is: free and used memory of the device and of this process, in bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from halfbyte.machine import Device, ram

__all__ = ["Device", "cuda_device", "peak", "peak_rss", "ram", "rss"]


def cuda_device() -> Device | None:
    """The first CUDA device, or None."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(0)
    return Device(torch.cuda.get_device_name(0), free, total)


def rss() -> int:
    """Resident bytes of this process now."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_rss()
    return 1024 * int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmRSS:")))


def peak_rss() -> int:
    """Most resident bytes that this process ever had."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak(device: torch.device) -> int:
    """Peak bytes of a run so far: the allocator's on a CUDA device, the process's resident ones on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()
