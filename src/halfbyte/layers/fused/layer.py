"""What a decoder layer holds to run fused: its parts, read once and again when a weight or an adapter moved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.formats.packed import Packed
from halfbyte.kernels.attention import Documents
from halfbyte.kernels.products import Products
from halfbyte.layers.fused import forward as stages
from halfbyte.layers.fused import parts as reading
from halfbyte.layers.fused.forward import Call, Room
from halfbyte.layers.fused.function import Layer
from halfbyte.layers.fused.keep import Keep
from halfbyte.layers.linear import Operand
from halfbyte.layers.structure import Structure


class Fused:
    """Runs one adopted layer. keep: what stays for backward. in_place: gradients go into `parameter.grad` (fp32, allocated)."""

    def __init__(
        self,
        layer: nn.Module,
        structure: Structure,
        dtype: torch.dtype,
        keep: Keep,
        products: Products,
        in_place: bool,
        room: Room,
    ) -> None:
        self.keep, self.products, self.in_place, self.dtype = keep, products, in_place, dtype
        self.room = room
        self.modules = reading.modules_of(layer, structure)
        self.parts = reading.read(layer, structure, dtype, products.padded_to)

    def run(self, hidden: Tensor, call: dict[str, Any]) -> Tensor | None:
        """The layer's output `[B, S, H]`; None for a call that it does not serve (a cache, a dense mask, another dtype)."""
        documents = documents_of(hidden, call)
        if documents is None or hidden.dtype != self.dtype:
            return None
        groups = [reading.operands(modules) for modules in self.modules]
        key = reading.key_of(groups)
        if key != self.parts.key:
            qkv, out, inputs, down = reading.projections(groups, self.dtype, self.products.padded_to)
            self.parts = replace(self.parts, qkv=qkv, out=out, inputs=inputs, down=down, key=key)
        members = [o for group in groups for o in group]
        x = hidden.reshape(-1, hidden.shape[-1])
        cos, sin = tables(x.shape[0], None if self.parts.structure.rotation == "none" else call["position_embeddings"])
        mask = next((o.dropout for o in members if o.dropout is not None), None)
        made = Call(self.parts, self.keep, documents, cos, sin, mask, self.products, self.in_place, self.room)
        return self._apply(x, made, members).view(hidden.shape)

    def _apply(self, x: Tensor, call: Call, members: list[Operand]) -> Tensor:
        if not torch.is_grad_enabled():
            return stages.forward(call, x)[0]
        learning = [t for o in members if o.lora is not None for t in (o.lora.a, o.lora.b)]
        stored = [o.weight.codes if isinstance(o.weight, Packed) else o.weight for o in members]
        out: Tensor = Layer.apply(x, call, len(learning), *learning, *stored)  # type: ignore[no-untyped-call]
        return out


def documents_of(hidden: Tensor, call: dict[str, Any]) -> Documents | None:
    """The documents of a packed row, or of unpadded rows without a cache; None where neither is the case."""
    if call.get("past_key_values") is not None or call.get("encoder_hidden_states") is not None:
        return None
    if call.get("documents") is not None:
        documents = call["documents"]
        assert isinstance(documents, Documents)
        return documents
    rows, tokens = hidden.shape[:2]
    if call.get("attention_mask") is not None:
        return None
    boundaries = tuple(range(0, rows * tokens + 1, tokens))
    return Documents(torch.tensor(boundaries, dtype=torch.int32, device=hidden.device), boundaries, tokens)


def tables(tokens: int, embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin `[T, r]` of tables `[1 or B, S, r]`."""
    if embeddings is None:
        return None, None
    cos, sin = (t.reshape(-1, t.shape[-1]) for t in embeddings)
    times = tokens // cos.shape[0]
    return (cos, sin) if times == 1 else (cos.repeat(times, 1), sin.repeat(times, 1))
