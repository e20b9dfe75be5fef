"""Tiny tokenizers, templates in the manner of the known model families, and the public demo sets."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAMPLE = [
    "user\nWhat is it?\n\nassistant\n\nIt is a cat.\n",
    "system\nYou are kind.\n\n",
    "One, two, three and four. Qwertz asks Uiop replies",
    "The quick brown fox jumps over the lazy dog. A journey of a thousand miles begins with a single step.",
]


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """Builds a byte-level BPE tokenizer with the chatml tokens, a bos and an eos; `template=None` leaves it without one."""

    def make(template: str | None = CHATML, specials: tuple[str, ...] = (), **options: Any) -> Any:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        tokens = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", *specials]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        core.train_from_iterator(
            SAMPLE * 3, trainers.BpeTrainer(vocab_size=480, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False)
        )
        options = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **options}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **options)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    """The usual one: chatml."""
    return make_tokenizer()


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes records as a JSONL file and returns its path."""

    def write(records: list[Any], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        return path

    return write


def chat(*turns: str, system: str | None = None) -> dict[str, Any]:
    """A record of shape `messages`, user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


@pytest.fixture(name="chat")
def _chat() -> Callable[..., dict[str, Any]]:
    return chat


@pytest.fixture(scope="session")
def demo() -> Callable[[str], str]:
    """The path of a public demo set; skips where the folder is not given."""
    folder = os.environ.get("HALFBYTE_TEST_DATA")
    if not folder:
        pytest.skip("HALFBYTE_TEST_DATA does not name a folder with the public demo sets (docs/guides/data.md tells which)")
    return lambda name: str(Path(folder) / name)


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The bundled model's own tokenizer."""
    from transformers import AutoTokenizer

    from halfbyte.checkpoints import bundled

    file = Path(bundled.fetch())
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


@pytest.fixture(scope="session")
def dialogues(demo: Callable[[str], str]) -> list[dict[str, Any]]:
    """Records of shape `messages` from a public set: distinct, of usual length."""
    records = json.loads(Path(demo("alpaca_en_demo.json")).read_text(encoding="utf-8"))
    chosen = [r for r in records if 60 < len(r["output"]) < 600 and not r["input"] and "@" not in r["output"]]
    return [
        {"messages": [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}]} for r in chosen
    ]
