"""An arena of host memory that a GPU copies to and from at the bus's full speed: mapped once, registered once, given back whole.

A GPU may also read it in place, row by row (`Arena.on_device`): what is read once and seldom needs no copy.
Why not torch's pinned allocator: it rounds every block up to a power of two (a 20 GiB arena takes 32), keeps what is freed, and
there is no other way to give memory back to the system. Nothing here is managed memory: no page ever moves.
Cost: registering touches every page, about a third of a second a GiB, once.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import sys
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 4096
"""Every tensor of an arena begins at a multiple of it."""
log = logging.getLogger("halfbyte")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on `device`. A small tensor of the host goes by way of pinned memory, so that the host need not wait: a copy from
    any other begins when the device has done everything before it, and the host is held up until then."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Arena:
    """Tensors in one block of host memory, not initialised; pinned for `device` where that is a CUDA device. Raises MemoryError.

    The memory lives as long as the arena: keep it as long as copies may be under way. bytes: of the whole block. pinned: whether it
    is, on a CUDA device.
    """

    def __init__(self, fields: Sequence[tuple[int, torch.dtype]], device: torch.device) -> None:
        """fields: elements and dtype of each tensor."""
        sizes = [-(-n * dtype.itemsize // ALIGNED) * ALIGNED for n, dtype in fields]
        self.bytes = max(ALIGNED, sum(sizes))
        block = torch.frombuffer(_mapped(self.bytes), dtype=torch.uint8)
        self.tensors: list[Tensor] = []
        start = 0
        for (n, dtype), size in zip(fields, sizes, strict=True):
            self.tensors.append(block[start : start + n * dtype.itemsize].view(dtype))
            start += size
        self.device, self.pinned = device, device.type == "cuda" and _register(block, device)
        if self.pinned:
            weakref.finalize(self, _release, block, device).atexit = False

    def on_device(self) -> list[Tensor] | None:
        """The same memory as tensors of `device`, which its kernels read over the bus; they keep the arena alive. None where the
        device cannot. On a CPU the tensors themselves."""
        if self.device.type != "cuda":
            return self.tensors
        address = _seen_by_device(self.tensors[0].data_ptr()) if self.pinned else None
        if address is None:
            return None
        mapped = torch.as_tensor(_Mapped(self, address), device=self.device)
        first = self.tensors[0].data_ptr()
        return [mapped[t.data_ptr() - first : t.data_ptr() - first + t.nbytes].view(t.dtype).view(t.shape) for t in self.tensors]


def _mapped(size: int) -> mmap.mmap:
    """Zeroed pages. Raises MemoryError where the system has no room for them."""
    try:
        return mmap.mmap(-1, size)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError(f"host memory: tried to allocate {size / 2**30:.2f} GiB") from error


class _Mapped:
    """An arena as torch takes memory of CUDA devices from others, by CUDA's array interface."""

    def __init__(self, arena: Arena, address: int) -> None:
        self.arena = arena
        self.__cuda_array_interface__ = {"shape": (arena.bytes,), "typestr": "|u1", "data": (address, False), "version": 3}


def _seen_by_device(pointer: int) -> int | None:
    """Where the current device sees registered host memory; None where it does not."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    found = ctypes.c_uint64()
    error: int = driver.cuMemHostGetDevicePointer_v2(ctypes.byref(found), ctypes.c_void_p(pointer), 0)
    return found.value if error == 0 else None


def _register(block: Tensor, device: torch.device) -> bool:
    """Whether the block could be pinned; where it could not, copies are right and wait for the host."""
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = cudart.cudaHostRegister(block.data_ptr(), block.numel(), 0)
    if error == cudart.cudaError.success:
        return True
    gib = block.numel() / 2**30
    log.warning("%.2f GiB of host memory could not be pinned (%s): copies will not overlap", gib, error)
    # CUDA remembers the error and would hand it to the next kernel launch: one of ours takes it.
    try:
        torch.empty(1, device=device).fill_(0)
    except RuntimeError:
        log.debug("the error of cudaHostRegister was taken")
    return False


def _release(block: Tensor, device: torch.device) -> None:
    """The block is an argument, so that it outlives its registration."""
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(block.data_ptr())  # type: ignore[no-untyped-call]
