"""One step's memory by part, planned and as torch's history tells it, on one GPU; and what recording and reading cost.

    python bench/memory_seen_gpu.py --out DIR        # DIR/memory_seen_gpu.jsonl and a picture a case; about 40 s

Models with random packed weights (`bench/planned.py`). Gate: the recorded curve's peak is the allocator's, to 1 %, and bytes are
there in every phase. Then, a line a case: the planned peak over the recorded one, less one; bytes by part at both peaks; seconds
of a step while it is recorded and while it is not; microseconds of what a log line reads.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

import planned as memory  # noqa: E402
import torch  # noqa: E402

from halfbyte.layers import forward  # noqa: E402
from halfbyte.layers.fused import host  # noqa: E402
from halfbyte.layers.fused.prepare import set_keep  # noqa: E402
from halfbyte.memory import curve, picture, speed  # noqa: E402
from halfbyte.memory.watch import Watch  # noqa: E402
from halfbyte.objectives import sft  # noqa: E402
from halfbyte.optim.adamw import AdamW  # noqa: E402

GIB = 1 << 30
CASES = [memory.Case("1b", 16, 4, 2048, p) for p in ("everything", "inputs", "third sent")]
CASES += [memory.Case("8b", 16, 2, 2048, p) for p in ("everything", "half")]


def step_of(case: memory.Case, it: memory.Ready, optimizer: AdamW, watch: Watch, chunks: int, device: str) -> Callable[[], None]:
    total = case.rows * case.tokens
    ids = torch.randint(0, 4000, (1, total), device=device)
    labels = ids.cpu().roll(-1)
    positions = torch.arange(case.tokens, device=device).repeat(case.rows)[None]
    bounds = torch.arange(0, total + 1, case.tokens, dtype=torch.int32)
    one = torch.ones((), device=device)

    def step() -> None:
        with watch.step():
            watch.mark("forward")
            hidden = forward.hidden_states(it.model, ids, positions, bounds)
            watch.mark("loss")
            loss = sft.loss(hidden, labels, it.output, total, chunks=chunks)
            watch.mark("backward")
            del hidden
            loss.backward()
            watch.mark("update")
            optimizer.clip(loss.detach(), one, 1.0)
            optimizer.step(1e-4)

    return step


def timed(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def seen(case: memory.Case, it: memory.Ready, out: Path, device: str) -> dict[str, Any]:
    """A case: the fourth step is recorded, the third timed without."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    chooser = memory.chooser_of(case, speed.tabulated("h200"), dtype, device)
    rung = memory.rung_of(case, chooser.s.layers)
    set_keep(it.model, rung.keeps(chooser.s.layers))
    host.forget()
    gc.collect()
    planned = curve.planned(chooser, rung)
    steady = {
        n: max(s) for n, s in planned.parts.items() if n in ("packed weights", "other weights", "adapter", "gradients", "optimizer")
    }
    watch = Watch(
        torch.device(device, 0) if device == "cuda" else torch.device("cpu"), lambda _: planned.peak, lambda: steady, record=4
    )
    step = step_of(case, it, AdamW(it.flat, memory.recipe_for(case).optim), watch, rung.chunks, device)
    step(), step()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    plain = timed(step, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    recorded = timed(step, device)
    line = watch.event(rung)
    reading = timed(lambda: [watch.event(rung) for _ in range(20)], "cpu") / 20
    real = watch.recorded
    assert real is not None, "nothing was recorded"
    name = f"memory_seen_{case.size}_{case.policy.replace(' ', '_')}.png"
    levels = {"allocated": int(line["memory_mib"] * 2**20)}
    picture.draw(out / name, picture.title(case.size, chooser, rung), planned, real, levels)
    found = {
        "gate": "red" if device == "cuda" and abs(real.peak / levels["allocated"] - 1) > 0.01 else "green",
        "recorded_GiB": round(real.peak / GIB, 3),
        "allocated_GiB": round(levels["allocated"] / GIB, 3),
        "planned_GiB": round(planned.peak / GIB, 3),
        "error": round(planned.peak / real.peak - 1, 4),
        "planned_MiB": {n: round(b / 2**20, 1) for n, b in planned.at_peak().items()},
        "recorded_MiB": {n: round(b / 2**20, 1) for n, b in real.at_peak().items()},
        "phases": {p: sum(curve.begins(p) <= x < curve.begins(p) + w for x in real.x) for p, w in curve.PHASES.items()},
        "seconds": round(plain, 4),
        "recorded_seconds": round(recorded, 4),
        "reading_us": round(1e6 * reading, 1),
        "event": line,
    }
    if not all(found["phases"].values()):
        found["gate"] = "red"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--cpu", action="store_true", help="the script itself, on a tiny model")
    asked = parser.parse_args()
    out, device = Path(asked.out), "cpu" if asked.cpu else "cuda"
    out.mkdir(parents=True, exist_ok=True)
    it, key = None, None
    with (out / "memory_seen_gpu.jsonl").open("w") as file:
        for case in [memory.Case("tiny", 8, 2, 64, "half")] if asked.cpu else CASES:
            if (case.size, case.rank) != key:
                it, key = None, (case.size, case.rank)
                gc.collect()
                it = memory.ready(case, torch.float32 if asked.cpu else torch.bfloat16, device)
            assert it is not None
            line = json.dumps(
                {"size": case.size, "rows": case.rows, "tokens": case.tokens, "policy": case.policy, **seen(case, it, out, device)}
            )
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()


if __name__ == "__main__":
    main()
