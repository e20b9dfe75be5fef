"""A base that the device has no room for: one clear error, whichever allocation fails; never another one, never half a model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from halfbyte.checkpoints import huggingface, shards
from halfbyte.errors import MemoryPlanError
from halfbyte.formats.config import FormatConfig
from halfbyte.layers import swap
from support import save_tiny
from train.trials import Short


def test_loading_tells_the_numbers_and_what_would_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "model")
    original, seen = swap.pack_module, []

    def sometimes(*arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 MiB. GPU 0 has a total capacity of")
        return original(*arguments)

    monkeypatch.setattr(swap, "pack_module", sometimes)
    with pytest.raises(MemoryPlanError) as caught:
        huggingface.load(str(tmp_path / "model"), FormatConfig(), torch.float32)
    error = caught.value
    assert error.code == "memory.load" and error.__context__ is None, "what the failed load held is let go"
    assert f"{tmp_path / 'model'} could not be loaded in nf4: 96.00 MiB could not be allocated, 0.00 of 0.00 GiB" in error.message
    assert "end other programs; format.head=nf4" in error.hint
    huggingface.load(str(tmp_path / "model"), FormatConfig(), torch.float32)


def test_other_errors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "model")

    def broken(*arguments: Any) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(swap, "pack_module", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        huggingface.load(str(tmp_path / "model"), FormatConfig(), torch.float32)


@pytest.mark.cpu
@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_every_allocation_of_a_load_may_fail(kind: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing, probes and proofs included: a layer whose proof found no memory is not one that was not understood."""
    original = shards.Shards.read

    def read(self: shards.Shards, name: str) -> torch.Tensor:
        with _disable_current_modes():  # a view of the file
            return original(self, name)

    monkeypatch.setattr(shards.Shards, "read", read)
    save_tiny(tmp_path / "model")
    fmt = FormatConfig(kind=kind)  # type: ignore[arg-type]

    def load(fails: set[int]) -> int:
        shutil.rmtree(cache, ignore_errors=True)
        with Short(fails) as memory:
            huggingface.load(str(tmp_path / "model"), fmt, torch.float32)
        return memory.made

    load(set())  # what is found out once a process
    count = load(set())
    assert count > 300
    for n in range(1, count + 1, 7):
        with pytest.raises(MemoryPlanError, match=r"could not be loaded in .*: 2.00 MiB could not be allocated"):
            load({n})
