"""The examples of the guide are what `halfbyte plan` prints."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import support

GUIDE = (Path(__file__).parents[2] / "docs/guides/memory.md").read_text(encoding="utf-8")
SHAPES = {"Llama-3.1-8B": support.LLAMA_8B, "Qwen3-32B": support.QWEN3_32B}
# A command, an empty line, and what it prints, which a line of dots shortens.
EXAMPLES = re.findall(r"^    halfbyte (plan .*)\n\n((?:    .*\n)+)", GUIDE, flags=re.M)


def words(text: str) -> str:
    """Without bars and line ends, which go by the width of the terminal."""
    return " ".join(re.sub("[█▓▒░·]", "", text).split())


@pytest.mark.cpu
@pytest.mark.parametrize(("command", "printed"), EXAMPLES, ids=[shlex.split(command)[2] for command, _ in EXAMPLES])
def test_an_example_is_what_plan_prints(command: str, printed: str, tmp_path: Path) -> None:
    args = shlex.split(command)
    (tmp_path / args[2]).mkdir()
    (tmp_path / args[2] / "config.json").write_text(json.dumps(SHAPES[args[2]]))
    # No GPU: on one, its own rates would choose.
    said = support.cli(*args, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert said.returncode in (0, 1), said.stderr
    out = words(said.stdout + said.stderr)
    lines = [line for line in printed.splitlines() if line.strip() != "..."]
    assert len(lines) >= 6
    assert [line for line in lines if words(line) not in out] == []


def test_every_example_is_run() -> None:
    assert {shlex.split(command)[2] for command, _ in EXAMPLES} == set(SHAPES)
