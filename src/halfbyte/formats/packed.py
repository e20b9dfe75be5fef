"""A packed weight: what is stored instead of a weight matrix, as a plain object.

Why no Tensor subclass: `torch.compile`, `state_dict`, FSDP2 and the profiler understand plain tensors; a subclass hides
copies from all four. A module holds these tensors as parameters, an operator receives them as arguments.

Letters: N = output features, K = input features, n = N*K elements, B = block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["nf4", "fp4", "int4", "int8"]
Zero = Literal["none", "int", "float", "min"]
NESTED_BLOCK = 256
SLOTS = ("codes", "scales", "nested_scales", "nested_offset", "zeros")


@dataclass(frozen=True)
class Format:
    """What the stored bits mean, without any tensor: hashable.

    kind: nf4, fp4 (codebook over the flat tensor), int4 (affine groups along K), int8 (one scale an output channel).
    block: weights a scale covers (ignored by int8). nested: scales themselves in 8 bits (nf4, fp4).
    zero: int4 only; "none" is symmetric, "int" and "float" decode (q - z) * s, "min" decodes q * s + m.
    """

    kind: Kind
    block: int = 64
    nested: bool = False
    zero: Zero = "none"


@dataclass(frozen=True)
class Packed:
    """Codes, scales, format, shape.

    shape: of the weight, `[N, K]` (any rank for the codebook formats). dtype: of the weight that was quantised; what
    `dequantize` returns unless told otherwise.
    codes          uint8 [ceil(n/2)]  two codes a byte, the first element in the HIGH nibble (int4: rows padded to whole bytes);
                   int8: uint8 [n], the bytes of int8 codes
    scales         uint8 bytes of fp32 [blocks]; nested: uint8 [blocks], codes of the signed dynamic map
    nested_scales  uint8 bytes of fp32 [ceil(blocks/256)]; empty unless nested
    nested_offset  uint8 bytes of fp32 [1]; empty unless nested
    zeros          uint8 bytes of fp32 [groups]; empty unless the format has a zero point
    Scales are kept as bytes, so that no mixed-precision policy ever casts them; `.view(torch.float32)` reads them.
    """

    format: Format
    shape: tuple[int, ...]
    dtype: torch.dtype
    codes: Tensor
    scales: Tensor
    nested_scales: Tensor
    nested_offset: Tensor
    zeros: Tensor

    @property
    def numel(self) -> int:
        """Weights stored, n."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The five stored tensors in the order of `SLOTS`; absent ones are empty uint8 tensors."""
        return self.codes, self.scales, self.nested_scales, self.nested_offset, self.zeros

    @property
    def spec(self) -> str:
        """Format, shape and dtype as one string, which custom operators take beside the tensors."""
        f = self.format
        return f"{f.kind}|{f.block}|{int(f.nested)}|{f.zero}|{'x'.join(map(str, self.shape))}|{str(self.dtype)[6:]}"

    @classmethod
    def from_spec(cls, spec: str, tensors: list[Tensor] | tuple[Tensor, ...]) -> Packed:
        """The inverse of `spec` and `tensors()`."""
        kind, block, nested, zero, shape, dtype = spec.split("|")
        fmt = Format(kind, int(block), nested == "1", zero)  # type: ignore[arg-type]
        return cls(fmt, tuple(int(s) for s in shape.split("x")), getattr(torch, dtype), *tensors)

    def to(self, device: torch.device | str) -> Packed:
        """The same weight on another device."""
        return Packed(self.format, self.shape, self.dtype, *(t.to(device) for t in self.tensors()))
