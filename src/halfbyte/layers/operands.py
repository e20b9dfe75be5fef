"""What a linear module of any make contributes to a grouped product, and the group call itself.

Why: the decoder layer runs q/k/v and gate/up as one operation, and an adapter sits on top of whatever linear module the
model came with. Three makes are known: modules with `operand()` (our own), `nn.Linear`, and transformers' `Conv1D` (GPT-2),
whose weight is transposed. A module of another make, or one that carries hooks (both are how other libraries wrap a layer),
is simply called.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from halfbyte.layers.linear import Linear4bit, Operand, SupportsOperand, linear_group
from halfbyte.shortage import is_shortage


class PlainLinear:
    """`nn.Linear` (or a subclass that computes the same) seen as an operand: weight `[N, K]`, nothing copied."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    def operand(self) -> Operand:
        return Operand(self.module.weight, self.module.bias)


class TransposedLinear:
    """`Conv1D` seen as an operand: its weight `[K, N]` as a transposed view `[N, K]`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def operand(self) -> Operand:
        weight, bias = self.module.weight, self.module.bias
        assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
        return Operand(weight.T, bias)


_COMPUTES_LINEAR: dict[type, bool] = {nn.Linear: True}


def computes_linear(module: nn.Module) -> bool:
    """Whether an instance of a subclass of nn.Linear computes `x Wᵀ + b` and no more: shown on small random numbers."""
    kind = type(module)
    if not issubclass(kind, nn.Linear) or issubclass(kind, Linear4bit):
        return False
    if kind not in _COMPUTES_LINEAR:
        _COMPUTES_LINEAR[kind] = _probe_linear(module)
    return _COMPUTES_LINEAR[kind]


def _probe_linear(module: nn.Module) -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    # On the CPU whatever the default device is: models are planned under `torch.device("meta")`.
    weight, bias, x = (torch.randn(shape, generator=generator, device="cpu") for shape in ((3, 5), (3,), (2, 5)))
    values = {"weight": weight} if module.bias is None else {"weight": weight, "bias": bias}
    if set(values) != {name for name, _ in module.named_parameters()}:
        return False
    try:
        out = functional_call(module, values, (x,))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        if is_shortage(error):
            raise
        return False
    expected = torch.nn.functional.linear(x, weight, values.get("bias"))
    return isinstance(out, Tensor) and out.shape == expected.shape and torch.allclose(out, expected, atol=1e-5)


def is_linear(module: nn.Module) -> bool:
    """A linear module of one of the known makes, without any adapter: packed, dense, or transposed."""
    return isinstance(module, Linear4bit) or type(module) is Conv1D or computes_linear(module)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """`(N, K)` of a linear module: output and input features."""
    if type(module) is Conv1D:
        return int(module.nf), int(module.nx)
    out_features, in_features = module.out_features, module.in_features
    assert isinstance(out_features, int) and isinstance(in_features, int)
    return out_features, in_features


def supports_operand(module: nn.Module) -> SupportsOperand | None:
    """The module seen as an operand, or None for a make that can only be called."""
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    if callable(getattr(module, "operand", None)):
        return module  # type: ignore[return-value]
    if type(module) is Conv1D:
        return TransposedLinear(module)
    return PlainLinear(module) if isinstance(module, nn.Linear) and computes_linear(module) else None


def run_group(x: Tensor, modules: list[nn.Module]) -> list[Tensor]:
    """x `[..., K]` through several linear modules: as one operation where all are understood, else one call each.

    Under autocast the product runs in autocast's dtype, as `nn.Linear` does.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    members = [supports_operand(module) for module in modules]
    known = [member for member in members if member is not None]
    if len(known) == len(modules):
        return linear_group(x, known)
    return [module(x) for module in modules]
