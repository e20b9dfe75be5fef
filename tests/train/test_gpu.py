"""The same loop on a GPU: bf16, fp16 with loss scaling, full fine-tuning, skipped steps, resume, memory that runs short."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.errors import Interrupted
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.config import OptimConfig
from halfbyte.optim.flat import flatten
from halfbyte.recipe import recipe_from
from halfbyte.train.finish import Result
from halfbyte.train.run import train
from support import save_tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


LARGER = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
"""Of a model whose step takes hundreds of MiB: far more than the granules of the allocator and the workspaces of libraries."""


def run(files: Path, output: Path, *overrides: str, on_event: Any = None) -> Result:
    os.environ["HALFBYTE_CACHE"] = str(files / "cache")
    data = {
        "model": str(files / "model"),
        "data": {"train": [str(files / "chats.jsonl")], "tokens": 96, "eval": 0.1},
        "train": {"batch": 4, "max_steps": 12, "lr": 1e-2, "eval_every": 4, "save_every": 4, "prompts": ["What is 1 plus 1?"]},
        "output": str(output),
    }
    return train(recipe_from(data, list(overrides)), on_event=on_event)


@pytest.mark.parametrize(
    "overrides",
    [
        ("compute=auto", "adapter.dropout=0.1"),
        ("compute=fp16",),
        ("compute=fp32", "memory.microbatch=1"),
        ("compute=bf16", "memory.recompute=on", "train.log_every=4"),
        ("compute=bf16", "format=none"),
        ("compute=bf16", "format=none", "adapter.kind=none", "train.lr=1e-3"),
        ("compute=fp16", "format=none", "adapter.kind=none", "train.lr=1e-3"),
    ],
    ids=" ".join,
)
def test_every_kind_of_run_learns(files: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    result = run(files, tmp_path / "run", *overrides)
    (before,), (after,) = result.eval_before.values(), result.eval_after.values()
    assert after["loss"] < before["loss"] - 0.1
    assert result.skipped <= 2
    assert any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())


def test_a_stopped_run_resumes(files: Path, tmp_path: Path) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "train" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = run(files, tmp_path / "whole", "compute=fp32")
    with pytest.raises(Interrupted):
        run(files, tmp_path / "broken", "compute=fp32", on_event=stop)
    resumed = run(files, tmp_path / "broken", "compute=fp32")
    assert resumed.loss_after == pytest.approx(whole.loss_after, rel=1e-3)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_nan_leaves_everything_untouched_on_the_device(bits: int) -> None:
    parameter = torch.nn.Parameter(torch.randn(1000, device="cuda"))
    flat = flatten([("x", parameter, "dense")])
    optimizer = AdamW(flat, OptimConfig(bits=bits))  # type: ignore[arg-type]
    one = torch.ones((), device="cuda")
    before = [tensor.clone() for tensor in (flat.values, *optimizer.state_dict().values())]
    flat.grads.fill_(float("nan"))
    optimizer.clip(one, one, 1.0)
    optimizer.step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, (flat.values, *optimizer.state_dict().values()), strict=True))
    flat.grads.fill_(0.5)
    optimizer.clip(one, one, 1.0)
    optimizer.step(1e-2)
    assert not torch.equal(flat.values, before[0])
    assert not flat.grads.any()


def test_a_run_survives_a_cap_that_falls_on_it(files: Path, tmp_path: Path) -> None:
    """In the middle of a run a step may take no more than three fifths of what it took: the run goes down the ladder and learns the
    same."""
    model = save_tiny(tmp_path / "model", max_position_embeddings=512, **LARGER)
    # No graphs: they would be tried in the capped step, with workspaces of their own.
    overrides = (f"model={model}", "compute=fp32", "train.graphs=off", "data.tokens=512", "train.batch=16", "train.max_steps=6")
    overrides += ("train.epochs=80", "train.eval_every=0", "train.lr=1e-3")
    whole = run(files, tmp_path / "whole", *overrides)
    told: list[str] = []

    def cap(event: dict[str, Any]) -> None:
        told.append(event.get("text", ""))
        if event["kind"] == "train" and event["step"] == 2:
            torch.cuda.empty_cache()
            took = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
            # What the allocator has, and cannot give back, is not the step's.
            allowed = torch.cuda.memory_reserved() + 0.6 * took
            torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)

    torch.cuda.reset_peak_memory_stats()
    try:
        result = run(files, tmp_path / "capped", *overrides, on_event=cap)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.shortages and any("could not be allocated" in text for text in told), told
    assert "memory ran short" in result.summary
    assert result.loss_after == pytest.approx(whole.loss_after, rel=1e-3)


def test_a_paged_run_learns_what_an_unpaged_one_does(files: Path, tmp_path: Path) -> None:
    ends = []
    for mode in ("always", "never"):
        ends.append(run(files, tmp_path / mode, "compute=fp32", f"optim.paged={mode}", "train.deterministic=true").loss_after)
    assert ends[0] == ends[1]


def test_two_deterministic_runs_are_the_same_bits(files: Path, tmp_path: Path) -> None:
    """Adapters and every loss on the way; without the flag attention's backward adds in the order in which threads finish."""
    found = []
    for name in ("one", "two"):
        losses: list[float] = []

        def listen(event: dict[str, Any], losses: list[float] = losses) -> None:
            if event["kind"] == "train":
                losses.append(event["loss"])

        result = run(files, tmp_path / name, "compute=bf16", "adapter.dropout=0.1", "train.deterministic=true", on_event=listen)
        found.append((losses, load_file(result.adapter / "adapter_model.safetensors")))
    (first, one), (second, two) = found
    assert first == second and len(first) == 12
    assert one.keys() == two.keys() and all(torch.equal(t, two[name]) for name, t in one.items())


@pytest.mark.parametrize("recompute", ["on", "off"])
def test_a_run_by_graphs_learns_bit_by_bit_what_one_by_launches_does(files: Path, tmp_path: Path, recompute: str) -> None:
    found: list[dict[str, torch.Tensor]] = []
    lines: list[str] = []
    for mode in ("on", "off"):
        overrides = (f"train.graphs={mode}", "train.deterministic=true", f"memory.recompute={recompute}", "memory.offload=off")
        told = lines if mode == "on" else []
        result = run(
            files, tmp_path / mode, "compute=bf16", *overrides, on_event=lambda event, told=told: told.append(event.get("text", ""))
        )
        found.append(load_file(result.adapter / "adapter_model.safetensors"))
    assert not any("recording failed" in line for line in lines)
    assert found[0].keys() == found[1].keys() and all(torch.equal(t, found[1][name]) for name, t in found[0].items())
