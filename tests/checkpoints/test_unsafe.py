"""Nothing that a model directory holds may run: pickles, code of the author, kernel repositories. Every test plants a canary."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.checkpoints import huggingface, shards
from halfbyte.errors import CheckpointError, UnsafeFileError
from halfbyte.formats.config import FormatConfig
from support import save_tiny


class Canary:
    """Unpickled, it creates the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def load(directory: Path) -> huggingface.Base:
    return huggingface.load(str(directory), FormatConfig(), torch.float32)


def edit_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def plant(directory: Path) -> Path:
    """A modeling file that creates a canary when it is imported; returns the canary's path."""
    canary = directory.parent / "canary"
    (directory / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    return canary


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "consolidated.00.pth", "weights.pkl", "model.ckpt"])
def test_pickles_are_refused(name: str, tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "m")
    (directory / "model.safetensors").unlink()
    canary = tmp_path / "canary"
    (directory / name).write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(UnsafeFileError, match=name) as caught:
        load(directory)
    assert "safetensors" in caught.value.hint
    assert not canary.exists()
    pickle.loads((directory / name).read_bytes())
    assert canary.exists(), "the canary works"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_the_author_is_refused(file: str, tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "m")
    canary = plant(directory)
    auto_map = {
        "AutoConfig": "modeling_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["modeling_evil.Evil", None],
    }
    edit_json(directory / file, auto_map=auto_map)
    if file == "config.json":
        edit_json(directory / file, model_type="evil")
    else:
        (directory / "tokenizer.json").rename(directory / "vocab.json")
    with pytest.raises(UnsafeFileError, match=f"{file}.*auto_map"):
        load(directory)
    assert not canary.exists()


def test_code_is_not_run_where_transformers_has_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    directory = save_tiny(tmp_path / "m")
    canary = plant(directory)
    edit_json(directory / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    base = load(directory)
    assert type(base.model).__module__.startswith("transformers.")
    assert not hasattr(base.model.config, "auto_map")
    assert "`auto_map` names code" in caplog.text
    assert not canary.exists()


@pytest.mark.parametrize(
    "key", ["_attn_implementation_internal", "attn_implementation", "_attn_implementation", "_experts_implementation"]
)
def test_kernel_repositories_are_refused(key: str, tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "m")
    edit_json(directory / "config.json", **{key: "someone/evil-kernel"})
    with pytest.raises(UnsafeFileError, match=f"{key}.*someone/evil-kernel"):
        load(directory)


def test_an_index_cannot_leave_its_directory(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "m")
    (directory / "model.safetensors").rename(tmp_path / "model.safetensors")
    (directory / shards.INDEX).write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(UnsafeFileError, match=r"\.\./model\.safetensors"):
        load(directory)


@pytest.mark.parametrize(
    ("file", "text"), [("config.json", "{"), ("config.json", "[]"), (shards.INDEX, "{"), (shards.INDEX, '{"weight_map": 3}')]
)
def test_broken_json_names_its_file(file: str, text: str, tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "m")
    (directory / file).write_text(text)
    with pytest.raises(CheckpointError, match=file):
        load(directory)
