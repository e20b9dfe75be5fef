"""Run by test_memory.py in a process of its own: loads a base and prints how anonymous memory grew, as JSON.

Arguments: a directory with a tiny model (loaded first, so that imports and thread pools do not count), then the measured one.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import torch

from halfbyte.checkpoints import huggingface
from halfbyte.formats.config import FormatConfig


def rss_anon() -> int:
    """Bytes of anonymous memory of this process that are resident now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


def main(tiny: str, large: str) -> None:
    huggingface.load(tiny, FormatConfig(), torch.bfloat16)
    before = rss_anon()
    peak = [before]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], rss_anon())

    watcher = threading.Thread(target=watch)
    watcher.start()
    base = huggingface.load(large, FormatConfig(), torch.bfloat16)
    stop.set()
    watcher.join()
    print(json.dumps({"growth": peak[0] - before, "after": rss_anon() - before, "resident": base.report.bytes}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
