"""Unsloth: the options of `unsloth-cli.py`, and the sections of the YAML that `unsloth train` reads.

The script's prompt is fixed in its code: alpaca's headings, learned whole. What it cannot say is told as a difference.
"""

from __future__ import annotations

from typing import Any

from halfbyte.importers import common
from halfbyte.importers.data import FILES
from halfbyte.importers.draft import (
    Draft,
    Rule,
    Table,
    all_of,
    ignored,
    is_on,
    number,
    opened,
    read_with,
    refused,
    switch,
    text,
    to,
    whole,
    words,
)

DEFAULTS: dict[str, Any] = {
    "model_name": "unsloth/llama-3-8b",
    "load_in_4bit": False,
    "max_seq_length": 2048,
    "dataset": "yahma/alpaca-cleaned",
    "r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
    "num_epochs": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "warmup_steps": 5,
    "max_steps": 400,
    "learning_rate": 2e-4,
    "optim": "adamw_8bit",
    "weight_decay": 0.01,
    "lr_scheduler_type": "linear",
    "seed": 3407,
    "dtype": None,
    "report_to": "tensorboard",
    "logging_steps": 1,
    "output_dir": "outputs",
    "save_steps": 500,
    "train_on_completions": False,
    "load_best_model_at_end": False,
}
SECTIONS = ("data", "training", "lora", "logging")
STUDIO: dict[str, Any] = DEFAULTS | {
    "load_in_4bit": True,
    "r": 64,
    "max_steps": 0,
    "save_steps": 0,
    "report_to": "none",
    "output_dir": "./outputs",
}
"""Defaults of the YAML, where they are others."""
_NAMES = {"model": "model_name", "lora_r": "r", "batch_size": "per_device_train_batch_size", "random_seed": "seed",
          "gradient_checkpointing": "use_gradient_checkpointing", "use_loftq": "loftq_config"}  # fmt: skip


def flattened(source: dict[str, Any]) -> dict[str, Any]:
    """The YAML's sections opened into the script's names."""
    flat = {key: value for key, value in source.items() if key not in SECTIONS}
    for name in SECTIONS:
        flat |= opened(source, name)
    return {_NAMES.get(key, key): value for key, value in flat.items()}


def base(draft: Draft, key: str, value: Any) -> None:
    """4 bits with double quantisation, or 16."""
    draft.put("format.kind", "nf4" if is_on(value) else "none", key, why="" if is_on(value) else "a 16-bit base")
    if is_on(value):
        draft.put("format.nested", True, key, why="its 4-bit models have double quantisation")


def kind(draft: Draft, key: str, value: Any) -> None:
    """lora or full."""
    draft.put("adapter.kind", "none" if value == "full" else "lora", key)
    if value == "full":
        draft.put("format.kind", "none", key, why="full fine-tuning")


def dataset(draft: Draft, key: str, value: Any) -> None:
    """A Hub dataset in alpaca's columns, or a file of plain text."""
    studio = "local_dataset" in draft.given or "format_type" in draft.given
    files = words(draft.get("local_dataset")) or words(draft.get("raw_text_file"))
    used = "local_dataset" if draft.get("local_dataset") else "raw_text_file" if draft.get("raw_text_file") else key
    for i, path in enumerate(files or [str(value)]):
        draft.put(f"data.train.{i}.path", path, used)
        if used == "raw_text_file":
            draft.put(f"data.train.{i}.shape", "text", used)
        elif not studio and not path.endswith(FILES):
            draft.put(f"data.train.{i}.shape", "alpaca", used, why="the script reads instruction, input, output")
    if not studio and used == key and str(value).endswith(FILES):
        draft.note(
            "differs", "the script cuts a local file into pieces of raw text, whatever is in it; here its records are read", key
        )
    elif not studio and used == key:
        draft.put("data.template", "alpaca", why="the script's prompt, without the sentence before `### Instruction:`")
    if used != key and key in draft.given:
        draft.note("ignored", f"`{used}` wins over it", key)
    draft.put("data.eval", 0, why="nothing is held out")
    draft.put("train.eval_every", 0, why="nothing is held out")


def loss(draft: Draft, key: str, value: Any) -> None:
    """The prompt is learned as well, unless told otherwise."""
    draft.put(
        "data.loss_on", "assistant" if is_on(value) else "all", key, why="" if is_on(value) else "the prompt is learned as well"
    )


def length(draft: Draft, key: str, value: Any) -> None:
    """Longer examples are cut at their end."""
    draft.put("data.tokens", draft.whole(key), key)
    draft.put("data.too_long", common.TRUNCATE, why="it cuts what is longer at the end")


def number_type(draft: Draft, key: str, value: Any) -> None:
    """bf16 where the GPU has it."""
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    draft.put("compute", names.get(str(value).lower().removeprefix("torch."), "auto"), key)


def merged(draft: Draft, key: str, value: Any) -> None:
    """What happens to the model afterwards."""
    draft.note("ignored", "after training: the adapter is always saved; `halfbyte merge`, `halfbyte quantize`", key)


def format_type(draft: Draft, key: str, value: Any) -> None:
    """Shape of the records."""
    if value in ("alpaca", "sharegpt"):
        draft.put("data.train.0.shape", value, key)
    else:
        draft.note("ignored", "recognised from the columns", key)


def saves(draft: Draft, key: str, value: Any) -> None:
    """Never when 0."""
    draft.put("train.save_every", draft.whole(key), key)


def tracker(name: str) -> Rule:
    """A switch of one tracker, beside those that are on already."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if is_on(value):
            draft.put("log.to", list(dict.fromkeys([*draft.recipe.get("log.to", []), name])), key)
        else:
            draft.note("ignored", "off in the source", key)

    return rule


TABLE: Table = {
    "model_name": to("model.name", text),
    "load_in_4bit": base,
    "training_type": kind,
    "max_seq_length": length,
    "dtype": number_type,
    "r": to("adapter.rank", whole),
    "lora_alpha": to("adapter.alpha", number),
    "lora_dropout": to("adapter.dropout", number),
    "target_modules": to("adapter.targets", lambda v, *_: words(v) if v != "all-linear" else v),
    "bias": to("adapter.bias", text),
    "use_rslora": to("adapter.rslora", switch),
    **all_of(refused, "this variant of LoRA is not built; plain LoRA and rsLoRA are", "use_dora loftq_config"),
    "dataset": dataset,
    **all_of(read_with, "dataset", "local_dataset raw_text_file"),
    "format_type": format_type,
    **all_of(ignored, "plain text is split into rows of `data.tokens`, without overlap", "chunk_size stride"),
    "train_on_completions": loss,
    "num_epochs": common.length("max_steps", "num_epochs"),
    "max_steps": read_with("num_epochs"),
    "per_device_train_batch_size": common.batch("per_device_train_batch_size", "gradient_accumulation_steps", "packing"),
    "gradient_accumulation_steps": read_with("per_device_train_batch_size"),
    "packing": lambda d, k, v: (
        d.note("ignored", "rows are always packed, and no example sees another", k) if is_on(v) else read_with("batch")(d, k, v)
    ),
    "learning_rate": to("train.lr", number),
    "lr_scheduler_type": common.schedule(("warmup_steps", "warmup_ratio")),
    "warmup_steps": common.warmup("warmup_steps", "warmup_ratio"),
    "optim": common.optimizer,
    "weight_decay": to("optim.weight_decay", number),
    "seed": to("train.seed", whole),
    "random_state": ignored("one seed serves data order, adapter and dropout: `train.seed`"),
    "use_gradient_checkpointing": common.checkpointing,
    "report_to": common.trackers,
    "logging_steps": to("train.log_every", whole),
    "save_steps": saves,
    "load_best_model_at_end": to("train.best", switch),
    "output_dir": to("output", text),
    "per_device_eval_batch_size": ignored(common.SPEED),
    "enable_wandb": tracker("wandb"),
    "enable_tensorboard": tracker("tensorboard"),
    **all_of(ignored, common.LOGS, "wandb_project tensorboard_dir"),
    **dict.fromkeys(("save_model", "save_method", "save_gguf", "save_path", "quantization"), merged),
    **all_of(ignored, common.HUB, "push_model push_gguf hub_path"),
    **all_of(ignored, common.TOKEN, "hub_token hf_token wandb_token"),
    **all_of(ignored, f"{common.MULTIMODAL}; text is learned", "vision_all_linear finetune_vision_layers"),
    **all_of(ignored, "said by `adapter.targets`", "finetune_language_layers finetune_attention_modules finetune_mlp_modules"),
}
"""How every option of Unsloth is read; those with a default come in this order."""


def differences(draft: Draft) -> None:
    """What no key says."""
    draft.note(
        "differs",
        "a model that Unsloth has quantised already (`unsloth/...-bnb-4bit`) loads as it is; others are packed while they load",
    )
