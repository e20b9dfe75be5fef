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


def test_memory_is_flat_where_its_end_is_no_higher_than_its_third_tenth() -> None:
    """A rise at the beginning is forgiven, one behind it is not, and a run of a few steps has no verdict."""
    flat = bench("flat")

    def code(reserved: list[float]) -> int:
        lines = [{"step": i, "reserved_mib": mib, "allocated_mib": 1.0} for i, mib in enumerate(reserved)]
        return int(flat.conclude(lines, lambda **fields: said.append(fields)))

    said: list[dict[str, object]] = []
    assert code([10.0, 40.0, *[50.0] * 28]) == 0 and code([50.0] * 29 + [50.5]) == 1
    assert [line["ok"] for line in said] == [True, True, False, True] and said[2]["late_mib"] == 50.5
    assert code([50.0] * 9) == 1 and "fewer than 10" in str(said[-1]["failed"])


def test_the_verdict_on_fp8_knows_which_seeds_were_asked_for(tmp_path: Path) -> None:
    def verdict(seeds: list[int] | None, *after: tuple[str, int, float], used: float = 1.0) -> tuple[str, bool]:
        """used: the loss of an adapter in bf16, over that in fp8."""
        rows = [
            {"compute": c, "seed": s, "before": 3.0, "after": x, "after_in_bf16": used * x, "rows": [[x, 1]]} for c, s, x in after
        ]
        header = [] if seeds is None else [{"seeds": seeds}]
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*header, *rows]))
        text, kept = bench("fp8_quality_gpu").verdict(tmp_path / "q.jsonl")
        return text.splitlines()[-1], kept

    zero = ("bf16", 0, 2.0), ("fp8", 0, 2.004)
    text, kept = verdict([0], *zero)
    assert kept and text.startswith("fp8 +0.20% (bound") and "between seeds" not in text
    assert verdict([0, 1], *zero, ("bf16", 1, 2.0)) == ("1 pairs are missing: no verdict", False)
    assert verdict(None, *zero)[0].startswith("2 pairs are missing")
    text, kept = verdict([0, 1], *zero, ("bf16", 1, 2.0), ("fp8", 1, 2.036))
    assert not kept and text.startswith("fp8 +1.00% +- 0.80% (bound +0.5%: MISSED)")
    text, kept = verdict([0], ("bf16", 0, 2.0), ("fp8", 0, 2.02), used=2.004 / 2.02)
    assert not kept and "(bound +0.5%: MISSED); its adapter with products in bf16 +0.20% (kept)" in text
    assert not verdict([0], *zero, used=1.01)[1], "the bound stands on both"


@pytest.mark.slow
def test_ways_and_parts_of_a_step_on_a_tiny_model(tmp_path: Path) -> None:
    _tokenizer(tmp_path / "tokenizer")
    shared = ["--dir", str(tmp_path / "m"), "--size", "tiny"]
    script = str(ROOT / "bench" / "throughput.py")
    subprocess.run([sys.executable, script, "make", *shared, "--tokenizer", str(tmp_path / "tokenizer")], check=True)
    call = [sys.executable, str(ROOT / "bench" / "step_ways_gpu.py"), *shared, "--rows", "2", "--tokens", "64"]
    subprocess.run([*call, "--rounds", "1", "--steps", "1", "--out", str(tmp_path / "out.jsonl")], check=True)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    ways = [line["way"] for line in lines if line["what"] == "way"]
    assert ways == list(bench("step_ways_gpu").WAYS) and lines[1]["gate"] == "green"
    out = tmp_path / "roofline.jsonl"
    call = [
        sys.executable,
        str(ROOT / "bench" / "roofline.py"),
        "run",
        *shared,
        "--rows",
        "2",
        "--tokens",
        "64",
        "--compute",
        "fp8",
    ]
    done = subprocess.run([*call, "--out", str(out)], check=True, capture_output=True, text=True)
    assert json.loads(out.read_text())["step_ms"] > 0 and "| M x N x K |" in done.stdout
