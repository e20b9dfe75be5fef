"""Imports whole: what comes out of settings as people write them, and that no key goes without a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.errors import RecipeError
from halfbyte.importers import axolotl, llamafactory, trainer_args, trl, unsloth
from halfbyte.importers.convert import Imported, convert, from_source
from halfbyte.importers.draft import SILENT, Line
from halfbyte.importers.source import Source
from halfbyte.recipe import load_recipe
from importers.examples import (
    AXOLOTL,
    AXOLOTL_QLORA_KEYS,
    DATASET_INFO,
    LLAMAFACTORY,
    LLAMAFACTORY_QLORA_KEYS,
    TRL,
    UNSLOTH,
)
from support import trl_wheel

DEPENDENT = {"lora_target_linear"}
"""Keys that mean nothing without another one."""
TABLES = {"axolotl": axolotl.TABLE, "llamafactory": llamafactory.TABLE, "trl": trl.TABLE, "unsloth": unsloth.TABLE}
LEAST: dict[str, dict[str, Any]] = {
    "axolotl": {"base_model": "m", "datasets": [{"path": "a.jsonl", "type": "chat_template"}], "learning_rate": 1e-4},
    "llamafactory": {"model_name_or_path": "m", "dataset": "mine"},
    "trl": {"model_name_or_path": "m", "dataset_name": "org/set"},
    "unsloth": {},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset_info.json").write_text(DATASET_INFO)
    return tmp_path


def imported(tool: str, **chosen: Any) -> Imported:
    return from_source(Source("settings", tool, "the test", LEAST[tool] | chosen))


def line_of(found: Imported, key: str) -> Line:
    (line,) = [line for line in found.lines if key in line.keys]
    return line


def test_axolotl(here: Path) -> None:
    (here / "qlora.yml").write_text(AXOLOTL)
    found = convert(["qlora.yml"])
    assert not found.of("refused") and not found.of("unknown")
    assert found.recipe == {
        "model": {"name": "NousResearch/Meta-Llama-3.1-8B", "revision": "abc123"},
        "format": {"kind": "nf4", "nested": True},
        "compute": "auto",
        "adapter": {"kind": "lora", "rank": 32, "alpha": 16, "dropout": 0.05, "targets": "all-linear"},
        "data": {
            "train": [{"path": "fozziethebeat/alpaca_messages_2k_test", "shape": "sharegpt", "split": "train[:20%]"}],
            "eval": 0.1,
            "template": "llama3",
            "tokens": 4096,
        },
        "train": {
            "batch": 8, "epochs": 4, "lr": 2e-4, "schedule": "cosine", "warmup": 0.1, "seed": 42, "eval_every": 0.0625,
            "save_every": 0.25, "log_every": 1, "keep": 4, "best": False,
        },
        "optim": {"kind": "paged_adamw_8bit", "weight_decay": 0.01},
        "memory": {"recompute": "auto"},
        "output": "./outputs/qlora-out",
    }  # fmt: skip
    batch = line_of(found, "micro_batch_size")
    assert (batch.kind, batch.to, batch.result, batch.why) == ("derived", "train.batch", 8, "2 x 4 x 1 process")
    assert batch.keys == ("micro_batch_size", "gradient_accumulation_steps") and batch.values == (2, 4) and batch.line == 25
    assert {line.to for line in found.of("default")} == {"train.seed", "train.keep", "train.best"}
    assert "lora_fan_in_fan_out" in next(line for line in found.report() if "empty in the source" in line)
    (here / "recipe.yaml").write_text(found.yaml())
    assert load_recipe(here / "recipe.yaml").optim.bits == 8


def test_llamafactory(here: Path) -> None:
    (here / "conf").mkdir()
    (here / "conf" / "sft.yaml").write_text(LLAMAFACTORY)
    (here / "dataset_info.json").rename(here / "conf" / "dataset_info.json")
    found = convert(["conf/sft.yaml"], processes=2)
    assert found.tool == "llamafactory" and not found.of("refused") and not found.of("unknown")
    assert found.recipe["data"] == {
        "train": [
            {"path": "conf/mine.json", "shape": "alpaca", "limit": 1000},
            {"path": "org/theirs", "shape": "messages", "split": "validation", "config": "en", "limit": 50},
        ],
        "eval": 0.1,
        "template": "auto",
        "tokens": 512,
        "too_long": "truncate_right",
    }
    assert found.recipe["format"] == {"kind": "nf4", "nested": False}
    assert found.recipe["adapter"] == {"kind": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}
    assert found.recipe["train"]["batch"] == 16 and found.recipe["train"]["lr"] == 1e-4
    assert next(line for line in found.lines if line.to == "adapter.alpha").why == "2 x 4, its rule"
    assert line_of(found, "trust_remote_code").why.startswith("never imported")
    assert any("divide `train.batch: 16` by the examples in a row" in line.why for line in found.of("differs"))
    kinds = {key: line_of(found, f"theirs.{key}").kind for key in ("subset", "split", "hf_hub_url")}
    assert kinds == {"subset": "mapped", "split": "mapped", "hf_hub_url": "derived"}, "dataset_info.json is part of the source"
    assert not any(key.startswith(("mine.", "theirs.")) for line in found.of("default") for key in line.keys)


def test_tags_and_columns_of_a_dataset_info(here: Path) -> None:
    entry = {
        "file_name": "d/chats.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "dialog", "system": "sys"},
        "tags": {
            "role_tag": "who",
            "content_tag": "said",
            "user_tag": "customer",
            "assistant_tag": "agent",
            "observation_tag": "api",
        },
    }
    (here / "info.json").write_text(
        json.dumps({"mine": entry, "plain": {"file_name": "p.json", "columns": {"prompt": "q", "response": "a"}}})
    )
    source = Source("settings", "llamafactory", "the test", LEAST["llamafactory"] | {"dataset": "mine,plain"})
    found = from_source(source, dataset_info="info.json")
    assert found.recipe["data"]["train"] == [
        {
            "path": "d/chats.jsonl", "shape": "messages", "columns": {"messages": "dialog", "system": "sys"},
            "keys": {"role": "who", "content": "said"}, "roles": {"customer": "user", "agent": "assistant", "api": "tool"},
        },
        {"path": "p.json", "shape": "alpaca", "columns": {"instruction": "q", "output": "a"}},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("pairs", "preferences"),
        ("pictures", "images"),
        ("script", "remote code"),
    ],
)
def test_datasets_that_cannot_be_learned_from_are_refused(name: str, told: str) -> None:
    refused = imported("llamafactory", dataset=name).of("refused")
    assert refused and told in refused[0].why


DATASETS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"path": "a", "type": "chat_template"}, {"path": "a", "shape": "messages"}),
    ({"path": "a", "type": "completion", "field": "chapter"}, {"path": "a", "shape": "text", "columns": {"text": "chapter"}}),
    ({"path": "json", "type": "alpaca", "data_files": "x.jsonl"}, {"path": "x.jsonl", "shape": "alpaca"}),
    (
        {"path": "a", "name": "en", "revision": "r1", "type": "sharegpt"},
        {"path": "a", "shape": "sharegpt", "config": "en", "revision": "r1"},
    ),
    (
        {"path": "a", "type": "alpaca_w_system.load_open_orca"},
        {"path": "a", "shape": "alpaca", "columns": {"instruction": "question", "output": "response", "system": "system_prompt"}},
    ),
    (
        {
            "path": "a",
            "type": "chat_template",
            "field_messages": "turns",
            "message_property_mappings": {"role": "who", "content": "said"},
            "roles": {"user": ["customer", "user"], "assistant": ["agent"]},
        },
        {
            "path": "a",
            "shape": "messages",
            "columns": {"messages": "turns"},
            "keys": {"role": "who", "content": "said"},
            "roles": {"customer": "user", "agent": "assistant"},
        },
    ),
]


@pytest.mark.parametrize(("theirs", "ours"), DATASETS, ids=lambda e: e.get("type") if "type" in e else "")
def test_datasets_of_axolotl(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    found = imported("axolotl", datasets=[theirs])
    assert not found.of("refused") and not found.of("unknown")
    assert found.recipe["data"]["train"] == [ours]
    told = {key.rpartition(".")[2] for line in found.lines for key in line.keys if key.startswith("datasets.0.")}
    assert told == set(theirs)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"val_set_size": 0.1}, {"eval": 0.1}),
        ({"val_set_size": 200}, {"eval": 200}),
        ({"test_datasets": [{"path": "t.jsonl", "type": "alpaca"}]}, {"eval": [{"path": "t.jsonl", "shape": "alpaca"}]}),
        ({"train_on_inputs": True}, {"loss_on": "all"}),
        (
            {"datasets": [{"path": "a", "type": "chat_template", "roles_to_train": ["assistant", "human"]}]},
            {"loss_on": ["assistant", "user"]},
        ),
        ({"chat_template": "tokenizer_default"}, {"template": "auto"}),
        ({"chat_template": "qwen3"}, {"template": "auto"}),
        ({"chat_template": "mistral_v7_tekken"}, {"template": "mistral-v7"}),
        ({"chat_template": "jinja", "chat_template_jinja": "mine.jinja"}, {"template": "mine.jinja"}),
        ({"datasets": [{"path": "a", "type": "alpaca"}]}, {"template": "alpaca"}),
        ({"excess_length_strategy": "truncate"}, {"too_long": "truncate_right"}),
        ({"excess_length_strategy": "raise"}, {"too_long": "error"}),
    ],
)
def test_what_is_learned_of_the_data(chosen: dict[str, Any], expected: dict[str, Any]) -> None:
    data = imported("axolotl", **chosen).recipe["data"]
    assert {key: data.get(key) for key in expected} == expected


def test_a_dataset_that_is_not_registered_is_an_error_with_the_nearest_name(here: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        imported("llamafactory", dataset="mien")
    assert caught.value.code == "import.dataset" and caught.value.hint == "did you mean `mine`?"
    (here / "dataset_info.json").unlink()
    with pytest.raises(RecipeError, match=r"there is no data/dataset_info\.json or dataset_info\.json"):
        imported("llamafactory", dataset="mine")


@pytest.mark.parametrize(
    "text", ["[" * 5000, '{"mine": 1}', '{"mine": {"file_name": 1}}', '{"mine": {"file_name": "a", "columns": 1}}']
)
def test_a_registry_that_is_none(here: Path, text: str) -> None:
    (here / "dataset_info.json").write_text(text)
    with pytest.raises(RecipeError) as caught:
        imported("llamafactory", dataset="mine")
    assert caught.value.code == "import.dataset" and "dataset_info.json" in caught.value.message


def test_trl_script(here: Path) -> None:
    (here / "run.sh").write_text(TRL)
    found = convert(["run.sh"])
    assert found.tool == "trl" and not found.of("refused") and not found.of("unknown")
    assert found.recipe["train"] == {
        "batch": 64, "epochs": 1, "lr": 1e-4, "schedule": "linear", "warmup": 0, "seed": 42, "eval_every": 50, "save_every": 500,
        "log_every": 10, "best": False,
    }  # fmt: skip
    assert found.recipe["data"] == {
        "train": [{"path": "trl-lib/Capybara", "config": "en"}],
        "eval": [{"path": "trl-lib/Capybara", "split": "test", "config": "en"}],
        "loss_on": "assistant",
        "tokens": 2048,
        "too_long": "truncate_right",
    }
    assert found.recipe["adapter"]["targets"] == ["q_proj", "k_proj", "v_proj"]
    assert found.recipe["format"] == {"kind": "nf4", "nested": True}
    assert line_of(found, "per_device_train_batch_size").why == "2 x 8 x 4 processes"


def test_trl_writes_out_what_it_hides() -> None:
    """A bare run of TRL: the whole conversation is learned, two projections are adapted, scales are not nested."""
    found = imported("trl", use_peft=True, load_in_4bit=True)
    defaults = {line.to: line.result for line in found.of("default")}
    assert defaults["data.loss_on"] == "all"
    assert defaults["adapter.targets"] == ["q_proj", "v_proj"]
    assert defaults["format.nested"] is False
    assert (defaults["data.tokens"], defaults["train.lr"], defaults["adapter.dropout"]) == (1024, 2e-5, 0.05)
    assert "batch" not in found.recipe["train"]  # 8 in both


@pytest.mark.parametrize(
    ("chosen", "policy"),
    [
        ({}, "truncate_right"),
        ({"truncation_mode": "keep_end"}, "truncate_left"),
        ({"packing": True, "packing_strategy": "wrapped"}, "split"),
        ({"packing_strategy": "wrapped"}, "truncate_right"),
    ],
)
def test_what_trl_does_with_long_examples(chosen: dict[str, Any], policy: str) -> None:
    assert imported("trl", **chosen).recipe["data"]["too_long"] == policy


def test_older_names_of_keys_are_the_same_settings(here: Path) -> None:
    (here / "c.yaml").write_text(
        "model_name_or_path: org/base\ndataset_name: org/set\nmax_seq_length: 4096\nevaluation_strategy: steps\neval_steps: 5\n"
    )
    found = convert(["c.yaml"])
    assert found.recipe["data"]["tokens"] == 4096 and found.recipe["train"]["eval_every"] == 5
    assert found.recipe["data"]["eval"] == [{"path": "org/set", "split": "test"}]
    length = line_of(found, "max_seq_length")
    assert (length.kind, length.to, length.values, length.line) == ("mapped", "data.tokens", (4096,), 3)
    assert {"data.eval.0.path", "train.eval_every"} < {line.to for line in found.lines if "evaluation_strategy" in line.keys}
    told = {key for line in found.lines for key in line.keys}
    assert not told & {"max_length", "eval_strategy"}, "the report has the names that the user wrote"
    with pytest.raises(RecipeError, match=r"c\.yaml:3: `max_seq_length` must be a whole number"):
        (here / "c.yaml").write_text((here / "c.yaml").read_text().replace("4096", "1.5"))
        convert(["c.yaml"])
    both = imported("trl", max_seq_length=4096, max_length=512)
    assert both.recipe["data"]["tokens"] == 512 and "`max_length`, which is given too" in line_of(both, "max_seq_length").why
    factory = imported("llamafactory", dataset="mine", val_size=0.1, evaluation_strategy="steps", eval_steps=7)
    assert factory.recipe["train"]["eval_every"] == 7


def test_trl_as_json_and_as_yaml(here: Path) -> None:
    trainer = {
        "model": "org/base",
        "train_dataset": "org/set",
        "args": {"learning_rate": 1e-3, "max_length": 512, "completion_only_loss": True, "warmup_steps": 7},
        "peft_config": {
            "r": 8,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "bias": "none",
            "rank_pattern": {"q_proj": 4},
            "init_lora_weights": True,
            "peft_type": "LORA",
        },
        "quantization_config": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    }
    (here / "trainer.json").write_text(json.dumps(trainer))
    found = convert(["trainer.json"])
    assert not found.of("refused") and not found.of("unknown")
    assert found.recipe["adapter"] == {
        "kind": "lora", "rank": 8, "alpha": 8, "targets": "all-linear", "bias": "none", "rank_pattern": {"q_proj": 4},
    }  # fmt: skip
    assert found.recipe["format"] == {"kind": "fp4", "nested": True}
    assert found.recipe["train"]["warmup"] == 7 and found.recipe["data"]["loss_on"] == "assistant"
    (here / "c.yaml").write_text("model_name_or_path: org/base\ndataset_name: org/set\nuse_peft: true\nlearning_rate: 2e-5\n")
    found = convert(["trl sft --config c.yaml --learning_rate 3e-5 --load_in_4bit=true"])
    assert found.recipe["train"]["lr"] == 3e-5 and found.recipe["format"]["kind"] == "nf4"


def test_objects_among_trl_s_arguments_bring_their_own_defaults(here: Path) -> None:
    trainer: dict[str, Any] = {"model": "org/base", "train_dataset": "org/set", "peft_config": {"target_modules": ["q_proj"]}}
    (here / "trainer.json").write_text(json.dumps(trainer | {"quantization_config": {"load_in_4bit": True}}))
    found = convert(["trainer.json"])
    assert found.recipe["adapter"] == {"kind": "lora", "rank": 8, "alpha": 8, "targets": ["q_proj"]}
    assert found.recipe["format"] == {"kind": "fp4", "nested": False}
    assert "BitsAndBytesConfig's default" in next(line.why for line in found.lines if line.to == "format.kind")
    said = trainer | {"peft_config": {"r": 4, "lora_alpha": 2, "lora_dropout": 0.2}}
    said["quantization_config"] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    (here / "trainer.json").write_text(json.dumps(said))
    found = convert(["trainer.json"])
    adapter = {"kind": "lora", "rank": 4, "alpha": 2, "dropout": 0.2, "targets": ["q_proj", "v_proj"]}
    assert found.recipe["adapter"] == adapter and found.recipe["format"] == {"kind": "nf4", "nested": True}


@pytest.mark.cpu
def test_their_defaults_are_those_of_peft_and_transformers() -> None:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    theirs = LoraConfig()
    ours = trl.PEFT_DEFAULTS | trl.BNB_DEFAULTS
    assert (theirs.r, theirs.lora_alpha, theirs.lora_dropout) == tuple(ours[f"lora_{key}"] for key in ("r", "alpha", "dropout"))
    assert BitsAndBytesConfig().bnb_4bit_quant_type == ours["bnb_4bit_quant_type"] and len(ours) == 4


def test_unsloth() -> None:
    found = convert([UNSLOTH])
    assert found.tool == "unsloth" and not found.of("refused") and not found.of("unknown")
    assert found.recipe["adapter"] == {
        "rank": 64, "alpha": 32, "dropout": 0.1, "rslora": True, "bias": "none",
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip
    assert found.recipe["data"] == {
        "train": [{"path": "yahma/alpaca-cleaned", "shape": "alpaca"}], "eval": 0, "template": "alpaca", "loss_on": "all",
        "tokens": 8192, "too_long": "truncate_right",
    }  # fmt: skip
    assert (found.recipe["train"]["max_steps"], found.recipe["train"]["epochs"]) == (400, 1000)
    assert "whatever the epochs" in next(line.why for line in found.lines if line.to == "train.epochs")
    studio = {"model": "org/m", "data": {"dataset": "org/s"}, "training": {"batch_size": 3, "num_epochs": 2}, "lora": {"lora_r": 8}}
    found = from_source(Source("studio", "unsloth", "the test", studio))
    assert found.recipe["model"] == "org/m" and "format" not in found.recipe  # nf4 with nested scales, as ours
    assert (found.recipe["train"]["batch"], found.recipe["train"]["epochs"], found.recipe["adapter"]["rank"]) == (12, 2, 8)
    assert "max_steps" not in found.recipe["train"]


@pytest.mark.parametrize(
    ("logging", "trackers"),
    [
        ({"enable_wandb": True, "enable_tensorboard": True}, ["wandb", "tensorboard"]),
        ({"enable_wandb": True, "enable_tensorboard": False}, ["wandb"]),
        ({"enable_wandb": False, "enable_tensorboard": True}, ["tensorboard"]),
        ({"report_to": "tensorboard", "enable_wandb": True, "enable_tensorboard": True}, ["tensorboard", "wandb"]),
        ({}, None),
    ],
)
def test_every_tracker_of_unsloth_is_kept(logging: dict[str, Any], trackers: list[str] | None) -> None:
    studio = {"model": "org/m", "data": {"dataset": "org/s"}, "training": {"num_epochs": 2}, "lora": {}, "logging": logging}
    found = from_source(Source("studio", "unsloth", "the test", studio))
    assert found.recipe.get("log", {}).get("to") == trackers
    assert not {line.keys for line in found.of("ignored")} & {(key,) for key, value in logging.items() if value}


@pytest.mark.parametrize("tool", TABLES)
def test_every_key_has_a_line(tool: str) -> None:
    """Whatever a table knows is told, switched on or off, and nothing is told of it as unknown."""
    silent: set[str] = set()
    structured = {"datasets", "test_datasets", "model_config", "overrides_of_model_config"}
    for key in TABLES[tool]:
        for value in (1, None):
            if key in LEAST[tool] or key in structured:
                continue
            try:
                found = imported(tool, **{key: value})
            except RecipeError as error:
                assert key in error.message or error.code in ("recipe.invalid", "import.dataset") or key.endswith("strategy"), key
                continue
            told = [line for line in found.lines if key in line.keys]
            assert told and all(line.kind != "unknown" for line in told), (key, value)
            silent |= {key} if value and told[0].why == SILENT else set()
    assert silent <= DEPENDENT, silent - DEPENDENT


@pytest.mark.parametrize(
    ("tool", "keys"), [("axolotl", AXOLOTL_QLORA_KEYS), ("llamafactory", LLAMAFACTORY_QLORA_KEYS)], ids=["axolotl", "llamafactory"]
)
def test_keys_of_the_tools_own_qlora_examples_are_known(tool: str, keys: str) -> None:
    assert set(keys.split()) <= set(TABLES[tool])


@pytest.mark.parametrize(
    ("tool", "key", "guess"),
    [
        ("axolotl", "context_parapllel_size", "context_parallel_size"),
        ("axolotl", "sequence_length", "sequence_len"),
        ("llamafactory", "lora_rnk", "lora_rank"),
        ("trl", "learning_rat", "learning_rate"),
        ("unsloth", "lora_alfa", "lora_alpha"),
    ],
)
def test_unknown_keys_get_the_nearest_known_one(tool: str, key: str, guess: str) -> None:
    (line,) = imported(tool, **{key: 2}).of("unknown")
    assert line.keys == (key,) and f"did you mean `{guess}`?" in line.why


@pytest.mark.parametrize(
    ("tool", "chosen", "told"),
    [
        ("axolotl", {"rl": "dpo"}, "preferences"),
        ("axolotl", {"peft_use_dora": True}, "variant of LoRA"),
        ("axolotl", {"adapter": "llama-adapter"}, "only lora and qlora"),
        ("axolotl", {"lr_scheduler": "rex"}, "cosine, linear and constant"),
        ("axolotl", {"optimizer": "lion_8bit"}, "only AdamW"),
        ("axolotl", {"plugins": ["axolotl.integrations.kd.KDPlugin"]}, "plugin"),
        ("axolotl", {"datasets": [{"path": "a", "type": "input_output"}]}, "prompt type"),
        (
            "axolotl",
            {"adapter": "qlora", "lora_target_linear": True, "lora_target_modules": ["embed_tokens"]},
            "lora_modules_to_save",
        ),
        ("llamafactory", {"stage": "dpo"}, "preferences"),
        ("llamafactory", {"finetuning_type": "oft"}, "only lora and full"),
        ("llamafactory", {"quantization_bit": 2}, "2 bits"),
        ("llamafactory", {"model_name_or_path": "org/Llama-3-8B-GPTQ"}, "unquantised"),
        ("trl", {"use_dora": True}, "variant of LoRA"),
        ("trl", {"loss_type": "dft"}, "cross-entropy"),
        ("unsloth", {"loftq_config": "{}"}, "variant of LoRA"),
    ],
)
def test_what_is_not_built_is_refused(tool: str, chosen: dict[str, Any], told: str) -> None:
    assert any(told in line.why for line in imported(tool, **chosen).of("refused"))


@pytest.mark.parametrize(
    ("tool", "key"),
    [("axolotl", "hf_use_auth_token"), ("axolotl", "comet_api_key"), ("llamafactory", "hf_hub_token"), ("trl", "hub_token"),
     ("trl", "env"), ("unsloth", "hub_token"), ("trl", "hbu_token")],
)  # fmt: skip
def test_secrets_are_neither_imported_nor_printed(tool: str, key: str) -> None:
    found = imported(tool, **{key: "hf_private"})
    assert key in str(list(found.report()))
    for said in (found.yaml(), "\n".join(found.report()), json.dumps(found.as_dict())):
        assert "hf_private" not in said


@pytest.mark.parametrize("tool", ["axolotl", "llamafactory", "trl"])
def test_remote_code_and_uploads_are_not_imported(tool: str) -> None:
    found = imported(tool, trust_remote_code=True, hub_model_id="me/x")
    assert all(line_of(found, key).kind == "ignored" for key in ("trust_remote_code", "hub_model_id") if key in TABLES[tool])
    assert "trust_remote_code" not in found.yaml() and "me/x" not in found.yaml()


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"max_steps": 50, "num_epochs": 3}, {"max_steps": 50, "epochs": 1000}),
        ({"lr_scheduler": "constant", "warmup_steps": 10}, {"schedule": "constant", "warmup": 0}),
        ({"lr_scheduler": "constant_with_warmup", "warmup_steps": 10}, {"schedule": "constant", "warmup": 10}),
        ({"warmup_steps": 10, "warmup_ratio": 0.1}, {"warmup": 10}),
        ({"batch_size": 24, "micro_batch_size": 2}, {"batch": 24}),
        ({"save_steps": 30}, {"save_every": 30}),
        ({"save_steps": 0.2}, {"save_every": 0.2}),
        ({"save_strategy": "no"}, {"save_every": 0}),
        ({"num_epochs": 2}, {"save_every": 0.5, "eval_every": 0}),
        ({"learning_rate": "5e-6"}, {"lr": 5e-6}),
        ({"save_total_limit": 1}, {"keep": 2}),
    ],
)
def test_arithmetic_of_a_run(chosen: dict[str, Any], expected: dict[str, Any]) -> None:
    train = imported("axolotl", **chosen).recipe["train"]
    assert {key: train.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"bf16": True}, "bf16"),
        ({"bf16": False, "fp16": True}, "fp16"),
        ({"bf16": False, "fp16": False}, "fp32"),
        ({"bf16": "auto"}, "auto"),
        ({"bfloat16": True}, "bf16"),
        ({"fp8": True, "adapter": "qlora", "lora_target_linear": True}, "fp8"),
    ],
)
def test_number_types(chosen: dict[str, Any], expected: str) -> None:
    assert imported("axolotl", **chosen).recipe.get("compute", "auto") == expected


@pytest.mark.parametrize(
    ("data", "tool"),
    [
        ("base_model: m\ndatasets: []\n", "axolotl"),
        ("model_name_or_path: m\nstage: sft\n", "llamafactory"),
        ("model_name_or_path: m\ndataset_name: d\n", "trl"),
        ("model: m\nlora: {}\ntraining: {}\n", "unsloth"),
        ("model: m\ndata: {train: a}\n", ""),
    ],
)
def test_the_tool_is_found_from_its_keys(here: Path, data: str, tool: str) -> None:
    from halfbyte.importers.source import read

    (here / "x.yaml").write_text(data)
    if tool:
        assert read(["x.yaml"]).tool == tool
    else:
        with pytest.raises(RecipeError, match="which tool wrote this"):
            read(["x.yaml"])
    assert read(["x.yaml"], "trl").tool == "trl"


@pytest.mark.parametrize(
    "line",
    [
        "{} 2>&1 | tee log.txt",
        "{} > log.txt",
        "{} >log.txt 2> err.txt < /dev/null",
        "{} &> 'my log.txt' &",
        "{}& echo started",
        "{};echo done",
        "{} && echo --lora_r 99 done || exit 1",
        "cd there && {}",
        "(cd there; {})",
        "{} 2> >(tee err.txt)",
        "{} # --lora_r 99 | what we don't take",
    ],
)
def test_what_a_shell_makes_of_a_command_is_no_value_of_an_option(line: str) -> None:
    command = (
        "CUDA_VISIBLE_DEVICES=0 trl sft --model_name_or_path m --dataset_name 'a;b|c>d#e' --lora_r 8 --load_in_4bit --use_peft"
    )
    found = convert([line.format(command)])
    plain = convert([command])
    assert found.recipe == plain.recipe and found.lines == plain.lines
    assert plain.recipe["format"]["kind"] == "nf4" and plain.recipe["data"]["train"][0]["path"] == "a;b|c>d#e"
    assert convert(["trl", "sft", *command.split()[3:-1], "--use_peft", "--output_dir", "a&b"]).recipe["output"] == "a&b"


def test_options_after_a_redirection_and_numbers_before_one() -> None:
    found = convert(["trl sft --model_name_or_path m#1 --dataset_name d 2>&1 --use_peft --lora_r 4 > log --seed 2 >> log"])
    assert (found.recipe["model"], found.recipe["adapter"]["rank"], found.recipe["train"]["seed"]) == ("m#1", 4, 2)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("trl sft --eos_token <|im_end|> --lora_r 8", "nothing belongs to the <"),
        ("trl sft --eos_token 'x; trl sft --model_name_or_path m", "nothing belongs to the '"),
        ("trl sft --model_name_or_path $(echo m) --dataset_name d", "shell variable"),
        ("trl sft --model_name_or_path $MODEL", "shell variable"),
        ("trl dpo --model_name_or_path m", "only supervised fine-tuning"),
        ("trl sft --config nope.yaml", "there is no file nope.yaml"),
        ("nope.yaml", "there is no file nope.yaml"),
        ("python train.py --lr 1", "no command of"),
        ("trl sft --model 'x", "not a command line"),
        ("trl sft --dataset_name a " + "--learning_rate two " * 20, "must be a number, but is"),
        (f"trl sft --dataset_name a --learning_rate {'9' * 5000}", "must be"),
        (f"trl sft --config {'a' * 300}", "there is no file aaa"),
        (f"trl sft --dataset_name a --model_init_kwargs {'[' * 5000}", "`model` is missing"),
    ],
)
def test_sources_that_cannot_be_read(given: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told.replace(".", r"\.")):
        convert([given])


@pytest.mark.parametrize(
    "text",
    [
        "model_name: m\nmax_seq_length: 9\ntraining: 1\n",
        "model_name: m\nmax_seq_length: 9\nlora: r\n",
        "dataset_name: a\nargs: b\n",
    ],
)
def test_a_section_that_is_none(here: Path, text: str) -> None:
    (here / "a.yml").write_text(text)
    with pytest.raises(RecipeError, match="must be a section"):
        convert(["a.yml"])


def test_a_value_that_is_none_names_file_line_and_key(here: Path) -> None:
    (here / "a.yml").write_text("base_model: m\ndatasets: [{path: a.jsonl, type: alpaca}]\nmicro_batch_size: two\n")
    with pytest.raises(RecipeError) as caught:
        convert(["a.yml"])
    assert caught.value.message == "a.yml:3: `micro_batch_size` must be a number, but is `two`"
    (here / "a.yml").write_text("base_model: m\nbase_model: n\n")
    with pytest.raises(RecipeError, match=r"a\.yml:2: `base_model` is given twice"):
        convert(["a.yml"])


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "auto", "no", "2e-4", "a,b", "epoch"])
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["path", "type", "role"]), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_nothing_but_our_errors_come_out(data: st.DataObject) -> None:
    tool = data.draw(st.sampled_from(sorted(TABLES)))
    keys = data.draw(st.lists(st.sampled_from([*TABLES[tool], "strange"]), max_size=6, unique=True))
    chosen = {key: data.draw(ANYTHING, label=key) for key in keys}
    try:
        found = imported(tool, **chosen)
    except RecipeError:
        return
    assert {key.partition(".")[0] for key in chosen} <= {key.partition(".")[0] for line in found.lines for key in line.keys}
    assert load_text(found.yaml()) == found.recipe


def load_text(text: str) -> Any:
    """A written recipe as YAML 1.2 reads it."""
    from halfbyte.recipe import parse

    return parse(text, "written").data


TRL_FIELDS = """
import dataclasses, json, warnings
warnings.simplefilter("ignore")
from trl import ModelConfig, ScriptArguments, SFTConfig
fields = {f.name: f.default for kind in (SFTConfig, ModelConfig, ScriptArguments) for f in dataclasses.fields(kind)}
print(json.dumps(fields, default=lambda value: getattr(value, "value", repr(value))))
"""


@pytest.mark.slow
def test_trl_defaults_and_keys_are_those_of_trl(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Against TRL's wheel: every field of its arguments is known, and every default that we fill in is its own."""
    environment = os.environ | {"PYTHONPATH": str(trl_wheel(tmp_path_factory)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", TRL_FIELDS], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    fields = json.loads(done.stdout.splitlines()[-1])
    assert set(fields) <= set(trl.TABLE), sorted(set(fields) - set(trl.TABLE))
    ours = {key: value for key, value in trl.DEFAULTS.items() if key not in ("bf16", "output_dir")}  # set after construction
    assert len(ours) > 10 and {key: fields[key] for key in ours} == ours


@pytest.mark.cpu
def test_trainer_arguments_are_those_of_transformers() -> None:
    import dataclasses

    from transformers import Seq2SeqTrainingArguments

    fields = {f.name: f.default for f in dataclasses.fields(Seq2SeqTrainingArguments)}
    assert set(fields) <= set(llamafactory.TABLE), sorted(set(fields) - set(llamafactory.TABLE))
    ours = trainer_args.DEFAULTS
    assert {key: str(getattr(fields[key], "value", fields[key])) for key in ours} == {
        key: str(value) for key, value in ours.items()
    }
