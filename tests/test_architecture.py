"""Who may import whom, and how large things may get: DESIGN's order and STYLE's bounds as tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "halfbyte"
FILES = sorted(PACKAGE.rglob("*.py"))

# Lowest first. A folder may import every folder above it in this list; those on one line do not import each other.
ORDER: list[set[str]] = [
    {"cachefile", "config_base", "errors", "machine", "mistakes", "pinned"},
    {"shortage"},
    {"*.config"},
    {"config"},
    {"recipe"},
    {"formats"},
    {"kernels"},
    {"layers"},
    {"adapters"},
    {"checkpoints"},
    {"optim", "data", "memory", "objectives", "generate"},
    {"export"},
    {"train", "importers"},
    {"cli"},
]
# Only these know the whole recipe; the folders below know their own section.
MAY_SEE_RECIPE = {"config", "recipe", "memory", "train", "export", "importers", "cli", "halfbyte"}
MAY_IMPORT: dict[str, set[str]] = {name: set().union(*ORDER[:level]) for level, names in enumerate(ORDER) for name in names}
MAY_IMPORT["mistakes"] = {"errors"}
MAY_IMPORT["*.config"] = {"config_base", "errors", "*.config"}
LIMITS = {"train/loop.py": 200}
BROAD = {"cli/main.py", "cli/doctor.py", "checkpoints/gguf.py"}  # the last: tokenizers raises bare Exceptions


def part_of(module: str) -> str:
    """`halfbyte.formats.nf4` -> formats; `halfbyte.formats.config` -> *.config; `halfbyte.recipe` -> recipe."""
    steps = module.split(".")[1:]
    if len(steps) == 2 and steps[1] == "config":
        return "*.config"
    return steps[0] if steps else "halfbyte"


def module_of(file: Path) -> str:
    steps = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(steps[:-1] if steps[-1] == "__init__" else steps)


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import of our own."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "halfbyte")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            if node.module and node.module.split(".")[0] == "halfbyte":
                for alias in node.names:
                    deeper = PACKAGE.parent.joinpath(*node.module.split("."), alias.name)
                    is_module = deeper.with_suffix(".py").exists() or (deeper / "__init__.py").exists()
                    yield node.lineno, f"{node.module}.{alias.name}" if is_module else node.module


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def test_imports_point_one_way() -> None:
    wrong = []
    for file in FILES:
        mine = part_of(module_of(file))
        for line, module in imports(file) if mine != "halfbyte" else ():
            other = part_of(module)
            allowed = other == mine or other in MAY_IMPORT[mine] or module == "halfbyte"
            if other in ("config", "recipe") and mine not in MAY_SEE_RECIPE:
                allowed = False
            if not allowed:
                wrong.append(f"{name_of(file)}:{line}: {mine} may not import {module}")
    assert not wrong, "\n".join(wrong)


def test_every_folder_is_in_the_table() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders <= set(MAY_IMPORT), f"add to ORDER: {folders - set(MAY_IMPORT)}"
    assert "utils" not in folders


def test_packages_import_nothing() -> None:
    packages = [f for f in FILES if f.name == "__init__.py" and f.parent != PACKAGE and f.parent.parent.name != "kernels"]
    wrong = [name_of(f) for f in packages if not all(isinstance(n, ast.Expr) for n in tree_of(f).body)]
    assert packages and not wrong, f"these hold more than their docstring: {wrong}"


def test_sizes() -> None:
    wrong = []
    for file in FILES:
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if lines > (limit := LIMITS.get(name_of(file), 400)):
            wrong.append(f"{name_of(file)} has {lines} lines, more than {limit}")
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                size = node.end_lineno - node.lineno + 1
                kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
                if size > (120 if kernel else 60):
                    wrong.append(f"{name_of(file)}:{node.lineno}: {node.name} has {size} lines")
    assert not wrong, "\n".join(wrong)


def test_every_file_opens_with_what_it_is() -> None:
    wrong = [name_of(file) for file in FILES if not ast.get_docstring(tree_of(file))]
    assert not wrong, f"no docstring: {wrong}"


def test_no_broad_except() -> None:
    wrong = []
    for file in FILES:
        for node in ast.walk(tree_of(file)) if name_of(file) not in BROAD else ():
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                if caught in ("", "Exception", "BaseException"):
                    wrong.append(f"{name_of(file)}:{node.lineno}: catches everything")
    assert not wrong, "\n".join(wrong)


def test_nothing_is_patched() -> None:
    """No assignment into an imported module (`torch.x = ...`, `transformers.y.z = ...`)."""
    wrong = [line for file in FILES for line in patches(file)]
    assert not wrong, "\n".join(wrong)


def patches(file: Path) -> Iterator[str]:
    """Assignments of a file into imported modules."""
    modules = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            modules |= {(a.asname or a.name).split(".")[0] for a in node.names}
    for node in ast.walk(tree_of(file)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
        for target in targets:
            root = target
            while isinstance(root, ast.Attribute):
                root = root.value
            patched = isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and root.id in modules
            # These hold switches that torch documents as settings, not code.
            if patched and not ast.unparse(target).startswith(("torch.backends", "torch.utils.deterministic")):
                yield f"{name_of(file)}:{node.lineno}: {ast.unparse(node)}"


def test_triton_is_imported_by_fused_only() -> None:
    for file in FILES:
        for node in ast.walk(tree_of(file)):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            if any(n.split(".")[0] == "triton" for n in names):
                assert "kernels" in file.parts, f"{name_of(file)} imports triton"


def test_private_paths_stay_out() -> None:
    """No path of a developer's machine in anything that is published."""
    suffixes = {".py", ".md", ".yaml", ".toml", ".txt", ""}
    skipped = {".git", ".venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "runs"}
    for file in ROOT.rglob("*"):
        parts = set(file.relative_to(ROOT).parts)
        if file.is_file() and file.suffix in suffixes and not parts & skipped and file != Path(__file__) and ".ci" not in parts:
            text = file.read_text(encoding="utf-8", errors="ignore")
            assert "../shared" not in text and "/work/" not in text, f"{file.relative_to(ROOT)} names a private path"
