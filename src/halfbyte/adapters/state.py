"""An adapter's tensors under PEFT's names, and back.

Why PEFT's names are the only ones: what is trained here must load in PEFT, vLLM and every tool that reads that layout,
tensor for tensor, and what they trained must load here. The module path is kept as it stands in the model:

    model.layers.0.self_attn.q_proj.lora_a           -> base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight  [r, K]
    model.layers.0.self_attn.q_proj.lora_b           -> base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight  [N, r]
    model.layers.0.self_attn.q_proj.base_layer.bias  -> base_model.model. + the same
    lm_head.weight (modules_to_save)                 -> base_model.model. + the same

Masters are fp32 and are stored as fp32. Cost: one copy of the trained parameters on the CPU while saving.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError

if TYPE_CHECKING:
    from halfbyte.adapters.lora import Adapter

PREFIX = "base_model.model."
_SUFFIX = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight"}


def file_name(name: str, role: str) -> str:
    """PEFT's tensor name of the parameter `name` (its path in the model) with the given role."""
    if role in _SUFFIX:
        return PREFIX + name.rpartition(".")[0] + _SUFFIX[role]
    return PREFIX + name


def names(adapter: Adapter) -> list[str]:
    """The names that `state_dict` will have, sorted."""
    return sorted(file_name(name, role) for name, _, role in adapter.parameters())


def state_dict(adapter: Adapter) -> dict[str, Tensor]:
    """Every trained tensor under its PEFT name, contiguous, on the CPU, sorted by name."""
    tensors = {file_name(name, role): parameter for name, parameter, role in adapter.parameters()}
    return {name: tensors[name].detach().to("cpu").contiguous() for name in sorted(tensors)}


def load_state_dict(adapter: Adapter, tensors: Mapping[str, Tensor], *, source: str = "the adapter") -> None:
    """Copies `tensors` into the adapter's parameters. All or nothing.

    Raises CheckpointError that lists every missing tensor, every unexpected tensor and every wrong shape, and
    (a damaged or diverged file) every tensor that holds NaN or infinite values.
    """
    wanted = {file_name(name, role): parameter for name, parameter, role in adapter.parameters()}
    given = {_current_name(name, wanted): tensor for name, tensor in tensors.items()}
    problems = [f"missing: {name} {list(wanted[name].shape)}" for name in sorted(wanted.keys() - given.keys())]
    problems += [f"unexpected: {name} {list(given[name].shape)}" for name in sorted(given.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & given.keys()):
        if wanted[name].shape != given[name].shape:
            problems.append(f"shape: {name} is {list(given[name].shape)} in the file, {list(wanted[name].shape)} in the model")
        elif not torch.isfinite(given[name]).all():
            problems.append(f"values: {name} holds NaN or infinite values")
    if problems:
        raise mismatch(source, problems)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(given[name])


def mismatch(source: str, problems: list[str]) -> CheckpointError:
    """The error that lists every difference between a file and a model."""
    listed = "\n".join(f"    {p}" for p in problems)
    return CheckpointError(
        f"{source} does not fit this model: {len(problems)} difference{'s' if len(problems) > 1 else ''}\n{listed}",
        hint="load the base that the adapter was trained on, or give the adapter settings it was trained with",
        code="adapter.mismatch",
    )


def _current_name(name: str, wanted: Mapping[str, Tensor]) -> str:
    """Accepts names of PEFT before 0.6 (`q_proj.bias` for what is `q_proj.base_layer.bias` now)."""
    if name not in wanted and name.endswith(".bias"):
        wrapped = name.removesuffix(".bias") + ".base_layer.bias"
        if wrapped in wanted:
            return wrapped
    return name
