"""The proof that a generic decoder layer equals the layer it adopts, on a probe input in fp32.

How: the model's own forward tells how it calls its layers (arguments, rotary tables). A copy of the layer (packed weights
shared, the rest in fp32) runs twice under that call: as the original with transformers' eager attention and an explicit mask,
and as the generic layer, once with the same mask and once with document boundaries. What the original hands to its attention
function (scale, window, soft cap) is observed, not guessed; what stays open is tried (`structure.variants`). Cost: one layer in
fp32 for each kind of layer in the model.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from halfbyte.kernels.attention import Documents
from halfbyte.kernels.attention.reference import banded
from halfbyte.layers import attention
from halfbyte.layers.decoder import DecoderLayer
from halfbyte.layers.structure import NotUnderstood, Structure, variants
from halfbyte.shortage import is_shortage

TOKENS = 12
_OBSERVER = "halfbyte-observer"
# Relative Frobenius error allowed between the two layers in fp32: the order of summation differs, nothing else.
TOLERANCE = 1e-4
_EXPECTED_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, AssertionError)


class _Captured(Exception):
    """Ends the probe forward once the call of every wanted layer is known."""


def capture_calls(model: PreTrainedModel, layers: list[nn.Module]) -> dict[nn.Module, dict[str, Any]]:
    """How `model` calls each of `layers`: its arguments by name, on TOKENS tokens without a cache."""
    calls: dict[nn.Module, dict[str, Any]] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = {"args": args, **kwargs}
        if len(calls) == len(layers):
            raise _Captured

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model.base_model(input_ids=torch.arange(TOKENS, device=device)[None] + 1, use_cache=False)
    except _Captured:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls


def prove(layer: nn.Module, structure: Structure, call: dict[str, Any]) -> Structure:
    """The completed structure under which the generic layer equals `layer`. Raises NotUnderstood with the reason."""
    call = {name: to_fp32(value) for name, value in _bind(structure, call).items()}
    original = fp32_copy(layer).eval()
    try:
        with torch.no_grad():
            return _prove(original, structure, call)
    except _EXPECTED_FAILURES as error:
        if is_shortage(error):
            raise
        reason = str(error).split("\n")[0]
        raise NotUnderstood(f"the probe failed: {type(error).__name__}: {reason}") from error


def _prove(original: nn.Module, structure: Structure, call: dict[str, Any]) -> Structure:
    device = next(p.device for p in original.parameters())
    x = torch.randn(call.pop("hidden_states").shape, generator=torch.Generator().manual_seed(0)).to(device)
    structure = _observe(original, structure, x, call)
    causal = banded(TOKENS, TOKENS, structure.window, device)
    documents = Documents.of(torch.tensor([0, 5, TOKENS, TOKENS], dtype=torch.int32), device, TOKENS)
    document = (torch.arange(TOKENS, device=device) >= 5).int()
    packed = causal & (document[:, None] == document[None, :])
    _set_attention(original, "eager")
    expected = _output(original(x, **call | {"attention_mask": _additive(causal)}))
    expected_packed = _output(original(x, **call | {"attention_mask": _additive(packed)}))
    errors = []
    for candidate in variants(structure):
        ours = DecoderLayer(original, candidate).eval()
        got = _output(ours(x, **call | {"attention_mask": _additive(causal)}))
        got_packed = _output(ours(x, **call | {"documents": documents}))
        errors.append(max(_error(got, expected, x), _error(got_packed, expected_packed, x)))
        if errors[-1] <= TOLERANCE:
            return candidate
    raise NotUnderstood(f"the probe disagrees: relative error {min(errors):.2g}")


def _observe(original: nn.Module, structure: Structure, x: Tensor, call: dict[str, Any]) -> Structure:
    """Scale, window and soft cap as the original hands them to its attention function; and whether it returns a tuple."""
    seen: list[dict[str, Any]] = []

    def observer(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
        seen.append(options)
        for name in attention.REFUSED:
            if options.get(name) is not None:
                raise NotUnderstood(f"its attention uses `{name}`, which is not built")
        return attention.attention(module, query, key, value, mask, **options)

    if call.get("alibi") is not None:
        raise NotUnderstood("its attention is biased by position (alibi), which is not built")
    AttentionInterface.register(_OBSERVER, observer)
    _set_attention(original, _OBSERVER)
    out = original(x, **call | {"attention_mask": _additive(banded(TOKENS, TOKENS, None, x.device))})
    if len(seen) > 1:
        raise NotUnderstood("it calls attention more than once")
    if not seen:
        _no_surprises(original.get_submodule(structure.attention), structure)
    options = seen[0] if seen else {}
    return replace(
        structure,
        scaling=options.get("scaling"),
        window=options.get("sliding_window"),
        cap=options.get("softcap"),
        rotation="none" if call.get("position_embeddings") is None else "half",
        returns_tuple=isinstance(out, tuple),
    )


def _no_surprises(module: nn.Module, structure: Structure) -> None:
    """Attention that does not go through transformers' interface shows itself on TOKENS tokens in eval mode only: raises
    NotUnderstood where a window or dropout would show later."""
    if structure.attention_dropout:
        raise NotUnderstood("its attention has dropout and does not go through transformers' attention interface")
    config = vars(module).get("config")
    known = {**vars(module), **(vars(config) if isinstance(config, PreTrainedConfig) else {})}
    if windows := sorted(name for name, value in known.items() if "window" in name and value):
        raise NotUnderstood(f"its attention does not go through transformers' attention interface and has `{windows[0]}`")


def _bind(structure: Structure, call: dict[str, Any]) -> dict[str, Any]:
    """The captured call, all arguments by name."""
    keywords = {name: value for name, value in call.items() if name != "args"}
    return {"attention_mask": None} | dict(zip(("hidden_states", *structure.arguments), call["args"], strict=False)) | keywords


def to_fp32(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    return tuple(to_fp32(v) for v in value) if isinstance(value, tuple) else value


def fp32_copy(layer: nn.Module) -> nn.Module:
    """A copy in fp32 that shares the packed bytes, with a config of its own."""
    shared: dict[int, Any] = {id(p): p for p in layer.parameters() if not p.is_floating_point()}
    return copy.deepcopy(layer, shared).float()


def _set_attention(layer: nn.Module, name: str) -> None:
    """On the copy only: its config is a copy as well."""
    for module in layer.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation = name


def _output(out: Any) -> Tensor:
    tensor = out[0] if isinstance(out, tuple) else out
    assert isinstance(tensor, Tensor)
    return tensor


def _additive(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, torch.finfo(torch.float32).min)[None, None]


def _error(got: Tensor, expected: Tensor, x: Tensor) -> float:
    """Relative Frobenius error of what the layer adds to its input `x`, less what fp32 rounding of the sum accounts for."""
    added = (expected - x).norm().clamp_min(1e-30)
    error = float(((got - expected).norm() - 1e-6 * x.norm()).clamp_min(0) / added)
    return error if error == error else float("inf")
