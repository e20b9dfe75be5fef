"""The norm behind the layers, fused: the same numbers as the module's, what it keeps, and what it leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from halfbyte.adapters import lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.layers.fused.final import FinalNorm
from halfbyte.layers.fused.forward import Room
from halfbyte.layers.fused.prepare import prepare, remove
from halfbyte.layers.swap import adopt
from layers.families import FUSED, LENGTHS, STILL, gradients_of, learned, pair, row
from support import tiny_model


def _norms(model: torch.nn.Module) -> list[FinalNorm]:
    return [m for m in model.modules() if isinstance(m, FinalNorm)]


@pytest.mark.parametrize("family", FUSED)
def test_every_family_has_it_and_it_can_be_taken_away(family: str) -> None:
    model, _ = pair(family, None, **STILL.get(family, {}))
    names = list(model.state_dict())
    modules = {path: m for path, m in model.named_modules() if not list(m.children())}
    done = prepare(model)
    assert done.norm == "" and len(_norms(model)) == 1
    assert list(model.state_dict()) == names
    prepare(model)
    assert len(_norms(model)) == 1
    remove(model)
    assert {path: m for path, m in model.named_modules() if not list(m.children())} == modules


def test_its_gradient_arrives_where_the_last_layer_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = learned(AdapterConfig(rank=4))
    _, expected = gradients_of(model, adapter)
    prepare(model)
    hits: list[bool] = []
    take = Room.take

    def watch(self: Room, grad: torch.Tensor, p: Any) -> Any:
        out = take(self, grad, p)
        hits.append(out[0].data_ptr() == grad.data_ptr())
        return out

    monkeypatch.setattr(Room, "take", watch)
    _, got = gradients_of(model, adapter)
    assert hits == [True, True]
    for name, grad in expected.items():
        assert (got[name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


def test_it_keeps_its_input_and_two_numbers_a_token_at_most() -> None:
    model, _ = learned(AdapterConfig(rank=4))
    prepare(model)
    (norm,) = _norms(model)
    x = torch.randn(1, 33, 64, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(x * 1.0)
    assert sorted(t.numel() for t in kept if t.numel() > 1) == [33, 33 * 64]


def test_other_dtypes_and_copies_run_as_before() -> None:
    model, _ = pair("llama", None)
    prepare(model)
    (norm,) = _norms(model)
    x = torch.randn(1, 5, 64)
    assert norm(x.bfloat16()).dtype == norm.__dict__["original"](x.bfloat16()).dtype
    (again,) = _norms(copy.deepcopy(model))
    torch.testing.assert_close(again(x), norm(x))


def test_a_norm_that_learns_is_left_and_named() -> None:
    model, _ = pair("llama", None)
    lora.attach(model, AdapterConfig(rank=4, modules_to_save=["model.norm"]), seed=1)
    done = prepare(model)
    assert done.layers == 2 and done.norm == "it learns beside the adapter" and "as a module: it learns" in done.summary()


def test_nothing_happens_where_no_layer_is_fused() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.1)
    adopt(model)
    assert prepare(model).norm == "" and not _norms(model)


def test_the_packed_row_is_the_modules_row() -> None:
    model, _ = learned(AdapterConfig(rank=4))
    prepare(model)
    (norm,) = _norms(model)
    ids, positions, cu = row(LENGTHS)
    del positions, cu
    seen: dict[str, torch.Tensor] = {}
    hook = norm.register_forward_hook(lambda m, args, out: seen.update(x=args[0], out=out))
    model.base_model(input_ids=ids, use_cache=False)
    hook.remove()
    torch.testing.assert_close(seen["out"], norm.__dict__["original"](seen["x"]), atol=1e-6, rtol=1e-6)
