"""Puts the page together: markup, style, script and data in one file that asks for nothing.

Why so careful with the data: it is anybody's text. It stands in a JSON block in which `<`, `>` and `&` are written as escapes, so
that no `</script>` of it can end the block; the script shows it as text nodes only; the page's own policy forbids every request.
Cost: the size of the page, a megabyte or two.
"""

from __future__ import annotations

import html
import json
from importlib import resources
from pathlib import Path
from typing import Any

from halfbyte import __version__
from halfbyte.data.config import DataConfig

ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def page(config: DataConfig, tokenizer: Any, seed: int, out: Path, *, title: str, examples: int, cache: Path | None = None) -> str:
    """Writes the page of a recipe's data; returns what it holds, in words. Raises `DataError` as `prepare` does."""
    from halfbyte.checkpoints.cache import cache_root
    from halfbyte.data.page import collect

    data = collect.of(config, tokenizer, seed, cache or cache_root(), examples)
    text = render({"title": title, "version": __version__, **data})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return f"{len(data['examples']):,} of {data['examplesInAll']:,} examples, {len(text) / 2**20:.1f} MiB"


def render(data: dict[str, Any]) -> str:
    """The whole page."""
    folder = resources.files(__package__)
    parts = {name: folder.joinpath(f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    parts |= {"title": html.escape(str(data["title"])), "data": embedded(data)}
    text = parts.pop("html")
    # One pass, so that nothing in the data is taken for a placeholder.
    before, *rest = text.split("@@")
    return before + "".join(parts[part] if number % 2 == 0 else part for number, part in enumerate(rest))


def embedded(data: Any) -> str:
    """JSON that may stand in a script block: pure ASCII, and nothing in it can end the block or begin a comment."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return "".join(ESCAPES.get(c, c) for c in text) if any(c in text for c in ESCAPES) else text
