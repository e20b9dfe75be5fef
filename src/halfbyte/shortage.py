"""What an allocation that failed looks like, and what is told of it: how much was asked for, who holds what.

Torch has an error of its own for it; libraries that it calls say it in a RuntimeError, and so does torch on a CPU.
"""

from __future__ import annotations

import re

import torch

from halfbyte.machine import Device

PHRASES = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
"""What libraries say in a plain RuntimeError, when it was they who asked for memory."""


def cuda_device() -> Device | None:
    """The first CUDA device, or None."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(0)
    return Device(torch.cuda.get_device_name(0), free, total)


def is_shortage(error: BaseException) -> bool:
    """Whether memory was what was missing, or what the error came of: a CUDA graph ends with an error of its own."""
    return _source(error) is not None


def _source(error: BaseException | None) -> BaseException | None:
    """The error that says so."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return error
        if isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES):
            return error
        error = error.__cause__ or error.__context__
    return None


def in_words(error: BaseException, device: torch.device) -> str:
    """`512.00 MiB could not be allocated (the run holds 7.10 GiB, others 3.20, free are 0.02 of 11.00)`."""
    text = str(_source(error) or error)
    asked = re.search(r"(?:Tried|tried) to allocate ([\d.]+ \w+)", text)
    told = f"{asked.group(1) if asked else 'memory'} could not be allocated"
    card = cuda_device() if device.type == "cuda" else None
    if card is None:
        return told
    held = torch.cuda.memory_reserved(device)
    others = max(0, card.total - card.free - held)
    gib = [f"{count / 2**30:.2f}" for count in (held, others, card.free, card.total)]
    capped = re.search(r"([\d.]+ \w+) allowed", text)
    cap = f", allowed are {capped.group(1)}" if capped else ""
    return f"{told} (the run holds {gib[0]} GiB, driver and others {gib[1]}, free are {gib[2]} of {gib[3]}{cap})"
