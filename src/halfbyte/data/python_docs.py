"""`python-docs`: a real dataset that needs no network: what the running interpreter's standard library says of itself.

Every public module, function, class and method with a docstring becomes one question and one answer: its name, its signature,
and the first sentence of its docstring. Why: facts that a small model does not know by heart yet, in every Python, under a
licence that lets anybody train on them. Source files are parsed and never run; only modules compiled into the interpreter are
imported, in a bare process of their own, so that nothing which this one has loaded or replaced can colour the answers. This
file therefore needs nothing but the standard library. Cost: two to four seconds, once a Python version.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REVISION = 2  # raise it when the wording changes: the cached file is named after it
SKIPPED = frozenset(
    {
        "antigravity", "this", "idlelib", "turtledemo", "lib2to3", "test", "ensurepip", "ntpath", "nturl2path", "pydoc_data",
        "tkinter", "turtle", "distutils", "msilib", "encodings", "__main__", "__hello__", "__phello__", "posixpath", "nt",
    }
)  # fmt: skip
RENAMED = {"posixpath": "os.path", "posix": "os"}  # the names that people use
CALL = re.compile(r"([\w.]+)\(.*\)\s*(?:[-=]+>.*|:?)")  # `D.get(k[,d]) -> v`: what C functions without a signature begin with
SAID = re.compile(r"([\w.]+)\([^()]*\): ")  # or, on one line with the text, `clear(): release ...`


class Entry(NamedTuple):
    """One documented name: `json.dumps`, its signature without the name (empty for modules and data), its first sentence."""

    name: str
    kind: str
    signature: str
    sentence: str


def place(cache_dir: Path) -> Path:
    """Where the file of this interpreter is, or will be."""
    version = f"{platform.python_implementation().lower()}-{platform.python_version()}"
    return cache_dir / "python-docs" / f"{version}-r{REVISION}.jsonl"


def build(cache_dir: Path) -> Path:
    """Writes (once) the JSONL file of this interpreter and returns its path; safe when several runs start at once."""
    path = place(cache_dir)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        # -I -S: no site-packages, no environment variables, no user code.
        subprocess.run([sys.executable, "-I", "-S", __file__, str(partial)], check=True)
        partial.replace(path)
    return path


def write(path: Path) -> None:
    """Writes the examples of this process's interpreter as JSONL."""
    path.write_text("".join(json.dumps(chat(e), ensure_ascii=False) + "\n" for e in entries()), encoding="utf-8")


def chat(entry: Entry) -> dict[str, list[dict[str, str]]]:
    """The question and the answer. The kind picks the verb, so that a question reads like one that somebody would ask."""
    ask = {"module": "What is the Python module `{}` for?", "class": "What is `{}` in Python?"}.get(
        entry.kind, "What does `{}` do?"
    )
    answer = f"`{entry.name}{entry.signature}`: {entry.sentence}"
    return {"messages": [{"role": "user", "content": ask.format(entry.name)}, {"role": "assistant", "content": answer}]}


def entries() -> list[Entry]:
    """Every documented public name, each once, in an order that mixes modules but never changes."""
    found: dict[str, Entry] = {}
    with warnings.catch_warnings():
        # Old escapes in sources and deprecated compiled modules warn; neither is the user's concern.
        warnings.simplefilter("ignore")
        public = {name for name in sys.stdlib_module_names if not name.startswith("_")}
        for module in [*sorted(public - SKIPPED), "posixpath"]:
            for entry in _module(module):
                found.setdefault(entry.name, entry)
    return sorted(found.values(), key=lambda e: hashlib.sha256(e.name.encode()).digest())


def _module(name: str) -> Iterator[Entry]:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return
    origin = spec.origin
    if spec.submodule_search_locations:
        for directory in spec.submodule_search_locations:
            yield from _package(name, Path(directory))
    elif origin.endswith(".py"):
        yield from _source(RENAMED.get(name, name), Path(origin))
    elif origin == "frozen":
        path = Path(os.__file__).parent / f"{name}.py"
        if path.exists():
            yield from _source(RENAMED.get(name, name), path)
    else:
        yield from _compiled(name)


def _package(name: str, directory: Path) -> Iterator[Entry]:
    for path in sorted(directory.rglob("*.py")):
        parts = path.relative_to(directory).with_suffix("").parts
        if any((part.startswith("_") and part != "__init__") or part in SKIPPED or part == "tests" for part in parts):
            continue
        yield from _source(".".join((name, *(p for p in parts if p != "__init__"))), path)


def _source(name: str, path: Path) -> Iterator[Entry]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # deliberately broken files ship with some distributions
        return
    yield from _entry(name, "module", "", ast.get_docstring(tree))
    yield from _definitions(name, tree.body)


def _definitions(prefix: str, body: list[ast.stmt], inside_class: bool = False) -> Iterator[Entry]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            name = f"{prefix}.{node.name}"
            yield from _entry(name, "class", "", ast.get_docstring(node))
            yield from _definitions(name, node.body, inside_class=True)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield from _entry(f"{prefix}.{node.name}", "function", _signature(node, inside_class), ast.get_docstring(node))


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> str:
    arguments = ast.unparse(node.args)
    if method:
        arguments = re.sub(r"^(self|cls)(, |$)", "", arguments)
    return f"({arguments})"


def _compiled(name: str) -> Iterator[Entry]:
    """Modules without Python source, such as `math` and `builtins`: there is nothing to run in them but their start."""
    try:
        module = importlib.import_module(name)
    except ImportError:  # an optional library behind it is missing
        return
    yield from _entry(name, "module", "", inspect.getdoc(module))
    shown = "" if name == "builtins" else f"{RENAMED.get(name, name)}."
    for attribute, value in sorted(vars(module).items()):
        if attribute.startswith("_") or inspect.ismodule(value):
            continue
        if inspect.isclass(value):
            yield from _entry(shown + attribute, "class", "", value.__doc__)
            for method, function in sorted(vars(value).items()):
                if not method.startswith("_") and callable(function):
                    yield from _entry(f"{shown}{attribute}.{method}", "function", _spoken(function), function.__doc__)
        elif callable(value):
            yield from _entry(shown + attribute, "function", _spoken(value), value.__doc__)


def _spoken(function: object) -> str:
    text = getattr(function, "__text_signature__", None) or ""  # CPython's own record; absent for some C functions
    return re.sub(r"\((\$?(self|module|type))(, /)?(, )?", "(", text, count=1) if text else ""


def _entry(name: str, kind: str, signature: str, doc: str | None) -> Iterator[Entry]:
    sentence = first_sentence(doc or "", name.rpartition(".")[2])
    if sentence:
        yield Entry(name, kind, " ".join(signature.split()), sentence)


def first_sentence(doc: str, name: str) -> str:
    """The first sentence of a docstring, on one line; empty when there is none of at least two words.

    A leading `name(...) -> type` line, as C functions without a signature carry, is passed over.
    """
    for block in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        lines = block.strip().split("\n")
        while lines and (call := CALL.fullmatch(lines[0])) and call.group(1).rpartition(".")[2] == name:
            lines.pop(0)
        text = " ".join(" ".join(lines).replace("``", "`").split())
        if (said := SAID.match(text)) and said.group(1).rpartition(".")[2] == name:
            text = text[said.end() :]
        if text and not text.startswith(">>>"):
            break
    else:
        return ""
    match = re.match(r"(.+?[.!?])(\s|$)(?![a-z])", text)
    sentence = match.group(1) if match else text
    return sentence if len(sentence.split()) > 1 and len(sentence) <= 400 else ""


if __name__ == "__main__":
    write(Path(sys.argv[1]))
