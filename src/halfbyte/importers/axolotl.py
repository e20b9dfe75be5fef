"""axolotl's YAML, key by key.

The defaults are those of its schema, and of the code behind it where the schema says None (0.18). An unknown key is dropped
there without a word, so a misspelt one may have had no effect for years: here it is named.
"""

from __future__ import annotations

from typing import Any

from halfbyte.importers import common
from halfbyte.importers.axolotl_data import datasets, held_out
from halfbyte.importers.axolotl_rest import REST
from halfbyte.importers.draft import (
    Draft,
    Rule,
    Table,
    all_of,
    ignored,
    is_on,
    number,
    read_with,
    refused,
    section,
    switch,
    text,
    to,
    whole,
    words,
)

DEFAULTS: dict[str, Any] = {
    "adapter": None,
    "datasets": None,
    "chat_template": None,
    "bf16": "auto",
    "sequence_len": 512,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1.0,
    "learning_rate": None,
    "optimizer": "adamw_torch_fused",
    "lr_scheduler": "cosine",
    "warmup_ratio": None,
    "val_set_size": 0.0,
    "excess_length_strategy": "drop",
    "evals_per_epoch": None,
    "saves_per_epoch": None,
    "save_total_limit": 4,
    "load_best_model_at_end": False,
    "seed": 42,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "output_dir": "./model-out",
}


def adapter(draft: Draft, key: str, value: Any) -> None:
    """What learns, and how the base is stored: the two belong together there."""
    kind = str(value or "").lower()
    if kind not in ("", "lora", "qlora"):
        draft.note("refused", "only lora and qlora are built", key)
        return
    draft.put("adapter.kind", "lora" if kind else "none", key, why="" if kind else "no adapter: full fine-tuning")
    bits = [k for k in ("load_in_4bit", "load_in_8bit") if draft.on(k)]
    if kind == "qlora" or "load_in_4bit" in bits:
        draft.put("format.kind", "nf4", *[k for k in (key, *bits) if k in draft.given])
        draft.put("format.nested", True, *[k for k in (key, *bits) if k in draft.given], why="its double quantisation is on")
    elif bits:
        draft.put("format.kind", "int8", *bits, why="one scale a channel; LLM.int8() keeps outlier columns in 16 bits besides")
    else:
        draft.put("format.kind", "none", key, why="a 16-bit base")


def targets(draft: Draft, key: str, value: Any) -> None:
    """`lora_target_linear` and `lora_target_modules` add up; every linear layer contains the rest, but for the head."""
    listed, linear = draft.get("lora_target_modules"), draft.on("lora_target_linear")
    names = words(listed) if isinstance(listed, list) else []
    given = [k for k in ("lora_target_linear", "lora_target_modules") if k in draft.given]
    outside = [name for name in names if name.rpartition(".")[2] in ("embed_tokens", "wte", "lm_head", "embed_out")]
    if outside:
        why = "low-rank matrices on the embedding or the head are not built; train them whole: `lora_modules_to_save`"
        draft.note("refused", why, "lora_target_modules")
    elif linear:
        draft.put("adapter.targets", "all-linear", *given, why="every linear layer but the head" if names else "")
    elif listed:
        draft.put("adapter.targets", names or str(listed), *given)
    elif draft.get("adapter") and not draft.get("lora_target_parameters"):
        draft.note("refused", "neither `lora_target_modules` nor `lora_target_linear` is set: nothing would learn", *given)


def warmup(draft: Draft, key: str, value: Any) -> None:
    """Steps or a share; with neither, 3 % of the steps and 100 at most."""
    if draft.get("warmup_steps") is None and draft.get("warmup_ratio") is None:
        draft.put("train.warmup", 0.03, "warmup_ratio", why="its rule")
        draft.note("differs", "without a warm-up axolotl takes 3 % of the steps, 100 at most; here 3 % without a limit")
    else:
        common.warmup("warmup_steps", "warmup_ratio")(draft, key, value)


def batch(draft: Draft, key: str, value: Any) -> None:
    """`micro_batch_size` x `gradient_accumulation_steps`, or `batch_size` for both."""
    if draft.get("batch_size") is None:
        common.batch("micro_batch_size", "gradient_accumulation_steps", "sample_packing")(draft, key, value)
        return
    total = draft.whole("batch_size")
    draft.put("train.batch", total, "batch_size", why="the batch of all processes")
    draft.note("ignored", "`batch_size` says it for both", *[k for k in (key, "gradient_accumulation_steps") if k in draft.given])


def often(path: str, per_epoch: str, steps: str, strategy: str) -> Rule:
    """`..._steps`, or so many an epoch; saves come once an epoch when nothing is said, evaluations never."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if draft.get(steps) is None and (draft.get(per_epoch) is not None or draft.get(strategy) is None):
            times = draft.whole(per_epoch) if draft.get(per_epoch) is not None else int(per_epoch == "saves_per_epoch")
            share, why = common.once_an_epoch(draft, times) if times else (0, "at the start and the end only")
            draft.put(path, share, per_epoch, why=why)
        else:
            common.every(path, strategy, steps)(draft, key, value)

    return rule


def packing(draft: Draft, key: str, value: Any) -> None:
    """Rows are always packed here."""
    if is_on(value):
        draft.note("ignored", "rows are always packed, and no example sees another", key)


def excess(draft: Draft, key: str, value: Any) -> None:
    """What happens to longer examples."""
    policies = {"drop": "drop", "truncate": common.TRUNCATE, "raise": "error"}
    name = str(value or "drop")
    if name in policies:
        draft.put("data.too_long", policies[name], key)
    else:
        draft.note("refused", f"one of {', '.join(policies)}", key)


def rl(draft: Draft, key: str, value: Any) -> None:
    """Preference and reinforcement learning."""
    draft.note("refused" if is_on(value) else "ignored", common.PREFERENCES if is_on(value) else "empty in the source", key)


def tracker(name: str) -> Rule:
    """A tracker that its project, or a switch, turns on."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if not is_on(value) or draft.source.get(f"use_{name}") is False:
            draft.note("ignored", "off in the source", key)
            return
        draft.put("log.to", sorted({*draft.recipe.get("log.to", []), name}), key)
        if key == "wandb_project":
            draft.note("differs", "the project's name is read from the environment: set WANDB_PROJECT")

    return rule


def model_class(draft: Draft, key: str, value: Any) -> None:
    """A class of transformers: found from the model's own config here."""
    multimodal = "ConditionalGeneration" in str(value) or key == "processor_type"
    why = "the class is found from the model's config" if not multimodal else f"{common.MULTIMODAL}; the text model is trained"
    draft.note("ignored", why if value else "empty in the source", key)


def precision(draft: Draft, key: str, value: Any) -> None:
    """bf16 or fp16 (`bfloat16`, `float16` without autocast), or neither."""
    whole_model = next((k for k in ("bfloat16", "float16", "float32") if draft.on(k)), None)
    if whole_model:
        draft.put("compute", {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[whole_model], whole_model)
        draft.note("ignored", f"`{whole_model}` wins over it", *[k for k in ("bf16", "fp16") if k in draft.given])
    else:
        common.precision("bf16", "fp16")(draft, key, value)


def plugins(draft: Draft, key: str, value: Any) -> None:
    """Plugins of kernels are a matter of speed; others change what is learned."""
    for name in words(value):
        fast = name.rpartition(".")[2] in ("CutCrossEntropyPlugin", "LigerPlugin", "KernelsPlugin")
        draft.note("ignored" if fast else "refused", common.SPEED if fast else "this plugin's work is not built", key, value=name)
    if not value:
        draft.note("ignored", "empty in the source", key)


BNB: Table = {
    "bnb_4bit_use_double_quant": to("format.nested", switch),
    "bnb_4bit_quant_type": to("format.kind", text),
    "load_in_4bit": read_with("adapter"),
    "load_in_8bit": read_with("adapter"),
    **all_of(ignored, common.SPEED, "bnb_4bit_quant_storage bnb_4bit_compute_dtype llm_int8_threshold llm_int8_skip_modules"),
}
"""What overrides BitsAndBytesConfig."""

SPECIAL: Table = {
    "pad_token": ignored("rows are full and padding is never recognised by its id, so it needs no token"),
    "eos_token": ignored("the end of a turn is found in the chat template, and proven"),
    **all_of(ignored, "the tokenizer's own is used", "bos_token unk_token"),
    "additional_special_tokens": refused(common.NEW_TOKENS),
}

ROUTER: Table = {
    "output_router_logits": ignored("a router's balance loss is not added: routers are frozen, and no adapter sits on them"),
}

TABLE: Table = {
    # what is trained
    "base_model": to("model.name", text),
    **all_of(lambda _: to("model.revision", text), "", "revision_of_model model_revision"),
    "adapter": adapter,
    **all_of(read_with, "adapter", "load_in_4bit load_in_8bit"),
    "bnb_config_kwargs": section(BNB),
    "lora_r": to("adapter.rank", whole),
    "lora_alpha": to("adapter.alpha", number),
    "lora_dropout": to("adapter.dropout", number),
    "lora_target_linear": targets,
    "lora_target_modules": lambda d, k, v: None if any(k in line.keys for line in d.lines) else targets(d, k, v),
    "lora_modules_to_save": to("adapter.modules_to_save", lambda v, *_: words(v)),
    **all_of(lambda _: to("adapter.rslora", switch), "", "peft_use_rslora"),
    "lora_rank_pattern": to("adapter.rank_pattern"),
    "lora_alpha_pattern": to("adapter.alpha_pattern"),
    "peft_init_lora_weights": common.initialisation,
    "loraplus_lr_ratio": to("optim.lora_plus", number),
    # from what
    "sequence_len": to("data.tokens", whole),
    "chat_template": lambda d, k, v: None,
    "datasets": datasets,
    "test_datasets": held_out,
    "val_set_size": held_out,
    "train_on_inputs": read_with("datasets"),
    "chat_template_kwargs": to("data.template_kwargs"),
    "default_system_message": to("data.system", text),
    "excess_length_strategy": excess,
    "special_tokens": section(SPECIAL),
    "chat_template_jinja": read_with("chat_template"),
    # how
    "num_epochs": common.length("max_steps", "num_epochs"),
    "max_steps": read_with("num_epochs"),
    "micro_batch_size": batch,
    **all_of(read_with, "micro_batch_size", "gradient_accumulation_steps batch_size"),
    "sample_packing": packing,
    "learning_rate": to("train.lr", number),
    "lr_scheduler": common.schedule(("warmup_steps", "warmup_ratio")),
    "warmup_ratio": warmup,
    "warmup_steps": read_with("warmup_ratio"),
    "optimizer": common.optimizer,
    "weight_decay": to("optim.weight_decay", number),
    "adam_beta1": to("optim.beta1", number),
    "adam_beta2": to("optim.beta2", number),
    "adam_epsilon": to("optim.eps", number),
    "max_grad_norm": to("train.clip", number),
    "seed": to("train.seed", whole),
    "bf16": precision,
    **all_of(read_with, "bf16", "fp16 bfloat16 float16 float32"),
    "fp8": lambda d, k, v: d.put("compute", "fp8", k) if is_on(v) else d.note("ignored", "off", k),
    "gradient_checkpointing": common.checkpointing,
    "activation_offloading": common.offloading,
    # how often
    "evals_per_epoch": often("train.eval_every", "evals_per_epoch", "eval_steps", "eval_strategy"),
    **all_of(read_with, "evals_per_epoch", "eval_steps eval_strategy"),
    "saves_per_epoch": often("train.save_every", "saves_per_epoch", "save_steps", "save_strategy"),
    **all_of(read_with, "saves_per_epoch", "save_steps save_strategy"),
    "logging_steps": to("train.log_every", lambda v, k, p: max(1, whole(v, k, p))),
    "save_total_limit": common.keep,
    "load_best_model_at_end": to("train.best", switch),
    "early_stopping_patience": to("train.patience", whole),
    "output_dir": to("output", text),
    "wandb_project": tracker("wandb"),
    "use_wandb": tracker("wandb"),
    "use_tensorboard": tracker("tensorboard"),
    "rl": rl,
    "plugins": plugins,
    "processor_type": model_class,
    **all_of(lambda _: section(ROUTER), "", "model_config overrides_of_model_config"),
    **REST,
}
"""How every key of axolotl is read; keys with a default come in this order."""


def differences(draft: Draft) -> None:
    """What no key says."""
    if draft.get("adapter") and draft.recipe.get("data.eval") and draft.recipe.get("train.eval_every"):
        draft.note("differs", "held-out examples are drawn by another generator than axolotl's: other ones, of the same number")
