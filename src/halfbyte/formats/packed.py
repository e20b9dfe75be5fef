"""A packed weight: what is stored instead of a weight matrix, as a plain object.

Why no Tensor subclass: `torch.compile`, `state_dict`, FSDP2 and the profiler understand plain tensors; a subclass hides
copies from all four. A module holds these tensors as parameters, an operator receives them as arguments.

Letters: N = output features, K = input features, n = N*K elements, B = block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from halfbyte.errors import FormatError

if TYPE_CHECKING:
    from halfbyte.formats.config import FormatConfig

Kind = Literal["nf4", "fp4", "int4", "int8"]
Zero = Literal["none", "int", "float", "min"]
NESTED_BLOCK = 256
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SLOTS = ("codes", "scales", "nested_scales", "nested_offset", "zeros")


@dataclass(frozen=True)
class Format:
    """What the stored bits mean, without any tensor: hashable.

    kind: nf4, fp4 (codebook over the flat tensor), int4 (affine groups along K), int8 (one scale an output channel).
    block: weights a scale covers, one of `BLOCKS` (int4, for foreign files: any even number; ignored by int8).
    nested: scales themselves in 8 bits (nf4, fp4).
    zero: int4 only; "none" is symmetric, (q - 8) * s; "int" and "float" decode (q - z) * s, "min" decodes q * s + m.
    Raises FormatError for a combination that does not exist.
    """

    kind: Kind
    block: int = 64
    nested: bool = False
    zero: Zero = "none"

    def __post_init__(self) -> None:
        if self.kind not in ("nf4", "fp4", "int4", "int8"):
            raise FormatError(f"unknown format {self.kind!r}", hint="one of nf4, fp4, int4, int8", code="format.kind")
        if self.kind in ("nf4", "fp4") and self.block not in BLOCKS:
            raise FormatError(f"{self.kind} has no block of {self.block}", hint=f"one of {BLOCKS}", code="format.block")
        if self.kind == "int4" and (self.block < 2 or self.block % 2):
            raise FormatError(f"int4 has no group of {self.block}", hint="an even number of weights", code="format.block")
        if self.nested and self.kind not in ("nf4", "fp4"):
            raise FormatError(f"{self.kind} has no nested scales", hint="nf4 and fp4 do", code="format.nested")
        known = ("none", "int", "float", "min") if self.kind == "int4" else ("none",)
        if self.zero not in known:
            raise FormatError(
                f"{self.kind} has no zero point {self.zero!r}", hint="int4 has none, int, float, min", code="format.zero"
            )

    @classmethod
    def from_config(cls, config: FormatConfig) -> Format:
        """The recipe's `format` section. Fields that belong to another kind are defaults there and do not count."""
        match config.kind:
            case "nf4" | "fp4":
                return cls(config.kind, config.block, nested=config.nested)
            case "int4":
                return cls("int4", config.block, zero="none" if config.symmetric else config.zero)
            case "int8":
                return cls("int8")
            case "none":
                raise FormatError("`format: none` keeps the base in 16 bits: there is nothing to pack", code="format.kind")

    @classmethod
    def of_head(cls, config: FormatConfig) -> Format | None:
        """The output head's own format, `format.head`; None: 16 bits."""
        match config.head:
            case "int8":
                return cls("int8")
            case "nf4":
                return cls("nf4", 64, nested=True)
            case "16bit":
                return None

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes that a weight of this shape takes, all stored tensors together; `8 * nbytes / elements` is its bits a weight."""
        n = math.prod(shape)
        rows, columns = matrix_shape(shape)
        if self.kind == "int8":
            return n + 4 * rows
        if self.kind == "int4":
            return rows * (-(-columns // 2) + -(-columns // self.block) * (4 if self.zero == "none" else 8))
        blocks = -(-n // self.block)
        scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if self.nested else 4 * blocks
        return -(-n // 2) + scales


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Any shape as `[N, K]`: K is the last dimension, N all others; a vector is one row."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


@dataclass(frozen=True)
class Packed:
    """Codes, scales, format, shape.

    shape: of the weight, `[N, K]` (any rank for the codebook formats). dtype: of the weight that was quantised; what
    `dequantize` returns unless told otherwise.
    codes          uint8 [ceil(n/2)]  two codes a byte, the first element in the HIGH nibble; int4: [N * ceil(K/2)], rows are
                   padded to whole bytes (the spare nibble is never read); int8: [n], the bytes of int8 codes
    scales         uint8 bytes of fp32 [blocks] (int4: [N * ceil(K/block)], int8: [N]); nested: uint8 [blocks], codes of the
                   signed dynamic map
    nested_scales  uint8 bytes of fp32 [ceil(blocks/256)]; empty unless nested
    nested_offset  uint8 bytes of fp32 [1]; empty unless nested
    zeros          uint8 bytes of fp32 [N * ceil(K/block)]; empty unless the format has a zero point
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
        return cls(fmt, tuple(int(s) for s in shape.split("x") if s), getattr(torch, dtype), *tensors)

    def to(self, device: torch.device | str) -> Packed:
        """The same weight on another device."""
        return Packed(self.format, self.shape, self.dtype, *(t.to(device) for t in self.tensors()))
