"""How the kernel benchmarks speak: a gate that nothing passes when it is red, and JSON lines, each written and printed when known.

`Report.fits(name)` is False once `--limit` seconds are over: what is left out then is named in the last line.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, TextIO

BEGUN = time.monotonic()
"""When this module was imported: the script's start, but for torch's own import."""


def read(results: Path) -> list[dict[str, Any]]:
    """The lines of a raw result."""
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def passed(found: dict[str, str], file: Path) -> bool:
    """Writes what every check said ("": green) to `file`, prints what is red; True when nothing is."""
    file.write_text(json.dumps(found, indent=1))
    red = {name: text for name, text in found.items() if text}
    print(f"gate: {len(found) - len(red)} of {len(found)} checks green, {time.monotonic() - BEGUN:.1f} s", flush=True)
    for name, text in red.items():
        print(f"RED {name}\n{text}", flush=True)
    if red:
        print("no figures: a kernel that is wrong has no speed")
    return not red


class Report:
    """Writes JSON lines, each with its second, to `file` and the terminal; `limit` in seconds since the script began."""

    def __init__(self, file: TextIO, limit: float = math.inf) -> None:
        self.file, self.limit = file, limit
        self.left_out: list[str] = []

    def __call__(self, **fields: Any) -> None:
        line = json.dumps(fields | {"at_s": round(time.monotonic() - BEGUN, 1)})
        self.file.write(line + "\n")
        self.file.flush()
        print(line, flush=True)

    def machine(self) -> None:
        import torch
        import triton

        self(what="machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__)

    def fits(self, name: str) -> bool:
        """Whether `name` may still begin; remembered when not."""
        if time.monotonic() - BEGUN < self.limit:
            return True
        self.left_out.append(name)
        return False

    def done(self) -> None:
        """The last line: seconds in all, and what the limit left out."""
        self(what="seconds", all=round(time.monotonic() - BEGUN, 1), left_out=self.left_out)
