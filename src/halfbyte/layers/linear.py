"""`Linear4bit`: a frozen linear layer whose weight is packed; and the seam by which layers run as a group.

Why a group: q, k and v read the same input, so one operation decodes, multiplies and differentiates them together; the modules
keep their places and names in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from halfbyte.errors import CheckpointError, FormatError
from halfbyte.formats.packed import SLOTS, Packed
from halfbyte.kernels.dequantize import dequantize
from halfbyte.kernels.dropout import Dropout
from halfbyte.kernels.lora_linear import LowRank, lora_linear


@dataclass(frozen=True)
class Operand:
    """What a linear layer contributes to a grouped product: its weight (packed or dense `[N, K]`), bias, adapter, mask."""

    weight: Packed | Tensor
    bias: Tensor | None = None
    lora: LowRank | None = None
    dropout: Dropout | None = None


class SupportsOperand(Protocol):
    """A layer that can run in a group."""

    def operand(self) -> Operand: ...


def operand_of(layer: SupportsOperand | nn.Linear) -> Operand:
    """The operand of one of our layers, or of a plain nn.Linear."""
    return Operand(layer.weight, layer.bias) if type(layer) is nn.Linear else layer.operand()  # type: ignore[operator]


def linear_group(x: Tensor, layers: Sequence[SupportsOperand | nn.Linear], dropout: Dropout | None = None) -> list[Tensor]:
    """Several linear layers on the same input `[..., K]`, as one operation; one output `[..., N_i]` each.

    dropout: the mask of the adapters' input; None takes the one that the layers bring (one mask state serves a group).
    """
    if torch.is_autocast_enabled(x.device.type):  # full fine-tuning: fp32 masters, products in 16 bits
        x = x.to(torch.get_autocast_dtype(x.device.type))
    operands = [operand_of(layer) for layer in layers]
    dropout = dropout or next((o.dropout for o in operands if o.dropout is not None), None)
    return lora_linear(x, [o.weight for o in operands], [o.bias for o in operands], [o.lora for o in operands], dropout)


class Linear4bit(nn.Linear):
    """A frozen linear layer on a packed weight. Subclasses nn.Linear so that PEFT and others see a linear layer.

    Parameters (all frozen uint8, named as `formats.packed.SLOTS`): `codes`, `scales`, `nested_scales`, `nested_offset`,
    `zeros`, and `bias` in 16 or 32 bits. `weight` is a property that decodes afresh: nothing decoded is kept by default.
    `state_dict()` holds these and, as `_extra_state`, the bytes of `Packed.spec`: bytes of one format are never read as another.
    """

    decoded: Tensor | None = None
    """The weight `[N, K]` in the compute dtype, within `layers.decoded.held` only."""

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self._head = (packed.format, packed.shape, packed.dtype)
        self._spec = packed.spec
        for slot, tensor in zip(SLOTS, packed.tensors(), strict=True):
            self.register_parameter(slot, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def packed(self) -> Packed:
        """The stored weight as a plain object (no copy)."""
        return Packed(*self._head, *(getattr(self, slot) for slot in SLOTS))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The decoded weight `[N, K]` in the dtype it was quantised from; a fresh tensor at every call."""
        return dequantize(self.packed)

    def operand(self) -> Operand:
        """Packed weight and bias; no adapter."""
        return Operand(self.packed if self.decoded is None else self.decoded, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear_group(x, [self])[0]

    def extra_repr(self) -> str:
        fmt = self._head[0]
        nested = ", nested" if fmt.nested else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, {fmt.kind}, block {fmt.block}{nested}"

    def get_extra_state(self) -> Tensor:
        """The bytes of `Packed.spec`, a tensor so that safetensors can hold it."""
        return torch.tensor(list(self._spec.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: `_load_from_state_dict` has compared it."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(f"{prefix}_extra_state")
        spec = self._spec if stored is None else bytes(stored.tolist()).decode(errors="replace")
        if spec != self._spec:
            raise CheckpointError(
                f"{prefix[:-1] or 'Linear4bit'}: the file holds {spec}, the layer {self._spec}",
                hint="load it into a model that was packed with the same format",
                code="checkpoint.format",
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        # Casts meant for floats (`.to(dtype)`, `.half()`) pass bytes by; `.type()` would not.
        if fn(self.packed.codes[:0]).dtype != torch.uint8:
            raise FormatError(
                "a packed weight is bytes and cannot be cast",
                hint="use .to(dtype), which casts the bias only, or dequantize the weight",
                code="format.cast",
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
