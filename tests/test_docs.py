"""The docs say what is: README's tree and commands, generated reference pages, links."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import support

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def commands_in(text: str) -> list[str]:
    """Lines of code blocks that call `halfbyte` or a script."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line.strip() for b in blocks for line in b.splitlines() if re.match(r"\s*(halfbyte [a-z]|scripts/)", line)]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_readme_tree_exists() -> None:
    tree = re.search(r"```\nsrc/halfbyte/\n(.*?)```", README, re.DOTALL)
    assert tree, "README has no file tree"
    named = []
    folder = ROOT / "src" / "halfbyte"
    for line in tree.group(1).splitlines():
        indented, names = re.match(r"(\s*)(\S+)", line).groups()  # type: ignore[union-attr]
        place = (folder if indented else ROOT) / names
        assert place.exists(), f"README names {names}, which does not exist"
        named.append(place.name)
    missing = {p.name for p in folder.iterdir() if p.is_dir() and p.name != "__pycache__"} - set(named)
    assert not missing, f"README's tree lacks {missing}"


def test_readme_commands_exist() -> None:
    commands = {" ".join(line.split()[: 2 if line.startswith("halfbyte") else 1]) for line in commands_in(README)}
    assert {"scripts/quickstart", "scripts/test"} <= commands
    from halfbyte.cli.main import app

    known = {c.name for c in app.registered_commands} | {g.name for g in app.registered_groups}
    for command in commands:
        if command.startswith("scripts/"):
            assert (ROOT / command).stat().st_mode & 0o111, f"{command} is not executable"
        else:
            assert command.split()[1] in known, command


def test_readme_python_runs_as_far_as_names_go() -> None:
    """Every `halfbyte.name` in README's Python is a public name; the slow tier runs the code itself."""
    import halfbyte

    used = set(re.findall(r"halfbyte\.(\w+)\(", README))
    assert used and used <= set(halfbyte.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md") if p.name not in ("index.md",)]
    missing = [str(p) for p in pages if str(p) not in index]
    assert not missing, f"docs/index.md lacks {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_docs_have_these_options(page: Path) -> None:
    """Options of `halfbyte ...` commands in the docs are in the reference of that command."""
    reference = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    sections = {s.split("\n")[0].strip(): s for s in reference.split("\n## ")[1:]}
    for line in commands_in(page.read_text(encoding="utf-8")):
        words = line.split("#")[0].split()
        if words[0] != "halfbyte":
            continue
        name = " ".join(words[:3]) if " ".join(words[:3]) in sections else " ".join(words[:2])
        assert name in sections or words[1].startswith("-"), f"{page.name}: {line}"
        for option in re.findall(r"(?<=\s)--[a-z][a-z-]*", line):
            assert option in sections[name], f"{page.name}: `{name}` has no {option}"


@pytest.mark.cpu
def test_reference_is_current() -> None:
    pinned = re.search(r"^typer==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    if metadata.version("typer") != pinned.group(1):
        pytest.skip("help texts are laid out by another version of typer")
    command = [sys.executable, str(ROOT / "scripts" / "reference"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=support.environment())
    assert done.returncode == 0, done.stderr
