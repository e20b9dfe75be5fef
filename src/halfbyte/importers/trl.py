"""TRL's supervised fine-tuning: `trl sft` on a command line, its YAML, or SFTConfig and SFTTrainer arguments as JSON.

The defaults are those of TRL 1.x. Two of them change what is learned, and few who have them know: the loss is on the whole
conversation, and an adapter covers `q_proj` and `v_proj` alone.
"""

from __future__ import annotations

from typing import Any

from halfbyte.importers import common, trainer_args
from halfbyte.importers.data import LOADERS, Columns, put_columns
from halfbyte.importers.draft import (
    Draft,
    Table,
    all_of,
    ignored,
    is_on,
    opened,
    read_with,
    refused,
    section,
    switch,
    text,
    to,
    unknown,
    words,
)

DEFAULTS: dict[str, Any] = {
    **trainer_args.DEFAULTS,
    "learning_rate": 2e-5,
    "logging_steps": 10,
    "bf16": True,
    "use_peft": False,
    "load_in_4bit": False,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": None,
    "dataset_name": None,
    "dataset_train_split": "train",
    "max_length": 1024,
    "assistant_only_loss": False,
    "packing_strategy": "bfd",
    "output_dir": "trainer_output",
}
OLDER = {**trainer_args.OLDER, "max_seq_length": "max_length"}
"""Names that keys had before: the same settings."""
PEFTS = ["q_proj", "v_proj"]
"""What PEFT adapts in most models when no targets are named."""


def adapter(draft: Draft, key: str, value: Any) -> None:
    """An adapter, or every weight."""
    draft.put("adapter.kind", "lora" if is_on(value) else "none", key, why="" if is_on(value) else "full fine-tuning")


def base(draft: Draft, key: str, value: Any) -> None:
    """How the base is stored."""
    given: list[str] = [k for k in ("load_in_4bit", "bnb_4bit_quant_type") if k in draft.given]
    if is_on(value):
        kind = str(draft.get("bnb_4bit_quant_type") or "nf4")
        hidden = "bnb_4bit_quant_type" in draft.source and "bnb_4bit_quant_type" not in draft.given
        draft.put("format.kind", kind, *given, why="BitsAndBytesConfig's default" if hidden else "")
        nested = draft.on("use_bnb_nested_quant")
        draft.put("format.nested", nested, *(["use_bnb_nested_quant"] if "use_bnb_nested_quant" in draft.given else []))
    elif draft.on("load_in_8bit"):
        why = "one scale a channel; LLM.int8() keeps outlier columns in 16 bits besides"
        draft.put("format.kind", "int8", "load_in_8bit", why=why)
    else:
        draft.put("format.kind", "none", *(given or [key]), why="a 16-bit base")


def targets(draft: Draft, key: str, value: Any) -> None:
    """Names, or what PEFT takes when there are none."""
    if not draft.on("use_peft"):
        if key in draft.given:
            draft.note("ignored", "without `use_peft` there is no adapter", key)
    elif value:
        names = words(value)
        draft.put(
            "adapter.targets",
            "all-linear" if names == ["all-linear"] else names if len(names) > 1 or "*" not in names[0] else names[0],
            key,
        )
    else:
        draft.put("adapter.targets", PEFTS, key, why="PEFT's choice for most models; GPT-2, Falcon, Phi-3 have other names")


def dataset(draft: Draft, key: str, value: Any) -> None:
    """One dataset by name."""
    if draft.get("datasets"):
        draft.note("ignored", "`datasets` wins over it", key)
        return
    if not value:
        draft.note("refused", "no dataset to learn from", key)
        return
    draft.put("data.train.0.path", str(value), key)
    _split(draft, 0, "dataset_config", "dataset_train_split", str(value))
    if str(draft.get("eval_strategy") or "no") == "no":
        draft.put("data.eval", 0, "eval_strategy", why="nothing is held out without it")
    else:
        given = "dataset_test_split" if "dataset_test_split" in draft.given else "eval_strategy"
        draft.put("data.eval.0.path", str(value), key, given, why="its test split")
        why = "" if given != "eval_strategy" else "its test split"
        draft.put("data.eval.0.split", str(draft.get("dataset_test_split") or "test"), given, why=why)
        if draft.get("dataset_config"):
            draft.put("data.eval.0.config", draft.get("dataset_config"), "dataset_config")


def _split(draft: Draft, i: int, config: str, split: str, path: str) -> None:
    if draft.get(config):
        draft.put(f"data.train.{i}.config", str(draft.get(config)), config)
    if split in draft.given and draft.get(split) != "train":
        draft.put(f"data.train.{i}.split", str(draft.get(split)), split)
    elif split in draft.given:
        draft.note("ignored", "train is the default here too", split)


def mixture(draft: Draft, key: str, value: Any) -> None:
    """`datasets`: a list of sections."""
    for i, entry in enumerate(draft.sections(key)):
        at, ours = f"datasets.{i}", f"data.train.{i}"
        known = {"path": "path", "name": "config", "split": "split"}
        for name, given in entry.items():
            draft.source[f"{at}.{name}"] = given
            if name == "path":
                files = words(entry.get("data_files")) if given in LOADERS else []
                draft.put(f"{ours}.path", files[0] if files else str(given), f"{at}.{name}")
            elif name in known and given is not None:
                draft.put(f"{ours}.{known[name]}", given, f"{at}.{name}")
            elif name == "data_files" and entry.get("path") in LOADERS and len(words(given)) == 1:
                draft.note("ignored", "the path of the source", f"{at}.{name}")
            elif name in ("data_dir", "data_files"):
                draft.note("refused", "give the files' own path, each an entry of its own", f"{at}.{name}")
            elif name == "columns":
                draft.note("ignored", "columns that a shape does not read are left alone", f"{at}.{name}")
            elif given is not None:
                unknown(draft, f"{at}.{name}", name, dict.fromkeys([*known, "data_dir", "data_files", "columns"]))
    if not value:
        draft.note("ignored", "empty in the source", key)
    elif str(draft.get("eval_strategy") or "no") == "no":
        draft.put("data.eval", 0, "eval_strategy", why="nothing is held out without it")


def held_out(draft: Draft, key: str, value: Any) -> None:
    """A share of the mixture."""
    if value:
        size = draft.number(key)
        draft.put("data.eval", int(size) if size >= 1 else size, key)


def loss(draft: Draft, key: str, value: Any) -> None:
    """The whole conversation, unless told otherwise."""
    given: list[str] = [k for k in ("assistant_only_loss", "completion_only_loss") if k in draft.given]
    if draft.on("assistant_only_loss") or draft.on("completion_only_loss"):
        draft.put("data.loss_on", "assistant", *given)
    else:
        why = "TRL learns the user's words too, but of prompt/completion data the completion alone: for those set `assistant`"
        draft.put("data.loss_on", "all", *(given or [key]), why=why)


def text_field(draft: Draft, key: str, value: Any) -> None:
    """Column of plain text; it matters only where there is one."""
    if value in (None, "text"):
        draft.note("ignored", "plain text is read from `text` here too", key)
    else:
        draft.put("data.train.0.shape", "text", key, why="plain text in a column of its own name")
        put_columns(draft, "data.train.0", "text", Columns({"text": str(value)}), key)


def length(draft: Draft, key: str, value: Any) -> None:
    """Longer examples are cut at their end."""
    if value is None:
        draft.note("refused", "rows have a length here: set it", key)
        return
    draft.put("data.tokens", draft.whole(key), key)
    wrapped = draft.get("packing_strategy") == "wrapped" and draft.on("packing")
    if wrapped:
        draft.put("data.too_long", "split", "packing_strategy", why="wrapped rows cut examples in two")
    elif draft.get("truncation_mode") == "keep_end":
        draft.put("data.too_long", "truncate_left", "truncation_mode")
    else:
        draft.put(
            "data.too_long", common.TRUNCATE, *([m] if (m := "truncation_mode") in draft.given else []), why="it cuts the end"
        )


def packing(draft: Draft, key: str, value: Any) -> None:
    """Always on here."""
    if is_on(value):
        draft.note("ignored", "rows are always packed, and no example sees another", key)


def template(draft: Draft, key: str, value: Any) -> None:
    """A file, or another model's tokenizer."""
    if str(value or "").endswith((".jinja", ".j2", ".jinja2")):
        draft.put("data.template", str(value), key)
    elif value:
        draft.note("refused", "another tokenizer's template: save its text in a .jinja file and give that path", key)


def loss_type(draft: Draft, key: str, value: Any) -> None:
    """Ways to compute the same loss, and one that is another."""
    same = str(value) in ("nll", "chunked_nll", "None")
    draft.note("ignored" if same else "refused", common.SPEED if same else "only cross-entropy is built", key)


_PEFT_CONFIG = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "target_modules": "lora_target_modules",
                "modules_to_save": "lora_modules_to_save", "use_rslora": "use_rslora", "use_dora": "use_dora",
                "target_parameters": "lora_target_parameters", "task_type": "lora_task_type"}  # fmt: skip
_BNB = {"load_in_4bit": "load_in_4bit", "load_in_8bit": "load_in_8bit", "bnb_4bit_quant_type": "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant": "use_bnb_nested_quant"}  # fmt: skip


PEFT_DEFAULTS: dict[str, Any] = {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
"""Of PEFT's LoraConfig, where they are others than the command line's."""
BNB_DEFAULTS: dict[str, Any] = {"bnb_4bit_quant_type": "fp4"}
"""Of transformers' BitsAndBytesConfig, likewise."""


def defaults(source: dict[str, Any]) -> dict[str, Any]:
    """What TRL takes where the source says nothing: objects of PEFT and transformers bring defaults of their own."""
    peft = PEFT_DEFAULTS if isinstance(source.get("peft_config"), dict) else {}
    bnb = BNB_DEFAULTS if isinstance(source.get("quantization_config"), dict) else {}
    return DEFAULTS | peft | bnb


def flattened(source: dict[str, Any]) -> dict[str, Any]:
    """SFTTrainer's arguments as JSON: `args`, `peft_config` and `quantization_config` opened into TRL's own command-line names."""
    flat = {
        key: value
        for key, value in source.items()
        if key not in ("args", "peft_config", "quantization_config", "model", "train_dataset")
    }
    flat |= opened(source, "args")
    if isinstance(source.get("model"), str):
        flat["model_name_or_path"] = source["model"]
    if isinstance(source.get("train_dataset"), str):
        flat["dataset_name"] = source["train_dataset"]
    if isinstance(peft := source.get("peft_config"), dict):
        flat["use_peft"] = True
        flat |= {_PEFT_CONFIG.get(key, f"peft_config.{key}"): value for key, value in peft.items()}
    if isinstance(bnb := source.get("quantization_config"), dict):
        flat |= {_BNB.get(key, f"quantization_config.{key}"): value for key, value in bnb.items()}
    return flat


MODEL: Table = {
    "revision": to("model.revision", text),
    "trust_remote_code": ignored(common.REMOTE_CODE),
    "token": ignored(common.TOKEN),
    **all_of(ignored, common.SPEED, "attn_implementation dtype torch_dtype use_cache device_map low_cpu_mem_usage"),
}
_PEFT_OFF = """
layers_to_transform layers_pattern layer_replication trainable_token_indices lora_bias use_qalora use_bdlora loftq_config
corda_config eva_config lora_ga_config kasa_config arrow_config alora_invocation_tokens ensure_weight_tying
"""
_PEFT_PASSIVE = """
peft_type peft_version auto_mapping base_model_name_or_path revision inference_mode fan_in_fan_out megatron_config megatron_core
qalora_group_size runtime_config
"""
PEFT: Table = {
    "bias": to("adapter.bias", text),
    "rank_pattern": to("adapter.rank_pattern"),
    "alpha_pattern": to("adapter.alpha_pattern"),
    "exclude_modules": to("adapter.exclude", lambda v, *_: words(v)),
    "init_lora_weights": common.initialisation,
    **all_of(refused, "this variant of LoRA is not built; plain LoRA and rsLoRA are", _PEFT_OFF),
    **all_of(ignored, "who wrote it and for what; it changes no number", _PEFT_PASSIVE),
}
"""Fields of a LoraConfig that `trl sft` has no option for."""
TABLE: Table = {
    "model_name_or_path": to("model.name", text),
    "model_revision": to("model.revision", text),
    "use_peft": adapter,
    "load_in_4bit": base,
    **all_of(read_with, "load_in_4bit", "load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant"),
    **all_of(ignored, common.SPEED, "bnb_4bit_quant_storage quantization_config.bnb_4bit_compute_dtype"),
    "lora_r": lambda d, k, v: d.put("adapter.rank", d.whole(k), k) if d.on("use_peft") else no_adapter(d, k),
    "lora_alpha": lambda d, k, v: d.put("adapter.alpha", d.number(k), k) if d.on("use_peft") else no_adapter(d, k),
    "lora_dropout": lambda d, k, v: d.put("adapter.dropout", d.number(k), k) if d.on("use_peft") else no_adapter(d, k),
    "lora_target_modules": targets,
    "lora_modules_to_save": to("adapter.modules_to_save", lambda v, *_: words(v)),
    "use_rslora": to("adapter.rslora", switch),
    **all_of(refused, "this variant of LoRA is not built; plain LoRA and rsLoRA are", "use_dora lora_target_parameters"),
    "lora_task_type": ignored("causal language models are what is trained here"),
    "datasets": mixture,
    "dataset_name": dataset,
    "test_split_size": held_out,
    **all_of(read_with, "dataset_name", "dataset_config dataset_train_split dataset_test_split"),
    **all_of(ignored, common.LOADER, "dataset_streaming streaming dataset_num_proc shuffle_dataset dataset_kwargs"),
    "dataset_text_field": text_field,
    "max_length": length,
    **all_of(read_with, "max_length", "truncation_mode packing_strategy"),
    "max_seq_length": ignored("an older name of `max_length`, which is given too and wins"),
    "packing": packing,
    **all_of(
        ignored, "rows are packed full, in training and evaluation alike", "padding_free pad_to_multiple_of eval_packing pad_token"
    ),
    "assistant_only_loss": loss,
    "completion_only_loss": read_with("assistant_only_loss"),
    "chat_template_path": template,
    "eos_token": ignored("the end of a turn is found in the chat template, and proven"),
    "loss_type": loss_type,
    "router_aux_loss_coef": refused("a router's balance loss is not built", off=(0, 0.0)),
    "model_init_kwargs": section(MODEL),
    **trainer_args.TABLE,
    **all_of(ignored, common.SPEED, "attn_implementation dtype torch_dtype ignore_bias_buffers"),
    "env": ignored("never imported: environment variables may hold tokens"),
    "config": ignored("read, and overridden by the command line"),
    **{f"peft_config.{key}": rule for key, rule in PEFT.items()},
    **all_of(refused, "another way to learn, which is not built", "teacher_model_name_or_path"),
}
"""How every key of `trl sft` is read; keys with a default come in this order."""


def no_adapter(draft: Draft, key: str) -> None:
    """Settings of an adapter that there is not."""
    if key in draft.given:
        draft.note("ignored", "without `use_peft` there is no adapter", key)


def differences(draft: Draft) -> None:
    """What no key says."""
    trainer_args.keeps_all(draft)
    if draft.on("load_in_4bit") and draft.get("dtype") in (None, "float32") and not draft.get("model_init_kwargs.dtype"):
        draft.note(
            "differs",
            "TRL keeps what is not packed in float32 unless `dtype` is set; here in the compute type, trained weights in fp32",
        )
