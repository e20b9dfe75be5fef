"""Memory that runs short on a CUDA GPU: a step whose allocations fail one by one, and a run under a cap that falls on it.

    python bench/survive_gpu.py --out DIR [--stride 11]      # about 180 s, 50 with 11; writes DIR/survive_gpu.jsonl

Gate: every allocation of a fused step on this GPU (or every so many-th) fails once, and the step ends where an undisturbed one does
(to rounding: attention adds in the order in which threads finish), whether less is kept or fewer rows run at once; the optimizer's
step allocates nothing, paged or not. Then `halfbyte.train` on a random Llama of 0.1 billion parameters, twice: undisturbed, and
with the allocator allowed three fifths of what it used, from the third step on. Reported: what the run says, its loss beside the
undisturbed one's, speed before and after, and the cost of looking at the allocator's counters in each step.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from reporting import Report  # noqa: E402

from halfbyte.memory.rungs import Rung  # noqa: E402
from halfbyte.optim.adamw import AdamW  # noqa: E402
from halfbyte.recipe import recipe_from  # noqa: E402
from halfbyte.train.finish import Result  # noqa: E402
from halfbyte.train.ladder import Ladder  # noqa: E402
from halfbyte.train.run import train  # noqa: E402
from support import chats, save_tiny, write_jsonl  # noqa: E402
from train import trials  # noqa: E402

DEVICE = torch.device("cuda", 0)
LARGER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}


def gate(folder: Path, stride: int, report: Report) -> bool:
    """Allocations that fail one by one, every so many-th."""
    good = True
    for name, steps in (("less is kept", trials.KEEPING), ("fewer rows", trials.SMALLER)):
        started, seen, tried, reason = time.monotonic(), set(), 0, ""
        try:
            trial = trials.Trial(trials.fused(folder / name, 32, steps, 0.2, DEVICE))
            seen = trial.every(stride, trials.near)
            tried = trial.tried
            for paged in (False, True):
                if paged:
                    trial.parts.optimizer.page()
                nothing_allocated(trial.parts.optimizer)
        except AssertionError as error:
            reason = str(error)[:400] or "a step ended elsewhere"
        seconds = round(time.monotonic() - started, 1)
        report(what="gate", check=f"allocations fail, {name}", ok=not reason, stride=stride, tried=tried, rungs=len(seen),
               seconds=seconds, reason=reason)  # fmt: skip
        good = good and not reason
    return good


def nothing_allocated(optimizer: AdamW) -> None:
    one = torch.ones((), device=DEVICE)
    optimizer.clip(one, one, 1.0)
    with trials.Short() as memory:
        optimizer.step(1e-4)
    assert memory.made == 0, f"the optimizer's step allocates {memory.made} times"


def run(folder: Path, output: str, on_event: Callable[[dict[str, Any]], None]) -> Result:
    data = {
        "model": str(folder / "model"),
        "compute": "bf16",
        "data": {"train": [str(folder / "chats.jsonl")], "tokens": 1024, "eval": 0},
        "train": {"batch": 16, "max_steps": 12, "epochs": 100, "lr": 1e-4, "eval_every": 0, "save_every": 0},
        "output": str(folder / output),
    }
    return train(recipe_from(data), on_event=on_event)


def capped(folder: Path, report: Report) -> None:
    """A whole run, and one that loses two fifths of its memory in the middle."""
    ends: dict[str, list[dict[str, Any]]] = {"whole": [], "capped": []}
    told: list[str] = []

    def listen(name: str) -> Callable[[dict[str, Any]], None]:
        def on_event(event: dict[str, Any]) -> None:
            if event["kind"] == "train":
                ends[name].append(event)
                if name == "capped" and event["step"] == 3:
                    torch.cuda.empty_cache()
                    now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
                    cap = now + 0.6 * (peak - now)
                    report(what="cap", now_mib=now >> 20, peak_mib=peak >> 20, cap_mib=int(cap) >> 20)
                    torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
            if "could not be allocated" in event.get("text", "") or "empty its cache" in event.get("text", ""):
                told.append(event["text"])

        return on_event

    run(folder, "whole", listen("whole"))
    torch.cuda.reset_peak_memory_stats()
    try:
        result = run(folder, "capped", listen("capped"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    rungs = [Rung(**shortage["rung"]).words() for shortage in result.shortages]
    report(
        what="survived",
        steps=result.steps,
        said=told,
        rungs=rungs,
        summary=[t for t in result.summary.splitlines() if "short" in t],
    )
    for name, events in ends.items():
        speeds = [event["tokens_per_s"] for event in events]
        report(what="run", which=name, loss=[round(event["loss"], 4) for event in events], tokens_per_s=speeds)
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(ends["whole"], ends["capped"], strict=True))
    report(what="gate", check="the capped run's losses", ok=worst < 0.02 and bool(told), furthest=round(worst, 5))


def watching(report: Report) -> None:
    """Microseconds of a look at the allocator's counters."""
    ladder = Ladder(Rung(1, False), DEVICE)
    ladder.thrashing()
    started = time.perf_counter()
    for _ in range(200):
        ladder.thrashing()
    report(what="watch", us_a_step=round((time.perf_counter() - started) / 200 * 1e6, 1))


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stride", type=int, default=1, help="of the allocations of a step, every so many-th fails")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.INFO)
    with (args.out / "survive_gpu.jsonl").open("w") as file, tempfile.TemporaryDirectory() as name:
        report = Report(file)
        folder = Path(name)
        os.environ["HALFBYTE_CACHE"] = str(folder / "cache")
        report(what="machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__)
        if not gate(folder, args.stride, report):
            return 1
        watching(report)
        save_tiny(folder / "model", **LARGER)
        write_jsonl(folder / "chats.jsonl", chats(2000))
        capped(folder, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
