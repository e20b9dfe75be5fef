"""Which linear modules get an adapter.

`all-linear`: every linear layer, packed or not, but the output head. A list: names (`q_proj` matches at any dot) or patterns
with `*`. Any other string: a regular expression that matches whole module paths, as in PEFT, or one name. Every entry has to
match something: a target that matches nothing trains nothing and still shows a normal loss curve.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from halfbyte.adapters.config import AdapterConfig
from halfbyte.errors import ModelError
from halfbyte.layers.names import nearest
from halfbyte.layers.operands import is_linear


def match(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Paths of the modules to adapt, in the model's order. Raises ModelError (`adapter.no-target`) if an entry matches nothing."""
    paths = [path for path, _ in model.named_modules() if path]
    linears = {path: module for path, module in model.named_modules() if is_linear(module)}
    chosen = _chosen(model, linears, paths, config.targets)
    excluded = {path for entry in config.exclude for path in _matching(entry, linears, paths, "adapter.exclude")}
    whole = {path for path in paths if any(_is_name(path, name) for name in config.modules_to_save)}
    found = [path for path in linears if path in chosen and path not in excluded and not _inside(path, whole)]
    if not found:
        raise ModelError(
            f"adapter: of {len(chosen)} targets none is left after `exclude` and `modules_to_save`",
            hint="exclude fewer modules",
            code="adapter.no-target",
        )
    return found


def _chosen(model: nn.Module, linears: dict[str, nn.Module], paths: list[str], targets: str | list[str]) -> set[str]:
    if targets == "all-linear":
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None  # type: ignore[no-untyped-call]
        return {path for path, module in linears.items() if module is not head}
    if isinstance(targets, list):
        return {path for entry in targets for path in _matching(entry, linears, paths, "adapter.targets")}
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise ModelError(
            f"adapter.targets: `{targets}` is not a regular expression: {error}",
            hint="a list takes plain names",
            code="adapter.no-target",
        ) from error
    by_pattern = {path for path in linears if pattern.fullmatch(path)}
    return by_pattern or _matching(targets, linears, paths, "adapter.targets")


def _matching(entry: str, linears: Iterable[str], paths: list[str], key: str) -> set[str]:
    """The linear modules that a name or `*` pattern names. Raises ModelError if there are none."""
    named: Callable[[str], bool] = lambda path: _is_name(path, entry)  # noqa: E731
    found = set(filter(named, linears))
    if found:
        return found
    other = [path for path in paths if named(path)]
    if other:
        raise ModelError(
            f"{key}: `{entry}` matches no linear layer, only {other[0]}",
            hint=f"linear layers here: {', '.join(nearest('', linears))}",
            code="adapter.no-target",
        )
    raise ModelError(
        f"{key}: `{entry}` matches no module",
        hint=f"nearest names: {', '.join(nearest(entry, linears))}",
        code="adapter.no-target",
    )


def _is_name(path: str, name: str) -> bool:
    return fnmatchcase(path, name) or fnmatchcase(path, f"*.{name}")


def _inside(path: str, containers: set[str]) -> bool:
    return any(path == c or path.startswith(f"{c}.") for c in containers)


def modules_named(model: nn.Module, names: list[str]) -> list[str]:
    """Paths of the modules that `modules_to_save` names. Raises ModelError for a name that matches none."""
    paths = [path for path, _ in model.named_modules() if path]
    found: list[str] = []
    for name in names:
        hits = [path for path in paths if _is_name(path, name)]
        if not hits:
            raise ModelError(
                f"adapter.modules_to_save: `{name}` matches no module",
                hint=f"nearest names: {', '.join(nearest(name, paths))}",
                code="adapter.no-target",
            )
        found += [path for path in hits if not _inside(path, set(found))]
    return found


def patterned(table: dict[str, int] | dict[str, float], path: str, default: float) -> float:
    """The value of the first key that matches the end of `path` by PEFT's rule, `(.*\\.)?(key)$`."""
    return next((value for key, value in table.items() if re.match(rf"(.*\.)?({key})$", path)), default)
