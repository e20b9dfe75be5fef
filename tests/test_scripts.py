"""The shell scripts: their syntax, and what they say when they cannot go on. That they work is what `scripts/test` itself shows."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHELL = [ROOT / ".ci" / "run", *(ROOT / "scripts" / name for name in ("setup", "quickstart", "test", "matrix"))]


def bash(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", *command], capture_output=True, text=True, check=False, env=os.environ | env, timeout=60)


@pytest.mark.parametrize("script", SHELL, ids=lambda p: p.name)
def test_syntax_and_bit(script: Path) -> None:
    assert bash("-n", str(script)).returncode == 0
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()


def test_no_python(tmp_path: Path) -> None:
    said = bash(str(ROOT / "scripts" / "setup"), PYTHON="no-such-python", VENV=str(tmp_path / "venv"))
    assert said.returncode == 1
    assert "Python 3.10 or later is needed" in said.stderr
    assert not (tmp_path / "venv").exists()


def test_a_python_that_cannot_make_environments(tmp_path: Path) -> None:
    """Debian's python3 without python3-venv: no ensurepip, no virtualenv, no pip."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\ncase "$*" in *version_info*) exit 0;; --version) echo Python 3.11.0;; *) exit 1;; esac\n')
    fake.chmod(0o755)
    said = bash(str(ROOT / "scripts" / "setup"), PYTHON=str(fake), VENV=str(tmp_path / "venv"))
    assert said.returncode == 1
    assert "apt install python3-venv" in said.stderr


def test_an_up_to_date_environment_is_left_alone(tmp_path: Path) -> None:
    """The second run installs nothing: it compares what is wanted with what the first one wrote."""
    copy = tmp_path / "project"
    (copy / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup"):
        shutil.copy(ROOT / name, copy / name)
    python = copy / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho called >> " + str(tmp_path / "log") + "\n")
    python.chmod(0o755)
    first = bash(str(copy / "scripts" / "setup"), "dev")
    assert first.returncode == 0 and "is ready" in first.stderr
    calls = (tmp_path / "log").read_text()
    second = bash(str(copy / "scripts" / "setup"), "dev")
    assert second.returncode == 0 and "is up to date" in second.stderr
    assert (tmp_path / "log").read_text() == calls
    (copy / "constraints.txt").write_text("torch==0.0\n")
    assert "is ready" in bash(str(copy / "scripts" / "setup"), "dev").stderr
