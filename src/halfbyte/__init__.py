"""halfbyte: fine-tunes large language models on 4-bit frozen weights.

    import halfbyte
    recipe = halfbyte.load_recipe("recipes/quickstart.yaml")
    print(halfbyte.plan(recipe).table())
    result = halfbyte.train(recipe)

The public names below are resolved on first use, so that `import halfbyte` and `halfbyte --help` never import torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Recipe": "halfbyte.config",
    "load_recipe": "halfbyte.recipe",
    "load_base": "halfbyte.checkpoints.huggingface:load",
    "train": "halfbyte.train.run",
    "plan": "halfbyte.train.lengths",
    "merge": "halfbyte.export.merge",
    "generate": "halfbyte.generate.chat",
    "quantize": "halfbyte.formats.quantize",
    "dequantize": "halfbyte.formats.quantize",
    "Format": "halfbyte.formats.packed",
    "Packed": "halfbyte.formats.packed",
    "HalfbyteError": "halfbyte.errors",
    "RecipeError": "halfbyte.errors",
    "FormatError": "halfbyte.errors",
    "CheckpointError": "halfbyte.errors",
    "UnsafeFileError": "halfbyte.errors",
    "DataError": "halfbyte.errors",
    "ModelError": "halfbyte.errors",
    "MemoryPlanError": "halfbyte.errors",
    "TrainingError": "halfbyte.errors",
    "Interrupted": "halfbyte.errors",
}
"""Public name: the module that defines it (`module:name` where it has another name there)."""

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from halfbyte.config import Recipe as Recipe
    from halfbyte.errors import CheckpointError as CheckpointError
    from halfbyte.errors import DataError as DataError
    from halfbyte.errors import FormatError as FormatError
    from halfbyte.errors import HalfbyteError as HalfbyteError
    from halfbyte.errors import Interrupted as Interrupted
    from halfbyte.errors import MemoryPlanError as MemoryPlanError
    from halfbyte.errors import ModelError as ModelError
    from halfbyte.errors import RecipeError as RecipeError
    from halfbyte.errors import TrainingError as TrainingError
    from halfbyte.errors import UnsafeFileError as UnsafeFileError
    from halfbyte.formats.packed import Format as Format
    from halfbyte.formats.packed import Packed as Packed
    from halfbyte.formats.quantize import dequantize as dequantize
    from halfbyte.formats.quantize import quantize as quantize
    from halfbyte.recipe import load_recipe as load_recipe


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """The functions `train` and `generate` share their names with folders: importing a folder must not hide them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
