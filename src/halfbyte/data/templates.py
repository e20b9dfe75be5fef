"""Chat templates: the tokenizer's own, a few named ones, or a Jinja file; resolved once, and saved with the adapter.

Why the text travels: a model that learned under one template answers nonsense under another, with a normal loss curve. So a
`Template` is its text, wherever it came from, and training, chat, evaluation and export all render that text. Rendering is
transformers' sandboxed Jinja. Cost: about 50 microseconds a render.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import DataError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALPACA = (
    "{{ first }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n### Response:\n' }}"
    "{% else %}{{ message['content'] + eos_token }}{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endif %}{% endfor %}"
)
PLAIN = (
    "{{ first }}{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% if message['role'] != 'assistant' or not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
)
NAMED = {"chatml": CHATML, "alpaca": ALPACA, "plain": PLAIN}
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Template:
    """A chat template: where it came from, its Jinja text, and why it was chosen."""

    name: str
    text: str
    reason: str = ""


def resolve(name: str, tokenizer: Any) -> Template:
    """The template that `data.template` means for this tokenizer.

    `auto` is the tokenizer's own; where there is none, chatml if its tokens exist, otherwise alpaca. Raises `DataError`
    (`data.template`, or `data.new-special-tokens` when a named template needs tokens that the tokenizer lacks).
    """
    if name == "auto":
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        if own:
            return Template("auto", own, "the tokenizer's own")
        chosen = "chatml" if _has(tokenizer, CHATML_TOKENS) else "alpaca"
        if chosen == "alpaca" and not tokenizer.eos_token:
            return Template(
                "none", "", "auto: the tokenizer has neither a template nor an eos token, so only plain text can be learned"
            )
        return Template(chosen, _named(chosen, tokenizer), f"auto: the tokenizer has no template of its own, so {chosen}")
    if name in NAMED:
        return Template(name, _named(name, tokenizer), "named in the recipe")
    path = Path(name).expanduser()
    if not path.is_file():
        message = f"`data.template: {name}` is neither a known template nor a file"
        raise DataError(message, hint=f"known: auto, {', '.join(NAMED)}, or the path of a Jinja file", code="data.template")
    return Template(str(path), path.read_text(encoding="utf-8"), "a file")


def _has(tokenizer: Any, tokens: Sequence[str]) -> bool:
    vocabulary = tokenizer.get_vocab()
    return all(token in vocabulary for token in tokens)


def _named(name: str, tokenizer: Any) -> str:
    if name == "chatml" and not _has(tokenizer, CHATML_TOKENS):
        message = f"the template `chatml` needs the tokens {' and '.join(CHATML_TOKENS)}, which this tokenizer lacks"
        hint = "new tokens would get embedding rows that nothing trains; use `template: alpaca` or `plain`, which need none"
        raise DataError(message, hint=hint, code="data.new-special-tokens")
    if name != "chatml" and not tokenizer.eos_token:
        message = f"the template `{name}` ends an answer with the tokenizer's eos token, and this tokenizer has none"
        raise DataError(message, hint="use a tokenizer with an eos token, or a Jinja file of your own", code="data.no-eot")
    # The text is saved for good, so what depends on the tokenizer is written into it.
    return NAMED[name].replace("{{ first }}", "{{ bos_token }}" if adds_bos(tokenizer) else "")


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins plain text with its bos token."""
    ids = tokenizer("a", add_special_tokens=True).input_ids
    return tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id
