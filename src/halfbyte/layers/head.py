"""The output head as plain numbers, so that the loss never needs all logits: logits = cap · tanh(scale · (h Wᵀ + b) / cap).

Why a proof: some models scale their logits (Granite, Cohere) or cap them (Gemma 2), each under a name of its own, and a loss
computed without that looks perfectly normal. Scale and cap are therefore measured on a probe against `model(...).logits`; a
head that does not fit the formula is refused. Cost: one forward pass of 16 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.formats.packed import Packed
from halfbyte.kernels.cross_entropy import Head
from halfbyte.layers.linear import Linear4bit

_TOKENS = 16
# Names of a soft cap on final logits in transformers' configs.
_CAPS = ("final_logit_softcapping",)


@torch.no_grad()
def find(model: PreTrainedModel) -> Head:
    """The output head of `model`, proven on a probe. Raises ModelError (`model.head`) if it does not fit the formula.

    Call it after the adapter is attached: a head that learns is then the trained parameter itself.
    """
    module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    weight, bias = _stored(model, module), getattr(module, "bias", None)
    was_training = model.training
    model.train(False)
    device = next(model.parameters()).device
    ids = torch.arange(_TOKENS, device=device)[None] % model.config.get_text_config().vocab_size
    seen: list[Tensor] = []
    handle = model.base_model.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    try:
        logits = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        handle.remove()
        model.train(was_training)
    hidden = seen[0]
    cap = next((float(c) for name in _CAPS if (c := getattr(model.config.get_text_config(), name, None))), 0.0)
    if logits.shape[-1] != weight.shape[0]:
        raise _refused(model, f"it gives {logits.shape[-1]} logits from a weight of {weight.shape[0]} rows")
    head = Head(weight, bias, _scale(model, Head(weight, bias).logits(hidden), logits, cap), cap)
    error = float((head.logits(hidden) - logits).norm() / logits.norm().clamp_min(1e-30))
    if not error <= (1e-4 if hidden.dtype == torch.float32 else 2e-2):
        raise _refused(model, f"its logits differ from scale · (h Wᵀ + b) by {error:.2g}")
    return head


def _stored(model: nn.Module, module: nn.Module | None) -> Tensor | Packed:
    """The head's weight `[V, H]` as it is stored. Raises ModelError for a layer that does more than multiply."""
    if type(module) is Linear4bit:
        return module.packed
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise _refused(model, f"it is {type(module).__name__}, not a linear layer, packed or in 16 or 32 bits")
    return weight


def _scale(model: PreTrainedModel, raw: Tensor, logits: Tensor, cap: float) -> float:
    """The factor between h Wᵀ + b and the logits before their cap: measured, then taken exactly from the config if it is there."""
    if cap:
        inside = logits.abs() < 0.9 * cap
        raw, logits = raw[inside], cap * torch.atanh(logits[inside] / cap)
    power = float((raw * raw).sum())
    measured = float((raw * logits).sum()) / power if power else 1.0
    config = model.config.get_text_config()
    written = [1.0]
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            written += [float(value), 1.0 / float(value)]
    return next((w for w in written if abs(w - measured) <= 1e-2 * abs(w)), measured)


def _refused(model: nn.Module, why: str) -> ModelError:
    return ModelError(
        f"the output head of {type(model).__name__} was not understood: {why}",
        hint="a loss computed on a misread head would look normal and train the wrong thing, so this model is refused",
        code="model.head",
    )
