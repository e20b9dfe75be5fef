"""Errors as the user sees them, exit codes, and the commands that need no model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Cli
from halfbyte.errors import Interrupted
from halfbyte.recipe import load_recipe


def test_help_names_every_command(cli: Cli) -> None:
    said = cli("--help")
    assert said.code == 0
    for command in ("init", "import", "train", "plan", "inspect", "data", "chat", "eval", "quantize", "merge", "doctor", "schema"):
        assert f"  {command} " in said.out
    assert "..." not in (said.out + cli("data", "--help").out).split("Commands:", 1)[1].replace("[ARGS]...", "").replace(
        "runs/...", ""
    )
    assert cli().out == said.out


def test_version(cli: Cli) -> None:
    from halfbyte import __version__

    assert cli("--version").out == f"halfbyte {__version__}\n"


def test_user_errors_are_message_and_hint(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m\ndata: {train: a}\nadaptr: {rank: 3}\n")
    said = cli("train", "r.yaml")
    assert said == type(said)(1, "", "error [recipe.invalid]: r.yaml:3: unknown key `adaptr`\n  hint: did you mean `adapter`?\n")
    said = cli("train", "r.yaml", "--debug")
    assert said.code == 1 and "Traceback" in said.err


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--modle", "x"], "No such option: --modle"),
        (["merge", "x"], "Missing option '--out'"),
        (["train"], "which recipe?"),
        (["train", "train.lr=1"], "which recipe?"),
        (["train", "a/chats.jsonl.gz"], "--model M --data a/chats.jsonl.gz`"),
        (["train", "r.yaml", "--lr", "1e-4"], "settings of a recipe are written `train.lr=1e-4`"),
        (["plan", "r.yaml", "--adapter.rank=8"], "settings of a recipe are written `adapter.rank=8`"),
        (["train", "r.yaml", "--modle", "x"], "such as `train.lr=1e-4`; `halfbyte train --help` lists the options"),
        (["train", "--model", "x"], "`--data` is missing"),
        (["train", "--data", "x"], "`--model` is missing"),
        (["train", "--model", "m", "--data", "x", "output=taken/x"], "`output: taken/x` is no directory: taken is a file"),
        (["train", "nope.yaml"], "there is no recipe nope.yaml"),
        (["plan", "--model", "nope/", "--gpu", "rtx4090x"], "did you mean `rtx4090`?"),
        (["merge", "nope", "--out", "x"], "nope holds no adapter"),
        (["merge", "nope", "--out", "x", "--into", "y"], "must be dequantised or original"),
        (["inspect", "x", "--format", "nf5"], "`kind` must be one of nf4, fp4, int4, int8, none, but is `nf5`"),
    ],
)
def test_mistakes(cli: Cli, tmp_path: Path, args: list[str], told: str) -> None:
    (tmp_path / "taken").touch()
    said = cli(*args)
    assert (said.code, said.out) == (1, "")
    assert told in said.err and "Traceback" not in said.err


@pytest.mark.parametrize("command", [["chat"], ["eval"], ["inspect"], ["merge", "--out", "x"]])
def test_what_is_no_model_is_named(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    (tmp_path / "chats.jsonl").write_text("{}\n")
    (tmp_path / "runs" / "half" / "checkpoints").mkdir(parents=True)
    assert "chats.jsonl is a file, not a model, run or adapter" in cli(*command, "chats.jsonl").err
    said = cli(*command, "runs/half")
    assert "runs/half is a run that has not finished\n" in said.err and "run its `halfbyte train` command again" in said.err
    if command[0] != "merge":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "there is no such directory here" in cli(*command, "runs/hafl").err
        assert "no such directory" not in cli(*command, "owner/name").err


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (Interrupted("stopped at step 3", hint="run it again"), 75, "error: stopped at step 3\n  hint: run it again\n"),
        (RuntimeError("boom"), 1, "error: unexpected RuntimeError: boom\n  hint: this is a defect in halfbyte"),
        (KeyboardInterrupt(), 1, "error: stopped\n"),
        (OSError(28, "No space left on device", "/x"), 1, "error: No space left on device: /x"),
    ],
)
def test_exit_codes(cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, told: str) -> None:
    from halfbyte.config import Recipe

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Recipe, "model_json_schema", fail)
    said = cli("schema")
    assert said.code == code and told in said.err and "Traceback" not in said.err


def test_schema(cli: Cli) -> None:
    schema = json.loads(cli("schema").out)
    assert set(schema["required"]) == {"model", "data"}
    assert schema["properties"]["compute"]["description"].startswith("Number type of activations")
    assert schema["additionalProperties"] is False


def test_show_prints_the_resolved_recipe(cli: Cli, tmp_path: Path) -> None:
    said = cli("train", "--model", "org/My-Model", "--data", "chats.jsonl", "--show", "train.lr=2e-5")
    (tmp_path / "shown.yaml").write_text(said.out)
    recipe = load_recipe(tmp_path / "shown.yaml")
    assert (recipe.model.name, recipe.train.lr, recipe.output) == ("org/My-Model", 2e-5, "runs/my-model-chats")


def test_init_writes_a_recipe(cli: Cli, tmp_path: Path) -> None:
    said = cli("init", "my.yaml", "--yes", "--data", "a b.jsonl", "--format", "fp4")
    assert said.code == 0 and "halfbyte train my.yaml" in said.err
    recipe = load_recipe(tmp_path / "my.yaml")
    assert (recipe.model.name, recipe.data.train[0].path, recipe.format.kind) == ("smollm2-135m", "a b.jsonl", "fp4")
    assert "halfbyte train my.yaml\n" in said.err
    assert "halfbyte train 'my own.yaml'\n" in cli("init", "my own.yaml", "--yes").err
    assert "my.yaml exists" in cli("init", "my.yaml", "--yes").err
    assert cli("init", "my.yaml", "--yes", "--force").code == 0
    said = cli("init", "other.yaml", "--format", "nf5")
    assert said.code == 1 and "must be one of nf4" in said.err and not (tmp_path / "other.yaml").exists()


def test_init_tells_the_defaults_that_it_could_not_ask_for(cli: Cli) -> None:
    told = "defaults were taken: model smollm2-135m, format nf4\n"
    assert told in cli("init", "a.yaml", "--data", "a.jsonl").err
    assert "defaults" not in cli("init", "b.yaml", "--yes").err


def test_doctor(cli: Cli) -> None:
    said = cli("doctor", "--json")
    found = {f["name"]: f for f in json.loads(said.out)["findings"]}
    assert set(found) == {"platform", "versions", "gpu", "memory", "kernels", "disk"}
    assert found["kernels"]["state"] == "ok", found["kernels"]["text"]
    assert "torch" in found["versions"]["text"]


def test_doctor_survives_a_broken_check(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.cli import doctor

    def broken() -> tuple[str, str]:
        raise ImportError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(doctor, "CHECKS", {"gpu": broken})
    said = cli("doctor")
    assert said.code == 1 and "BAD  gpu: ImportError: libcuda.so.1" in said.out


@pytest.mark.cpu
def test_plan(cli: Cli, place: Path) -> None:
    said = cli("plan", "recipe.yaml", "--gpu", "24GiB")
    assert said.code == 0 and "yes, it fits" in said.out and said.err == ""
    assert json.loads(cli("plan", "recipe.yaml", "--gpu", "24GiB", "--json").out)["fits"] is True
    said = cli("plan", "--model", "model", "--gpu", "t4", "--json", "data.tokens=96", "optim=paged_adamw_8bit")
    changed = json.loads(said.out)
    assert (changed["model"], changed["tokens"], changed["compute"]) == ("model", 96, "fp16")
    assert any("8 bits" in part["note"] for part in changed["parts"] if part["name"] == "optimizer")
    assert cli("plan", "recipe.yaml", "--gpu", "24GiB", "--timeline", str(place / "plan.png")).code == 0
    assert (place / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "is no picture" in cli("plan", "recipe.yaml", "--gpu", "24GiB", "--timeline", "plan.txt").err
    said = cli("plan", "recipe.yaml", "--gpu", "1MiB")
    assert said.code == 1 and "no, it does not fit" in said.out
    assert json.loads(cli("plan", "--json-schema").out)["title"] == "Plan"


def test_inspect(cli: Cli, place: Path) -> None:
    said = cli("inspect", "model")
    assert said.code == 0 and "model.layers.*.self_attn.q_proj.weight" in said.out and "packed, " in said.out
    rows = json.loads(cli("inspect", "model", "--json", "--skip", "*.down_proj").out)["tensors"]
    reasons = {r["path"]: r["reason"] for r in rows}
    assert reasons["model.layers.0.mlp.down_proj.weight"] == "skip: *.down_proj"
    assert reasons["lm_head.weight"] == "output head"
    assert "2 x LlamaDecoderLayer: adopted if the probe agrees" in said.out


@pytest.mark.parametrize("width", [80, 30])
def test_inspect_cuts_nothing_on_a_narrow_terminal(cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    whole = cli("inspect", "model").out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    narrow = re.sub(r"\x1b\[[0-9;]*m", "", cli("inspect", "model").out)
    assert len(narrow.splitlines()[0]) <= 80 < len(whole.splitlines()[0])
    assert "…" not in narrow
    for word in [
        *re.findall(r" [\d.,x]+ (?:[KMG]iB)?", whole.split("parameters in")[0]),
        "stored",
        "packed",
        "is:",
        "output",
        "head",
    ]:
        assert word in narrow, word


def test_data_preview(cli: Cli, place: Path) -> None:
    said = cli("data", "preview", "recipe.yaml", "-n", "1")
    assert said.code == 0 and "plus" in said.out
    assert json.loads(cli("data", "preview", "--model", "model", "--data", "chats.jsonl", "--json").out)
    said = cli("data", "preview", "recipe.yaml", "--html", "page.html")
    assert said.code == 0 and said.err.startswith("page.html: 32 of 32 examples") and (place / "page.html").exists()


def test_data_check(cli: Cli, place: Path) -> None:
    said = cli("data", "check", "recipe.yaml")
    assert said.code == 0 and "checks passed" in said.out.splitlines()[-1]
    with (place / "chats.jsonl").open("a") as file:
        file.write("{'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]}\n{\n")
    said = cli("data", "check", "recipe.yaml", "--bad", "bad.jsonl", "--fix", "fixed.jsonl")
    assert (
        said.code == 1
        and "error [data.bad-file] chats: 2 of 42" in said.out
        and "chats.jsonl:41: expected a JSON object" in said.out
    )
    assert "bad.jsonl: 2 wrong lines written" in said.err and "1 x a Python dict written as JSON: chats.jsonl:41" in said.err
    found = json.loads(cli("data", "check", "recipe.yaml", "data.train=fixed.jsonl", "--json").out)
    assert not [f for f in found["findings"] if f["error"]] and len((place / "fixed.jsonl").read_text().splitlines()) == 41


def test_a_home_of_nobody_is_a_name_that_is_not_there(cli: Cli) -> None:
    for command in (("chat", "-p", "Hi"), ("eval",), ("merge", "--out", "merged"), ("inspect",)):
        said = cli(command[0], "~nosuchuser/x", *command[1:])
        assert said.code == 1 and "~nosuchuser/x" in said.err and "defect" not in said.err, command
