"""The verdict of `equivalence_gpu.py` on runs that are only pretended."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from .test_tables import bench


def pretended(drift: float, bits: str) -> Any:
    """Runs whose seeds are 0.1 apart, whose paths are `drift` apart, and whose deterministic twins have these adapters."""

    def spawn(args: Namespace, path: str, seed: int, number: int, steps: int) -> dict[str, Any]:
        import json

        loss = 2.0 + 0.1 * seed + drift * (path == "reference")
        speed = 8.0 if path == "deterministic" else 10.0
        adapter = bits[number] if path == "deterministic" else "c"
        row = {"path": path, "seed": seed, "losses": [loss] * steps, "held_out": loss, "steps_per_s": speed, "adapter": adapter}
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    return spawn


@pytest.mark.parametrize(("drift", "bits", "green"), [(0.01, "aa", True), (0.2, "aa", False), (0.01, "ab", False)])
def test_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str], drift: float, bits: str, green: bool) -> None:
    args = Namespace(gguf=None, model="m", work=str(tmp_path), out=tmp_path / "o.jsonl", steps=8, jobs=1, no_deterministic=False)
    assert bench("equivalence_gpu").run(args, pretended(drift, bits)) is green
    said = capsys.readouterr().out
    assert f"verdict: {'green' if green else 'red'}, curves differ by {drift:.4f} (two seeds: 0.1000)" in said
    assert "cost 20.0%" in said and ("NOT equal" in said) is (bits == "ab")


def test_a_run_that_failed_is_red() -> None:
    assert bench("equivalence_gpu").verdict([{"path": "fused", "seed": 0, "failed": "x"}]) == (
        "verdict: red, not measured: fused",
        False,
    )
