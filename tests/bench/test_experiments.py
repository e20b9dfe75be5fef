"""The scripts that compare ways of setting a step up, as far as a CPU can run them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .test_bench import ROOT, _tokenizer, bench


def test_pauses_are_found_between_kernels_that_may_overlap() -> None:
    spans = [(0.0, 10.0, "a"), (5.0, 8.0, "inside"), (31.0, 40.0, "b"), (59.0, 60.0, "c"), (81.5, 82.0, "b"), (105.0, 106.0, "c")]
    assert bench("step_ways_gpu").pauses(reversed(spans)) == [
        {"behind": "b", "before": "c", "count": 1, "us": 23.0},
        {"behind": "c", "before": "b", "count": 1, "us": 21.5},
        {"behind": "a", "before": "b", "count": 1, "us": 21.0},
    ]


@pytest.mark.slow
def test_ways_of_a_step_on_a_tiny_model(tmp_path: Path) -> None:
    _tokenizer(tmp_path / "tokenizer")
    shared = ["--dir", str(tmp_path / "m"), "--size", "tiny"]
    script = str(ROOT / "bench" / "throughput.py")
    subprocess.run([sys.executable, script, "make", *shared, "--tokenizer", str(tmp_path / "tokenizer")], check=True)
    call = [sys.executable, str(ROOT / "bench" / "step_ways_gpu.py"), *shared, "--rows", "2", "--tokens", "64"]
    subprocess.run([*call, "--rounds", "1", "--steps", "1", "--out", str(tmp_path / "out.jsonl")], check=True)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    ways = [line["way"] for line in lines if line["what"] == "way"]
    assert ways == list(bench("step_ways_gpu").WAYS) and lines[1]["gate"] == "green"
