"""Products of a packed group with few rows of x (generation): each weight is read once, at the speed of memory.

out [M, N] = add + multiplier * f(x [M, K] W^T + bias + s B (A x)),   M <= 16

Why apart from training's products: there a weight is decoded into a buffer and multiplied by cuBLAS, which costs 8.5 times the
bytes of the packed weight; for a single token the bytes are the whole cost. q, k and v, or gate, up and the activation, are one
launch, the adapter unmerged in it. What the kernel cannot take (`Product.why_not`) is decoded and multiplied as in training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.formats.packed import Packed
from halfbyte.kernels.dequantize import decode
from halfbyte.kernels.dispatch import twin
from halfbyte.kernels.packed_gemv import reference
from halfbyte.kernels.packed_gemv.product import (
    FED_ROWS,
    MOST_FED,
    MOST_ROWS,
    Activation,
    Launch,
    Pieces,
    Product,
    RmsNorm,
    Shape,
    build,
    pieces,
)  # fmt: skip

__all__ = [
    "MOST_ROWS", "Activation", "Launch", "Pieces", "Product", "RmsNorm", "Shape", "build", "feeds", "multiply", "pieces",
    "programs", "takes_norm",
]  # fmt: skip


def multiply(
    product: Product, x: Tensor, out: Tensor, add: Tensor | None = None, multiplier: float = 1.0, *, norm: RmsNorm | None = None,
    pieces: Pieces | None = None, feeds: Pieces | None = None, shape: Shape | None = None,
) -> None:  # fmt: skip
    """x `[M, K]`, out and add `[M, N]`: strided rows, last dimension contiguous; out may be add.

    norm: x goes through it first (`takes_norm`). pieces: A x as the launch in front left it; without, a launch of its own makes it.
    feeds: the pieces of the group that reads `out`, filled here. shape: for measurements.
    """
    assert x.shape[0] <= MOST_ROWS and x.shape[1] == product.width and out.shape == (x.shape[0], product.rows), "does not fit"
    if twin(x.device) != "fused":
        reference.multiply(product, x, out, add, multiplier, norm)
    elif product.launch is None:
        assert norm is None and feeds is None, "not fused"
        _decoded(product, x, out, add, multiplier)
    else:
        from halfbyte.kernels.packed_gemv import launch

        launch.multiply(product, product.launch, x, out, add, multiplier, norm, pieces, feeds, shape)


def takes_norm(product: Product, rows: int, norm: RmsNorm) -> bool:
    """Whether a product with so many rows of x can norm them itself."""
    if not _fused(product) or rows > FED_ROWS or norm.weight.data_ptr() % 8:
        return False
    from halfbyte.kernels.packed_gemv import launch

    assert product.launch is not None
    if norm.weight.dtype != product.launch.a.dtype:
        return False
    return launch.keeps(product.width, rows, launch.chosen(product.launch, rows))


def programs(product: Product, rows: int, shape: Shape | None = None) -> int:
    """How many pieces a launch with so many rows leaves."""
    assert product.launch is not None
    from halfbyte.kernels.packed_gemv import launch

    return launch.programs(product.launch, rows, shape)


def feeds(product: Product | None, reader: Product, rows: int) -> bool:
    """Whether the launch of `product` (None: another kernel) can leave pieces of A x for the group that reads its output."""
    if not _fused(reader) or rows > FED_ROWS or not (product is None or _fused(product)):
        return False
    assert reader.launch is not None
    return 0 < reader.launch.a.shape[0] <= MOST_FED and reader.launch.rank > 0


def _fused(product: Product) -> bool:
    return product.launch is not None and twin(product.launch.a.device) == "fused"


def _decoded(product: Product, x: Tensor, out: Tensor, add: Tensor | None, multiplier: float) -> None:
    """By decoding: what the kernel does not take, in the dtype of x."""
    only = product.members[0]
    if len(product.members) == 1 and only.bias is None and only.lora is None and product.activation is None and multiplier == 1.0:
        weight = decode(only.weight, x.dtype) if isinstance(only.weight, Packed) else only.weight.to(x.dtype)
        if add is None:
            torch.mm(x, weight.T, out=out)
        else:
            torch.addmm(add, x, weight.T, out=out)
        return
    outputs = []
    for member in product.members:
        weight = decode(member.weight, x.dtype) if isinstance(member.weight, Packed) else member.weight.to(x.dtype)
        y = torch.nn.functional.linear(x, weight, None if member.bias is None else member.bias.to(x.dtype))
        if member.lora is not None:
            low = torch.nn.functional.linear(x, member.lora.a.detach().to(x.dtype))
            y = y + torch.nn.functional.linear(low, (member.lora.b.detach() * member.lora.scale).to(x.dtype))
        outputs.append(y)
    y = torch.cat(outputs, 1)
    if product.activation is not None:
        y = reference.activated(outputs[0], product.activation) * (outputs[1] if len(outputs) == 2 else 1)
    y = y if multiplier == 1.0 else y * multiplier
    out.copy_(y if add is None else add + y)
