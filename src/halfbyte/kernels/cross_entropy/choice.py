"""Which way a GPU takes through the loss: measured once for a shape, logged with its reason.

`chunked` lets the vendor's GEMM write logits, which one kernel turns into their gradient; `tiled` has a GEMM of ours that gathers
the sums of the softmax while it writes the logits, so that the kernel after it reads them once; `exact` keeps logits in fp32.
Which of the first two is faster depends on the chip's GEMM rate against its memory's, so `auto` times both on one chunk.
Where bit-equal runs are asked for (`torch.use_deterministic_algorithms`) nothing is chosen by the clock: `chunked` runs.
Cost: the first call of a shape waits for the device and runs each way twice, on one chunk of rows.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any, Literal

import torch

from halfbyte.formats.packed import Packed
from halfbyte.kernels.cross_entropy.parts import Results, Task

log = logging.getLogger("halfbyte")
Method = Literal["auto", "chunked", "tiled", "exact"]
ROWS = 1024
"""Rows that `auto` measures on, a whole chunk; below it nothing is chosen and nothing kept: a few rows are `chunked`."""
Way = Literal["chunked", "tiled", "exact"]
_chosen: dict[Any, Way] = {}


def run(method: Method, task: Task) -> Results:
    """The loss of a task on a GPU."""
    from halfbyte.kernels.cross_entropy import fused

    return fused.cross_entropy(task, way=_choose(task) if method == "auto" else _possible(method, task))


def _possible(way: Way, task: Task) -> Way:
    """What was asked for, or `chunked` where that does not exist, which is told."""
    if way == "tiled" and (isinstance(task.head.weight, Packed) or task.hidden.dtype == torch.float32):
        _tell("loss: chunked (tiled was asked for, and knows neither packed heads nor products in fp32)")
        return "chunked"
    return way


@functools.cache
def _tell(line: str) -> None:
    log.warning(line)


def _choose(task: Task) -> Way:
    hidden, weight = task.hidden, task.head.weight
    if isinstance(weight, Packed) or not hidden.is_cuda or hidden.dtype == torch.float32:
        return "chunked"
    if task.labelled < ROWS or torch.cuda.is_current_stream_capturing() or torch.are_deterministic_algorithms_enabled():
        return "chunked"
    key = (hidden.device, hidden.dtype, tuple(weight.shape), task.head.bias is None, task.head.scale, task.head.cap, task.extras)
    if key not in _chosen:
        _chosen[key], why = _fastest(task)
        log.warning("loss: %s (auto: %s)", _chosen[key], why)
    return _chosen[key]


def _fastest(task: Task) -> tuple[Way, str]:
    """The faster way, and why. `tiled` is out where this GPU has not the room that its kernel takes; `chunked` needs hardly any."""
    from triton.runtime.errors import OutOfResources

    ms: dict[Way, float] = {"chunked": _milliseconds(task, "chunked")}
    try:
        ms["tiled"] = _milliseconds(task, "tiled")
    except OutOfResources as error:
        return "chunked", f"tiled cannot be launched on this GPU, {error}"
    told = ", ".join(f"{way} {value:.2f} ms" for way, value in ms.items())
    return min(ms, key=lambda way: ms[way]), f"measured on {ROWS} rows, {told}"


def _milliseconds(task: Task, way: Way) -> float:
    """Of the second of two runs on the first labelled rows."""
    from halfbyte.kernels.cross_entropy import fused

    rows = task.rows()[:ROWS]
    few = replace(task, hidden=task.hidden[rows], labels=task.labels[rows], labelled=len(rows))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    fused.cross_entropy(few, way=way)
    start.record()
    fused.cross_entropy(few, way=way)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
