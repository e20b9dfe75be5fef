"""Reserved memory over 20,000 steps of a whole run: flat, or something leaks.

    python bench/flat.py --out DIR [--seconds 55] [--steps 20000]       # writes DIR/flat.jsonl

`halfbyte.train` on a tiny Llama in nf4 with all that a long run does: steps, log lines, evaluation, answers to a fixed prompt,
checkpoints. On a GPU what the allocator holds (`reserved`) and gives out (`allocated`) is read at every log line; on a CPU the
resident memory of the process. Exit code 1 where the last tenth of the lines holds more than the third: the first ones also
compile, measure and fill caches. `--seconds` ends the run earlier; the line says how many steps were made.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from reporting import Report  # noqa: E402

from halfbyte.recipe import recipe_from  # noqa: E402
from halfbyte.train.run import train  # noqa: E402
from support import chats, save_tiny, write_jsonl  # noqa: E402

LINES = 100
"""Log lines of a run of all steps."""
SLACK = {"cuda": 1.0, "cpu": 1.02}
"""What the end may be times the beginning: a C heap keeps and gives back as it likes."""


def run(folder: Path, steps: int, seconds: float) -> list[dict[str, Any]]:
    """Its log lines."""
    events: list[dict[str, Any]] = []
    every = max(1, steps // LINES)
    data = {
        "model": str(folder / "model"),
        "data": {"train": [str(folder / "chats.jsonl")], "tokens": 128, "eval": 0.02},
        "adapter": {"rank": 8, "dropout": 0.1},
        "train": {
            "batch": 2,
            "max_steps": steps,
            "max_minutes": seconds / 60,
            "epochs": max(2, steps // 40),
            "lr": 1e-4,
            "log_every": every,
            "eval_every": steps // 20,
            "save_every": steps // 20,
            "prompts": ["hello"],
            "sample_tokens": 8,
        },
        "optim": {"bits": 8},
        "output": str(folder / "run"),
    }
    train(recipe_from(data), on_event=lambda event: events.append(event) if event["kind"] == "train" else None)
    return events


def verdict(lines: list[dict[str, Any]], key: str, slack: float) -> dict[str, Any]:
    """The largest of the third and of the last tenth, and whether they are level."""
    values = [line[key] for line in lines]
    tenth = max(1, len(values) // 10)
    early, late = max(values[2 * tenth : 3 * tenth] or values), max(values[-tenth:])
    return {"key": key, "early_mib": early, "late_mib": late, "ok": late <= slack * early}


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=55.0)
    parser.add_argument("--steps", type=int, default=20_000)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.INFO)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with (args.out / "flat.jsonl").open("w") as file, tempfile.TemporaryDirectory() as name:
        report, folder = Report(file), Path(name)
        os.environ["HALFBYTE_CACHE"] = str(folder / "cache")
        report(what="machine", device=torch.cuda.get_device_name() if device == "cuda" else "cpu", torch=torch.__version__)
        save_tiny(folder / "model")
        write_jsonl(folder / "chats.jsonl", chats(400))
        lines = run(folder, args.steps, args.seconds)
        keys = ("reserved_mib", "allocated_mib") if device == "cuda" else ("resident_mib",)
        for line in lines:
            report(what="line", step=line["step"], **{key: line[key] for key in keys})
        found = [verdict(lines, key, SLACK[device]) for key in keys]
        for one in found:
            report(what="flat", steps=lines[-1]["step"], **one)
    return 0 if all(one["ok"] for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
