"""A tiny model, data and a recipe on disk, and a way to call the command line in this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import chats, save_tiny, write_jsonl


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str


Cli = Callable[..., Said]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """`cli("plan", "recipe.yaml")` in a directory and cache of its own."""
    from halfbyte.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_COLOR", "1")
    before = dict(os.environ)

    def run(*args: str) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(args))
        found = capsys.readouterr()
        return Said(int(caught.value.code or 0), found.out, found.err)

    yield run
    os.environ.clear()
    os.environ.update(before)


RECIPE = """\
model: model
data:
  train: [{path: chats.jsonl}]
  eval: 0.2
  tokens: 128
train: {batch: 2, max_steps: 3, lr: 1e-2, eval_every: 0, save_every: 0, prompts: ["What is 1 plus 1?"], sample_tokens: 4}
compute: fp32
output: run
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with `model/`, `chats.jsonl` and `recipe.yaml`."""
    save_tiny(tmp_path / "model")
    write_jsonl(tmp_path / "chats.jsonl", chats(40))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path
