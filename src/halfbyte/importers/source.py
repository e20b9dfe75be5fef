"""What an import is given: a YAML or JSON file, a shell script, or a command line; and which tool it belongs to.

Values are plain data with the line of each key. A command line is taken apart as a shell would, without running anything: what
starts the processes (`accelerate launch`, `torchrun`) gives their number, a YAML named in it is read first, options come on top.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from halfbyte.errors import RecipeError
from halfbyte.importers.draft import is_secret
from halfbyte.recipe import parse

TOOLS = ("axolotl", "llamafactory", "trl", "unsloth")
MAX_BYTES = 1_000_000
_HINT = "name the tool with --from axolotl, llamafactory, trl or unsloth"
_PROCESSES = re.compile(r"--(?:num_processes|nproc_per_node|nproc-per-node)[= ](\d+)")
_QUOTED = r"""\\.|'[^']*'|"(?:\\.|[^"\\])*\""""
_FILE = rf"""[<>]\([^)]*\)|(?:{_QUOTED}|[^\s|&;<>()'"\\])+"""
_SHELL = re.compile(
    rf"(?P<word>{_QUOTED}|\$\([^)]*\)?)|(?P<comment>(?<!\S)\#.*)"
    rf"|(?P<redirection>(?:(?<!\S)\d+)?(?:&>>?|>&|<&|>>|<<<?|>\||<>|[<>])\s*(?:{_FILE}))"
    r"|(?P<end>[|&;()]+)|(?P<open>[<>'\"])|(?P<other>.)",
    re.DOTALL,
)
"""What a line of shell is made of, as far as it matters where a command ends."""
_STAGES = ("dpo", "kto", "grpo", "rloo", "reward", "distillation")


@dataclass(frozen=True)
class Source:
    """What was given. tool: found, or "". reason: by what it was found. data: keys and values. lines: of top-level keys."""

    where: str
    tool: str
    reason: str
    data: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)
    folder: str = "."
    processes: int | None = None


def read(given: list[str], tool: str = "") -> Source:
    """The source that the arguments name: one file, or the words of a command line. Raises RecipeError (`import.*`)."""
    # os.path, since Path.is_file raises for a name that no file can have, such as a long command line.
    if len(given) == 1 and os.path.isfile(given[0]):
        source = _file(Path(given[0]))
    elif len(given) == 1 and not any(c.isspace() for c in given[0]):
        raise RecipeError(f"there is no file {given[0]}", hint="give a file, or a command line in quotes", code="import.missing")
    else:
        source = _command(shlex.join(given) if len(given) > 1 else given[0], "the command line", Path("."))
    if tool:
        source = replace(source, tool=tool, reason="--from")
    if not source.tool:
        keys = ", ".join(f"`{key}`" for key in list(source.data)[:6])
        raise RecipeError(f"{source.where}: which tool wrote this? it has {keys or 'no keys'}", hint=_HINT, code="import.tool")
    return source


def _file(path: Path) -> Source:
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{path} is larger than {MAX_BYTES:,} bytes", hint="is this a configuration?", code="import.source")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text", hint="is this a configuration?", code="import.source") from error
    if path.suffix == ".json":
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{path} is not JSON: {error}", code="import.source") from error
        if not isinstance(data, dict):
            raise RecipeError(f"{path} is not a JSON object", hint="expected the arguments of a trainer", code="import.source")
        lines: dict[str, int] = {}
    elif path.suffix in (".yaml", ".yml"):
        data, lines = _yaml(text, str(path))
    else:
        return _command(text, str(path), path.parent)
    found, reason = detect(data)
    return Source(str(path), found, reason, data, lines, str(path.parent))


def _yaml(text: str, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    document = parse(text, where)
    if document.mistakes:
        message = "; ".join(f"{where}:{document.lines.get(m.path, 1)}: {m.message}" for m in document.mistakes)
        raise RecipeError(message, hint="keep one of them", code="import.source")
    return document.data, {".".join(map(str, path)): line for path, line in document.lines.items()}


def detect(data: dict[str, Any]) -> tuple[str, str]:
    """(tool, the keys that told), or ("", "") when nothing does."""
    if "base_model" in data:
        return "axolotl", "`base_model`"
    factory = ["finetuning_type", "stage", "template", "cutoff_len"]
    if "model_name_or_path" in data and (told := [k for k in factory if k in data]):
        return "llamafactory", f"`model_name_or_path` and `{told[0]}`"
    if isinstance(data.get("lora"), dict) and isinstance(data.get("training"), dict):
        return "unsloth", "sections `lora` and `training`"
    trl = (
        "dataset_name",
        "use_peft",
        "assistant_only_loss",
        "completion_only_loss",
        "peft_config",
        "max_length",
        "dataset_text_field",
    )
    if told := [k for k in trl if k in data or k in (data.get("args") or {})]:
        return "trl", f"`{told[0]}`"
    if "max_seq_length" in data and "model_name" in data:
        return "unsloth", "`model_name` and `max_seq_length`"
    return "", ""


def _command(text: str, where: str, folder: Path) -> Source:
    """The last command of a script that starts one of the tools, or the options alone."""
    joined = text.replace("\\\n", " ")
    for line in reversed(joined.splitlines()):
        for command in reversed(_commands(line, where)):
            found = _of_tool(shlex.split(command), command, where, folder)
            if found is not None:
                return found
    raise RecipeError(
        f"{where}: no command of axolotl, llamafactory-cli, trl or unsloth-cli.py is in it",
        hint="a configuration ends in .yaml or .json; options alone need --from",
        code="import.tool",
    )


def _commands(line: str, where: str) -> list[str]:
    """The commands of a line of shell, without comments and redirections: `cd x && trl sft ... 2>&1 | tee log` has three."""
    commands = [""]
    for piece in _SHELL.finditer(line):
        if piece.lastgroup == "open":
            raise RecipeError(
                f"{where}: not a command line: nothing belongs to the {piece.group()} in `{line[piece.start() :][:60]}`",
                hint="are the quotes closed, and values such as '<|im_end|>' in quotes?",
                code="import.source",
            )
        if piece.lastgroup == "end":
            commands.append("")
        elif piece.lastgroup in ("word", "other"):
            commands[-1] += piece.group()
    return [command for command in commands if command.strip()]


def _of_tool(words: list[str], line: str, where: str, folder: Path) -> Source | None:
    for i, word in enumerate(words):
        name = Path(word).name
        following = words[i + 1] if i + 1 < len(words) else ""
        if (name == "trl" and following in _STAGES) or (name.endswith(".py") and name.removesuffix(".py") in _STAGES):
            message = f"{where}: `{word} {following}`: only supervised fine-tuning (`trl sft`) is built"
            raise RecipeError(message, code="import.refused")
        if name == "trl" and following == "sft":
            tool, rest = "trl", words[i + 2 :]
        elif name == "sft.py":
            tool, rest = "trl", words[i + 1 :]
        elif name == "unsloth-cli.py":
            tool, rest = "unsloth", words[i + 1 :]
        elif name in ("axolotl", "llamafactory-cli", "lmf", "unsloth") and following == "train":
            tool, rest = {"llamafactory-cli": "llamafactory", "lmf": "llamafactory"}.get(name, name), words[i + 2 :]
        else:
            continue
        data, lines = _options(rest, where, folder)
        processes = next((int(n) for n in _PROCESSES.findall(line)), None)
        return Source(where, tool, f"`{name}`", data, lines, str(folder), processes)
    if words and words[0].startswith("--"):
        data, lines = _options(words, where, folder)
        found, reason = detect(data)
        return Source(where, found, reason, data, lines, str(folder))
    return None


def _options(words: list[str], where: str, folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """`--key value`, `--key=value`, `--flag`, `--list a b`, `key=value`, and a configuration file, which they override."""
    data: dict[str, Any] = {}
    files: list[str] = []
    key = ""
    for word in words:
        if word == "--":
            continue
        if re.match(r"--?[A-Za-z]", word):
            name, sign, value = word.lstrip("-").partition("=")
            key = name.replace("-", "_")
            data[key] = _scalar(value, key, where) if sign else True
            key = "" if sign else key
        elif key:
            value = _scalar(word, key, where)
            before = data[key]
            data[key] = value if before is True else [*before, value] if isinstance(before, list) else [before, value]
        elif "=" in word:
            name, _, value = word.partition("=")
            data[name] = _scalar(value, name, where)
        else:
            files.append(word)
    if isinstance(data.get("config"), str):
        files.append(data.pop("config"))
    if not files:
        return data, {}
    path = folder / files[0]
    if not os.path.isfile(path):
        raise RecipeError(
            f"{where}: there is no file {path}, which it names", hint="run it where that file lies", code="import.missing"
        )
    inner = _file(path)
    return inner.data | data, inner.lines


def _scalar(text: str, key: str, where: str) -> Any:
    """The value of an option, as a shell and an argument parser would read it."""
    if "$" in text and not is_secret(key):
        message = f"{where}: `{key}`: `{text}` holds a shell variable, and nothing is run here"
        raise RecipeError(message, hint="write its value", code="import.source")
    if text[:1] in ("{", "["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    plain = len(text) < 100 and re.fullmatch(r"[-+]?[0-9][0-9_]*|true|false|True|False|None|null", text)
    value = yaml.safe_load(text) if plain else text
    if text == "None":
        return None
    return value if not re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?", text) or isinstance(value, int) else float(text)
