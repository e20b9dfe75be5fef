"""The rates of the GPU that is here, measured once in about three seconds and kept on disk.

Why measured hot: a chip at its power limit multiplies a fifth slower than in the first second, and a run is never in its first
second. Kept for a card's name, a torch version and a dtype in `HALFBYTE_CACHE` (`memory/rates.json`); delete it to measure again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.cachefile import replacing
from halfbyte.machine import cache_root
from halfbyte.memory.speed import Rates
from halfbyte.pinned import Arena

SECONDS = 2.0
SIDE = (8192, 4096, 14336)
"""Tokens, inputs and outputs of the product: the shape of an MLP."""
COPIED = 1 << 29
"""Bytes of a copy."""
CALL = 6.0
"""Host time of a kernel of a layer, with its arguments made and all Python around it, over that of the smallest call of torch:
fitted to 167 steps of 1B to 70B models on an H200, of which 44 waited for the host (docs/LOG.md)."""


def rates(dtype: torch.dtype = torch.bfloat16) -> Rates | None:
    """Of the first GPU: kept from before, or measured now; None without one, or where too little of its memory is free."""
    if not torch.cuda.is_available():
        return None
    key = f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}"
    path = cache_root() / "memory" / "rates.json"
    known = _read(path)
    if key in known:
        return Rates(**known[key])
    try:
        found = measure(torch.device("cuda", 0), dtype, key)
    except torch.OutOfMemoryError:
        return None
    with replacing(path) as stream:
        stream.write(json.dumps(known | {key: asdict(found)}, indent=1).encode())
    return found


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found


def measure(device: torch.device, dtype: torch.dtype, name: str) -> Rates:
    """Products for SECONDS, of which the last third counts; a copy on the device; copies over the bus; launches."""
    gemm = _gemm(device, dtype)
    copy, bus = _copies(device)
    torch.cuda.empty_cache()
    return Rates(gemm, copy, bus, _launch(device), f"measured on {name}")


def _gemm(device: torch.device, dtype: torch.dtype) -> float:
    tokens, inner, columns = SIDE
    x, w = (torch.randn(n, inner, device=device, dtype=dtype) for n in (tokens, columns))
    y = torch.empty(tokens, columns, device=device, dtype=dtype)
    hot: list[float] = []
    began = time.perf_counter()
    while (now := time.perf_counter() - began) < SECONDS or not hot:
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(20):
            torch.mm(x, w.T, out=y)
        torch.cuda.synchronize(device)
        if now > SECONDS * 2 / 3:
            hot.append((time.perf_counter() - started) / 20)
    return 2.0 * tokens * inner * columns * len(hot) / sum(hot)


def _copies(device: torch.device) -> tuple[float, float]:
    """Bytes a second, read and written, on the device; and one way over the bus, the slower."""
    one, other = (torch.empty(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    arena = Arena([(COPIED, torch.uint8)], device)
    host = arena.tensors[0]
    copy = _seconds(lambda: one.copy_(other), device, 20)
    out = _seconds(lambda: host.copy_(one, non_blocking=True), device, 4)
    back = _seconds(lambda: one.copy_(host, non_blocking=True), device, 4)
    return 2 * COPIED / copy, COPIED / max(out, back)


def _seconds(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Of one call, the first left out."""
    work()
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / times


def _launch(device: torch.device) -> float:
    """Host seconds of a small call."""
    small: Tensor = torch.zeros(64, device=device)
    for _ in range(50):  # the first call loads its kernel
        small.add_(1.0)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(500):
        small.add_(1.0)
    issued = (time.perf_counter() - started) / 500
    torch.cuda.synchronize(device)
    return CALL * issued
