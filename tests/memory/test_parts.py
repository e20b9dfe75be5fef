"""The parts of a plan against what is really allocated: weights and trained numbers exactly, the rest in its proportions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from halfbyte.adapters import full, lora
from halfbyte.config import Recipe
from halfbyte.formats.packed import Format
from halfbyte.layers import swap
from halfbyte.layers.forward import hidden_states
from halfbyte.layers.fused.prepare import prepare
from halfbyte.memory.parts import Part, activations, parts
from halfbyte.memory.shapes import shapes, skeleton
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.config import OptimConfig
from halfbyte.optim.flat import flatten
from halfbyte.recipe import recipe_from
from support import LLAMA_8B, QWEN3_8B, SMOLLM2, tiny_config, tiny_model

FORMATS: list[dict[str, Any]] = [
    {"kind": "nf4", "nested": True},
    {"kind": "nf4", "nested": False, "block": 128},
    {"kind": "fp4", "nested": True},
    {"kind": "int4", "block": 32},
    {"kind": "int4", "symmetric": False},
    {"kind": "int8"},
]


def recipe_of(**sections: Any) -> Recipe:
    return recipe_from({"model": "m", "data": {"train": "a.jsonl", "tokens": 64}, **sections})


def named(found: list[Part]) -> dict[str, Part]:
    return {p.name: p for p in found}


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: "-".join(map(str, f.values())))
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "phi3"])
def test_weights_are_exact(family: str, fmt: dict[str, Any]) -> None:
    recipe = recipe_of(format=fmt)
    found = named(parts(tiny_config(family), recipe, compute="fp32"))
    model = tiny_model(family)
    swap.pack(model, None, Format.from_config(recipe.format))
    packed = sum(p.nbytes for p in model.parameters() if p.dtype == torch.uint8)
    kept = sum(p.nbytes for p in model.parameters() if p.dtype != torch.uint8)
    assert found["packed weights"].bytes == packed
    assert found["other weights"].bytes == kept


@pytest.mark.parametrize(
    "adapter",
    [
        {"rank": 8},
        {"rank": 3, "targets": ["q_proj", "down_proj"]},
        {"rank": 8, "rank_pattern": {"v_proj": 2}, "modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_what_learns_is_exact(adapter: dict[str, Any]) -> None:
    recipe = recipe_of(adapter=adapter)
    s = shapes(skeleton(tiny_config(), torch.float32), recipe.format, recipe.adapter)
    model = tiny_model()
    swap.pack(model, None, Format.from_config(recipe.format))
    flat = flatten(lora.attach(model, recipe.adapter, 0).parameters())
    assert s.trained == flat.numel
    assert 4 * s.padded == flat.values.nbytes
    found = named(parts(tiny_config(), recipe))
    assert found["adapter"].bytes == found["gradients"].bytes == flat.values.nbytes
    assert found["optimizer"].bytes == 2 * flat.values.nbytes
    small = named(parts(tiny_config(), recipe_of(adapter=adapter, optim={"bits": 8})))["optimizer"]
    moments = AdamW(flat, OptimConfig(bits=8)).moments
    assert small.bytes == sum(t.nbytes for t in vars(moments).values())


def test_full_fine_tuning_counts_masters() -> None:
    recipe = recipe_of(format="none", adapter={"kind": "none"})
    found = named(parts(tiny_config(), recipe))
    model = tiny_model()
    flat = flatten(full.attach(model, recipe.adapter).parameters())
    assert found["weights"].bytes == sum(4 * p.numel() for p in model.parameters())
    assert found["gradients"].bytes == flat.values.nbytes
    assert "adapter" not in found and "packed weights" not in found and "decode scratch" not in found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_activations_are_near_what_autograd_keeps(family: str) -> None:
    """The count of saved tensors of one forward pass, by autograd's own hooks."""
    tokens = 64
    recipe = recipe_of(adapter={"rank": 8})
    s = shapes(skeleton(tiny_config(family), torch.float32), recipe.format, recipe.adapter)
    model = tiny_model(family)
    swap.pack(model, None, Format.from_config(recipe.format))
    swap.adopt(model)
    lora.attach(model, recipe.adapter, 0)
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    ids = torch.arange(tokens)[None] % 256
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden_states(model.train(), ids, torch.arange(tokens)[None], torch.tensor([0, tokens], dtype=torch.int32))
    predicted = named(activations(s, tokens, False, torch.float32))["activations"].bytes
    assert 0.85 <= predicted / sum(seen.values()) <= 1.35


@pytest.mark.parametrize(
    ("rows", "tokens", "recompute", "measured"),
    [(4, 2048, False, 33.690), (4, 2048, True, 9.248), (1, 2048, True, 6.990), (1, 16384, True, 12.121 + 0.239)],
)
def test_8b_steps_on_an_h200(rows: int, tokens: int, recompute: bool, measured: float) -> None:
    """Llama 3 8B, r = 16, 32-bit AdamW: GiB allocated at the peak (bench/memory_gpu.py; the last with 8-bit moments, whose saving
    is added). The context is not in it."""
    found = parts(LLAMA_8B, recipe_of(data={"train": "a.jsonl", "tokens": tokens}), microbatch=rows, recompute=recompute)
    assert -0.0005 < sum(p.bytes for p in found if p.name != "context") / 2**30 / measured - 1 < 0.001


def test_recompute_and_microbatch_move_what_they_should() -> None:
    recipe = recipe_of()
    config = SMOLLM2
    one, two = (named(parts(config, recipe, microbatch=m)) for m in (1, 2))
    lean = named(parts(config, recipe, recompute=True))
    assert two["activations"].bytes == 2 * one["activations"].bytes
    assert lean["activations"].bytes < one["activations"].bytes / 5
    for name in ("packed weights", "other weights", "adapter", "optimizer", "context"):
        assert one[name].bytes == two[name].bytes == lean[name].bytes


def test_8b_bytes() -> None:
    """Figures that can be checked by hand: 36 layers of Qwen3-8B in nf4 with nested scales, r = 16."""
    recipe = recipe_of()
    found = named(parts(QWEN3_8B, recipe))
    per_layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 12288
    weights = 36 * per_layer
    assert abs(found["packed weights"].bytes - weights * 4.127 / 8) < 1e-4 * weights
    assert found["other weights"].bytes == 2 * (2 * 151936 * 4096 + 36 * (2 * 4096 + 2 * 128) + 4096)
    assert found["adapter"].bytes == 4 * 36 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288))


@pytest.mark.cpu
def test_smollm2_against_the_loaded_model() -> None:
    from halfbyte.checkpoints import huggingface
    from halfbyte.formats.config import FormatConfig

    base = huggingface.load("smollm2-135m", FormatConfig(), torch.float32)
    found = named(parts(SMOLLM2, recipe_of(), compute="fp32"))
    rows = base.report
    assert found["packed weights"].bytes == sum(r.bytes for r in rows.packed) == 54_770_040
    assert found["other weights"].bytes == sum(r.bytes for r in rows.kept)


@pytest.mark.parametrize(("family", "first"), [("llama", "q_proj"), ("phi3", "qkv_proj")])
def test_16_bit_weights_that_layers_hold_are_counted_once(family: str, first: str) -> None:
    """Against the memory of all parameters: views of the matrices that products read."""
    recipe = recipe_of(format="none", adapter={"rank": 8, "targets": [first, "down_proj"]})
    model = tiny_model(family)
    swap.adopt(model)
    lora.attach(model, recipe.adapter, 0)
    assert prepare(model).layers == 2
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters() if not p.requires_grad}
    found = named(parts(tiny_config(family), recipe, compute="fp32"))
    assert found["other weights"].bytes + found["matrices"].bytes == sum(storages.values())
    packed = named(parts(tiny_config(family), recipe_of(adapter=recipe.adapter.model_dump()), compute="fp32"))
    assert "matrices" not in packed
