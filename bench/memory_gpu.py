"""Predicted against measured memory and speed of a step, over shapes, row lengths, ranks, policies and optimizers, on one GPU.

    python bench/memory_gpu.py --out DIR [--only 8b,70b] [--budget 230]       # writes DIR/memory_gpu.jsonl, a line a case
    python bench/memory_gpu.py --cpu                                          # the script itself, on a tiny model

Models have random packed weights, made on the GPU (`planned.py`). 32B and 70B run with fewer layers (`layers` of `whole`): layers
are alike, and the peak is a sum over them. Each case runs some steps, then some that are measured: the allocator's peak (allocated
and reserved; driver: what is taken of the device), and seconds. `error` is predicted over measured peak, less one; `speed_error`
the same of tokens/s. Predictions come from shapes alone, before the model is built; rates of the GPU from `memory.calibrate`. The
last line sums up: worst over, worst under, mean of the absolute errors. What is chosen, and how far it carries: `fits_gpu.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import planned
import torch
from planned import POLICIES, SIZES, Case

from halfbyte.memory import calibrate, speed

SHOWN = (
    "size",
    "rank",
    "rows",
    "tokens",
    "policy",
    "failed",
    "bits",
    "compute",
    "decoded",
    "embedding_away",
    "peak_GiB",
    "predicted_GiB",
    "driver_GiB",
    "error",
    "tokens_per_s",
    "speed_error",
)
WARM, TIMED = 0.3, 0.4
"""Seconds of steps before those that are timed, and of those: the chip is as hot as its rates were taken."""


def cases() -> list[Case]:
    """65 of them; models of one size and rank behind each other."""
    found = [Case("1b", 16, m, t, p) for m, t in ((4, 2048), (1, 16384)) for p in ("everything", "inputs", "offloaded", "half")]
    found += [Case("1b", 64, 8, 512, p, 8) for p in ("everything", "attended")]
    found += [Case("3b", 8, m, t, p) for m, t in ((2, 2048), (1, 8192)) for p in ("everything", "inputs", "third sent")]
    found += [Case("3b", 8, 2, 2048, "attended", 8, True, 8)]
    found += [Case("8b", 16, m, t, p) for m, t in ((4, 2048), (1, 2048)) for p in list(POLICIES)[:6]]
    found += [Case("8b", 16, 1, t, p, 8, paged, 8) for t, p, paged in ((16384, "inputs", False), (32768, "tiled", True))]
    found += [Case("8b", 16, 1, 8192, p) for p in ("everything", "attention only", "tiled")]
    found += [
        Case("8b", 16, 4, 2048, p, compute="fp8", decoded=d)
        for p, d in (("everything", False), ("everything", True), ("half", False))
    ]
    found += [Case("8b", 16, 1, 8192, p, compute="fp8") for p in ("inputs", "tiled", "third sent")]
    found += [Case("8b", 16, 1, 2048, "inputs", 8, embedding_away=True, compute=c) for c in ("bf16", "fp8")]
    found += [Case("8b", 128, 2, 2048, p, bits) for p, bits in (("everything", 32), ("inputs", 8), ("half", 32))]
    found += [Case("14b", 32, 1, t, p) for t in (1024, 4096) for p in ("everything", "offloaded", "half")]
    found += [Case("32b", 16, 1, t, p) for t in (2048, 8192) for p in ("everything", "inputs", "third sent")]
    found += [Case("70b", 16, 1, t, p) for t in (1024, 4096) for p in ("everything", "inputs", "offloaded", "attention only")]
    return found


def tiny() -> list[Case]:
    some = [Case("tiny", 8, m, 64, p) for m in (1, 2) for p in POLICIES]
    return [*some, Case("tiny", 8, 1, 64, "half", compute="fp8"), Case("tiny", 8, 1, 64, "inputs", embedding_away=True)]


def run(found: list[Case], device: str, budget: float) -> Iterator[dict[str, Any]]:
    """A line a case."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    began = time.monotonic()
    rates = calibrate.rates(dtype) or speed.tabulated("h200")
    yield {"what": "rates", **asdict(rates), "gpu": torch.cuda.get_device_name() if device == "cuda" else "none"}
    it, key = None, None
    for case in found:
        if time.monotonic() - began > budget:
            yield {"skipped": asdict(case), "why": "no time left"}
            continue
        chooser = planned.chooser_of(case, rates, dtype, device)
        rung = planned.rung_of(case, chooser.s.layers)
        bytes_, seconds = planned.allocated(chooser, rung), chooser.seconds(rung)
        if case.made_of != key:
            it = None
            gc.collect()
            key = case.made_of
            it = planned.ready(case, dtype, device)
        assert it is not None
        sizes = SIZES[case.size]
        line: dict[str, Any] = {**asdict(case), "layers": sizes[2], "whole": sizes[3], "rung": rung.words()}
        line["predicted_GiB"] = round(sum(bytes_.values()) / planned.GIB, 3)
        try:
            took, steps = planned.timed(planned.use(case, it, rung, device), device, WARM, TIMED)
        except torch.OutOfMemoryError as error:
            yield line | {"failed": str(error)}
            continue
        tokens = case.rows * case.tokens
        line |= {
            "seconds": round(took, 4),
            "steps": steps,
            "tokens_per_s": round(tokens / took),
            "predicted_tokens_per_s": round(tokens / seconds),
            "speed_error": round(took / seconds - 1, 4),
            **planned.peaks(),
        }
        if "peak" in line:
            line["error"] = round(sum(bytes_.values()) / line["peak"] - 1, 4)
        yield line | {"parts_MiB": {name: round(size / 2**20, 1) for name, size in bytes_.items()}}


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"what": "summary", "cases": sum("speed_error" in line for line in lines)}
    for name in ("error", "speed_error"):
        errors = [line[name] for line in lines if name in line]
        if errors:
            mean = sum(abs(e) for e in errors) / len(errors)
            found[name] = {"worst_over": max(errors), "worst_under": min(errors), "mean": round(mean, 4)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--only", default="", help="sizes, comma-separated")
    parser.add_argument("--budget", type=float, default=230.0, help="seconds after which no further case starts")
    parser.add_argument("--cpu", action="store_true", help="a tiny model, no figures of memory")
    args = parser.parse_args()
    found = tiny() if args.cpu else [c for c in cases() if not args.only or c.size in args.only.split(",")]
    where = Path(args.out)
    where.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    with (where / "memory_gpu.jsonl").open("a") as file:
        for line in run(found, "cpu" if args.cpu else "cuda", args.budget):
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(*([f"{k}={line[k]}" for k in SHOWN if k in line] or [json.dumps(line)]), flush=True)
        last = summary(lines)
        file.write(json.dumps(last) + "\n")
        print(json.dumps(last), flush=True)


if __name__ == "__main__":
    main()
