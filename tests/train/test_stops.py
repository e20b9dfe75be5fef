"""What stops an answer is what training used: in samples, chat, eval, the merged model's settings, and Ollama's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig
from typer.testing import CliRunner

from halfbyte.checkpoints import peft
from halfbyte.cli.arguments import load
from halfbyte.cli.main import app
from halfbyte.export.model import MODELFILE
from halfbyte.generate import chat
from halfbyte.generate.routes import Request
from halfbyte.recipe import recipe_from
from halfbyte.train.run import train
from support import chats, write_jsonl

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("cache")]

# A tool call ends with a token of its own, which neither the model nor the tokenizer declares, and which no plain answer shows.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{% for t in m.tool_calls %}"
    "{{ 'call ' + t.function.name + (t.function.arguments | tojson) }}{% endfor %}<|endoftext|>{% else %}{{ m.content }}<|im_end|>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL_ENDS, TURN_ENDS = 256, 258


@pytest.fixture
def recipe(files: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    asked = [{"role": "user", "content": "And 1?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    write_jsonl(tmp_path / "calls.jsonl", [*chats(40), {"messages": asked}])
    data = {"train": [str(tmp_path / "calls.jsonl")], "tokens": 96, "eval": 0.1, "template": str(tmp_path / "mine.jinja")}
    settings = {"batch": 2, "max_steps": 1, "prompts": ["hello"], "sample_tokens": 2}
    return {"model": str(files / "model"), "compute": "fp32", "data": data, "train": settings, "output": str(tmp_path / "run")}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """What stops each answer that is generated; the call's end is what the model says at once."""
    ends: list[set[int]] = []

    def tokens_of(model: Any, request: Request, streamer: Any, session: Any) -> list[int]:
        ends.append(set(request.ends))
        return [CALL_ENDS]

    monkeypatch.setattr(chat, "tokens_of", tokens_of)
    return ends


def test_an_adapter(recipe: dict[str, Any], tmp_path: Path, asked: list[set[int]]) -> None:
    result = train(recipe_from(recipe, []))
    assert asked and all(CALL_ENDS in ends for ends in asked), "samples while training"
    assert json.loads((result.adapter / peft.RECORD).read_text())["end_ids"] == [CALL_ENDS, TURN_ENDS]
    loaded = load(str(tmp_path / "run"), "nf4", None, "fp32")
    assert CALL_ENDS not in chat.end_tokens(loaded.base, loaded.template), "only training saw it"
    run, runner = str(tmp_path / "run"), CliRunner()
    for command in (["chat", run, "--prompt", "hello"], ["eval", run, "--prompt", "hello"]):
        asked.clear()
        assert runner.invoke(app, command).exit_code == 0
        assert asked and all(ends == {CALL_ENDS, TURN_ENDS} for ends in asked), command
    assert runner.invoke(app, ["merge", run, "--out", str(tmp_path / "merged")]).exit_code == 0
    stops_at(tmp_path / "merged")


def test_a_whole_model(recipe: dict[str, Any], tmp_path: Path, asked: list[set[int]]) -> None:
    result = train(recipe_from(recipe, ["format=none", "adapter.kind=none"]))
    stops_at(result.adapter)
    asked.clear()
    assert CliRunner().invoke(app, ["chat", str(tmp_path / "run"), "--format", "none", "--prompt", "hello"]).exit_code == 0
    assert asked == [{CALL_ENDS, TURN_ENDS}]


def stops_at(model: Path) -> None:
    assert GenerationConfig.from_pretrained(model).eos_token_id == [CALL_ENDS, TURN_ENDS]
    assert (model / MODELFILE).read_text().splitlines() == [
        "FROM .",
        'PARAMETER stop """<|endoftext|>"""',
        'PARAMETER stop """<|im_end|>"""',
    ]


def test_an_adapter_saved_before_there_were_ends_still_loads(recipe: dict[str, Any]) -> None:
    result = train(recipe_from(recipe, ["train.prompts=[]"]))
    record = json.loads((result.adapter / peft.RECORD).read_text())
    del record["end_ids"]
    (result.adapter / peft.RECORD).write_text(json.dumps(record))
    assert peft.read(result.adapter).end_ids == ()
