"""Planted faults in what an adapter covers: each is told with its id, and clean adapters are told nothing."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from halfbyte.adapters import checks, full, lora
from halfbyte.adapters.config import AdapterConfig
from support import tiny_model


def told(
    family: str = "llama", model: nn.Module | None = None, changes: dict[str, Any] | None = None, **settings: Any
) -> list[Any]:
    model = tiny_model(family, **(changes or {})) if model is None else model
    return checks.findings(lora.attach(model, AdapterConfig(**settings), 0))


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "phi3", "gemma3", "gptj"])
def test_all_linear_is_clean(family: str) -> None:
    assert told(family) == []


@pytest.mark.parametrize(
    "settings",
    [{"targets": ["q_proj", "v_proj"]}, {"targets": r".*mlp\..*"}, {"exclude": ["mlp.*"]}, {"modules_to_save": ["lm_head"]}],
)
def test_the_same_modules_of_every_layer_are_clean(settings: dict[str, Any]) -> None:
    assert told(**settings) == []


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        (
            {"targets": ["layers.1.self_attn.q_proj", "v_proj"]},
            ["q_proj: 3 of 4 layers of `model.layers` get no adapter (0, 2 to 3)"],
        ),
        ({"exclude": ["layers.3.mlp.down_proj"]}, ["down_proj: 1 of 4 layers of `model.layers` get no adapter (3)"]),
        (
            {"modules_to_save": ["layers.2.mlp"]},
            ["down_proj, gate_proj, up_proj: 1 of 4 layers of `model.layers` get no adapter (2)"],
        ),
        ({"targets": r".*layers\.[01]\..*(q|v)_proj"}, ["q_proj, v_proj: 2 of 4 layers of `model.layers` get no adapter (2 to 3)"]),
        (
            {"targets": ["layers.0.self_attn.q_proj", "layers.3.mlp.up_proj"]},
            [
                "up_proj: 3 of 4 layers of `model.layers` get no adapter (0 to 2)",
                "q_proj: 3 of 4 layers of `model.layers` get no adapter (1 to 3)",
            ],
        ),
    ],
)
def test_targets_that_match_a_part_of_the_layers(settings: dict[str, Any], messages: list[str]) -> None:
    found = told(changes={"num_hidden_layers": 4}, **settings)
    assert {f.message for f in found} == set(messages)
    assert all(f.code == "adapter.part-of-layers" and "all-linear" in f.hint for f in found)


class Hybrid(nn.Module):
    """Attention layers, and one whose projections have other names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj" if i != 1 else "in_proj": nn.Linear(8, 8)}) for i in range(3))


def test_layers_whose_modules_have_other_names() -> None:
    (found,) = told(model=Hybrid(), targets=["q_proj"])
    assert found.code == "adapter.part-of-layers"
    assert found.message == "1 of 3 layers of `layers` get no adapter at all (1)" and "in_proj" in found.hint
    assert told(model=Hybrid()) == []


class Experts(nn.Module):
    """One layer of experts behind a router, both linear."""

    def __init__(self, router: str) -> None:
        super().__init__()
        experts = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(8, 8)}) for _ in range(4))
        self.layers = nn.ModuleList([nn.ModuleDict({router: nn.Linear(8, 4), "experts": experts})])


@pytest.mark.parametrize("router", ["gate", "router", "shared_expert_gate"])
def test_a_router_among_the_targets(router: str) -> None:
    (found,) = told(model=Experts(router))
    assert (found.code, found.hint.endswith(f"`adapter.exclude: [{router}]`")) == ("adapter.router", True)
    assert told(model=Experts(router), exclude=[router]) == []


def test_a_gate_without_experts_is_no_router() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"gate": nn.Linear(8, 4)}) for _ in range(2))})
    assert told(model=model) == []


def test_the_output_head_among_the_targets() -> None:
    (found,) = told(targets=["q_proj", "lm_head"])
    assert (found.code, found.stops) == ("adapter.head", True) and "`adapter.modules_to_save: [lm_head]`" in found.hint
    assert not any(f.stops for f in told(targets=["layers.1.self_attn.q_proj"]))


def test_full_fine_tuning_has_nothing_to_check() -> None:
    assert checks.findings(full.attach(tiny_model())) == []
