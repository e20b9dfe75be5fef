"""A decoder layer as the fused path sees it: groups of weights, norms and an activation as data, read off an adopted layer.

Norms and activations are recognised by what they compute on a probe, never by their class. What is not recognised, what learns
beside the adapter, and active dropout of the base are reasons to leave the layer to `layers.decoder` (NotUnderstood).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.formats.packed import Packed
from halfbyte.kernels.glu import Activation
from halfbyte.kernels.lora_linear.members import Member
from halfbyte.kernels.norm import NormSpec
from halfbyte.kernels.norm import reference as norm_reference
from halfbyte.layers.fused.projection import Projection
from halfbyte.layers.linear import Operand, operand_of
from halfbyte.layers.operands import supports_operand
from halfbyte.layers.structure import NotUnderstood, Structure

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
    "relu2": lambda x: nn.functional.relu(x).square(),
}


@dataclass(frozen=True)
class Norm:
    """A norm as data. weight `[H]`, bias `[H]` or None; both may be None for a norm without parameters."""

    spec: NormSpec
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class LayerParts:
    """Everything fixed about a layer. key: of what the groups were built from (`key_of`)."""

    structure: Structure
    activation: Activation
    key: tuple[float, ...]
    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    qkv: Projection
    out: Projection
    inputs: Projection
    down: Projection


def modules_of(layer: nn.Module, s: Structure) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module], list[nn.Module]]:
    """The linear modules of the four groups: q/k/v, output, gate/up, down."""
    attention, mlp = layer.get_submodule(s.attention), layer.get_submodule(s.mlp)
    return (
        [attention.get_submodule(n) for n in s.qkv],
        [attention.get_submodule(s.out)],
        [mlp.get_submodule(n) for n in s.inputs],
        [mlp.get_submodule(s.down)],
    )


def operands(modules: list[nn.Module]) -> list[Operand]:
    """Of modules without hooks; raises NotUnderstood for one that can only be called."""
    found = []
    for module in modules:
        member = supports_operand(module)
        if member is None:
            raise NotUnderstood(f"{type(module).__name__} can only be called")
        found.append(operand_of(member))
    return found


def key_of(groups: list[list[Operand]]) -> tuple[float, ...]:
    """Addresses of what is stored, and who and how large the adapters are: another tuple means other groups."""
    key: list[float] = []
    for group in groups:
        for o in group:
            key.append((o.weight.codes if isinstance(o.weight, Packed) else o.weight).data_ptr())
            key.append(0 if o.bias is None else o.bias.data_ptr())
            if o.lora is not None:
                key += [o.lora.a.data_ptr(), o.lora.b.data_ptr(), id(o.lora.a), id(o.lora.b), o.lora.scale]
    return tuple(key)


def read(layer: nn.Module, s: Structure, dtype: torch.dtype, padded_to: int) -> LayerParts:
    """The parts of an adopted layer that computes in `dtype`. Raises NotUnderstood with the reason."""
    if s.dropout_after_attention or s.dropout_after_mlp or s.attention_dropout:
        raise NotUnderstood("dropout of the base is active")
    if s.layout == "grouped":
        raise NotUnderstood("queries, keys and values are interleaved in one projection")
    groups = [operands(modules) for modules in modules_of(layer, s)]
    learning = {id(t) for group in groups for o in group if o.lora is not None for t in (o.lora.a, o.lora.b)}
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad and id(parameter) not in learning:
            raise NotUnderstood(f"`{name}` learns beside the adapter")
    attention = layer.get_submodule(s.attention)
    places = s.norms
    norms: list[Norm | None] = [
        None if name is None else read_norm(layer.get_submodule(name))
        for name in (places.before_attention, places.after_attention, places.before_mlp, places.after_mlp)
    ]
    qk = [read_norm(attention.get_submodule(n)) if s.qk_norm != "none" else None for n in ("q_norm", "k_norm")]
    built = projections(groups, dtype, padded_to)
    activation = read_activation(getattr(layer.get_submodule(s.mlp), s.activation))
    return LayerParts(s, activation, key_of(groups), *norms, *qk, *built)  # type: ignore[arg-type]


def projections(groups: list[list[Operand]], dtype: torch.dtype, padded_to: int) -> list[Projection]:
    """q/k/v, output, gate/up and down, of their operands."""
    return [Projection.of([Member(o.weight, o.bias, o.lora) for o in group], dtype, padded_to) for group in groups]


@torch.no_grad()
def read_norm(module: nn.Module) -> Norm:
    """The norm that `module` computes, found on a probe: RMS (weight, or weight + 1) or LayerNorm. Raises NotUnderstood."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = next((float(e) for n in ("variance_epsilon", "eps", "epsilon") if isinstance(e := getattr(module, n, None), float)), None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or eps is None:
        raise NotUnderstood(f"the norm {type(module).__name__} has another shape of weight or no eps")
    # As wide as the norm, in its dtype, at a size where eps matters.
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, weight.shape[0], generator=generator) * eps**0.5 + 1e-3).to(weight)
    expected = module(x)
    for spec in (NormSpec("rms", eps, 0.0), NormSpec("rms", eps, 1.0), NormSpec("layer", eps, 0.0)):
        got = torch.empty_like(x)
        norm_reference.add_norm(x, None, spec, weight, bias, got)
        error = (got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
        if error <= 4 * torch.finfo(x.dtype).eps:
            return Norm(spec, weight, bias)
    raise NotUnderstood(f"the norm {type(module).__name__} computes something else than RMSNorm or LayerNorm")


@torch.no_grad()
def read_activation(function: Callable[[Tensor], Tensor]) -> Activation:
    """The name of the activation, found by its values. Raises NotUnderstood."""
    x = torch.linspace(-6, 6, 4097, dtype=torch.float64)
    got = function(x)
    for name, candidate in ACTIVATIONS.items():
        if torch.allclose(got, candidate(x), atol=1e-7, rtol=1e-6):
            return name
    raise NotUnderstood(f"unknown activation {getattr(function, '__name__', type(function).__name__)}")
