"""One run of `throughput.py`: load, first step, warm-up, timed steps, memory, launches, and the share of what the chip could do."""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import time
from dataclasses import asdict
from typing import Any

WARMUP, LEAST, SECONDS = 3, 6, 2.5
"""Steps before the clock runs, steps measured at least, and seconds to measure for."""
SPEEDS = ("step_s", "step_median_s", "host_s", "tokens_per_s", "trained_tokens_per_s")
"""Figures that a run with a wrong loss does not give."""
LEARNED, SPREAD = 1.5, 0.3
"""What the loss of random rows may fall by while it is measured, and lie above what is expected of it."""


def measure(case: Any, root: str, data: str | None, only_first: bool = False) -> dict[str, Any]:
    """The JSON line of a case; without figures when the loss says that the model does not run as it should."""
    began = time.perf_counter()
    from engines import RANK, engine  # Unsloth must be imported before torch

    if case.impl == "unsloth":
        import unsloth  # noqa: F401
    import torch
    from gputime import CUDA, DEVICE, Watch, sync
    from shapes import SIZES

    where = case.directory(root)
    watch = Watch()
    machine = engine(case, where, data, DEVICE)
    sync()
    loaded = time.perf_counter() - began
    resident = torch.cuda.memory_allocated() if CUDA else 0
    first = time.perf_counter()
    loss = machine.step(0)
    sync()
    first = time.perf_counter() - first
    line: dict[str, Any] = asdict(case) | {
        "rank": RANK,
        "trainable": machine.trainable,
        "gpu": torch.cuda.get_device_name() if CUDA else "none",
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "load_s": round(loaded, 1),
        "first_step_s": round(first, 2),
        "resident_GiB": round(resident / 2**30, 3),
    }
    if not only_first:
        timed = _steps(machine, watch)
        loss = timed.pop("last")
        line |= timed
    strict = torch.are_deterministic_algorithms_enabled()
    assert strict == case.deterministic, "the run was not as deterministic as its line says"
    value = float(loss)
    line |= {"loss": round(value, 4), "gate": "green" if plausible(value, machine.model.config) else "red"}
    if line["gate"] == "green" and not only_first:
        line |= _share(case, SIZES[case.size], machine, line["step_s"])
    watch.close()
    return {name: figure for name, figure in line.items() if line["gate"] == "green" or name not in SPEEDS}


def plausible(loss: float, config: Any) -> bool:
    """Whether a model with a random head says as much as one that runs as it should: normed hidden states make logits of a variance
    of hidden size times that of the weights, and the mean of log-sum-exp is ln(vocabulary) and half of it. Then it learns."""
    expected = math.log(config.vocab_size) + config.hidden_size * config.initializer_range**2 / 2
    return expected - LEARNED < loss < expected + SPREAD


def _steps(machine: Any, watch: Any) -> dict[str, Any]:
    """Time, memory and launches of warm steps; no wait for the device between them but the implementation's own."""
    import torch
    from gputime import CUDA, kernels, sync

    for i in range(WARMUP):
        if i == WARMUP - 1:
            sync()
            before = time.perf_counter()
        machine.step(i)
    sync()
    count = max(LEAST, min(40, round(SECONDS / (time.perf_counter() - before)))) if CUDA else 2
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    start = time.perf_counter()
    for i in range(count):
        if CUDA:
            events[i].record()
        loss = machine.step(i)
    issued = time.perf_counter() - start
    if CUDA:
        events[count].record()
    sync()
    end = time.perf_counter()
    each = sorted(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)) if CUDA else [(end - start) / count]
    batches = machine.batches
    trained = sum(batches[i % len(batches)].trained for i in range(count)) / count
    tokens = batches[0].ids.numel()
    line = {
        "steps": count,
        "step_s": round((end - start) / count, 5),
        "step_median_s": round(each[len(each) // 2], 5),
        "host_s": round(issued / count, 5),
        "tokens_per_s": round(tokens * count / (end - start)),
        "trained_tokens_per_s": round(trained * count / (end - start)),
        "last": loss,
    }
    if CUDA:
        free, total = torch.cuda.mem_get_info()
        line |= {
            "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 3),
            "reserved_GiB": round(torch.cuda.max_memory_reserved() / 2**30, 3),
            "driver_GiB": round((total - free) / 2**30, 3),
        }
        line["launches"] = len(kernels({"step": lambda: machine.step(0)})["step"])
    return line | watch.between(start, end)


def _share(case: Any, shape: Any, machine: Any, seconds: float) -> dict[str, Any]:
    """What the step's own operations would take at the rate that its GEMM shapes reach right now, over what the step takes."""
    from shapes import flops, hot_rate

    rows = machine.batches[0]
    layers = case.layers or shape.layers
    labelled = [b.trained for b in machine.batches]
    mean = sum(labelled) // len(labelled)
    work = flops(shape, layers, rows.ids.numel(), mean, rows.documents)
    rate = hot_rate(shape, layers, rows.ids.numel(), mean)
    line: dict[str, Any] = {"step_tflop": {name: round(value / 1e12, 2) for name, value in work.items()}} | rate
    if rate:
        line["share"] = round(sum(work.values()) / rate["hot_tflops"] / 1e12 / seconds, 4)
    return line


def launches(case: Any, root: str, data: str | None) -> dict[str, Any]:
    """Kernels, copies and memsets that one more layer adds to a step of one microbatch: four layers less two, halved."""
    from dataclasses import replace

    from engines import engine

    if case.impl == "unsloth":
        import unsloth  # noqa: F401
    from gputime import DEVICE, kernels

    counts: dict[int, list[str]] = {}
    for layers in (2, 4):
        part = replace(case, layers=layers)
        machine = engine(part, part.directory(root), data, DEVICE)
        for i in range(WARMUP):
            machine.step(i)
        counts[layers] = kernels({"step": lambda m=machine: m.step(0)})["step"]
    fewer, more = _counted(counts[2]), _counted(counts[4])
    names = {name: (more[name] - fewer.get(name, 0)) / 2 for name in more if more[name] != fewer.get(name, 0)}
    line = asdict(case) | {
        "kernels_a_layer": (len(counts[4]) - len(counts[2])) / 2,
        "outside_layers": 2 * len(counts[2]) - len(counts[4]),
    }
    return line | {"kernels": dict(sorted(names.items(), key=lambda item: -item[1]))}


def _counted(names: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name[:90]] = counts.get(name[:90], 0) + 1
    return counts
