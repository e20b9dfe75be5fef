"""Survival in a whole run, from a recipe: the ladder of its plan, what is said, the summary, the checkpoint, what was asked for."""

from __future__ import annotations

import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.checkpoints import resume
from halfbyte.errors import MemoryPlanError, RecipeError
from halfbyte.memory.choose import ASKED, Chooser
from halfbyte.recipe import recipe_from
from halfbyte.train import fusing, loop
from halfbyte.train.finish import Result
from halfbyte.train.run import train

FILE = "adapter_model.safetensors"
pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("cache")]


def run(files: Path, output: Path, *overrides: str, messages: list[str] | None = None) -> Result:
    data = {
        "model": str(files / "model"),
        "compute": "fp32",
        "data": {"train": [str(files / "chats.jsonl")], "tokens": 96, "eval": 0.1},
        "adapter": {"dropout": 0.2},
        "train": {"batch": 4, "max_steps": 4, "lr": 1e-2, "eval_every": 0, "save_every": 2},
        "output": str(output),
    }
    told = [] if messages is None else messages
    return train(recipe_from(data, list(overrides)), on_event=lambda event: told.append(event.get("text", "")))


def short(monkeypatch: pytest.MonkeyPatch, calls: Container[int]) -> None:
    """The backward number n of the run (from 1) finds no memory, for every n in `calls`."""
    original, seen = loop.backward, []

    def sometimes(*arguments: Any) -> torch.Tensor:
        seen.append(arguments[1].detach())
        if len(seen) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of")
        return original(*arguments)

    monkeypatch.setattr(loop, "backward", sometimes)


def weights(output: Path) -> dict[str, torch.Tensor]:
    found = resume.newest(output / "checkpoints", print)
    assert found is not None
    return dict(found.tensors["adapter_model"])


@pytest.mark.parametrize("path", ["modules", "fused"])
def test_a_run_goes_down_says_so_and_resumes_there(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    if path == "fused":  # the path of a GPU on the kernels of this CPU
        monkeypatch.setattr(fusing, "twin", lambda device: "fused")
    # Nothing but recompute is left to choose, and a shorter run's steps are the longer one's.
    fixed = ("memory.microbatch=4", "train.schedule=constant", "train.warmup=0")
    run(files, tmp_path / "whole", *fixed)
    messages: list[str] = []
    with monkeypatch.context() as patch:
        short(patch, {2})
        result = run(files, tmp_path / "short", *fixed, "train.max_steps=2", messages=messages)
    (line,) = [text for text in messages if "could not be allocated" in text]
    assert line == "step 2: 512.00 MiB could not be allocated; going on with 4 rows at once, every layer is recomputed in backward"
    assert "memory ran short once; from step 2 on: 4 rows at once, every layer is recomputed in backward" in result.summary
    assert result.shortages[0]["step"] == 2
    messages.clear()
    run(files, tmp_path / "short", *fixed, messages=messages)
    assert "recompute: on (memory ran short at step 2; kept from the checkpoint)" in messages
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "short")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_embedding_goes_to_host_memory_in_the_middle(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has nowhere else to put it, so the plan is told that it may; the bits are the same, from the start or from then on."""
    fixed = ("memory.microbatch=4", "memory.recompute=on", "train.schedule=constant", "train.warmup=0", "train.prompts=[hello]")
    whole = run(files, tmp_path / "whole", *fixed)
    messages: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Chooser, "embedding", lambda self: ([False, True], ""))
        short(patch, {2})
        result = run(files, tmp_path / "short", *fixed, "train.max_steps=2", messages=messages)
        (line,) = [text for text in messages if "could not be allocated" in text]
        assert line.endswith("4 rows at once, every layer is recomputed in backward, the embedding is in host memory")
        table = 4 * 272 * 64
        assert result.memory.actual["other weights"] == whole.memory.actual["other weights"] - table
        messages.clear()
        run(files, tmp_path / "short", *fixed, messages=messages)
    assert "embedding: in host memory (memory ran short at step 2; kept from the checkpoint)" in messages
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "short")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    asked: list[str] = []
    monkeypatch.setattr(Chooser, "embedding", lambda self: ([True], ASKED))
    there = run(files, tmp_path / "asked", *fixed, messages=asked)
    assert "embedding: in host memory (asked for)" in asked and there.samples == whole.samples
    assert there.eval_after == whole.eval_after
    assert (whole.adapter / FILE).read_bytes() == (there.adapter / FILE).read_bytes()
    monkeypatch.setattr("halfbyte.layers.embedding.send", lambda model, device: "this device cannot read host memory")
    with pytest.raises(RecipeError, match=r"memory.embedding: host cannot be had here: this device cannot read host memory"):
        run(files, tmp_path / "refused", *fixed)


def test_what_finds_no_memory_before_the_first_step_ends_with_the_numbers(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*arguments: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of")

    monkeypatch.setattr(sys.modules["halfbyte.train.run"], "AdamW", nothing)
    with pytest.raises(MemoryPlanError, match=r"before the first step: 512.00 MiB could not be allocated") as caught:
        run(files, tmp_path / "run")
    assert caught.value.code == "train.out-of-memory" and "memory.gpu is auto" in caught.value.hint


def test_fewer_rows_at_once_are_the_same_steps(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(files, tmp_path / "whole", "memory.recompute=off")
    messages: list[str] = []
    with monkeypatch.context() as patch:
        short(patch, {2, 3})
        run(files, tmp_path / "short", "memory.recompute=off", messages=messages)
    assert [text.split("going on with ")[1] for text in messages if "could not be allocated" in text] == [
        "2 rows at once, all activations are kept",
        "1 row at once, all activations are kept",
    ]
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "short")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)


def test_what_was_asked_for_stays_and_the_end_says_what_would_help(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        short(patch, range(2, 100))
        with pytest.raises(MemoryPlanError) as caught:
            run(files, tmp_path / "run", "memory.microbatch=2", "memory.recompute=off", "train.save_every=0", "data.tokens=1024")
    assert caught.value.code == "train.out-of-memory"
    assert "nothing smaller is left to choose than 2 rows at once" in caught.value.message
    for advice in ("memory.recompute=on saves", "memory.microbatch=1 saves", "data.tokens=512 saves"):
        assert advice in caught.value.hint
    assert weights(tmp_path / "run"), "the run was saved before it ended"
