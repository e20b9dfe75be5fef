"""What a decoder layer holds to run fused: its parts, read once and again when a weight or an adapter moved."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from halfbyte.formats.packed import Packed
from halfbyte.kernels.attention import Documents
from halfbyte.kernels.products import Products
from halfbyte.layers.fused import forward as stages
from halfbyte.layers.fused import holding
from halfbyte.layers.fused import parts as reading
from halfbyte.layers.fused.forward import Call, Room
from halfbyte.layers.fused.function import Layer
from halfbyte.layers.fused.keep import Keep, keeping
from halfbyte.layers.fused.watch import Watch
from halfbyte.layers.structure import Structure

KNOWN = 3
"""States of a layer's adapters whose groups stay built: switching one off and on again builds nothing."""


class Fused:
    """Runs one adopted layer, as its modules are at each call.

    keep: what stays for backward. in_place: gradients go into `parameter.grad` (fp32, allocated). exact: products are made in the
    activations' dtype for now, whatever `products` are.
    """

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
        self.room, self.exact = room, False
        self._layer = layer
        self.parts = reading.read(layer, structure, dtype, products.padded_to)
        found = self.parts
        self._known = {found.key: [found.qkv, found.out, found.inputs, found.down]}
        self._holding: Literal["nothing", "dense", "all"] = "nothing"
        self._hook: RemovableHandle | None = None
        self._read()

    def run(self, hidden: Tensor, call: dict[str, Any]) -> Tensor | None:
        """The layer's output `[B, S, H]`; None for a call that it does not serve (a cache, a dense mask, another dtype)."""
        documents = documents_of(hidden, call)
        if documents is None or hidden.dtype != self.dtype:
            return None
        if not self._watch.holds():
            self._read()
        x = hidden.reshape(-1, hidden.shape[-1])
        rotation = None if self.parts.structure.rotation == "none" else call["position_embeddings"]
        cos, sin = self.room.tables(x.shape[0], rotation)
        products = self.products.exact if self.exact else self.products
        made = Call(self.parts, self.keep, documents, cos, sin, self._mask, products, self.in_place, self.room)
        return self._apply(x, made).view(hidden.shape)

    def _apply(self, x: Tensor, call: Call) -> Tensor:
        if not (torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in self._learning))):
            # No backward comes, as below the lowest adapter: nothing is kept or sent, whatever a step keeps.
            return stages.forward(replace(call, keep=keeping((), tile=call.keep.tile)), x)[0]
        out: Tensor = Layer.apply(x, call, len(self._learning), *self._learning, *self._stored)  # type: ignore[no-untyped-call]
        return out

    def hold(self, *, packed: bool) -> None:
        """Weights in the compute dtype live inside the matrices of their groups from now on: the modules' parameters become views
        (`holding`), if those are what products read. packed: weights in a format are decoded once, and kept beside their codes."""
        self._holding = "all" if packed else "dense" if self.products.holds else "nothing"
        self._hook = self._hook or self._layer.register_state_dict_post_hook(holding.as_if_alone)  # type: ignore[no-untyped-call]
        self._read()

    def decode(self, on: bool) -> None:
        """Whether weights in a format are held decoded from now on, where weights are held at all (`hold`)."""
        if self._holding == "nothing" or on == (self._holding == "all"):
            return
        self._holding = "all" if on else "dense"
        for built in self._known.values() if not on else ():
            holding.drop_decoded(built)
        self._read()

    @property
    def drops(self) -> bool:
        """Whether adapters drop some of their inputs."""
        return self._mask is not None

    @property
    def decoded_bytes(self) -> int:
        """Of weights that are held decoded."""
        return holding.decoded_bytes((self.parts.qkv, self.parts.out, self.parts.inputs, self.parts.down), self.dtype)

    def release(self) -> None:
        """The mirror of `hold`."""
        self._holding = "nothing"
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._known.clear()
        modules = reading.modules_of(self._layer, self.parts.structure)
        holding.give_back(o.weight for group in modules for o in reading.operands(group))
        self._read()

    def _read(self) -> None:
        """The modules as they are now. What was built for the same memory before is taken up again: an adapter that is switched."""
        modules = reading.modules_of(self._layer, self.parts.structure)
        groups = [reading.operands(group) for group in modules]
        key = reading.key_of(groups)
        built = self._known.pop(key, None) or reading.projections(groups, self.dtype, self.products.padded_to)
        if self._holding != "nothing":
            for other in self._known.values():
                holding.drop_decoded(other)
            if self.products.holds:
                holding.hold(built, self.dtype, packed=self._holding == "all")
            elif self._holding == "all":
                holding.hold_float8(built)
            # Parameters may have moved into the matrices.
            groups = [reading.operands(group) for group in modules]
            key = reading.key_of(groups)
        while len(self._known) >= KNOWN:
            del self._known[next(iter(self._known))]
        self._known[key] = built
        qkv, out, inputs, down = built
        self.parts = replace(self.parts, qkv=qkv, out=out, inputs=inputs, down=down, key=key)
        members = [o for group in groups for o in group]
        self._mask = next((o.dropout for o in members if o.dropout is not None), None)
        self._learning = [t for o in members if o.lora is not None for t in (o.lora.a, o.lora.b)]
        self._stored = [o.weight.codes if isinstance(o.weight, Packed) else o.weight for o in members]
        s = self.parts.structure
        parents = [self._layer.get_submodule(name) for name in (s.attention, s.mlp)]
        self._watch = Watch([m for group in modules for m in group], parents)


def documents_of(hidden: Tensor, call: dict[str, Any]) -> Documents | None:
    """The documents of a packed row, or of unpadded rows without a cache; None where neither is the case."""
    if call.get("past_key_values") is not None or call.get("encoder_hidden_states") is not None:
        return None
    if call.get("documents") is not None:
        documents = call["documents"]
        assert isinstance(documents, Documents)
        return documents
    if call.get("attention_mask") is not None:
        return None
    return _rows(*hidden.shape[:2], hidden.device)


@functools.lru_cache(maxsize=16)
def _rows(rows: int, tokens: int, device: torch.device) -> Documents:
    """One document a row."""
    boundaries = tuple(range(0, rows * tokens + 1, tokens))
    return Documents(torch.tensor(boundaries, dtype=torch.int32, device=device), boundaries, tokens)
