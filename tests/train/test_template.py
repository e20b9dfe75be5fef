"""The chat template of a run, byte for byte: saved with the adapter, and what chat, eval, merge and export read and render."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from halfbyte.checkpoints import peft
from halfbyte.cli.arguments import load
from halfbyte.cli.evaluate import _data
from halfbyte.cli.main import app
from halfbyte.data.prepare import prepare
from halfbyte.export.merge import merge
from halfbyte.generate.chat import encode
from halfbyte.recipe import load_recipe, recipe_from
from halfbyte.train.run import train

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("cache")]

# Odd bytes on purpose: a carriage return, a trailing line break, letters beyond ASCII, a variable from the recipe.
TEMPLATE = (
    "{# é #}{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + mood + '\n' + m['content'] + '<|im_end|>' }}\r\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant ' + mood + '\n' }}{% endif %}\n"
)


def test_the_template_travels_byte_for_byte(files: Path, tmp_path: Path) -> None:
    written = tmp_path / "mine.jinja"
    written.write_bytes(TEMPLATE.encode())
    data = {
        "train": [str(files / "chats.jsonl")],
        "tokens": 96,
        "eval": 0.1,
        "template": str(written),
        "template_kwargs": {"mood": "ü"},
    }
    values = {"model": str(files / "model"), "compute": "fp32", "data": data, "train": {"batch": 4, "max_steps": 1}}
    recipe = recipe_from(values | {"output": str(tmp_path / "run")}, [])
    result = train(recipe)
    written.write_text("{{ 'another one' }}")  # what happens to the file later changes nothing

    saved = (result.adapter / peft.TEMPLATE).read_bytes()
    assert TEMPLATE.encode() in saved and b"mood = " in saved
    loaded = load(str(tmp_path / "run"), "nf4", None, "fp32")
    assert loaded.template is not None and loaded.template.encode() == saved

    config, seed = _data(loaded, [], None, None)
    prepared = prepare(config, loaded.base.tokenizer, seed, tmp_path / "cache")
    assert prepared.template.text.encode() == saved

    # What chat asks is what training saw before the answer, token by token.
    source = prepared.train.sources[0]
    ids, trained = source.ids[: source.offsets[1]], source.trained[: source.offsets[1]]
    question = load_question(files)
    assert encode(loaded.base, question, loaded.template) == ids[: int(np.argmax(trained))].tolist()

    merge(result.adapter, tmp_path / "merged", base=None, probe=None)
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == (
        loaded.base.tokenizer.apply_chat_template(
            question, chat_template=loaded.template, tokenize=False, add_generation_prompt=True
        )
    )
    assert (tmp_path / "merged" / peft.TEMPLATE).read_bytes() == saved
    assert load_recipe(result.adapter / peft.RECIPE).data.template_kwargs == {"mood": "ü"}
    assert CliRunner().invoke(app, ["eval", str(tmp_path / "run"), "--prompt", "hello", "--max-tokens", "2"]).exit_code == 0


def load_question(files: Path) -> list[dict[str, str]]:
    """The first conversation up to its first answer."""
    import json

    messages = json.loads((files / "chats.jsonl").read_text().splitlines()[0])["messages"]
    return messages[: next(i for i, m in enumerate(messages) if m["role"] == "assistant")]
