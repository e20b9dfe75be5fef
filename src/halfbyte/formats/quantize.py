"""The two mirror verbs over every format: `quantize` and `dequantize`.

Why here: the formats know codes and scales, this file knows `Packed`. It is also where bad input is refused, by name.
Cost: 1 to 5 ns a weight on one CPU core; temporaries are a few tiles (formats/tiling.py), besides one copy in the source dtype
when the weight is not contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats import codebook, fp4, int4, int8, nested, nf4
from halfbyte.formats.packed import Format, Packed, matrix_shape
from halfbyte.formats.tiling import flat_tiles

OUTPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOOKS = {"nf4": nf4.BOOK, "fp4": fp4.BOOK}


def quantize(weight: Tensor, fmt: Format, *, name: str = "tensor") -> Packed:
    """Stores `weight` (any float dtype, any shape) in `fmt`. Loss by format: docs/concepts/formats.md.

    Raises FormatError naming `name` when it is not floating point or holds a value that is not finite in fp32.
    """
    if not weight.is_floating_point():
        raise FormatError(
            f"{name} holds {str(weight.dtype)[6:]}, not floating point numbers",
            hint="only float weights can be quantised; is it already packed by another library?",
            code="format.dtype",
        )
    weight = weight.detach()
    empty = torch.empty(0, dtype=torch.uint8, device=weight.device)
    outer = offset = zeros = empty
    if fmt.kind == "int8":
        codes, scales = int8.encode(weight.reshape(matrix_shape(weight.shape)))
    elif fmt.kind == "int4":
        codes, scales, zeros = int4.encode(weight.reshape(matrix_shape(weight.shape)), fmt.block, fmt.zero)
    else:
        codes, scales = codebook.encode(weight, fmt.block, BOOKS[fmt.kind])
    if not torch.isfinite(scales).all():
        raise _not_finite(weight, name)
    if fmt.nested:
        scales, outer, offset = nested.encode(scales)
    dtype = _source_dtype(weight.dtype)
    tensors = (_bytes(t) for t in (codes, scales, outer, offset, zeros))
    return Packed(fmt, tuple(weight.shape), dtype, *tensors)


def dequantize(packed: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """The weight again, `[*shape]` in `dtype` (fp32, bf16, fp16; default: the source dtype): decoded in fp32, rounded once."""
    dtype = dtype or packed.dtype
    if dtype not in OUTPUT_DTYPES:
        raise FormatError(f"cannot decode to {str(dtype)[6:]}", hint="decode to float32, bfloat16 or float16", code="format.dtype")
    fmt, scales = packed.format, scales_of(packed)
    rows, columns = matrix_shape(packed.shape)
    out = torch.empty(rows, columns, dtype=dtype, device=packed.codes.device)
    if fmt.kind == "int8":
        int8.decode(packed.codes.view(rows, columns), scales, out)
    elif fmt.kind == "int4":
        groups = (rows, -(-columns // fmt.block))
        zeros = packed.zeros.view(torch.float32)
        zeros = zeros if fmt.zero == "none" else zeros.view(groups)
        int4.decode(packed.codes.view(rows, -(-columns // 2)), scales.view(groups), zeros, fmt.block, fmt.zero, out)
    else:
        codebook.decode(packed.codes.view(-1), scales, fmt.block, BOOKS[fmt.kind], out.view(-1))
    return out.view(packed.shape)


def scales_of(packed: Packed) -> Tensor:
    """fp32 scales `[blocks]` (int4: `[N * groups]`, int8: `[N]`), nested ones decoded."""
    if not packed.format.nested:
        return packed.scales.view(torch.float32)
    return nested.decode(packed.scales, packed.nested_scales.view(torch.float32), packed.nested_offset.view(torch.float32))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _source_dtype(dtype: torch.dtype) -> torch.dtype:
    """What `dequantize` returns by default: the source dtype; fp32 for fp64; bf16, which holds them all, for 8-bit floats."""
    if dtype in OUTPUT_DTYPES:
        return dtype
    return torch.float32 if dtype == torch.float64 else torch.bfloat16


def _not_finite(weight: Tensor, name: str) -> FormatError:
    """Where the first bad value is, and how many there are; only called once something is wrong."""
    flat = weight.reshape(-1)
    count, first = 0, -1
    for span in flat_tiles(flat.numel(), 1, flat.device):
        bad = ~torch.isfinite(flat[span].to(torch.float32))
        if first < 0 and bad.any():
            first = span.start + int(bad.to(torch.uint8).argmax())
        count += int(bad.sum())
    if not count:
        return FormatError(f"{name}: the values of one group span more than fp32 can hold", code="format.not-finite")
    index: list[int] = []
    rest = first
    for size in reversed(weight.shape):
        index.insert(0, rest % size)
        rest //= size
    return FormatError(
        f"{name} holds NaN or infinite values: {count:,} of {flat.numel():,}, the first at {index}",
        hint="the checkpoint is damaged or a training run diverged: download it again, or use an earlier one",
        code="format.not-finite",
    )
