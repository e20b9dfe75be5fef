"""The public names, and what may not be loaded before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import halfbyte
import support

HEAVY = ("torch", "transformers", "datasets", "pydantic", "numpy")


def loaded_after(code: str) -> list[str]:
    """Heavy modules that a fresh interpreter has loaded after running `code`."""
    script = f"{code}\nimport json, sys; print(); print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=support.environment())
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_names_are_what_the_docs_promise() -> None:
    functions = {"load_recipe", "load_base", "train", "plan", "merge", "generate", "quantize", "dequantize"}
    classes = {"Recipe", "Format", "Packed"}
    errors = {
        "HalfbyteError",
        "RecipeError",
        "FormatError",
        "CheckpointError",
        "UnsafeFileError",
        "DataError",
        "ModelError",
        "MemoryPlanError",
        "TrainingError",
        "Interrupted",
    }
    assert set(halfbyte.__all__) == functions | classes | errors | {"__version__"}


@pytest.mark.parametrize("name", halfbyte.__all__)
def test_every_name_resolves(name: str) -> None:
    assert getattr(halfbyte, name) is not None


def test_folders_do_not_hide_functions() -> None:
    import halfbyte.generate.chat
    import halfbyte.train.state

    assert callable(halfbyte.train)
    assert callable(halfbyte.generate)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = halfbyte.trian


def test_import_loads_nothing_heavy() -> None:
    assert loaded_after("import halfbyte") == []


def after_command(*args: str) -> list[str]:
    return loaded_after(
        f"from halfbyte.cli.main import main\ntry: main({list(args)!r})\nexcept SystemExit as e: assert e.code == 0, e.code"
    )


def test_help_loads_nothing_heavy() -> None:
    assert after_command("--help") == []


@pytest.mark.parametrize("args", [["train", "--help"], ["data", "preview", "--help"], ["--version"], []])
def test_help_of_commands_loads_no_torch(args: list[str]) -> None:
    """typer itself reads the arguments of a command through pydantic."""
    assert set(after_command(*args)) <= {"pydantic"}


def test_recipe_needs_no_torch() -> None:
    code = "from halfbyte.recipe import recipe_from\nrecipe_from({'model': 'a', 'data': {'train': 'b.jsonl'}})"
    assert loaded_after(code) == ["pydantic"]


def test_import_of_settings_needs_no_torch() -> None:
    code = "from halfbyte.importers.convert import convert\nconvert(['trl sft --model_name_or_path a --dataset_name b'])"
    assert loaded_after(code) == ["pydantic"]
