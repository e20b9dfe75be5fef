"""Chat templates: the tokenizer's own, a named one, or a Jinja file; resolved once, and saved with the adapter.

Why the text travels: a model that learned under one template answers nonsense under another, with a normal loss curve. So a
`Template` is its text, wherever it came from, and training, chat, evaluation, merge and export all render that text. What the
recipe sets for the template (`template_kwargs`) is written into it for the same reason. Cost: nothing to speak of.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.data.named import CHATML, FIRST, NAMED
from halfbyte.errors import DataError

GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # a tag of transformers', which Jinja alone does not know
__all__ = ["CHATML", "NAMED", "Template", "adds_bos", "resolve"]


@dataclass(frozen=True)
class Template:
    """A chat template: where it came from, its Jinja text, and why it was chosen."""

    name: str
    text: str
    reason: str = ""


def resolve(name: str, tokenizer: Any, kwargs: Mapping[str, Any] | None = None) -> Template:
    """The template that `data.template` means for this tokenizer, with `data.template_kwargs` written into it.

    `auto` is the tokenizer's own; where there is none, chatml if its tokens exist, otherwise alpaca. Raises `DataError`
    (`data.template`, or `data.new-special-tokens` when a named template needs tokens that the tokenizer lacks).
    """
    template = _found(name, tokenizer)
    return _with(template, kwargs) if kwargs else template


def _found(name: str, tokenizer: Any) -> Template:
    own = tokenizer.chat_template
    several: dict[str, str] = own if isinstance(own, dict) else {"default": own} if own else {}
    if name == "auto":
        if "default" in several:
            return Template("auto", several["default"], "the tokenizer's own")
        chosen = "chatml" if _has(tokenizer, NAMED["chatml"].tokens) else "alpaca"
        if chosen == "alpaca" and not tokenizer.eos_token:
            return Template(
                "none", "", "auto: the tokenizer has neither a template nor an eos token, so only plain text can be learned"
            )
        return Template(chosen, _named(chosen, tokenizer), f"auto: the tokenizer has no template of its own, so {chosen}")
    if name in NAMED:
        return Template(name, _named(name, tokenizer), "named in the recipe")
    if name in several:
        return Template(name, several[name], f"the tokenizer's own, `{name}` of {len(several)}")
    path = Path(os.path.expanduser(name))
    if not os.path.isfile(path):  # False for a name that no file can have, where Path.is_file raises: a template's text
        message = f"`data.template: {name}` is neither a known template nor a file"
        near = difflib.get_close_matches(name, NAMED, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise DataError(message, hint=f"{hint}known: auto, {', '.join(NAMED)}, or the path of a Jinja file", code="data.template")
    try:
        return Template(str(path), path.read_bytes().decode("utf-8"), "a file")
    except UnicodeDecodeError as error:
        raise DataError(f"the chat template {path} is not UTF-8 text", hint="save it as UTF-8", code="data.template") from error


def _has(tokenizer: Any, tokens: Sequence[str]) -> bool:
    vocabulary = tokenizer.get_vocab()
    return all(token in vocabulary for token in tokens)


def _named(name: str, tokenizer: Any) -> str:
    text, tokens = NAMED[name]
    if not _has(tokenizer, tokens):
        message = f"the template `{name}` needs the tokens {' and '.join(tokens)}, which this tokenizer lacks"
        hint = "new tokens would get embedding rows that nothing trains; use `template: alpaca` or `plain`, which need none"
        raise DataError(message, hint=hint, code="data.new-special-tokens")
    if "eos_token" in text and not tokenizer.eos_token:
        message = f"the template `{name}` ends an answer with the tokenizer's eos token, and this tokenizer has none"
        raise DataError(message, hint="use a tokenizer with an eos token, or a Jinja file of your own", code="data.no-eot")
    return text.replace(FIRST, "{{ bos_token }}" if adds_bos(tokenizer) else "")


def _with(template: Template, kwargs: Mapping[str, Any]) -> Template:
    """The template with values for some of its variables, which a caller's own values still override."""
    from jinja2 import TemplateError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
        known = meta.find_undeclared_variables(environment.parse(GENERATION.sub("", template.text)))
    except (TemplateError, RecursionError) as error:
        message = f"the chat template `{template.name}` cannot be read: {error}"
        raise DataError(message, hint="mend the Jinja text", code="data.template") from error
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it reads: {', '.join(sorted(known))}"
            message = f"`data.template_kwargs.{name}` is nothing that the chat template `{template.name}` reads"
            raise DataError(message, hint=hint, code="data.template")
    sets = "".join(f"{{% if {n} is not defined %}}{{% set {n} = {_literal(v)} %}}{{% endif %}}" for n, v in kwargs.items())
    # A line break right after a block is swallowed, so one that the template begins with is written twice.
    text = sets + ("\n" if template.text.startswith("\n") else "") + template.text
    told = ", ".join(f"{name}: {json.dumps(value)}" for name, value in kwargs.items())
    return replace(template, text=text, reason=f"{template.reason}; {told}")


def _literal(value: Any) -> str:
    """A value as Jinja writes it; JSON's null is its none."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(k), ensure_ascii=False)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins plain text with its bos token."""
    ids = tokenizer("a", add_special_tokens=True).input_ids
    return tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id
