"""`train` whole, on a tiny model and real files: every kind of base and adapter, resume by signal, refusals, what is left."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.checkpoints import huggingface, peft, resume
from halfbyte.checkpoints.config import ModelConfig
from halfbyte.checkpoints.resume import Contents
from halfbyte.errors import CheckpointError, Interrupted, ModelError, TrainingError
from halfbyte.formats.config import FormatConfig
from halfbyte.layers import head
from halfbyte.layers.linear import Linear4bit
from halfbyte.memory.table import size
from halfbyte.recipe import load_recipe, recipe_from
from halfbyte.train import choices, fusing, metrics
from halfbyte.train.finish import Result
from halfbyte.train.run import train
from support import write_jsonl

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("cache")]


def run(files: Path, output: Path, *overrides: str, on_event: Any = None, memory_timeline: bool = False) -> Result:
    data = {
        "model": str(files / "model"),
        "compute": "fp32",
        "data": {"train": [str(files / "chats.jsonl")], "tokens": 96, "eval": 0.1},
        "train": {"batch": 4, "max_steps": 8, "lr": 1e-2, "eval_every": 3, "save_every": 2},
        "output": str(output),
    }
    return train(recipe_from(data, list(overrides)), on_event=on_event, memory_timeline=memory_timeline)


def test_a_short_run_says_that_nothing_is_recorded_and_gives_back_what_was_pinned(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten, events = [], []
    monkeypatch.setattr(fusing.host, "forget", lambda: forgotten.append(True))
    run(files, tmp_path / "run", "train.max_steps=2", on_event=events.append, memory_timeline=True)
    assert forgotten == [True]
    assert [e["text"] for e in events if "is recorded" in e.get("text", "")] == [
        "WARNING: no step is recorded: step 3 of what is left would be, and the run ends before"
    ]


def test_graphs_may_change_on_resume(files: Path, tmp_path: Path) -> None:
    run(files, tmp_path / "run", "train.max_steps=2")
    assert run(files, tmp_path / "run", "train.max_steps=3", "train.graphs=off").steps == 3


def newest(output: Path) -> Contents:
    found = resume.newest(output / "checkpoints", print)
    assert found is not None
    return found


def lines(output: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (output / metrics.METRICS).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in metrics.TIMES} for line in found]


def test_qlora_leaves_what_the_summary_says(files: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    prompt = "What is 3 plus 4?"
    result = run(files, tmp_path / "a run", f"train.prompts=['{prompt}']", "log.to=[tensorboard]", on_event=events.append)
    (before,), (after,) = result.eval_before.values(), result.eval_after.values()
    assert after["loss"] < before["loss"] - 0.3
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))
    assert result.steps == 8
    assert [s["step"] for s in result.samples] == [0, 3, 6, 8]
    for text in (prompt, str(result.adapter), "halfbyte chat", "halfbyte eval", "halfbyte merge", "held-out loss"):
        assert text in result.summary
    assert shlex.join(["halfbyte", "merge", str(result.adapter), "--out", str(tmp_path / "a run" / "merged")]) in result.summary
    left = {p.name for p in (tmp_path / "a run").iterdir()}
    assert left >= {"adapter", "checkpoints", "metrics.jsonl", "loss.png", "summary.json", "tensorboard"}
    assert (tmp_path / "a run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "a run" / "summary.json").read_text())["steps"] == 8
    assert {e["kind"] for e in events} >= {"train", "eval", "sample", "message"}
    again = load_recipe(result.adapter / peft.RECIPE)
    assert again.train.lr == 1e-2
    assert "<|im_start|>" in (result.adapter / peft.TEMPLATE).read_text()


def test_memory_is_told_beside_its_plan_and_drawn(files: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    result = run(files, tmp_path / "run", "train.max_steps=4", on_event=events.append, memory_timeline=True)
    found = [e for e in events if e["kind"] == "train"]
    assert all(e["planned_mib"] > 0 and 0 < e["resident_mib"] <= 1.01 * e["memory_mib"] for e in found)
    memory = result.memory
    for name in ("packed weights", "adapter", "gradients", "optimizer"):
        assert memory.planned[name] == memory.actual[name] > 0, name
    # Rotary frequencies are no weights.
    assert memory.planned["other weights"] == pytest.approx(memory.actual["other weights"], rel=0.01)
    assert sum(memory.planned.values()) == memory.planned_peak and sum(memory.actual.values()) >= memory.peak > 0
    (told,) = [e["text"] for e in events if e["kind"] == "message" and e["text"].startswith("memory: ")]
    assert f"{size(memory.actual['decoded weights'])} of decoded weights" in told
    assert told.endswith(f"{size(memory.planned_peak)} in all")
    for text in ("memory by part", "packed weights", "the step", "in all", f"(planned {memory.planned_peak / 2**30:.2f})"):
        assert text in result.summary
    assert (tmp_path / "run" / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["memory"]["planned_peak"] == memory.planned_peak


def test_the_exported_adapter_is_the_trained_one(files: Path, tmp_path: Path) -> None:
    run(files, tmp_path / "run", "train.best=false")
    base = huggingface.load(ModelConfig(name=str(files / "model")), FormatConfig(), torch.float32)
    adapter = peft.load(tmp_path / "run" / "adapter", base)
    stored = newest(tmp_path / "run").tensors["adapter_model"]
    trained = {name: p for name, p, _ in adapter.parameters()}
    assert len(trained) == len(stored)
    assert any(torch.equal(p, tensor) for p in trained.values() for tensor in stored.values())


@pytest.mark.parametrize(
    "overrides",
    [
        ("format=none",),
        ("format=int4", "adapter.modules_to_save=[lm_head]"),
        ("format=none", "adapter.kind=none", "train.lr=1e-3"),
        ("compute=bf16", "memory.recompute=on", "optim.bits=8"),
        ("format=none", "adapter.kind=none", "compute=bf16", "train.lr=1e-3"),
        ("optim.lora_plus=4", "optim.weight_decay=0.1", "adapter.bias=all", "adapter.rslora=true"),
    ],
    ids=" ".join,
)
def test_every_kind_of_run_learns(files: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    result = run(files, tmp_path / "run", *overrides)
    (before,), (after,) = result.eval_before.values(), result.eval_after.values()
    assert after["loss"] < before["loss"] - 0.1


def test_a_fully_trained_model_loads_in_transformers(files: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run(
        files, tmp_path / "run", "format=none", "adapter.kind=none", "train.lr=1e-3", "train.best=false", "data.template=alpaca"
    )
    assert result.adapter == tmp_path / "run" / "model"
    model = AutoModelForCausalLM.from_pretrained(result.adapter, dtype=torch.float32)
    stored = newest(tmp_path / "run").tensors["adapter_model"]
    name, tensor = next((n, t) for n, t in stored.items() if n.endswith("down_proj.weight"))
    mine = model.get_parameter(name.removeprefix("base_model.model."))
    torch.testing.assert_close(mine, tensor.bfloat16().float())
    assert "### Instruction:" in AutoTokenizer.from_pretrained(result.adapter).chat_template
    assert (result.adapter / "recipe.yaml").is_file()


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_a_signal_saves_and_the_same_command_ends_like_an_undisturbed_run(files: Path, tmp_path: Path, kind: str) -> None:
    overrides = ["adapter.dropout=0.2", "memory.microbatch=2", "train.save_every=0", "train.max_steps=6"]
    if kind == "none":
        overrides = ["adapter.kind=none", "format=none", "train.save_every=0", "train.max_steps=6", "train.lr=1e-3"]

    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "train" and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    run(files, tmp_path / "whole", *overrides)
    with pytest.raises(Interrupted) as caught:
        run(files, tmp_path / "broken", *overrides, on_event=stop)
    assert caught.value.exit_code == 75
    assert newest(tmp_path / "broken").step == 4
    run(files, tmp_path / "broken", *overrides)
    one, other = newest(tmp_path / "whole"), newest(tmp_path / "broken")
    for stem, tensors in one.tensors.items():
        assert tensors.keys() == other.tensors[stem].keys()
        assert all(torch.equal(tensor, other.tensors[stem][name]) for name, tensor in tensors.items())
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")


def test_every_microbatch_learns_the_same_dropout_included(files: Path, tmp_path: Path) -> None:
    losses = []
    for m in (1, 2, 4):
        run(files, tmp_path / str(m), "adapter.dropout=0.3", f"memory.microbatch={m}", "train.max_steps=4", "train.eval_every=0")
        losses.append([line["loss"] for line in lines(tmp_path / str(m)) if line["kind"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)


def test_recompute_changes_nothing(files: Path, tmp_path: Path) -> None:
    losses = []
    for mode in ("on", "off"):
        run(files, tmp_path / mode, "adapter.dropout=0.3", f"memory.recompute={mode}", "train.max_steps=4", "train.eval_every=0")
        losses.append([line["loss"] for line in lines(tmp_path / mode) if line["kind"] == "train"])
    assert losses[0] == losses[1]


def test_holding_decoded_weights_changes_no_bit(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []
    operand = Linear4bit.operand

    def spy(layer: Linear4bit) -> Any:
        held.append(layer.decoded is not None)
        return operand(layer)

    monkeypatch.setattr(Linear4bit, "operand", spy)
    losses = []
    for room in (0, 1 << 60):
        monkeypatch.setattr(choices, "ROOM", room)
        held.clear()
        result = run(files, tmp_path / str(room), "adapter.dropout=0.3", "memory.recompute=on", "train.max_steps=4")
        losses.append([line["loss"] for line in lines(result.output) if line["kind"] in ("train", "eval")])
        assert any(held) == (room == 0)
    assert losses[0] == losses[1]


def test_another_recipe_in_the_same_output_is_refused_by_key(files: Path, tmp_path: Path) -> None:
    run(files, tmp_path / "run", "train.max_steps=2")
    with pytest.raises(CheckpointError) as caught:
        run(files, tmp_path / "run", "train.max_steps=2", "train.lr=1e-3", "adapter.alpha=8")
    assert caught.value.code == "train.other-run"
    assert "train.lr: 0.01 in the checkpoint, 0.001 now" in caught.value.message
    assert "adapter.alpha" in caught.value.message


def test_a_finished_run_goes_on_with_more_steps(files: Path, tmp_path: Path) -> None:
    run(files, tmp_path / "run", "train.max_steps=3")
    result = run(files, tmp_path / "run", "train.max_steps=5", "train.eval_every=1")
    assert result.steps == 5
    assert [line["step"] for line in lines(tmp_path / "run") if line["kind"] == "train"] == [1, 2, 3, 4, 5]


def test_a_finished_run_started_again_repeats_its_summary_and_leaves_its_picture(files: Path, tmp_path: Path) -> None:
    first = run(files, tmp_path / "run", "train.max_steps=2")
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "memory.png").write_bytes(b"drawn")
    again = run(files, tmp_path / "run", "train.max_steps=2")
    assert again == first and again.memory.peak > 0 and again.memory_bytes > 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == written
    assert (tmp_path / "run" / "memory.png").read_bytes() == b"drawn"
    # With nothing left of it, a start still ends: there is a plan and no truth.
    (tmp_path / "run" / "summary.json").write_text("{}")
    assert run(files, tmp_path / "run", "train.max_steps=2").memory.planned_peak > 0


def test_automatic_choices_are_kept_on_resume(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(files, tmp_path / "run", "compute=auto", "train.max_steps=2")
    chosen = newest(tmp_path / "run").documents["choices"]
    assert {"compute", "threads", "attention", "microbatch", "recompute", "run"} <= chosen.keys()

    def never(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(choices, "_gemm_seconds", never)
    run(files, tmp_path / "run", "compute=auto", "train.max_steps=3")
    after = newest(tmp_path / "run").documents["choices"]
    assert {name: entry["value"] for name, entry in after.items()} == {name: entry["value"] for name, entry in chosen.items()}


def test_a_time_limit_ends_with_an_adapter_and_says_so(files: Path, tmp_path: Path) -> None:
    result = run(files, tmp_path / "run", "train.max_minutes=0.00001")
    assert result.steps == 1
    assert "ended early by train.max_minutes: 1e-05" in result.summary
    assert (result.adapter / "adapter_model.safetensors").exists()
    more = run(files, tmp_path / "run", "train.max_minutes=60")
    assert more.steps == 8
    assert "ended early" not in more.summary


def test_the_weights_of_the_lowest_held_out_loss_are_exported(files: Path, tmp_path: Path) -> None:
    strange = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ZYX" * n}]} for n in range(1, 9)]
    write_jsonl(tmp_path / "strange.jsonl", strange)
    overrides = ("train.lr=0.1", "train.schedule=constant", "train.warmup=0", "train.eval_every=1", "train.max_steps=12")
    result = run(
        files, tmp_path / "run", *overrides, f"data.eval=[{tmp_path / 'strange.jsonl'}]", "train.prompts=['What is 1 plus 1?']"
    )
    held_out = {line["step"]: line["loss"] for line in lines(tmp_path / "run") if line["kind"] == "eval" and line["step"] > 0}
    assert result.exported_step == min(held_out, key=lambda step: held_out[step])
    assert result.exported_step < 12, "the run must get worse for this test to mean anything"
    (after,) = result.eval_after.values()
    assert after["loss"] == min(held_out.values())
    (answer,) = [s["answer"] for s in result.samples if s["step"] == result.exported_step]
    assert f"after:  {' '.join(answer.split())}" in result.summary


def test_doubts_about_an_adapter_are_told_before_the_first_step(files: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    asked = ("adapter.targets=[layers.0.self_attn.q_proj]", "adapter.rank=24", "format=none", "train.max_steps=1")
    run(files, tmp_path / "run", *asked, "train.eval_every=0.5", on_event=events.append)
    first = next(i for i, event in enumerate(events) if event["kind"] in ("eval", "train"))
    told = " ".join(event.get("text", "") for event in events[:first])
    assert "WARNING: q_proj: 1 of 2 layers" in told and "[adapter.part-of-layers]" in told
    assert "vLLM loads this adapter with --enable-lora --max-lora-rank 32" in told
    with pytest.raises(ModelError) as caught:
        run(files, tmp_path / "head", "adapter.targets=[q_proj, lm_head]", "format=none")
    assert caught.value.code == "adapter.head" and "modules_to_save" in caught.value.hint


def test_a_missing_tracker_is_an_error_before_anything_is_loaded(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError) as caught:
        run(files, tmp_path / "run", "log.to=[wandb]")
    assert caught.value.code == "train.no-tracker"
    assert "halfbyte[wandb]" in caught.value.hint
    assert not (tmp_path / "run").exists()


def test_a_head_that_cannot_be_proven_stops_the_run(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ModelError("not understood", code="model.head")

    monkeypatch.setattr(head, "find", refuse)
    with pytest.raises(ModelError):
        run(files, tmp_path / "run")
