"""`dequantize`: a packed weight as a dense one, in one launch, nested scales decoded inside.

Two operators, `halfbyte::dequantize` (a fresh tensor) and `halfbyte::dequantize_out` (a buffer of the caller's). Both are
exact: every twin gives the bits of `formats.dequantize` (one fp32 product, then one rounding). No autograd: what reads a
packed weight in a backward pass decodes it again (`lora_linear`).
Cost on a GPU: reads 0.516 and writes 2 bytes a weight (nf4 nested to bf16): copy speed is the bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.formats.packed import Packed
from halfbyte.kernels.dequantize import cpu, reference
from halfbyte.kernels.dispatch import twin


def decode(packed: Packed, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`dequantize` below the operator: for use inside other operators. `out`: contiguous, n elements."""
    which = twin(packed.codes.device)
    if out is None:
        if which == "reference":
            return reference.decode_new(packed, dtype)
        out = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
    if which == "fused":
        from halfbyte.kernels.dequantize import fused

        fused.decode(packed, out)
    elif which == "cpu":
        cpu.decode(packed, out)
    else:
        reference.decode(packed, out)
    return out


@torch.library.custom_op("halfbyte::dequantize", mutates_args=())
def dequantize_op(tensors: list[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    """tensors: the five of `Packed.tensors()`; spec: `Packed.spec`."""
    return decode(Packed.from_spec(spec, tensors), dtype)


@dequantize_op.register_fake
def _(tensors: list[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(Packed.from_spec(spec, tensors).shape, dtype=dtype)


@torch.library.custom_op("halfbyte::dequantize_out", mutates_args=("out",))
def dequantize_out_op(tensors: list[Tensor], spec: str, out: Tensor) -> None:
    """The same into `out`."""
    decode(Packed.from_spec(spec, tensors), out.dtype, out)


@dequantize_out_op.register_fake
def _(tensors: list[Tensor], spec: str, out: Tensor) -> None:
    return None


def dequantize(packed: Packed, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """The weight `[*shape]` in `dtype` (default: of `out`, else the dtype it was quantised from).

    out: a contiguous buffer of `[*shape]`, which is filled and returned; without it the result is a fresh tensor.
    """
    if out is None:
        fresh: Tensor = dequantize_op(list(packed.tensors()), packed.spec, dtype or packed.dtype)
        return fresh
    assert out.is_contiguous() and tuple(out.shape) == packed.shape and dtype in (None, out.dtype), "out does not fit"
    dequantize_out_op(list(packed.tensors()), packed.spec, out)
    return out
