"""README's first command and its Python, run: the main job as a newcomer meets it (the setup around it is scripts/setup)."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

import support

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def test_quickstart(tmp_path: Path) -> None:
    """Within six minutes of the ten that the README promises (the rest is the installation), on two cores."""
    started = time.monotonic()
    recipe = str(ROOT / "recipes" / "quickstart.yaml")
    said = support.cli("train", recipe, f"output={tmp_path}/run", cwd=ROOT, timeout=1200, OMP_NUM_THREADS="2")
    seconds = time.monotonic() - started
    assert said.returncode == 0, said.stderr
    for words in (
        "python-docs",
        "yes, it fits",
        "Trained a LoRA adapter of rank 16",
        "halfbyte chat",
        "halfbyte eval",
        "halfbyte merge",
    ):
        assert words in said.stderr
    assert said.stderr.count("before: ") == said.stderr.count("after: ") == 3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    ((before,), (after,)) = (summary[key].values() for key in ("eval_before", "eval_after"))
    assert after["loss"] < 0.75 * before["loss"], "held-out loss is clearly lower"
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [e["loss"] for e in events if e["kind"] == "train"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), "the loss falls"
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert seconds < 600, f"{seconds:.0f} s"


def test_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block as it stands, with fewer steps and another output directory."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    lines = [line for line in blocks[0].splitlines() if line.strip()]
    assert len(lines) <= 12
    code = blocks[0].replace('"output=runs/from-python"', f'"output={tmp_path}/run", "train.max_steps=2", "data.train.0.limit=200"')
    assert str(tmp_path) in code
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    exec(code, names)
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()
    result = names["result"]
    assert getattr(result, "steps") == 2  # noqa: B009
