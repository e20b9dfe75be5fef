"""Whether the modules of a layer still are what they were read as: asked at every call, for a fifth of what reading them takes.

Why: reading seven adapters and packed weights is a good part of a layer's Python, and what they say changes when an adapter is
switched, a parameter replaced or moved, a mask given; that is between steps, and mostly never.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

Values = list[tuple[str, Any]]


class Watch:
    """Of modules and everything in them: plain attributes and parameters by identity, parameters' memory by address, hooks."""

    __slots__ = ("_addresses", "_seen", "_tensors")

    def __init__(self, modules: Iterable[nn.Module], parents: Iterable[nn.Module] = ()) -> None:
        """parents: of these, what they are and whom they have, but not what is in those."""
        self._seen: list[tuple[nn.Module, Values, Values, Values, tuple[int, ...]]] = []
        self._tensors: list[Tensor] = []
        for module in (*parents, *(part for one in modules for part in one.modules())):
            values = [(name, value) for name, value in vars(module).items() if not name.startswith("_")]
            parameters, children = list(module._parameters.items()), list(module._modules.items())
            self._seen.append((module, values, parameters, children, _sizes(vars(module))))
            self._tensors += [p for _, p in parameters if p is not None]
        self._addresses = [t.data_ptr() for t in self._tensors]

    def holds(self) -> bool:
        """Nothing has changed."""
        for module, values, parameters, children, sizes in self._seen:
            # Not kept: a copy of a module has other dictionaries than the copy of what looks at it.
            own = module.__dict__
            if _sizes(own) != sizes:
                return False
            for found, expected in ((own, values), (own["_parameters"], parameters), (own["_modules"], children)):
                for name, value in expected:
                    if found.get(name) is not value:
                        return False
        return [t.data_ptr() for t in self._tensors] == self._addresses


def _sizes(own: dict[str, Any]) -> tuple[int, ...]:
    return len(own), len(own["_parameters"]), len(own["_modules"]), len(own["_forward_hooks"]), len(own["_forward_pre_hooks"])
