"""LLaMA-Factory's YAML, key by key. Its datasets are names: `dataset_info.json` says what they are.

An unknown key ends its run there with an error, so a file that ever ran has none.
"""

from __future__ import annotations

from typing import Any

from halfbyte.importers import common, trainer_args
from halfbyte.importers.axolotl_data import held_out_share
from halfbyte.importers.dataset_info import datasets, eval_datasets
from halfbyte.importers.draft import (
    Draft,
    Table,
    all_of,
    ignored,
    is_on,
    number,
    read_with,
    refused,
    shown,
    switch,
    text,
    to,
    whole,
    words,
)

DEFAULTS: dict[str, Any] = {
    **trainer_args.DEFAULTS,
    "stage": "sft",
    "finetuning_type": "lora",
    "quantization_bit": None,
    "lora_rank": 8,
    "lora_alpha": None,
    "lora_dropout": 0.0,
    "lora_target": "all",
    "dataset": None,
    "dataset_dir": "data",
    "cutoff_len": 2048,
    "val_size": 0.0,
    "template": None,
    "output_dir": "saves",
}
TEMPLATES = {
    **{name: name for name in ("chatml", "alpaca", "vicuna", "llama2", "llama3", "mistral", "gemma", "zephyr")},
    **{"empty": "plain", "phi": "phi3"},
}
"""Its templates of a family's own format, which stand here under these names; all others are copies of a model's own."""


def stage(draft: Draft, key: str, value: Any) -> None:
    """What kind of learning."""
    if value == "pt":
        draft.put("data.loss_on", "all", key, why="plain text: all of it is learned")
    elif value != "sft":
        draft.note("refused", common.PREFERENCES, key)
    else:
        draft.note("ignored", "supervised fine-tuning is what is done here", key)


def finetuning(draft: Draft, key: str, value: Any) -> None:
    """lora or full."""
    if value not in ("lora", "full"):
        draft.note("refused", "only lora and full are built", key)
    else:
        draft.put("adapter.kind", "lora" if value == "lora" else "none", key)


def quantization(draft: Draft, key: str, value: Any) -> None:
    """Bits of the base, and by which method."""
    given = [k for k in ("quantization_bit", "quantization_method", "quantization_type", "double_quantization") if k in draft.given]
    method = str(draft.get("quantization_method") or "bnb").lower()
    if value is None:
        draft.put("format.kind", "none", key, why="a 16-bit base")
        if rest := [k for k in given if k != key]:
            draft.note("ignored", f"`{key}` is not set", *rest)
        if any(name in str(draft.get("model_name_or_path")).lower() for name in ("gptq", "awq", "aqlm")):
            draft.note("refused", "bases in GPTQ, AWQ and AQLM are not read: name the unquantised model", "model_name_or_path")
    elif method not in ("bnb", "bitsandbytes"):
        draft.note("refused", "only bitsandbytes' formats are the same here; int4 (`format: int4`) comes nearest to hqq", *given)
    elif draft.whole(key) == 4:
        draft.put("format.kind", str(draft.get("quantization_type") or "nf4"), *[k for k in given if k != "double_quantization"])
        nested = draft.get("double_quantization") is None or draft.on("double_quantization")
        draft.put("format.nested", nested, *(["double_quantization"] if "double_quantization" in given else [key]))
    elif draft.whole(key) == 8:
        draft.put("format.kind", "int8", *given, why="one scale a channel; LLM.int8() keeps outlier columns in 16 bits besides")
    else:
        draft.note("refused", f"{shown(value)} bits are not built; 4 and 8 are", key)


def alpha(draft: Draft, key: str, value: Any) -> None:
    """Twice the rank where it is not set."""
    rank = draft.whole("lora_rank")
    if value is None:
        draft.put("adapter.alpha", 2 * rank, *(["lora_rank"] if "lora_rank" in draft.given else [key]), why=f"2 x {rank}, its rule")
        if key in draft.given:
            draft.note("ignored", "empty in the source", key)
    else:
        draft.put("adapter.alpha", draft.number(key), key)


def target(draft: Draft, key: str, value: Any) -> None:
    """`all`, or names."""
    draft.put("adapter.targets", "all-linear" if value == "all" else words(value), key)


def template(draft: Draft, key: str, value: Any) -> None:
    """Its own copies of templates: the tokenizer's text is taken."""
    name = str(value or "")
    if name in TEMPLATES:
        draft.put("data.template", TEMPLATES[name], key)
    elif key in draft.given:
        why = f"the tokenizer's own; LLaMA-Factory writes {name} from a copy of its own, without Jinja" if name else ""
        draft.put("data.template", "auto", key, why=why)


def loss(draft: Draft, key: str, value: Any) -> None:
    """What is learned of a conversation."""
    if is_on(value):
        draft.put("data.loss_on", "all" if key == "train_on_prompt" else "last", key)
    else:
        draft.note("ignored", "off in the source", key)


def cutoff(draft: Draft, key: str, value: Any) -> None:
    """Longer examples are cut."""
    draft.put("data.tokens", draft.whole(key), key)
    draft.put("data.too_long", common.TRUNCATE, why="it cuts what is longer, question and answer in proportion")


def packing(draft: Draft, key: str, value: Any) -> None:
    """Packed rows, here always apart."""
    if is_on(value) and not draft.on("neat_packing"):
        draft.note("differs", "without `neat_packing` packed examples see each other there; here never", key)
    elif key in draft.given:
        draft.note("ignored", "rows are always packed, and no example sees another", key)


def precision(draft: Draft, key: str, value: Any) -> None:
    """`pure_bf16` besides."""
    if draft.on("pure_bf16"):
        draft.put("compute", "bf16", "pure_bf16", why="trained weights stay in fp32 here")
    else:
        common.precision("bf16", "fp16")(draft, key, value)


def validation(draft: Draft, key: str, value: Any) -> None:
    """`val_size`, or datasets of their own."""
    if draft.get("eval_dataset"):
        draft.note("ignored", "`eval_dataset` wins over it", key)
    else:
        held_out_share(draft, key)


_SPEED = """
flash_attn shift_attn use_unsloth use_unsloth_gc enable_liger_kernel disable_gradient_checkpointing use_reentrant_gc
low_cpu_mem_usage offload_folder use_kv_cache use_v1_kernels infer_dtype upcast_layernorm upcast_lmhead_output
quantization_device_map preprocessing_num_workers preprocessing_batch_size overwrite_cache data_shared_file_system
tokenized_path streaming buffer_size enable_torch_profiler profiler_output_dir profiler_wait_steps profiler_warmup_steps
profiler_active_steps profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules
fp8_backend fp8_enable_fsdp_float8_all_gather
"""
_LOGS = """
plot_loss print_param_status compute_accuracy include_effective_tokens_per_second eval_on_each_dataset eval_num_beams
ignore_pad_token_for_loss swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_logdir use_swanlab
"""
_GENERATION = """
do_sample temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty length_penalty skip_special_tokens
preserve_thinking infer_backend vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank
vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend
"""
_EXPORT = """
export_dir export_size export_device export_legacy_format export_quantization_bit export_quantization_dataset
export_quantization_nsamples export_quantization_maxlen adapter_folder
"""
_OTHER = """
use_galore use_apollo use_badam use_adam_mini use_muon use_llama_pro use_dft_loss use_asft_loss use_eaft_loss mixture_of_depths
use_mca use_megatron_bridge use_hyper_parallel use_kt moe_aux_loss_coef train_from_scratch rope_scaling pissa_init pissa_convert
use_dora create_new_adapter reward_model ref_model resize_vocab add_tokens add_special_tokens new_special_tokens_config
"""
_DETAILS = """
galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise apollo_target apollo_rank
apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front
badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose asft_alpha
eaft_alpha hyper_parallel_args hyper_parallel_cp_size pissa_iter freeze_trainable_layers freeze_trainable_modules
freeze_extra_modules module_dropout oft_rank oft_block_size oft_target pref_beta pref_ftx pref_bco_weight pref_loss
dpo_label_smoothing kto_chosen_weight kto_rejected_weight simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target
ppo_whiten_rewards ref_model_adapters ref_model_quantization_bit reward_model_adapters reward_model_quantization_bit
reward_model_type ld_alpha init_special_tokens kt_cpu_activation kt_weight_path kt_non_expert_weight_path
kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size
"""
_MEDIA = """
image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels video_fps video_maxlen
use_audio_in_video audio_sampling_rate media_dir freeze_vision_tower freeze_multi_modal_projector freeze_language_model
"""

TABLE: Table = {
    "model_name_or_path": to("model.name", text),
    "model_revision": to("model.revision", text),
    "stage": stage,
    "finetuning_type": finetuning,
    "quantization_bit": quantization,
    **all_of(read_with, "quantization_bit", "quantization_method quantization_type double_quantization"),
    "lora_rank": to("adapter.rank", whole),
    "lora_alpha": alpha,
    "lora_dropout": to("adapter.dropout", number),
    "lora_target": target,
    "additional_target": to("adapter.modules_to_save", lambda v, *_: words(v)),
    "use_rslora": to("adapter.rslora", switch),
    "loraplus_lr_ratio": to("optim.lora_plus", number),
    "dataset": datasets,
    "eval_dataset": eval_datasets,
    "val_size": validation,
    "dataset_dir": read_with("dataset"),
    **all_of(read_with, "dataset", "max_samples mix_strategy interleave_probs"),
    "template": template,
    "enable_thinking": lambda d, k, v: d.put("data.template_kwargs", {"enable_thinking": is_on(v)}, k, why="read by the template"),
    "default_system": to("data.system", text),
    "cutoff_len": cutoff,
    **dict.fromkeys(("train_on_prompt", "mask_history"), loss),
    "packing": packing,
    "neat_packing": ignored("packed examples never see each other"),
    **trainer_args.TABLE,
    "bf16": precision,
    **all_of(read_with, "bf16", "pure_bf16"),
    "fp8": lambda d, k, v: d.put("compute", "fp8", k) if is_on(v) else d.note("ignored", "off", k),
    "early_stopping_steps": to("train.patience", whole),
    "disable_shuffling": refused("examples are always shuffled, by `train.seed`"),
    "adapter_name_or_path": refused("training on from another adapter is not built: merge it first, and train on the merged model"),
    **all_of(refused, "this changes what is learned, and is not built", _OTHER),
    **all_of(ignored, "goes with a method that is not built, and is off unless that is on", _DETAILS),
    **all_of(ignored, common.SPEED, _SPEED),
    **all_of(ignored, common.LOGS, _LOGS),
    **all_of(ignored, common.GENERATION, _GENERATION),
    **all_of(ignored, "after training: `halfbyte merge`, `halfbyte quantize`", _EXPORT),
    **all_of(ignored, f"{common.MULTIMODAL}; text is learned", _MEDIA),
    **all_of(ignored, common.HUB, "export_hub_model_id"),
    **all_of(
        ignored, common.TOKEN, "hf_hub_token ms_hub_token om_hub_token swanlab_api_key swanlab_lark_webhook_url swanlab_lark_secret"
    ),
    **all_of(ignored, common.DEVICES, "ray_num_workers ray_init_kwargs master_addr master_port"),
    **all_of(ignored, "found from the tokenizer's own files", "use_fast_tokenizer split_special_tokens cache_dir"),
    "loraplus_lr_embedding": ignored("goes with the embedding's low-rank matrices, which are not built"),
    "tool_format": ignored("tool calls are written by the chat template"),
}
"""How every key of LLaMA-Factory is read; keys with a default come in this order."""


def differences(draft: Draft) -> None:
    """What no key says."""
    trainer_args.keeps_all(draft)
    if draft.recipe.get("train.lr") and not draft.on("bf16") and not draft.on("fp16") and not draft.on("pure_bf16"):
        draft.note("differs", "without bf16 or fp16 it computes in fp32, which is slow: `compute: auto` chooses by the device")
