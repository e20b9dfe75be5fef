"""The path of the layers in a run: which one, told with its reason, and the same training on either."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.data.config import DataConfig
from halfbyte.data.prepare import prepare as prepare_data
from halfbyte.errors import RecipeError
from halfbyte.kernels.products import Float8
from halfbyte.layers import swap
from halfbyte.layers.decoder import DecoderLayer
from halfbyte.layers.fused import prepare
from halfbyte.layers.fused.layer import Fused
from halfbyte.memory.rungs import Rung
from halfbyte.recipe import recipe_from
from halfbyte.train import fusing, metrics
from halfbyte.train.choices import Choice
from halfbyte.train.determinism import VARIABLE, deterministic
from halfbyte.train.evaluate import evaluate_base
from halfbyte.train.finish import Result
from halfbyte.train.run import train
from support import chats, packed_base, save_tiny, tiny_model, write_jsonl

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    save_tiny(root / "model")
    write_jsonl(root / "chats.jsonl", chats(40))
    return root


def run(files: Path, output: Path, *overrides: str, told: list[str] | None = None) -> Result:
    def listen(event: dict[str, Any]) -> None:
        if told is not None and event["kind"] == "message":
            told.append(event["text"])

    data = {
        "model": str(files / "model"),
        "compute": "fp32",
        "adapter": {"dropout": 0.1},
        "data": {"train": [str(files / "chats.jsonl")], "tokens": 64, "eval": 0.1},
        "train": {"batch": 2, "max_steps": 4, "lr": 1e-2, "eval_every": 2},
        "output": str(output),
    }
    return train(recipe_from(data, list(overrides)), on_event=listen)


def losses(output: Path) -> list[float]:
    found = [json.loads(line) for line in (output / metrics.METRICS).read_text().splitlines()]
    return [line["loss"] for line in found if line["kind"] in ("train", "eval")]


@pytest.fixture
def fused_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU on the kernels of this CPU."""
    monkeypatch.setattr(fusing, "twin", lambda device: "fused")


@pytest.mark.cpu
@pytest.mark.parametrize("recompute", ["on", "off"])
def test_the_fused_path_trains_as_the_modules_do(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recompute: str
) -> None:
    told: list[str] = []
    asked = (f"memory.recompute={recompute}", "train.prompts=['What is 3 plus 4?']")
    run(files, tmp_path / "modules", *asked, told=told)
    assert any(line.startswith("layers: modules (auto: the kernels of this cpu device are the cpu ones)") for line in told)
    monkeypatch.setattr(fusing, "twin", lambda device: "fused")
    run(files, tmp_path / "fused", *asked, told=told)
    assert any(line.startswith("layers: fused (2 of 2) (auto: proven") for line in told), told
    expected, got = losses(tmp_path / "modules"), losses(tmp_path / "fused")
    assert len(got) == 7 and got == pytest.approx(expected, rel=1e-4)


@pytest.mark.cpu
def test_layers_that_are_left_are_named(files: Path, tmp_path: Path, fused_here: None) -> None:
    told: list[str] = []
    learns = "model.layers.1.mlp.down_proj"
    asked = (f"adapter.modules_to_save=[{learns}]", f"format.skip=[{learns}]", "adapter.targets=[q_proj]")
    run(files, tmp_path / "run", *asked, told=told)
    assert any(line.startswith("layers: fused (1 of 2)") for line in told), told
    assert "layers left to their modules: model.layers.1: `mlp.down_proj.weight` learns beside the adapter" in told


@pytest.mark.cpu
def test_full_fine_tuning_runs_modules(files: Path, tmp_path: Path, fused_here: None) -> None:
    told: list[str] = []
    run(files, tmp_path / "run", "format=none", "adapter.kind=none", "adapter.dropout=0", "train.lr=1e-3", told=told)
    assert "layers: modules (auto: no layer can run fused)" in told


@pytest.mark.cpu
def test_two_deterministic_runs_are_the_same_bits(files: Path, tmp_path: Path) -> None:
    from halfbyte.checkpoints import resume

    found = []
    for name in ("one", "two"):
        run(files, tmp_path / name, "train.deterministic=true")
        found.append(resume.newest(tmp_path / name / "checkpoints", print))
    one, two = found
    assert one is not None and two is not None and one.identity["train.deterministic"] is True
    for group, tensors in one.tensors.items():
        assert all(torch.equal(tensor, two.tensors[group][name]) for name, tensor in tensors.items())
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert not torch.are_deterministic_algorithms_enabled()


def test_determinism_is_for_the_length_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled() and VARIABLE not in os.environ
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled() and os.environ[VARIABLE] == ":4096:8"
        assert torch.utils.deterministic.fill_uninitialized_memory is False
    assert not torch.are_deterministic_algorithms_enabled() and VARIABLE not in os.environ
    assert torch.utils.deterministic.fill_uninitialized_memory is True
    monkeypatch.setenv(VARIABLE, ":16:8")
    with deterministic(True):
        assert os.environ[VARIABLE] == ":16:8"
    assert os.environ[VARIABLE] == ":16:8"


@pytest.mark.cpu
def test_a_run_in_fp8_is_scored_in_16_bits(files: Path, tmp_path: Path, fused_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `halfbyte eval` scores its adapter: before the first step both runs are the same model."""

    def of(kind: str, output: Path) -> list[float]:
        lines = [json.loads(line) for line in (output / metrics.METRICS).read_text().splitlines()]
        return [line["loss"] for line in lines if line["kind"] == kind]

    told: list[str] = []
    plain, narrow = tmp_path / "fp32", tmp_path / "fp8"
    run(files, plain)
    monkeypatch.setattr(fusing, "Augmented", Float8)  # a CPU is refused `compute: fp8`
    run(files, narrow, told=told)
    assert any(line.startswith("layers: fused (2 of 2)") for line in told)
    assert of("eval", narrow)[0] == pytest.approx(of("eval", plain)[0], rel=1e-6)
    trained, expected = of("train", narrow)[0], of("train", plain)[0]
    assert trained == pytest.approx(expected, rel=1e-2) and trained != pytest.approx(expected, rel=1e-5)


@pytest.mark.cpu
def test_evaluation_without_a_run_takes_the_fused_layers(
    files: Path, tmp_path: Path, fused_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = packed_base()
    swap.adopt(base.model)
    calls: list[int] = []
    whole = Fused.run

    def counted(self: Fused, *args: Any) -> Any:
        calls.append(1)
        return whole(self, *args)

    monkeypatch.setattr(Fused, "run", counted)
    data = DataConfig(train=[str(files / "chats.jsonl")], tokens=64, eval=0.5)
    sets = prepare_data(data, base.tokenizer, 0, tmp_path).eval
    fused = evaluate_base(base, sets, 64)
    assert calls and all(m.fused is None for m in base.model.modules() if isinstance(m, DecoderLayer))
    monkeypatch.setattr(fusing, "twin", lambda device: "reference")
    seen = len(calls)
    modules = evaluate_base(base, sets, 64)
    assert len(calls) == seen
    for name, score in modules.items():
        assert fused[name].loss == pytest.approx(score.loss, rel=1e-5)


def test_offloading_that_cannot_be_had_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"memory\.offload: on cannot be had here") as caught:
        fusing.require("on", CPU)
    assert caught.value.code == "memory.offload"
    fusing.require("auto", CPU)


@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_what_only_fused_layers_have_is_not_dropped(monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    """A model without adopted layers, or kernels that are forced."""
    monkeypatch.setattr(fusing, "twin", lambda device: kernels)
    off, on = Choice("off", "auto: why"), Choice("on", "asked for")
    model = tiny_model("gpt2")
    room = Choice("on", "auto: there is room")

    def place(compute: str, offload: Choice) -> dict[str, Choice]:
        return fusing.place(model, CPU, compute=compute, rung=Rung(1, True), offload=offload, decoded=room, tell=print)

    assert place("bf16", off)["layers"].value == "modules"
    with pytest.raises(RecipeError, match="compute: fp8 cannot be had here"):
        place("fp8", off)
    with pytest.raises(RecipeError, match=r"memory\.offload: on cannot be had here"):
        place("bf16", on)


def test_neighbouring_layers_are_told_as_a_range() -> None:
    left = dict.fromkeys(["m.0", "m.1", "m.2", "m.4"], "why") | {"m.3": "other"}
    assert prepare.Preparation(1, left).reasons() == ["m.0-2, m.4: why", "m.3: other"]
