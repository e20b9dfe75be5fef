"""`adapter_config.json`: PEFT's settings to ours and back.

Every field of PEFT's falls into one of three: it is built here, it does not change the answer (PASSIVE), or it changes the
mathematics and is not built: then loading is an error that names it. A field of a newer PEFT that nobody here knows is
refused as well when it is set: ignoring it could load another model than was trained, with no word.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.adapters.config import AdapterConfig
from halfbyte.errors import CheckpointError

if TYPE_CHECKING:
    from halfbyte.adapters.lora import Adapter
    from halfbyte.checkpoints.base import Base

BUILT = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "modules_to_save",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "peft_type",
}  # fmt: skip
PASSIVE = {
    # who wrote it, for what; how a weight is oriented in memory; options of fields that are refused themselves
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type", "runtime_config",
    "fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config",
}  # fmt: skip
# Initialisations that leave the base as it was: the saved A and B mean what they say.
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def to_peft(adapter: Adapter, base: Base) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter: every field that PEFT needs to rebuild it, names as PEFT matches them."""
    config = adapter.config
    alpha = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
    wrapped = sorted(name.rpartition(".")[0] for name, _, role in adapter.parameters() if role == "lora_a")
    return {
        "peft_type": "LORA",
        "peft_version": version("peft"),
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "bias": config.bias,
        "target_modules": _shortest(base.model, wrapped),
        "exclude_modules": None,
        "modules_to_save": _saved_modules(base.model, config.modules_to_save) or None,
        "fan_in_fan_out": base.model.config.model_type in CONV1D_MODELS,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_dora": False,
        "lora_bias": False,
        "target_parameters": None,
        "trainable_token_indices": None,
        "layer_replication": None,
    }


def from_peft(raw: dict[str, Any], model: PreTrainedModel, source: str) -> AdapterConfig:
    """Our settings for PEFT's, targets resolved to module paths of `model`. Raises CheckpointError naming every field."""
    refuse_unbuilt(raw, source)
    for field in ("r", "lora_alpha", "target_modules"):
        if raw.get(field) in (None, []):
            raise CheckpointError(f"{source}: {field} is missing", hint="copy the directory again")
    if malformed := _malformed(raw):
        raise CheckpointError(
            f"{source}: {'; '.join(malformed)}", hint="is it the adapter_config.json of a LoRA adapter?", code="adapter.config"
        )
    try:
        return AdapterConfig(
            kind="lora",
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw.get("lora_dropout", 0.0),
            targets=target_paths(raw, model, source),
            rslora=raw.get("use_rslora", False),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
            bias=raw.get("bias", "none"),
            modules_to_save=_peft_saved(model, raw.get("modules_to_save") or []),
        )
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{source}: {wrong}", hint="is it the adapter_config.json of a LoRA adapter?") from error


def _malformed(raw: dict[str, Any]) -> list[str]:
    """What is wrong with the fields that name modules: a type that PEFT does not write, or no regular expression."""
    wrong = []
    patterns: list[tuple[str, str]] = []
    for field, one in (("target_modules", True), ("exclude_modules", True), ("layers_pattern", True), ("modules_to_save", False)):
        value = raw.get(field)
        names = [value] if one and isinstance(value, str) else value or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            wrong.append(f"{field} must be {'a regular expression or ' if one else ''}a list of names, but is {value!r}")
        elif isinstance(value, str) or field in ("layers_pattern", "modules_to_save"):
            patterns += [(field, name) for name in names]
    for field in ("rank_pattern", "alpha_pattern"):
        patterns += [(field, key) for key in raw.get(field) or {}] if isinstance(raw.get(field), dict) else []
    layers = raw.get("layers_to_transform")
    if not all(isinstance(n, int) for n in (layers if isinstance(layers, list) else [layers or 0])):
        wrong.append(f"layers_to_transform must be a number or a list of numbers, but is {layers!r}")
    for field, pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            wrong.append(f"{field}: {pattern!r} is not a regular expression: {error}")
    return wrong


def refuse_unbuilt(raw: dict[str, Any], source: str) -> None:
    """Raises CheckpointError naming every field that changes the mathematics and is not built."""
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{source}: peft_type {kind} is not built, only LORA", code="adapter.not-built")
    wrong = [f"{field} = {value!r}" for field, value in sorted(raw.items()) if field not in BUILT | PASSIVE and not _is_off(value)]
    init = raw.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        wrong.append(f"init_lora_weights = {init!r} (it changes the base; convert the adapter to plain LoRA when saving it)")
    if wrong:
        raise CheckpointError(
            f"{source}: these settings change the mathematics and are not built: {'; '.join(wrong)}",
            hint="load it with PEFT, merge it there, and use the merged model",
            code="adapter.not-built",
        )


def target_paths(raw: dict[str, Any], model: PreTrainedModel, source: str) -> list[str]:
    """The linear layers that PEFT would give an adapter, by PEFT's own rules: their paths in `model`."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    targets = raw["target_modules"]
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if targets == "all-linear":
        return [name for name in linears if model.get_submodule(name) is not head]
    chosen = [name for name, _ in model.named_modules() if name and _is_target(raw, name)]
    if others := sorted(set(chosen) - set(linears)):
        kinds = ", ".join(f"{name} ({type(model.get_submodule(name)).__name__})" for name in others[:5])
        raise CheckpointError(f"{source}: target_modules name layers that are not linear: {kinds}", code="adapter.not-built")
    if not chosen:
        raise CheckpointError(
            f"{source}: target_modules {targets!r} match nothing in this model",
            hint="load the base that the adapter was trained on",
            code="adapter.no-target",
        )
    return chosen


def _is_target(raw: dict[str, Any], path: str) -> bool:
    targets, exclude = raw["target_modules"], raw.get("exclude_modules")
    if exclude and (re.fullmatch(exclude, path) if isinstance(exclude, str) else _named(path, exclude)):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in raw.get("modules_to_save") or []):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    if path in targets:
        return True
    return _named(path, targets) and _is_layer_chosen(raw, path)


def _is_layer_chosen(raw: dict[str, Any], path: str) -> bool:
    layers = raw.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = raw.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path):
            return int(match.group(1)) in ([layers] if isinstance(layers, int) else layers)
    return False


def _named(path: str, names: list[str]) -> bool:
    return path in names or any(path.endswith(f".{name}") for name in names)


def _shortest(model: nn.Module, paths: list[str]) -> list[str]:
    """Last names where they select exactly these paths (as people write them); otherwise the paths in full."""
    leaves = sorted({path.rpartition(".")[2] for path in paths})
    selected = sorted(name for name, _ in model.named_modules() if _named(name, leaves))
    return leaves if selected == paths else paths


def _saved_modules(model: nn.Module, names: list[str]) -> list[str]:
    """`modules_to_save` as PEFT must read it: it matches ends of paths, so a name that would match more is written in full."""
    chosen = [path for path, _ in model.named_modules() if path and _named(path, names)]
    return list(names) if set(_peft_saved(model, names)) == set(chosen) else chosen


def _peft_saved(model: nn.Module, names: list[str]) -> list[str]:
    return [path for path, _ in model.named_modules() if path and path.endswith(tuple(names))] if names else []


def _is_off(value: Any) -> bool:
    return value is None or value is False or value == {} or value == []


CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
