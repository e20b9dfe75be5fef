"""What is packed, what is not and why; and that no 16-bit copy outlives its packing."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from halfbyte.errors import ModelError
from halfbyte.formats.packed import Format
from halfbyte.layers import swap
from halfbyte.layers.linear import Linear4bit
from halfbyte.layers.operands import computes_linear
from layers.families import ADOPTED, LEFT, NF4
from support import FAMILIES, tiny_model

FORMATS = [
    Format("nf4", 64, True),
    Format("fp4", 128, False),
    Format("int4", 32, False, "none"),
    Format("int4", 32, False, "int"),
    Format("int8"),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("family", [*ADOPTED, *LEFT])
def test_the_plan_on_meta_is_what_packing_does(family: str, fmt: Format) -> None:
    with torch.device("meta"):
        config = AutoConfig.for_model(**{"model_type": family} | FAMILIES[family])
        planned = swap.plan_packing(AutoModelForCausalLM.from_config(config, dtype=torch.float32), (), fmt)
    model = tiny_model(family)
    done = swap.pack(model, None, fmt)
    assert planned.rows == done.rows
    held = sum(p.nbytes for p in model.parameters())
    assert done.bytes == held
    assert done.params == sum(p.numel() for p in tiny_model(family).parameters())
    assert not any(p.requires_grad for p in model.parameters())
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and not isinstance(m, Linear4bit)]
    assert linear == [model.get_output_embeddings()]


def test_reasons() -> None:
    rows = {r.path: r for r in swap.plan_packing(tiny_model("gpt2"), ["h.0.mlp", "c_proj"], NF4).rows}
    assert rows["transformer.wte.weight"].reason == "embedding, which is the output head too"
    assert rows["transformer.wpe.weight"].reason == "embedding"
    assert rows["transformer.h.0.ln_1.weight"].reason == "norm"
    assert rows["transformer.h.0.attn.c_attn.bias"].reason == "bias"
    assert rows["transformer.h.0.mlp.c_fc.weight"].reason == "skip: h.0.mlp"
    assert rows["transformer.h.1.attn.c_proj.weight"].reason == "skip: c_proj"
    assert rows["transformer.h.1.attn.c_attn.weight"].packed and rows["transformer.h.1.attn.c_attn.weight"].kind == "conv1d"
    assert "lm_head.weight" not in rows  # tied: listed once, as the embedding
    head = {r.path: r for r in swap.plan_packing(tiny_model("llama", tie_word_embeddings=False), (), NF4).rows}
    assert head["lm_head.weight"].reason == "output head"


def test_weights_that_are_tied_to_something_else_stay() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    rows = {r.path: r for r in swap.plan_packing(model, (), NF4).rows}
    assert rows["model.layers.0.mlp.up_proj.weight"].reason == "tied to another parameter"


def test_experts_of_rank_3_are_listed_never_silent() -> None:
    config = AutoConfig.for_model("qwen3_moe", **FAMILIES["qwen3"] | {"num_experts": 4, "moe_intermediate_size": 32})
    report = swap.plan_packing(AutoModelForCausalLM.from_config(config), (), NF4)
    experts = [r for r in report.rows if r.kind == "experts"]
    assert experts and all(r.reason == "3-D experts are not packed yet" for r in experts)


def test_a_skip_pattern_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(ModelError, match="`down_prj` matches no module") as error:
        swap.plan_packing(tiny_model("llama"), ["down_prj"], NF4)
    assert "down_proj" in error.value.hint and error.value.code == "format.skip-no-match"


def test_skipping_the_head_by_name_is_no_mistake_and_changes_nothing() -> None:
    model = tiny_model("llama")
    assert swap.plan_packing(model, ["lm_head"], NF4) == swap.plan_packing(model, (), NF4)


@pytest.mark.cpu
def test_no_dense_copy_is_left() -> None:
    model = tiny_model("llama", intermediate_size=168)  # a shape that no other test has
    dense = {r.path: weakref.ref(model.get_parameter(r.path)) for r in swap.plan_packing(model, (), NF4).packed}
    swap.pack(model, None, NF4)
    swap.adopt(model)
    model(torch.arange(8)[None])
    gc.collect()
    assert dense and all(ref() is None for ref in dense.values())
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    assert not [t.shape for t in tensors if t.is_floating_point() and sorted(t.shape) == [64, 168]]


def test_weights_from_a_source() -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=5)
    asked: list[str] = []

    def source(path: str) -> torch.Tensor:
        asked.append(path)
        return other.get_parameter(path).detach()

    report = swap.pack(model, source, NF4)
    assert asked == [r.path for r in report.packed]
    swap.pack(other, None, NF4)
    for path in (r.module for r in report.packed):
        assert torch.equal(model.get_submodule(path).codes, other.get_submodule(path).codes)


def test_a_linear_layer_that_does_more_is_kept() -> None:
    class Doubling(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    class Spelled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input @ self.weight.T + (0 if self.bias is None else self.bias)

    assert not computes_linear(Doubling(4, 4))
    assert computes_linear(Spelled(4, 4)) and computes_linear(Spelled(4, 4, bias=False))
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.__class__ = Doubling
    rows = {r.path: r for r in swap.plan_packing(model, (), NF4).rows}
    assert rows["model.layers.0.mlp.up_proj.weight"].reason == "Doubling computes more than a linear layer"


def test_adopting_twice_changes_nothing() -> None:
    model = tiny_model("llama")
    swap.adopt(model)
    layers = list(model.model.layers)
    report = swap.adopt(model)
    assert all(a is b for a, b in zip(model.model.layers, layers, strict=True))
    assert all(r.adopted for r in report.layers) and report.attention == "boundaries"


def test_names_in_the_state_dict_do_not_change() -> None:
    model = tiny_model("qwen3")
    before = list(model.state_dict())
    swap.adopt(model)
    assert list(model.state_dict()) == before
