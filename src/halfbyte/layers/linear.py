"""`Linear4bit`: a frozen linear layer whose weight is packed; and the seam by which layers run as a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from halfbyte.formats.packed import SLOTS, Packed
from halfbyte.formats.quantize import dequantize
from halfbyte.kernels.lora_linear import Dropout, LowRank, lora_linear


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


def linear_group(x: Tensor, layers: list[SupportsOperand], dropout: Dropout | None = None) -> list[Tensor]:
    """Several linear layers on the same input `[..., K]`, as one operation; one output `[..., N_i]` each.

    dropout: the mask of the adapters' input; None takes the one that the layers bring (one mask state serves a group).
    """
    operands = [layer.operand() for layer in layers]
    dropout = dropout or next((o.dropout for o in operands if o.dropout is not None), None)
    return lora_linear(x, [o.weight for o in operands], [o.bias for o in operands], [o.lora for o in operands], dropout)


class Linear4bit(nn.Linear):
    """A frozen linear layer on a packed weight. Subclasses nn.Linear so that PEFT and others see a linear layer.

    Parameters (all frozen uint8, named as `formats.packed.SLOTS`): `codes`, `scales`, `nested_scales`, `nested_offset`,
    `zeros`, and `bias` in 16 or 32 bits. `weight` is a property that decodes afresh: nothing decoded is kept.
    """

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self._spec = packed.spec
        for slot, tensor in zip(SLOTS, packed.tensors(), strict=True):
            self.register_parameter(slot, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def packed(self) -> Packed:
        """The stored weight as a plain object (no copy)."""
        return Packed.from_spec(self._spec, [getattr(self, slot) for slot in SLOTS])

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The decoded weight `[N, K]` in the dtype it was quantised from; a fresh tensor at every call."""
        return dequantize(self.packed)

    def operand(self) -> Operand:
        return Operand(self.packed, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear_group(x, [self])[0]

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self._spec}"
