"""What a model is between its token ids and its logits, read for the token step: embedding, layers, last norm, head, rotary tables.

Everything is shown on a probe of 12 tokens, never taken from names alone: that the first layer reads a multiple of the embedding,
that every layer turns by the same tables, that the last norm makes the last hidden state. What does not fit is a reason
(NotUnderstood) to answer through transformers instead. Cost: two short forward passes, once a model.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.kernels.augmented import LEAST
from halfbyte.kernels.cross_entropy import Head
from halfbyte.kernels.decode_step import Heads
from halfbyte.kernels.packed_gemv import Activation
from halfbyte.layers import head as heads
from halfbyte.layers.decoder import DecoderLayer
from halfbyte.layers.fused.parts import (
    LayerParts,
    Norm,
    key_of,
    modules_of,
    operands,
    projections,
    read_activation,
    read_norm,
)
from halfbyte.layers.linear import Operand
from halfbyte.layers.structure import NotUnderstood

TOKENS = 12
_LAST_NORMS = ("norm", "final_layernorm", "ln_f", "final_norm")
# Rotary tables that depend on how long the row is.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True)
class Layer:
    """One decoder layer's fixed parts; its weights are read anew for every engine, since adapters move and are switched.

    qk_norms: of queries and keys, whole (`full_norms`) or a head each, which is in `heads` too.
    """

    module: DecoderLayer
    heads: Heads
    activation: Activation
    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    qk_norms: tuple[Norm, Norm] | None

    @property
    def full_norms(self) -> tuple[Norm, Norm] | None:
        """Norms over all queries, and over all keys."""
        return self.qk_norms if self.module.structure.qk_norm == "full" else None

    def operands(self) -> list[list[Operand]]:
        """The four groups' weights, with whatever adapter is on now."""
        return [operands(modules) for modules in modules_of(self.module, self.module.structure)]

    def parts(self, groups: list[list[Operand]], dtype: torch.dtype) -> LayerParts:
        """As the fused layer's forward takes it."""
        q, k = self.qk_norms or (None, None)
        return LayerParts(
            self.module.structure, self.activation, key_of(groups), self.before_attention, self.after_attention, self.before_mlp,
            self.after_mlp, q, k, *projections(groups, dtype, LEAST),
        )  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """embedding_scale: of the embedding's rows. rotary: the model's own module that makes the tables, or None."""

    layers: tuple[Layer, ...]
    embedding_scale: float
    norm: Norm
    head: Head
    rotary: nn.Module | None


_READ: weakref.WeakKeyDictionary[PreTrainedModel, tuple[tuple[int, ...], Reading]] = weakref.WeakKeyDictionary()


def read(model: PreTrainedModel) -> Reading:
    """The reading of `model`, made once for the parameters it has. Raises NotUnderstood: why the token step cannot run it."""
    key = tuple(id(p) for p in model.parameters())
    found = _READ.get(model)
    if found is None or found[0] != key:
        try:
            found = _READ[model] = (key, _read(model))
        except ModelError as error:
            raise NotUnderstood(error.message) from error
    return found[1]


@torch.no_grad()
def _read(model: PreTrainedModel) -> Reading:
    if model.get_submodule(model.base_model_prefix) is not model.base_model:
        raise NotUnderstood("its body is not one submodule")
    layers = [m for m in model.base_model.modules() if isinstance(m, DecoderLayer)]
    count = model.config.get_text_config().num_hidden_layers
    if len(layers) != count:
        raise NotUnderstood(f"{len(layers)} of {count} decoder layers are adopted")
    seen = _observed(model, layers)
    ids = _ids(model)
    scale = _embedding_scale(model.get_input_embeddings()(ids), seen.inputs[0])
    tables = [call.get("position_embeddings") for call in seen.calls]
    if any(t is not None and not all(torch.equal(a, b) for a, b in zip(t, tables[0] or (), strict=False)) for t in tables):
        raise NotUnderstood("its layers turn by different rotary tables")
    rotary = None if tables[0] is None else _rotary(model, tables[0])
    name = next((n for n in _LAST_NORMS if hasattr(model.base_model, n)), None)
    if name is None:
        raise NotUnderstood("its last norm was not found")
    last = model.base_model.get_submodule(name)
    if not torch.equal(last(seen.output), seen.hidden):
        raise NotUnderstood("its last hidden state is not the last norm of the last layer")
    return Reading(tuple(map(_layer, layers)), scale, read_norm(last), heads.find(model), rotary)


@dataclass
class _Seen:
    """inputs: hidden states before each layer. calls: their arguments. output: of the last layer. hidden: the model's last."""

    inputs: list[Tensor]
    calls: list[dict[str, Any]]
    output: Tensor
    hidden: Tensor


def _ids(model: PreTrainedModel) -> Tensor:
    return torch.arange(TOKENS, device=next(model.get_input_embeddings().parameters()).device)[None] + 1


def _observed(model: PreTrainedModel, layers: list[DecoderLayer]) -> _Seen:
    inputs: list[Tensor] = []
    calls: list[dict[str, Any]] = []
    outputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(("hidden_states", *module.structure.arguments), args, strict=False)) | kwargs  # type: ignore[union-attr,misc]
        inputs.append(named["hidden_states"])
        calls.append(named)

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        outputs.append(out[0] if isinstance(out, tuple) else out)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(after))
    training = model.training
    model.train(False)
    try:
        hidden = model.base_model(input_ids=_ids(model), use_cache=False).last_hidden_state
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if len(inputs) != len(layers):
        raise NotUnderstood("its forward does not run every layer once")
    return _Seen(inputs, calls, outputs[0], hidden)


def _embedding_scale(rows: Tensor, hidden: Tensor) -> float:
    rows, hidden = rows.double(), hidden.double()
    scale = float((rows * hidden).sum() / rows.square().sum().clamp_min(1e-300))
    scale = 1.0 if torch.equal(rows, hidden) else scale
    if not float((rows * scale - hidden).norm() / hidden.norm()) <= 4e-3:
        raise NotUnderstood("its first layer does not read a multiple of the embedding")
    return scale


def _rotary(model: PreTrainedModel, seen: tuple[Tensor, Tensor]) -> nn.Module:
    module = getattr(model.base_model, "rotary_emb", None)
    kind = getattr(module, "rope_type", "default")
    if not isinstance(module, nn.Module) or kind in _LENGTH_DEPENDENT:
        raise NotUnderstood(f"its rotary tables ({kind}) are not the same for rows of every length")
    made = tables(module, TOKENS, seen[0].dtype, seen[0].device)
    if not all(torch.equal(a, b[0]) for a, b in zip(made, seen, strict=True)):
        raise NotUnderstood("its rotary tables are not those of positions from 0")
    return module


@torch.no_grad()
def tables(rotary: nn.Module, places: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin `[places, r]` of the positions 0, 1, ..."""
    cos, sin = rotary(torch.empty(0, dtype=dtype, device=device), torch.arange(places, device=device)[None])
    return cos[0].contiguous(), sin[0].contiguous()


def _layer(layer: DecoderLayer) -> Layer:
    s = layer.structure
    attention = layer.get_submodule(s.attention)
    if s.layout == "grouped":
        raise NotUnderstood("queries, keys and values are interleaved in one projection")
    for modules in modules_of(layer, s):
        operands(modules)
    norms = [
        None if name is None else read_norm(layer.get_submodule(name))
        for name in (s.norms.before_attention, s.norms.after_attention, s.norms.before_mlp, s.norms.after_mlp)
    ]
    qk = [read_norm(attention.get_submodule(n)) for n in ("q_norm", "k_norm")] if s.qk_norm != "none" else []
    if qk and (qk[0].spec != qk[1].spec or qk[0].bias is not None or qk[1].bias is not None):
        raise NotUnderstood("the norms of its queries and keys differ or have a bias")
    each = qk if s.qk_norm == "head" else []
    numbers = Heads(
        s.heads, s.kv_heads, s.head_size, s.head_size**-0.5 if s.scaling is None else s.scaling, s.window, s.cap, s.rotation,
        each[0].spec if each else None, each[0].weight if each else None, each[1].weight if each else None,
    )  # fmt: skip
    activation = read_activation(getattr(layer.get_submodule(s.mlp), s.activation))
    return Layer(layer, numbers, activation, norms[0], norms[1], norms[2], norms[3], (qk[0], qk[1]) if qk else None)
