"""The main job on a tiny model, through the command line: train, chat, eval, merge, quantize, and again."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

import pytest

from cli.conftest import Cli
from support import save_tiny

pytestmark = pytest.mark.cpu


@pytest.fixture
def trained(cli: Cli, place: Path) -> Path:
    said = cli("train", "recipe.yaml")
    assert said.code == 0, said.err
    assert said.out == "", "words go to stderr"
    for word in ("yes, it fits", "held-out loss", "before:", "after:", "halfbyte chat run/adapter", "halfbyte merge run/adapter"):
        assert word in said.err
    return place


def test_train_leaves_an_adapter(trained: Path, cli: Cli) -> None:
    for name in (
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/recipe.yaml",
        "metrics.jsonl",
        "loss.png",
        "memory.png",
    ):
        assert (trained / "run" / name).is_file(), name
    again = cli("train", "recipe.yaml")
    assert again.code == 0 and "resuming at step 3 of 3" in again.err
    assert cli("train", "run/adapter/recipe.yaml", "--show").code == 0


def test_events_as_json(place: Path, cli: Cli) -> None:
    said = cli("train", "recipe.yaml", "--json")
    events = [json.loads(line) for line in said.out.splitlines()]
    assert {"train", "eval", "sample"} <= {e["kind"] for e in events}
    told = "\n".join(e["text"] for e in events if e["kind"] == "message")
    (planned,), (real,) = (re.findall(words, told) for words in (r" learn \((\S+)\)", r"trainable parameters \((\S+)\)"))
    assert planned == real and re.fullmatch(r"\d+\.\d\d%", real), "one share of the same parameters"
    assert events[-1]["kind"] == "done" and events[-1]["adapter"].endswith("run/adapter")


def test_chat(trained: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("chat", "run", "--max-tokens", "5")
    one = cli(*args, "--prompt", "What is 2 plus 2?")
    assert one.code == 0 and one.out
    base = cli(*args, "--prompt", "What is 2 plus 2?", "--base")
    lines = "What is 2 plus 2?\n/reset\n/base\nWhat is 2 plus 2?\n/nope\n/quit\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    both = cli(*args)
    assert both.out == one.out + base.out, "/base answers as --base does"
    for word in ("answers come from the base", "forgotten", "unknown command /nope"):
        assert word in both.err


def test_chat_with_a_base(place: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/adapter\n\n"))
    said = cli("chat", "model", "--max-tokens", "3")
    assert said.code == 0 and "there is no adapter here" in said.err


def test_chat_goes_on_after_a_conversation_that_the_template_refuses(
    place: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = place / "model" / "chat_template.jinja"
    refuses = "{% if messages | length > 1 %}{{ raise_exception('one message at a time') }}{% endif %}"
    template.write_text(refuses + "{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n/reset\nthree\n/quit\n"))
    said = cli("chat", "model", "--max-tokens", "3")
    assert said.code == 0 and said.err.count("refuses this conversation: one message at a time") == 1
    assert "/reset starts" in said.err and "defect" not in said.err and len(said.out.splitlines()) >= 2
    said = cli("chat", "model", "--system", "Be brief.", "--prompt", "one")
    assert said.code == 1 and "leave --system out" in said.err and "defect" not in said.err


def test_eval(trained: Path, cli: Cli) -> None:
    scores = json.loads(cli("eval", "run", "--json").out)
    summary = json.loads((trained / "run" / "summary.json").read_text())
    (held_out,) = scores["base"]
    assert scores["base"][held_out]["loss"] == pytest.approx(summary["eval_before"][held_out]["loss"], rel=1e-4)
    assert scores["adapter"][held_out]["loss"] == pytest.approx(summary["eval_after"][held_out]["loss"], rel=1e-4)
    other = cli("eval", "run", "--data", "chats.jsonl")
    assert other.code == 0 and "adapter" in other.out and "perplexity" in other.out
    assert "base     chats: loss" in other.out
    assert "on what?" in cli("eval", "model").err


def test_eval_of_a_run_that_held_nothing_out(trained: Path, cli: Cli) -> None:
    recipe = trained / "run" / "adapter" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("eval: 0.2", "eval: 0"))
    said = cli("eval", "run")
    assert said.code == 1 and "held nothing out" in said.err and "give --data FILE" in said.err and not said.out
    assert cli("eval", "run", "--prompt", "Hi", "--max-tokens", "2").out.startswith("\n> Hi")
    assert "perplexity" in cli("eval", "run", "--data", "chats.jsonl").out


def test_eval_answers_questions(trained: Path, cli: Cli) -> None:
    asked = ("--prompt", "What is 1 plus 1?", "--prompt", "And 2?", "--max-tokens", "4")
    answers = json.loads(cli("eval", "run", *asked, "--json").out)["answers"]
    assert [a["prompt"] for a in answers] == ["What is 1 plus 1?", "And 2?"]
    samples = json.loads((trained / "run" / "summary.json").read_text())["samples"]
    first, last = (next(s["answer"] for s in some if s["prompt"] == answers[0]["prompt"]) for some in (samples, samples[::-1]))
    assert (answers[0]["base"], answers[0]["adapter"]) == (first, last)
    assert "> And 2?" in cli("eval", "run", *asked).out


def test_merge(trained: Path, cli: Cli) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    said = cli("merge", "run", "--out", "merged", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["into"] == "dequantised"
    merged = AutoModelForCausalLM.from_pretrained(trained / "merged")
    assert torch.isfinite(merged(torch.arange(8)[None]).logits).all()
    assert "is not empty" in cli("merge", "run", "--out", "merged").err


def test_an_adapter_without_a_record(trained: Path, cli: Cli) -> None:
    """As PEFT writes it: nothing says on which base and format it was trained but the options."""
    record = trained / "run" / "adapter" / "halfbyte.json"
    text = record.read_text()
    record.unlink()
    said = cli("merge", "run", "--out", "merged", "--model", "model", "--format", "fp4")
    assert said.code == 0 and "merged 14 layers" in said.err, said.err
    assert cli("chat", "run", "--model", "model", "--prompt", "Hi", "--max-tokens", "2").code == 0
    record.write_text(text)


def test_another_base_is_refused_unless_allowed(trained: Path, cli: Cli) -> None:
    save_tiny(trained / "other", seed=1)
    for command in (("chat", "run", "--prompt", "Hi", "--max-tokens", "2"), ("merge", "run", "--out", "merged")):
        said = cli(*command, "--model", "other")
        assert said.code == 1 and "--other-base" in said.err
        assert cli(*command, "--model", "other", "--other-base").code == 0


def test_an_adapter_whose_base_lies_elsewhere(trained: Path, cli: Cli) -> None:
    (trained / "model").rename(trained / "moved")
    assert cli("chat", "run", "--prompt", "Hi").code == 1
    said = cli("chat", "run", "--prompt", "Hi", "--max-tokens", "2", "--model", "moved")
    assert said.code == 0, said.err


def test_a_fully_trained_model_and_what_the_summary_says_next(place: Path, cli: Cli) -> None:
    said = cli("train", "recipe.yaml", "format=none", "adapter.kind=none", "train.lr=1e-3", "output=the run's")
    assert said.code == 0, said.err
    commands = [shlex.split(line)[1:] for line in said.err.splitlines() if line.startswith("  halfbyte ")]
    assert [command[0] for command in commands] == ["chat", "eval", "quantize"]
    for command in commands:
        extra = ("--prompt", "Hi", "--max-tokens", "2") if command[0] == "chat" else ()
        done = cli(*command, *extra)
        assert done.code == 0, done.err
    assert cli("chat", "the run's", "--prompt", "Hi", "--max-tokens", "2").code == 0


def test_quantize(place: Path, cli: Cli) -> None:
    said = cli("quantize", "model", "--format", "fp4", "--out", "small")
    assert said.code == 0 and said.out == "small\n"
    config = json.loads((place / "small" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "fp4"
    assert cli("quantize", "model", "--format", "int4", "--out", "other").code == 1
