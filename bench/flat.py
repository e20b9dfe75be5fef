"""Reserved memory over 20,000 steps of a whole run: flat, or something leaks.

    python bench/flat.py --out DIR [--seconds 55] [--steps 20000]       # writes DIR/flat.jsonl, a line as soon as it is known
    python bench/flat.py --out DIR --again                              # the verdict on the lines that are there

`halfbyte.train` on a tiny Llama in nf4 with all that a long run does: steps, log lines, evaluation, answers to a fixed prompt,
checkpoints. On a GPU what the allocator holds (`reserved`) and gives out (`allocated`) is read at every log line; on a CPU the
resident memory of the process. Exit code 1 where the last tenth of the lines holds more than the third: the first ones also
compile, measure and fill caches; or where there are fewer than LEAST lines. `--seconds` and SIGTERM end the run earlier, and the
verdict says how many steps were made.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from reporting import Report, read  # noqa: E402

from halfbyte.errors import Interrupted  # noqa: E402
from halfbyte.recipe import recipe_from  # noqa: E402
from halfbyte.train.run import train  # noqa: E402
from support import chats, save_tiny, write_jsonl  # noqa: E402

LINES = 100
"""Log lines of a run of all steps."""
LEAST = 10
"""Lines of a verdict."""
SLACK = {"cuda": 1.0, "cpu": 1.02}
"""What the end may be times the beginning: a C heap keeps and gives back as it likes."""
KEYS = {"cuda": ("reserved_mib", "allocated_mib"), "cpu": ("resident_mib",)}


def run(folder: Path, steps: int, seconds: float, on_line: Callable[[dict[str, Any]], None]) -> None:
    """on_line: is given every log line when it is written."""
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
            "eval_every": max(1, steps // 20),
            "save_every": max(1, steps // 20),
            "prompts": ["hello"],
            "sample_tokens": 8,
        },
        "optim": {"bits": 8},
        "output": str(folder / "run"),
    }
    try:
        train(recipe_from(data), on_event=lambda event: on_line(event) if event["kind"] == "train" else None)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)


def verdict(lines: list[dict[str, Any]], key: str, slack: float) -> dict[str, Any]:
    """The largest of the third and of the last tenth, and whether they are level."""
    values = [line[key] for line in lines]
    tenth = len(values) // LEAST
    early, late = max(values[2 * tenth : 3 * tenth]), max(values[-tenth:])
    return {"key": key, "early_mib": early, "late_mib": late, "ok": late <= slack * early}


def conclude(lines: list[dict[str, Any]], report: Callable[..., None]) -> int:
    """Reports the verdicts on the log lines; returns the exit code."""
    if len(lines) < LEAST:
        report(what="flat", lines=len(lines), ok=False, failed=f"no verdict on fewer than {LEAST} lines")
        return 1
    device = "cuda" if KEYS["cuda"][0] in lines[0] else "cpu"
    found = [verdict(lines, key, SLACK[device]) for key in KEYS[device]]
    for one in found:
        report(what="flat", steps=lines[-1]["step"], **one)
    return 0 if all(one["ok"] for one in found) else 1


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=55.0)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--again", action="store_true", help="no run: the verdict on DIR/flat.jsonl")
    args = parser.parse_args()
    if args.again:
        lines = [line for line in read(args.out / "flat.jsonl") if line["what"] == "line"]
        return conclude(lines, lambda **fields: print(json.dumps(fields)))
    args.out.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.INFO)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines: list[dict[str, Any]] = []
    with (args.out / "flat.jsonl").open("w") as file, tempfile.TemporaryDirectory() as name:
        report, folder = Report(file), Path(name)
        os.environ["HALFBYTE_CACHE"] = str(folder / "cache")
        report(what="machine", device=torch.cuda.get_device_name() if device == "cuda" else "cpu", torch=torch.__version__)
        save_tiny(folder / "model")
        write_jsonl(folder / "chats.jsonl", chats(400))

        def on_line(event: dict[str, Any]) -> None:
            lines.append({"step": event["step"]} | {key: event[key] for key in KEYS[device]})
            report(what="line", **lines[-1])

        run(folder, args.steps, args.seconds, on_line)
        return conclude(lines, report)


if __name__ == "__main__":
    sys.exit(main())
