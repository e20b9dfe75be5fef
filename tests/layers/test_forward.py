"""Examples in a row do not see each other, and a model in which they would is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbyte.errors import ModelError, RecipeError
from halfbyte.kernels.attention import Documents, Wanted
from halfbyte.layers import forward, swap
from layers.families import ADOPTED, LEFT, pair, row
from support import tiny_model


@pytest.mark.parametrize("family", [*ADOPTED, *LEFT])
def test_isolation_is_proven(family: str) -> None:
    ours, _ = pair(family, None)
    forward.prove_isolation(ours)
    assert not ours.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leaking_mask_is_refused(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    forward.prove_isolation(model)

    def causal_only(cu_seqlens: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
        mask = torch.full((tokens, tokens), torch.finfo(dtype).min, dtype=dtype).triu(1)
        return mask[None, None]

    monkeypatch.setattr(forward, "block_mask", causal_only)
    with pytest.raises(ModelError, match="neighbours' tokens change") as error:
        forward.prove_isolation(model)
    assert error.value.code == "model.leak"


def test_leaking_boundaries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    swap.adopt(model)
    of = Documents.of

    def one_document(cu_seqlens: Tensor, device: torch.device, tokens: int, wanted: Wanted) -> Documents:
        return of(cu_seqlens[[0, -1]], device, tokens, wanted)

    monkeypatch.setattr(Documents, "of", one_document)
    with pytest.raises(ModelError, match="not isolated"):
        forward.prove_isolation(model)


def test_a_method_that_is_asked_for_and_cannot_run_is_an_error() -> None:
    for name, why in (("llama", "it needs CUDA, not cpu"), ("gptj", "under a dense mask")):
        model = tiny_model(name)
        if name == "llama":
            swap.adopt(model)
        with pytest.raises(RecipeError, match=f"`attention: flash` cannot run here: .*{why}"):
            forward.hidden_states(model, *row((9, 3)), "flash")
        if name == "llama":
            forward.hidden_states(model, *row((9, 3)), "sdpa")


def test_a_model_that_takes_no_packed_row_is_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ModelError, match="BloomForCausalLM") as error:
        forward.prove_isolation(AutoModelForCausalLM.from_config(config))
    assert error.value.code == "model.leak"


def test_a_window_shorter_than_an_example_is_refused_under_a_dense_mask() -> None:
    model = tiny_model("mistral", sliding_window=8)
    ids, positions, cu_seqlens = row((9, 3))
    with pytest.raises(ModelError, match="sliding window of 8"):
        forward.hidden_states(model, ids, positions, cu_seqlens)
    forward.hidden_states(model, *row((8, 3)))


def test_block_mask_against_its_definition() -> None:
    mask = forward.block_mask(torch.tensor([0, 2, 5, 5], dtype=torch.int32), 5, torch.float32)[0, 0]
    document = [0, 0, 1, 1, 1]
    for q in range(5):
        for k in range(5):
            assert (mask[q, k] == 0) == (document[q] == document[k] and k <= q)
