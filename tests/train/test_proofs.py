"""Faults that only a running adapter shows, planted: a module that no gradient reaches, a checkpoint with other weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from halfbyte.adapters import lora, state
from halfbyte.adapters.config import AdapterConfig
from halfbyte.adapters.lora import Adapter
from halfbyte.errors import TrainingError
from halfbyte.optim.flat import Flat, flatten
from halfbyte.train import proofs
from halfbyte.train.config import TrainConfig
from halfbyte.train.proofs import Proofs
from support import tiny_model
from train import rig

FINITE, OVERFLOW = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])


def attached(**settings: object) -> tuple[nn.Module, Adapter, Flat]:
    model = tiny_model()
    adapter = lora.attach(model, AdapterConfig(rank=2, **settings), 0)
    return model, adapter, flatten(adapter.parameters())


def backward(model: nn.Module) -> None:
    ids = torch.arange(1, 9)[None]
    model(input_ids=ids, labels=ids).loss.backward()


def test_a_healthy_adapter_is_proven_once() -> None:
    model, _, flat = attached()
    done = Proofs()
    backward(model)
    proofs.gradient(done, flat, FINITE, 8)
    assert done.gradient
    flat.grads.zero_()
    proofs.gradient(done, flat, FINITE, 8)  # proven already: not looked at again


def test_modules_without_a_gradient_are_named() -> None:
    model, adapter, flat = attached()
    dead = [path for path in adapter.layers if "layers.1" in path and path.endswith(("up_proj", "gate_proj"))]
    for path in dead:
        adapter.layers[path].active = False  # a module that the forward pass does not run
    backward(model)
    with pytest.raises(TrainingError) as caught:
        proofs.gradient(Proofs(), flat, FINITE, 8)
    assert caught.value.code == "adapter.no-gradient"
    assert "2 of 14 adapted modules got no gradient" in caught.value.message
    assert all(path in caught.value.message for path in dead) and "layers.0" not in caught.value.message
    assert "adapter.exclude" in caught.value.hint and "up_proj" in caught.value.hint


def test_an_adapter_that_nothing_reaches() -> None:
    _, _, flat = attached()
    with pytest.raises(TrainingError, match="14 of 14 adapted modules") as caught:
        proofs.gradient(Proofs(), flat, FINITE, 8)
    assert "nothing of the adapter is reached" in caught.value.hint


def test_steps_that_prove_nothing_are_waited_out() -> None:
    _, _, flat = attached()
    done = Proofs()
    proofs.gradient(done, flat, OVERFLOW, 8)
    proofs.gradient(done, flat, FINITE, 0)
    assert not done.gradient


def test_experts_that_a_batch_did_not_visit_are_no_fault() -> None:
    names = [f"layers.0.mlp.experts.{i}.up_proj.lora_b" for i in range(3)]
    flat = flatten([(name, nn.Parameter(torch.zeros(4, 2)), "lora_b") for name in names])
    flat.groups[0].grads[:4] = 1
    proofs.gradient(Proofs(), flat, FINITE, 8)
    flat.grads.zero_()
    with pytest.raises(TrainingError, match="3 of 3"):
        proofs.gradient(Proofs(), flat, FINITE, 8)


def test_a_checkpoint_with_the_weights_in_memory_is_proven(tmp_path: Path) -> None:
    _, adapter, flat = attached(modules_to_save=["lm_head"], bias="none")
    flat.values.normal_()
    save_file(state.state_dict(adapter), tmp_path / "adapter_model.safetensors")
    done = Proofs()
    proofs.saved(done, flat, tmp_path)
    assert done.saved


@pytest.mark.parametrize("fault", ["stale", "missing", "strange", "rounded"])
def test_a_checkpoint_with_other_weights_is_an_error(tmp_path: Path, fault: str) -> None:
    _, adapter, flat = attached()
    flat.values.normal_()
    tensors = state.state_dict(adapter)
    name = sorted(tensors)[3]
    if fault == "stale":  # a parameter that was replaced: what is saved is not what learns
        tensors[name] = tensors[name].clone().zero_()
    elif fault == "rounded":
        tensors[name] = tensors[name].bfloat16().float()
    elif fault == "missing":
        del tensors[name]
    else:
        name = "base_model.model.other.lora_A.weight"
        tensors[name] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(TrainingError) as caught:
        proofs.saved(Proofs(), flat, tmp_path)
    assert caught.value.code == "adapter.not-saved" and name in caught.value.message


@pytest.mark.parametrize(
    ("every", "total", "steps"), [(0.25, 9, 3), (0.0625, 160, 10), (0.333333, 30, 10), (100, 9, 100), (0, 9, 0)]
)
def test_a_share_of_the_run_in_steps(every: float, total: int, steps: int) -> None:
    found = TrainConfig(eval_every=every, save_every=every).in_steps(total)
    assert (found.eval_every, found.save_every) == (steps, steps)


@pytest.mark.cpu
def test_a_run_ends_at_its_first_save_when_the_checkpoint_holds_other_weights(tmp_path: Path) -> None:
    parts = rig.build(tmp_path, steps=3, eval_every=0, save_every=1)
    before = {name: values.clone() for name, values in parts.flat.named().items()}
    with pytest.raises(TrainingError) as caught:
        rig.run(replace(parts, weights=lambda: before))
    assert caught.value.code == "adapter.not-saved" and "step-00000001" in caught.value.message
