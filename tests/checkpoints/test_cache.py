"""The cache of packed bases: used, verified, rebuilt, and harmless when it cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfbyte.checkpoints import cache as cache_module
from halfbyte.checkpoints import huggingface
from halfbyte.formats.config import FormatConfig
from halfbyte.formats.packed import Packed
from halfbyte.formats.quantize import quantize
from halfbyte.layers import swap
from support import save_tiny

IDS = torch.arange(1, 20)[None]


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weights that were quantised so far."""
    names: list[str] = []

    def counting(weight: torch.Tensor, fmt: object, *, name: str = "tensor") -> Packed:
        names.append(name)
        return quantize(weight, fmt, name=name)  # type: ignore[arg-type]

    monkeypatch.setattr(swap, "quantize", counting)
    return names


def load(directory: Path, fmt: FormatConfig | None = None, compute: torch.dtype = torch.float32) -> huggingface.Base:
    return huggingface.load(str(directory), fmt or FormatConfig(), compute)


def test_a_second_start_does_not_quantise_again(tmp_path: Path, quantised: list[str]) -> None:
    directory = save_tiny(tmp_path / "m", "gpt2")
    first = load(directory)
    assert len(quantised) == 8
    second = load(directory)
    assert len(quantised) == 8
    assert first.digest == second.digest
    assert first.model.state_dict().keys() == second.model.state_dict().keys()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    assert [(r.path, r.packed, r.reason, r.bytes) for r in first.report.rows] == [
        (r.path, r.packed, r.reason, r.bytes) for r in second.report.rows
    ]


def test_the_key_knows_format_dtype_and_file(tmp_path: Path, quantised: list[str]) -> None:
    directory = save_tiny(tmp_path / "m")
    load(directory)
    for change in (lambda: load(directory, FormatConfig(block=128)), lambda: load(directory, compute=torch.bfloat16)):
        before = len(quantised)
        change()
        assert len(quantised) == before + 14
    os.utime(directory / "model.safetensors", ns=(1, 1))
    load(directory)
    assert len(quantised) == 4 * 14


DAMAGE = ["first", "middle", "last", "short", "manifest", "not text", "specs", "weights gone"]


@pytest.mark.parametrize("where", DAMAGE)
def test_a_damaged_entry_is_rebuilt(
    where: str, tmp_path: Path, cache: Path, quantised: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    directory = save_tiny(tmp_path / "m")
    expected = load(directory)
    (entry,) = (cache / "bases").iterdir()
    file = entry / "model.safetensors"
    data = bytearray(file.read_bytes())
    if where in ("first", "middle", "last"):
        data[{"first": 9, "middle": len(data) // 2, "last": -1}[where]] ^= 1
        file.write_bytes(data)
    elif where == "short":
        file.write_bytes(data[:-100])
    elif where == "manifest":
        (entry / "manifest.json").write_text("{")
    elif where == "not text":
        (entry / "manifest.json").write_bytes(b"\xff")
    elif where == "specs":
        text = (entry / "manifest.json").read_text()
        (entry / "manifest.json").write_text(text.replace("nf4|64|", "fp4|64|"))
    else:
        file.unlink()
    again = load(directory)
    assert "is damaged" in caplog.text
    assert len(quantised) == 28
    assert again.digest == expected.digest
    load(directory)
    assert len(quantised) == 28


def test_an_unwritable_cache_costs_only_time(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = save_tiny(tmp_path / "m")
    expected = load(directory)
    for file in sorted(cache.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    (cache / "bases").write_text("a file where a directory should be")
    base = load(directory)
    assert "is not cached" in caplog.text
    assert base.digest == expected.digest


def test_a_full_disk_costs_only_time(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> dict[str, str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.shards, "write", full)
    base = load(save_tiny(tmp_path / "m"))
    assert len(base.digest) == 64
    assert list((cache / "bases").iterdir()) == []


def test_dense_bases_keep_only_their_digest(tmp_path: Path, cache: Path) -> None:
    directory = save_tiny(tmp_path / "m")
    none = FormatConfig(kind="none")
    assert load(directory, none).digest == load(directory, none).digest != load(directory).digest
    assert len(list((cache / "digests").iterdir())) == 1


@pytest.mark.cpu
def test_two_processes_at_once(tmp_path: Path, cache: Path, child_env: dict[str, str]) -> None:
    directory = save_tiny(tmp_path / "m")
    code = (
        "import sys, torch; from halfbyte.checkpoints import huggingface; from halfbyte.formats.config import FormatConfig;"
        "print(huggingface.load(sys.argv[1], FormatConfig(), torch.float32).digest)"
    )
    command = [sys.executable, "-c", code, str(directory)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_env) for _ in range(2)]
    digests = {run.communicate()[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert digests == {load(directory).digest}
    assert len(list((cache / "bases").iterdir())) == 1
