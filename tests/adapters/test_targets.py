"""What a target names, and that a target which names nothing is an error with the nearest name."""

from __future__ import annotations

import pytest

from halfbyte.adapters import targets
from halfbyte.adapters.config import AdapterConfig
from halfbyte.errors import ModelError
from halfbyte.formats.packed import Format
from halfbyte.layers import swap
from support import tiny_model

LEAVES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def _leaves(family: str = "llama", **settings: object) -> set[str]:
    return {p.rpartition(".")[2] for p in targets.match(tiny_model(family), AdapterConfig(**settings))}


def test_all_linear_leaves_out_the_head() -> None:
    assert _leaves() == LEAVES
    assert _leaves("gpt2") == {"c_attn", "c_proj", "c_fc"}
    assert _leaves("falcon") == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert _leaves("phi3") == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_packed_layers_are_found_alike() -> None:
    model = tiny_model("gpt2")
    before = targets.match(model, AdapterConfig())
    swap.pack(model, None, Format("nf4", 64, True))
    swap.adopt(model)
    assert targets.match(model, AdapterConfig()) == before


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"targets": ["q_proj", "v_proj"]}, {"q_proj", "v_proj"}),
        ({"targets": ["*_proj"], "exclude": ["mlp.*"]}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"targets": r".*\.(up|down)_proj"}, {"up_proj", "down_proj"}),
        ({"targets": "q_proj"}, {"q_proj"}),
        ({"targets": ["lm_head", "q_proj"]}, {"lm_head", "q_proj"}),
        ({"modules_to_save": ["mlp"]}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_names_patterns_and_regular_expressions(settings: dict[str, object], expected: set[str]) -> None:
    assert _leaves(**settings) == expected


def test_one_layer_by_its_path() -> None:
    path = "model.layers.1.mlp.up_proj"
    assert targets.match(tiny_model(), AdapterConfig(targets=[path])) == [path]
    assert targets.match(tiny_model(), AdapterConfig(targets=r"model\.layers\.1\.mlp\.up_proj")) == [path]


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"targets": ["q_porj"]}, "adapter.targets: `q_porj` matches no module", "q_proj"),
        ({"targets": ["q_proj", "c_attn"]}, "`c_attn` matches no module", "o_proj"),
        ({"targets": "query_.*"}, "`query_.*` matches no module", "q_proj"),
        ({"targets": "(q_proj"}, "not a regular expression", "list"),
        ({"targets": ["mlp"]}, "matches no linear layer, only model.layers.0.mlp", "up_proj"),
        ({"exclude": ["w1"]}, "adapter.exclude: `w1`", "up_proj"),
        ({"exclude": ["*"]}, "none is left", "fewer"),
        ({"modules_to_save": ["lm_haed"]}, "adapter.modules_to_save: `lm_haed`", "lm_head"),
    ],
)
def test_what_matches_nothing_is_an_error(settings: dict[str, object], message: str, hint: str) -> None:
    from halfbyte.adapters import lora

    with pytest.raises(ModelError) as error:
        lora.attach(tiny_model(), AdapterConfig(**settings), 0)
    assert message in error.value.message and hint in error.value.hint
    assert error.value.code == "adapter.no-target"


def test_patterns_follow_pefts_rule() -> None:
    table = {"q_proj": 4, r"layers\.0\..*up_proj": 2, "proj": 9}
    assert targets.patterned(table, "model.layers.0.self_attn.q_proj", 16) == 4
    assert targets.patterned(table, "model.layers.0.mlp.up_proj", 16) == 2
    assert targets.patterned(table, "model.layers.1.mlp.up_proj", 16) == 16  # "proj" is no whole name
    assert targets.patterned({r".*\.q_proj": 3, "q_proj": 4}, "a.q_proj", 1) == 3  # the first key wins
