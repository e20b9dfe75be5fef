"""The one generic decoder layer: it adopts the submodules of a transformers layer under their own names and paths.

Why: in transformers the layer itself adds residuals and calls q, k and v one by one, so running them as a group (and later
fusing them) needs the whole layer. What differs between families is data (`structure.Structure`); the arithmetic below is
the same for all. Cost: none in memory, every submodule and parameter is the original's.

Letters: B rows, S tokens, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from halfbyte.errors import ModelError
from halfbyte.kernels.attention import Documents
from halfbyte.layers import attention as halfbyte_attention
from halfbyte.layers.operands import run_group
from halfbyte.layers.structure import Rotation, Structure

_documents: ContextVar[Documents | None] = ContextVar("documents", default=None)


@contextmanager
def given(documents: Documents) -> Iterator[None]:
    """While inside, every layer that is called gets the boundaries of this packed row. Why not an argument: some models
    (Falcon) take further arguments and drop them."""
    token = _documents.set(documents)
    try:
        yield
    finally:
        _documents.reset(token)


class SupportsRun(Protocol):
    """Another way to run a layer (`layers.fused`): the output, or None for a call that it does not serve."""

    def run(self, hidden: Tensor, call: dict[str, Any]) -> Tensor | None: ...


class DecoderLayer(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]
    """A decoder layer that computes what the adopted one computes, with q/k/v and gate/up run as groups."""

    def __init__(self, original: nn.Module, structure: Structure) -> None:
        nn.Module.__init__(self)  # not super(): that may be the adopted class, which would build a layer
        for name, child in original.named_children():
            self.add_module(name, child)
        self.structure = structure
        self.fused: SupportsRun | None = None
        self.training = original.training

    @classmethod
    def adopting(cls, original: nn.Module, structure: Structure) -> DecoderLayer:
        """The generic layer in the place of `original`, as an instance of its class too.

        What looks layers up by class (recording of hidden states, sharding policies) keeps finding them; nothing but the class's
        identity is inherited, since every method it calls is found here first.
        """
        return _adopted_class(type(original))(original, structure)

    @property
    def adopted(self) -> str:
        """Name of the class of the adopted layer."""
        return type(self).__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Adds the documents of `given` where the model's own forward did not hand them on."""
        documents = _documents.get()
        if documents is not None:
            kwargs.setdefault("documents", documents)
        return super().__call__(*args, **kwargs)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """hidden_states `[B, S, hidden]`; further arguments as the adopted layer takes them, and `documents` for packed rows."""
        call = dict(zip(self.structure.arguments, args, strict=False)) | kwargs
        if call.get("layer_past") is not None:  # an older name
            call["past_key_values"] = call["layer_past"]
        if call.get("encoder_hidden_states") is not None:
            raise ModelError("cross-attention is not built into the generic decoder layer", code="model.cross-attention")
        s = self.structure
        if self.fused is not None and (out := self.fused.run(hidden_states, call)) is not None:
            return (out,) if s.returns_tuple else out
        normed = self._through(s.norms.before_attention, hidden_states)
        attended = self._dropped(s.dropout_after_attention, self._attention(normed, call))
        attended = self._scaled(self._through(s.norms.after_attention, attended))
        if s.norms.parallel:
            source = normed if s.norms.before_mlp is None else self._through(s.norms.before_mlp, hidden_states)
            out = hidden_states + attended + self._scaled(self._dropped(s.dropout_after_mlp, self._mlp(source)))
        else:
            hidden_states = hidden_states + attended
            mlp = self._mlp(self._through(s.norms.before_mlp, hidden_states))
            out = hidden_states + self._scaled(self._through(s.norms.after_mlp, self._dropped(s.dropout_after_mlp, mlp)))
        return (out,) if s.returns_tuple else out

    def _through(self, name: str | None, x: Tensor) -> Tensor:
        return x if name is None else self.get_submodule(name)(x)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.structure.residual_multiplier == 1.0 else x * self.structure.residual_multiplier

    def _dropped(self, paths: tuple[str, ...], x: Tensor) -> Tensor:
        for path in paths:
            x = self.get_submodule(path)(x)
        return x

    def _attention(self, x: Tensor, call: dict[str, Any]) -> Tensor:
        """x `[B, S, hidden]` through projections, rotation, cache and attention; returns `[B, S, hidden]`."""
        s = self.structure
        module = self.get_submodule(s.attention)
        query, key, value = self._heads(module, x)
        if s.rotation != "none":
            cos, sin = call["position_embeddings"]
            query, key = rotate(query, cos, sin, s.rotation), rotate(key, cos, sin, s.rotation)
        cache = call.get("past_key_values")
        if cache is not None:
            assert isinstance(cache, Cache) and isinstance(module.layer_idx, int)
            key, value = cache.update(key, value, module.layer_idx)
        mixed, _ = halfbyte_attention.attention(
            module,
            query,
            key,
            value,
            call.get("attention_mask"),
            dropout=s.attention_dropout if self.training else 0.0,
            scaling=s.scaling,
            sliding_window=s.window,
            softcap=s.cap,
            documents=call.get("documents"),
            cu_seqlens=call.get("cu_seqlens"),
            boundaries=call.get("boundaries"),
            longest=call.get("longest"),
        )
        return run_group(mixed.flatten(2), [module.get_submodule(s.out)])[0]

    def _heads(self, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query `[B, H, S, d]`, key and value `[B, G, S, d]`, normed where the layer norms them."""
        s = self.structure
        projected = run_group(x, [module.get_submodule(name) for name in s.qkv])
        if s.layout == "grouped":
            groups = projected[0].unflatten(-1, (s.kv_heads, s.heads // s.kv_heads + 2, s.head_size))  # type: ignore[no-untyped-call]
            projected = [groups[..., :-2, :].flatten(-3), groups[..., -2, :].flatten(-2), groups[..., -1, :].flatten(-2)]
        elif len(projected) == 1:
            projected = list(projected[0].split([n * s.head_size for n in (s.heads, s.kv_heads, s.kv_heads)], dim=-1))  # type: ignore[no-untyped-call]
        if s.qk_norm == "full":
            projected[:2] = [module.get_submodule(n)(p) for n, p in zip(("q_norm", "k_norm"), projected, strict=False)]
        heads = [p.unflatten(-1, (-1, s.head_size)) for p in projected]  # type: ignore[no-untyped-call]
        if s.qk_norm == "head":
            heads[:2] = [module.get_submodule(n)(p) for n, p in zip(("q_norm", "k_norm"), heads, strict=False)]
        query, key, value = (h.transpose(1, 2) for h in heads)
        return query, key, value

    def _mlp(self, x: Tensor) -> Tensor:
        s = self.structure
        module = self.get_submodule(s.mlp)
        inputs = run_group(x, [module.get_submodule(name) for name in s.inputs])
        if s.gated and len(inputs) == 1:
            inputs = list(inputs[0].chunk(2, dim=-1))
        hidden = getattr(module, s.activation)(inputs[0])
        return run_group(hidden * inputs[1] if s.gated else hidden, [module.get_submodule(s.down)])[0]

    def extra_repr(self) -> str:
        return "run by halfbyte.layers.decoder.DecoderLayer"


_ADOPTED: dict[type[nn.Module], type[DecoderLayer]] = {}


def _adopted_class(original: type[nn.Module]) -> type[DecoderLayer]:
    if original not in _ADOPTED:
        _ADOPTED[original] = type(original.__name__, (DecoderLayer, original), {"__module__": DecoderLayer.__module__})
    return _ADOPTED[original]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> Tensor:
    """Rotary positions on x `[B, n, S, d]`; cos and sin `[B, S, r]`, r <= d: only the first r of each head turn.

    half: element i turns with i + r/2. interleaved: element 2i turns with 2i + 1, tables in that order; interleaved-halves: the
    same, tables in the order of `half`.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if rotation == "interleaved-halves":
        cos, sin = (t.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for t in (cos, sin))
    size = cos.shape[-1]
    turning, still = x[..., :size], x[..., size:]
    if rotation == "half":
        first, second = turning.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-turning[..., 1::2], turning[..., ::2]), dim=-1).flatten(-2)
    turning = turning * cos + turned * sin
    return torch.cat((turning, still), dim=-1) if still.shape[-1] else turning
