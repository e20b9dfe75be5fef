"""What must hold of an adapter before it learns: each check has an id, a sentence and a fix.

    adapter.part-of-layers  some layers get an adapter, others of the same kind do not
    adapter.router          a router of experts is among the targets
    adapter.head            the output head is among the targets: an error, the loss reads its weight without an adapter

Targets that match nothing at all are an error of `targets.py` (`adapter.no-target`). Why the others are warnings: each may be
meant, and none shows in the loss curve where it is not. What can only be seen while it learns is in `train/proofs.py`, what another
program makes of the files in `checkpoints/vllm.py`. Cost: one walk over the module names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from halfbyte.adapters.lora import Adapter, LoraLinear
from halfbyte.layers.operands import is_linear, shape_of

SHOWN = 6
_NUMBER = re.compile(r"\.(\d+)\.")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ROUTERS = ("router", "gate", "wg", "shared_expert_gate", "expert_gate")


@dataclass(frozen=True)
class Finding:
    """What was found, what to do (`hint`), the id of the check (`code`), and whether training has to stop for it."""

    message: str
    hint: str
    code: str
    stops: bool = False

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]; {self.hint}"


def findings(adapter: Adapter) -> list[Finding]:
    """Everything that is doubtful about what an attached adapter covers; empty when nothing is."""
    if adapter.config.kind == "none":
        return []
    linears = {path: module for path, module in adapter.model.named_modules() if is_linear(module)}
    whole = {path.removesuffix(".base_layer") for path in linears}
    return [*_routers(adapter), *_head(adapter), *_part_of_layers(set(adapter.layers), whole)]


def _part_of_layers(adapted: set[str], linears: set[str]) -> Iterator[Finding]:
    """Per kind of layer (a list of modules and the names below it): members with an adapter against members without."""
    kinds: dict[str, dict[bool, list[int]]] = {}
    for path in sorted(linears):
        for match in _NUMBER.finditer(path):
            stack, leaf = path[: match.start()], path[match.end() :]
            if "." in leaf and _NUMBER.search(f".{leaf}"):
                continue  # an inner list (experts) is looked at by itself
            here = kinds.setdefault(f"{stack}.*.{leaf}", {True: [], False: []})
            here[path in adapted].append(int(match[1]))
    partial: dict[tuple[str, tuple[int, ...], int], list[str]] = {}
    for kind, found in kinds.items():
        if found[True] and found[False]:
            stack, _, leaf = kind.partition(".*.")
            partial.setdefault((stack, tuple(sorted(found[False])), len(found[True]) + len(found[False])), []).append(leaf)
    for (stack, without, count), leaves in partial.items():
        names = ", ".join(leaf.rpartition(".")[2] for leaf in leaves[:SHOWN])
        message = f"{names}: {len(without)} of {count} layers of `{stack}` get no adapter ({_ranges(without)})"
        hint = "where that is not meant, name the modules without their layer, or take `adapter.targets: all-linear`"
        yield Finding(message, hint=hint, code="adapter.part-of-layers")
    yield from _bare_layers(adapted, linears, {stack for stack, _, _ in partial})


def _bare_layers(adapted: set[str], linears: set[str], told: set[str]) -> Iterator[Finding]:
    """Layers of an adapted stack without any adapter, because their modules have other names (hybrid models)."""
    stacks: dict[str, dict[int, bool]] = {}
    for path in linears:
        if match := _NUMBER.search(path):
            layers = stacks.setdefault(path[: match.start()], {})
            layers[int(match[1])] = layers.get(int(match[1]), False) or path in adapted
    for stack, layers in stacks.items():
        without = tuple(sorted(number for number, has in layers.items() if not has))
        if without and any(layers.values()) and stack not in told:
            other = sorted({path.rpartition(".")[2] for path in linears if path.startswith(f"{stack}.{without[0]}.")})
            message = f"{len(without)} of {len(layers)} layers of `{stack}` get no adapter at all ({_ranges(without)})"
            hint = (
                f"their linear layers have other names: {', '.join(other[:SHOWN])}; add them, or take `adapter.targets: all-linear`"
            )
            yield Finding(message, hint=hint, code="adapter.part-of-layers")


def _routers(adapter: Adapter) -> Iterator[Finding]:
    routers = [path for path, layer in adapter.layers.items() if _is_router(adapter.model, path, layer)]
    if routers:
        names = sorted({path.rpartition(".")[2] for path in routers})
        message = f"{len(routers)} routers of experts are among the targets ({routers[0]})"
        hint = f"it moves tokens between experts, and vLLM does not load it: `adapter.exclude: [{', '.join(names)}]`"
        yield Finding(message, hint=hint, code="adapter.router")


def _is_router(model: nn.Module, path: str, layer: LoraLinear) -> bool:
    """By name, where experts stand beside it or its outputs are as many as the model's experts."""
    parts = path.split(".")
    if "router" in parts:
        return True
    parent = model.get_submodule(".".join(parts[:-1]))
    beside = any("expert" in name for name, _ in parent.named_children())
    counts = {getattr(getattr(model, "config", None), name, None) for name in _EXPERT_COUNTS} - {None}
    return parts[-1] in _ROUTERS and (beside or shape_of(layer.base_layer)[0] in counts)


def _head(adapter: Adapter) -> Iterator[Finding]:
    model = adapter.model
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None  # type: ignore[no-untyped-call]
    path = next((path for path, layer in adapter.layers.items() if layer is head), None)
    if path is None:
        return
    message = (
        f"the output head `{path}` is among the targets; the loss is computed from its weight alone, so nothing there would learn"
    )
    hint = f"`adapter.targets: all-linear` leaves it out; it can be trained whole: `adapter.modules_to_save: [{path}]`"
    yield Finding(message, hint=hint, code="adapter.head", stops=True)


def _ranges(numbers: tuple[int, ...]) -> str:
    """`0, 2 to 5, 9`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    said = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in found]
    return ", ".join(said[:SHOWN]) + (", ..." if len(said) > SHOWN else "")
