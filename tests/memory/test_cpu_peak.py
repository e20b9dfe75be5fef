"""A CPU's plan against the peak of a real run, in a process of its own: SmolLM2-135M on `python-docs`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import support

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
FULL = ("format=none", "adapter.kind=none", "train.lr=2e-5", "train.max_steps=3")


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [("train.max_steps=40",), FULL], ids=["qlora", "full"])
def test_the_plan_is_within_15_percent_of_the_peak(overrides: tuple[str, ...], tmp_path: Path) -> None:
    quick = ("train.max_minutes=20", "train.prompts=[]", "data.eval=0.002", f"output={tmp_path}/run")
    said = support.cli("train", str(RECIPE), *quick, *overrides, timeout=1500)
    assert said.returncode == 0, said.stderr
    found = re.search(r"peak ([\d.]+) GiB \(planned ([\d.]+)\)", said.stderr)
    assert found, said.stderr[-500:]
    peak, planned = map(float, found.groups())
    assert 0.85 <= planned / peak <= 1.15, f"planned {planned} GiB, peak {peak} GiB"
