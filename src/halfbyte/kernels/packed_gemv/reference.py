"""The reference: the group's weights decoded and multiplied, everything in fp32, one rounding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.formats import quantize as formats
from halfbyte.formats.packed import Packed
from halfbyte.kernels.lora_linear.members import Member
from halfbyte.kernels.packed_gemv.product import Activation, Product, RmsNorm


def activated(z: Tensor, activation: Activation) -> Tensor:
    """act(z)."""
    if activation == "gelu_tanh":
        return functional.gelu(z, approximate="tanh")
    if activation == "relu2":
        return functional.relu(z).square()
    if activation == "silu":
        return functional.silu(z)
    return functional.gelu(z) if activation == "gelu" else functional.relu(z)


def multiply(product: Product, x: Tensor, out: Tensor, add: Tensor | None, multiplier: float, norm: RmsNorm | None = None) -> None:
    """out = add + multiplier * f(x W^T + bias + s B (A x)); f the activation, or the activated first times the second."""
    if norm is not None:
        x = normed(x, norm).to(x.dtype)
    outputs = [_one(member, x) for member in product.members]
    y = torch.cat(outputs, 1)
    if product.activation is not None:
        y = activated(outputs[0], product.activation) * (outputs[1] if len(outputs) == 2 else 1)
    y = y * multiplier
    out.copy_(y if add is None else add.float() + y)


def normed(x: Tensor, norm: RmsNorm) -> Tensor:
    """x through the norm, in fp32 or wider."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps) * (norm.weight.to(wide.dtype) + norm.offset)


def _one(member: Member, x: Tensor) -> Tensor:
    weight = formats.dequantize(member.weight, torch.float32) if isinstance(member.weight, Packed) else member.weight.float()
    x = x.float()
    y = x @ weight.T
    if member.bias is not None:
        y = y + member.bias.float()
    if member.lora is not None:
        y = y + member.lora.scale * (x @ member.lora.a.T.float()) @ member.lora.b.T.float()
    return y
