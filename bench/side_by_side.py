"""Checks of a GPU benchmark side by side: each in a forked process of its own, which is ready at once and ends alone when it fails.

What a check compiles lies in Triton's cache on disk afterwards. The parent must not have touched CUDA before: whoever has cannot
fork children that use it. Where a fork cannot use it anyway, the processes are started anew.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

# Asking CUDA for its devices through the runtime would already spoil a fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch

Job = tuple[Callable[..., None], tuple[Any, ...]]
"""A function at the top of a module, and its arguments."""


def _child(name: str, run: Callable[..., None], arguments: tuple[Any, ...], said: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        run(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        said.put((name, ""))
    except BaseException:
        said.put((name, traceback.format_exc()[-3000:]))


def _on_device() -> None:
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")


def together(jobs: Mapping[str, Job], limit: float) -> dict[str, str]:
    """Runs the jobs all at once, for at most `limit` seconds; what each says if it fails, or "" """
    context: Any = multiprocessing.get_context("fork")
    probe = context.Process(target=_on_device)
    probe.start()
    probe.join()
    if probe.exitcode:
        context = multiprocessing.get_context("spawn")
    said, started = context.Queue(), time.perf_counter()
    running = [context.Process(target=_child, args=(name, *job, said), daemon=True) for name, job in jobs.items()]
    for process in running:
        process.start()
    found: dict[str, str] = {}
    while len(found) < len(jobs) and (left := limit - (time.perf_counter() - started)) > 0:
        try:
            name, fault = said.get(timeout=min(left, 5.0))
        except queue.Empty:
            if not any(process.is_alive() for process in running):
                break
            continue
        found[name] = fault
        print(f"{name}: {'RED' if fault else 'green'}, {time.perf_counter() - started:.0f} s\n{fault}", flush=True)
    for process in running:
        process.kill()
    return {name: found.get(name, f"did not end within {limit} s, or died") for name in jobs}
