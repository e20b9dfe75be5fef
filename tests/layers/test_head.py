"""The head found by proof: scales and caps of every spelling; what does not fit is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.formats.packed import Format, Packed
from halfbyte.kernels.cross_entropy import cross_entropy
from halfbyte.layers import head, swap
from layers.families import row
from support import FAMILIES, tiny_model


def _build(family: str, **changes: object) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **FAMILIES["llama"] | changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("family", "changes", "scale", "cap"),
    [
        ("llama", {}, 1.0, 0.0),
        ("granite", {"logits_scaling": 8.0}, 0.125, 0.0),
        ("cohere", {"logit_scale": 0.0625}, 0.0625, 0.0),
        ("gemma2", {"final_logit_softcapping": 0.05, "head_dim": 16}, 1.0, 0.05),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_cap(family: str, changes: dict[str, object], scale: float, cap: float, dtype: torch.dtype) -> None:
    model = _build(family, **changes).to(dtype)
    found = head.find(model)
    assert found.weight is model.get_output_embeddings().weight
    assert (found.scale, found.cap) == (scale, cap)
    ids, _, _ = row((11,))
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    expected = model(input_ids=ids, use_cache=False).logits.float()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (found.logits(hidden) - expected).norm() <= tolerance * expected.norm()


def test_a_bias_is_found() -> None:
    model = _build("phi", hidden_act="gelu_new")
    with torch.no_grad():
        model.lm_head.bias.normal_()
    assert head.find(model).bias is model.lm_head.bias


def test_a_scale_without_a_name_is_measured() -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: 0.7 * out)
    assert head.find(model).scale == pytest.approx(0.7, rel=1e-5)


@pytest.mark.parametrize("fmt", [Format("int8"), Format("nf4", 64, nested=True)], ids=str)
@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_a_packed_head(fmt: Format, family: str) -> None:
    """It stays packed, and the loss of the whole model is the loss of its decoded weight."""
    changes = {"logit_scale": 0.0625} if family == "cohere" else {}
    model = _build(family, tie_word_embeddings=False, **changes)
    report = swap.pack(model, None, Format("nf4", 64), (), fmt)
    packed = next(row for row in report.rows if row.kind == "head")
    assert packed.packed and packed.format == fmt and packed.bytes == fmt.nbytes(packed.shape)
    found = head.find(model)
    assert isinstance(found.weight, Packed) and found.scale == changes.get("logit_scale", 1.0)
    ids, _, _ = row((23,))
    labels = ids.roll(-1)
    loss, _ = cross_entropy(model.base_model(input_ids=ids, use_cache=False).last_hidden_state, labels, found)
    logits = model(input_ids=ids, use_cache=False).logits[0]
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, labels[0], reduction="sum"))


def test_a_head_tied_to_the_embedding_is_not_packed() -> None:
    model = _build("llama", tie_word_embeddings=True)
    with pytest.raises(ModelError, match="it is the embedding too") as error:
        swap.plan_packing(model, (), Format("nf4", 64), Format("int8"))
    assert error.value.code == "format.head"


def test_a_head_that_does_not_fit_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out + out.sin())
    with pytest.raises(ModelError, match="not understood: its logits differ") as error:
        head.find(model)
    assert error.value.code == "model.head"


def test_a_head_that_is_not_linear_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ModelError, match="it is Sequential"):
        head.find(model)
