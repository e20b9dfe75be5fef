"""Parameters of the base that learn: kept in fp32 inside a model that computes in 16 bits.

Why: an optimizer's step is lost in 16 bits. A linear module on the grouped product casts by itself; any other module with a
trained parameter becomes an island: all its floating parameters in fp32, its inputs cast on the way in, its output on the way
out. Cost: fp32 instead of 16 bits for those modules, and the original values, kept to let the base answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import ModelError


def trainable_in_fp32(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Makes the named parameters trainable in fp32, in place; returns their original values by name.

    A parameter shared with another module is parted from it: only the named module learns (as in PEFT). Raises ModelError
    (`adapter.packed`) for a packed weight.
    """
    originals: dict[str, Tensor] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = module.get_parameter(leaf)
        if not parameter.is_floating_point():
            raise ModelError(
                f"adapter.modules_to_save: `{path}` is packed and cannot learn",
                hint=f"keep it in 16 bits: format.skip: [{path}]",
                code="adapter.packed",
            )
        originals[name] = parameter.detach()
        dtype = parameter.dtype
        module.register_parameter(leaf, nn.Parameter(parameter.detach().to(torch.float32, copy=True)))
        if dtype != torch.float32 and not _casts_by_itself(module, name):
            _make_island(module, dtype)
    return originals


def _casts_by_itself(module: nn.Module, name: str) -> bool:
    """A bias below an adapter, or of a packed layer, is cast to the compute dtype by the grouped product."""
    from halfbyte.layers.linear import Linear4bit

    below_adapter = name.endswith(".base_layer.bias")
    return below_adapter or (name.endswith("bias") and isinstance(module, Linear4bit))


def _make_island(module: nn.Module, dtype: torch.dtype) -> None:
    for leaf, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            frozen = nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
            module.register_parameter(leaf, frozen)

    def cast_in(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    def cast_out(_: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        return out.to(dtype) if isinstance(out, Tensor) and out.is_floating_point() else out

    module.register_forward_pre_hook(cast_in)
    module.register_forward_hook(cast_out)
