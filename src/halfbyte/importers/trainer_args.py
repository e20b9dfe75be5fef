"""transformers' TrainingArguments, which LLaMA-Factory and TRL both build on, key by key.

The defaults are those of transformers 5; a tool that changes one says so in its own file.
"""

from __future__ import annotations

from typing import Any

from halfbyte.importers import common
from halfbyte.importers.draft import Draft, Table, all_of, ignored, is_on, number, read_with, refused, switch, text, to, whole

DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "seed": 42,
    "bf16": False,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 500,
    "logging_steps": 500,
    "load_best_model_at_end": False,
}

OLDER = {"evaluation_strategy": "eval_strategy"}
"""Names that keys had before: the same settings."""
_SPEED = """
tf32 gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs torch_compile torch_compile_backend
torch_compile_mode use_liger_kernel liger_kernel_config use_cache torch_empty_cache_steps auto_find_batch_size bf16_full_eval
fp16_full_eval per_device_eval_batch_size eval_accumulation_steps eval_do_concat_batches eval_use_gather_object jit_mode_eval
use_cpu no_cuda half_precision_backend fp16_opt_level use_legacy_prediction_loop
"""
_DEVICES = """
local_rank ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_backend ddp_timeout ddp_static_graph fsdp
fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap deepspeed accelerator_config parallelism_config
average_tokens_across_devices log_on_each_node save_on_each_node
"""
_LOADER = """
dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
dataloader_multiprocessing_context dataloader_in_order remove_unused_columns group_by_length train_sampling_strategy
length_column_name data_seed label_names ignore_data_skip dispatch_batches split_batches
"""
_LOGS = """
logging_dir logging_strategy logging_first_step logging_nan_inf_filter log_level log_level_replica disable_tqdm run_name project
trackio_space_id trackio_bucket_id trackio_static_space_id include_num_input_tokens_seen include_tokens_per_second
include_for_metrics include_inputs_for_metrics debug skip_memory_metrics metric_for_best_model greater_is_better
prediction_loss_only batch_eval_metrics eval_delay eval_on_start save_safetensors enable_jit_checkpoint
restore_callback_states_from_checkpoint full_determinism do_predict do_eval predict_with_generate generation_max_length
generation_num_beams generation_config sortish_sampler
"""

TABLE: Table = {
    "num_train_epochs": common.length("max_steps", "num_train_epochs"),
    "max_steps": read_with("num_train_epochs"),
    "per_device_train_batch_size": common.batch("per_device_train_batch_size", "gradient_accumulation_steps", "packing"),
    "gradient_accumulation_steps": read_with("per_device_train_batch_size"),
    "learning_rate": to("train.lr", number),
    "lr_scheduler_type": common.schedule(("warmup_steps", "warmup_ratio")),
    "warmup_steps": common.warmup("warmup_steps", "warmup_ratio"),
    "warmup_ratio": read_with("warmup_steps"),
    "lr_scheduler_kwargs": refused("a schedule other than a plain cosine, line or constant is not built"),
    "optim": common.optimizer,
    **all_of(refused, "of optimizers other than AdamW", "optim_args optim_target_modules"),
    "weight_decay": to("optim.weight_decay", number),
    "adam_beta1": to("optim.beta1", number),
    "adam_beta2": to("optim.beta2", number),
    "adam_epsilon": to("optim.eps", number),
    "max_grad_norm": to("train.clip", number),
    "label_smoothing_factor": to("loss.label_smoothing", number),
    "neftune_noise_alpha": refused("NEFTune's noise on embeddings is not built"),
    "seed": to("train.seed", whole),
    "bf16": common.precision("bf16", "fp16"),
    "fp16": read_with("bf16"),
    "gradient_checkpointing": common.checkpointing,
    "activation_offloading": common.offloading,
    "eval_strategy": common.every("train.eval_every", "eval_strategy", "eval_steps"),
    "eval_steps": read_with("eval_strategy"),
    "evaluation_strategy": ignored("an older name of `eval_strategy`, which is given too and wins"),
    "save_strategy": common.every("train.save_every", "save_strategy", "save_steps"),
    "save_steps": read_with("save_strategy"),
    "save_total_limit": common.keep,
    "load_best_model_at_end": to("train.best", switch),
    "logging_steps": to("train.log_every", lambda v, k, p: max(1, int(number(v, k, p)))),
    "output_dir": to("output", text),
    "report_to": common.trackers,
    "do_train": lambda d, k, v: d.note("ignored", "`halfbyte train` trains" if is_on(v) else "off; `halfbyte train` trains", k),
    "trust_remote_code": ignored(common.REMOTE_CODE),
    **all_of(ignored, common.HUB, "push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision"),
    **all_of(ignored, common.TOKEN, "hub_token push_to_hub_token"),
    **all_of(ignored, common.RESUME, "resume_from_checkpoint overwrite_output_dir"),
    "save_only_model": ignored("checkpoints always hold the optimizer's state; the adapter lies apart"),
    **all_of(ignored, common.SPEED, _SPEED),
    **all_of(ignored, common.DEVICES, _DEVICES),
    **all_of(ignored, common.LOADER, _LOADER),
    **all_of(ignored, common.LOGS, _LOGS),
}
"""How TrainingArguments are read; keys with a default come in this order."""


def keeps_all(draft: Draft) -> None:
    """The one default that cannot be had."""
    if draft.get("save_total_limit") is None and draft.recipe.get("train.save_every"):
        draft.note("differs", f"{draft.tool} keeps every checkpoint; here `train.keep` (2) and the best one")
