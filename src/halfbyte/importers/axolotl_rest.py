"""axolotl's keys that set nothing here: what has no effect on what is learned, what is never imported, and what is not built.

Why every one is listed: a key that nobody knows is probably misspelt, and that is only worth saying when all others are known.
"""

from __future__ import annotations

from halfbyte.importers import common
from halfbyte.importers.draft import Table, all_of, differs, ignored, refused

_SPEED = """
tf32 lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel fused_attn_kernel use_kernels experts_implementation
use_scattermoe use_sonicmoe expert_backend moe_grouped_backend moe_dequant_chunk_size moe_bnb_fast cut_cross_entropy
chunked_cross_entropy chunked_cross_entropy_num_chunks liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm
liger_swiglu liger_glu_activation liger_cross_entropy liger_fused_linear_cross_entropy liger_use_token_scaling torch_compile
torch_compile_backend torch_compile_mode torch_compile_options flex_attn_compile_kwargs low_cpu_mem_usage
gradient_checkpointing_kwargs selective_checkpointing layer_offloading tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp
gc_steps gc_collect_steps torch_empty_cache_steps max_memory gpu_memory_limit lora_on_cpu qlora_sharded_model_loading
embeddings_skip_upcast auto_find_batch_size group_by_length flash_optimum flash_attn_cross_entropy flash_attn_fuse_mlp
flash_attn_d512 large_head_attention sdpa_varlen deepcompile peft_autocast_adapter_dtype lora_fan_in_fan_out fp32_norms
fp32_norm_classes experimental_skip_move_to_device eval_batch_size
"""
_ATTENTION = """
attn_implementation flash_attention sdp_attention xformers_attention flex_attention sage_attention eager_attention
gemma4_hybrid_attn_impl flash_attn_rms_norm
"""
_DEVICES = """
fsdp fsdp_config fsdp_version fsdp_final_state_dict_type deepspeed ddp ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers
ddp_find_unused_parameters device device_map world_size local_rank accelerator_config context_parallel_size
sequence_parallel_degree tensor_parallel_size dp_shard_size dp_replicate_size heads_k_stride ring_attn_func expert_parallel_size
expert_parallel_backend use_ray ray_run_name ray_num_workers resources_per_worker fp8_enable_fsdp_float8_all_gather
"""
_LOADER = """
dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory dataset_shard_num dataset_shard_idx
num_dataset_shards_to_save shuffle_merged_datasets shuffle_before_merging_datasets dataloader_pin_memory dataloader_num_workers
dataloader_prefetch_factor dataloader_drop_last remove_unused_columns streaming streaming_multipack_buffer_size
sample_packing_group_size sample_packing_bin_size sample_packing_sequentially sample_packing_mp_start_method
multipack_real_batches pretrain_multipack_buffer_size pretrain_multipack_attn pretraining_sample_concatenation is_preprocess
preprocess_iterable total_num_tokens total_supervised_tokens sample_packing_eff_est min_sample_len eval_sequence_len
"""
_ROWS = "pad_to_sequence_len pad_to_multiple_of batch_flattening eval_sample_packing"
_LOGS = """
wandb_entity wandb_watch wandb_log_model wandb_name wandb_run_id wandb_mode profiler_steps profiler_steps_start
include_tokens_per_second include_tkps use_otel_metrics otel_metrics_host otel_metrics_port strict axolotl_config_path
save_safetensors save_first_step tokenizer_save_jinja_files metric_for_best_model greater_is_better do_causal_lm_eval
eval_causal_lm_metrics eval_table_size eval_max_new_tokens
"""
_TRACKERS = """
use_mlflow mlflow_tracking_uri mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts use_comet comet_workspace
comet_project_name comet_experiment_key comet_mode comet_online comet_experiment_config use_trackio trackio_project_name
trackio_run_name trackio_space_id use_swanlab swanlab_project swanlab_experiment_name swanlab_description swanlab_mode
swanlab_workspace swanlab_log_model swanlab_web_host swanlab_api_host
"""
_GENERATION = """
generate_samples num_generation_samples generation_max_new_tokens generation_temperature generation_top_p generation_top_k
generation_prompt_ratio generation_do_sample gradio_title gradio_share gradio_server_name gradio_server_port
gradio_max_new_tokens gradio_temperature
"""
_MODEL = """
model_type type_of_model tokenizer_type tokenizer_config base_model_config cls_model_config tokenizer_use_fast tokenizer_legacy
is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_qwen_derived_model quantize_moe_experts
"""
_PREFERENCES = """
rl_beta dpo_beta orpo_alpha simpo_gamma cpo_alpha rpo_alpha kto_desirable_weight kto_undesirable_weight dpo_use_weighting
dpo_label_smoothing dpo_loss_type dpo_loss_weights dpo_use_liger_kernel dpo_padding_free dpo_norm_loss dpo_use_logits_to_keep
dpo_generate_during_eval precompute_ref_log_probs max_prompt_len center_rewards_coefficient trl vllm ebft
"""
_OTHER_OPTIMIZERS = """
optim_args optim_target_modules adam_epsilon2 adam_beta3 dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of
qgalore_rank qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant qgalore_proj_bits
qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size torchdistx_path
"""
_SCHEDULE = """
lr_scheduler_kwargs lr_quadratic_warmup cosine_min_lr_ratio cosine_constant_lr_ratio lr_div_factor lr_groups embedding_lr
embedding_lr_scale
"""
_RELORA = """
relora_steps relora_prune_ratio relora_prune_method relora_cpu_offload relora_warmup_steps relora_anneal_steps
jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps
"""
_VARIANTS = """
peft_use_dora peft_layer_replication peft_trainable_token_indices peft_ensure_weight_tying lora_target_parameters peft
peft_layers_to_transform peft_layers_pattern use_mora mora_type mora
"""
_METHODS = """
reward_model process_reward_model num_labels trainer_cls qat quantization kd_trainer kd_ce_alpha kd_alpha kd_temperature kd_beta
kd_normalize_topk kd_online_server kd_online_server_base_url kd_online_topk kd_online_timeout kd_temperature_min use_eaft
eaft_alpha eaft_k curriculum_sampling use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks diffusion
spectrum_top_fraction spectrum_model_name grokfast_alpha grokfast_lamb dense_mixer lisa_n_layers lisa_step_interval
lisa_layers_attribute llmcompressor use_onebitllms model_quantization_config model_quantization_config_kwargs scaling_softmax
scaling_softmax_factor scaling_softmax_bias reinit_weights rope_scaling overrides_of_model_kwargs model_kwargs
noisy_embedding_alpha neftune_noise_alpha hatchery nemo_gym_enabled
"""
_EVALUATION = "do_bench_eval bench_dataset bench_split lm_eval_tasks lm_eval_batch_size lm_eval_post_train lm_eval_model"

REST: Table = {
    **all_of(ignored, common.SPEED, _SPEED),
    **all_of(ignored, "attention is exact whatever computes it; here a measured choice (`attention: auto`)", _ATTENTION),
    **all_of(ignored, common.DEVICES, _DEVICES),
    **all_of(ignored, common.LOADER, _LOADER),
    **all_of(ignored, "rows are packed full, in training and evaluation alike", _ROWS),
    **all_of(ignored, common.LOGS, _LOGS),
    **all_of(ignored, common.TRACKER, _TRACKERS),
    **all_of(ignored, common.GENERATION, _GENERATION),
    **all_of(ignored, "found from the model's own files", _MODEL),
    **all_of(ignored, common.RESUME, "resume_from_checkpoint auto_resume_from_checkpoints dynamic_checkpoint"),
    **all_of(ignored, "checkpoints always hold the optimizer's state; the adapter lies apart", "save_only_model"),
    **all_of(ignored, common.REMOTE_CODE, "trust_remote_code"),
    **all_of(ignored, common.TOKEN, "hf_use_auth_token comet_api_key swanlab_api_key swanlab_lark_webhook_url swanlab_lark_secret"),
    **all_of(ignored, common.HUB, "hub_model_id hub_strategy hub_revision push_dataset_to_hub"),
    **all_of(
        ignored, f"{common.MULTIMODAL}; text is learned", "skip_prepare_dataset image_size image_resize_algorithm role_boundaries"
    ),
    **all_of(ignored, f"{common.MULTIMODAL}; text is learned", "freeze_mm_modules processor_kwargs"),
    **all_of(ignored, "after training: `halfbyte merge`", "merge_lora merge_method"),
    **all_of(ignored, "after training: `halfbyte eval`", _EVALUATION),
    **all_of(
        ignored, "the base's vocabulary stays as it is", "resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings"
    ),
    **all_of(ignored, "the end of a turn is found in the chat template, and proven", "eot_tokens"),
    **all_of(ignored, "goes with the embedding's low-rank matrices, which are not built", "loraplus_lr_embedding"),
    **all_of(ignored, "a step that is not finite is skipped and named; a high loss alone ends no run", "loss_watchdog_threshold"),
    **all_of(ignored, "a step that is not finite is skipped and named; a high loss alone ends no run", "loss_watchdog_patience"),
    **all_of(ignored, "not in axolotl's schema either: it was dropped there", "gptq_groupsize gptq_model_v1"),
    **all_of(ignored, "duplicates are found by the data checks", "dataset_exact_deduplication"),
    **all_of(ignored, "of preference learning, which is not built", _PREFERENCES),
    **all_of(ignored, "of optimizers other than AdamW", _OTHER_OPTIMIZERS),
    **all_of(refused, "a schedule other than a plain cosine, line or constant is not built", _SCHEDULE),
    "relora": refused("ReLoRA's restarts are not built; a larger `lora_r` comes nearest"),
    **all_of(ignored, "of ReLoRA's restarts, which are not built", _RELORA),
    "llama4_linearized_experts": refused("a checkpoint whose experts were split into linear layers is not read: name the original"),
    "tokenizer_use_mistral_common": differs(
        "text becomes tokens by the model's tokenizer.json; `halfbyte data preview` shows them"
    ),
    **all_of(refused, "this variant of LoRA is not built; plain LoRA and rsLoRA are", _VARIANTS),
    **all_of(refused, "this method changes what is learned, and is not built", _METHODS),
    **all_of(
        refused, "the embedding's new rows would need training; not built", "tokens added_tokens_overrides fix_untrained_tokens"
    ),
    **all_of(
        refused, "training on from another adapter is not built: merge it first, and train on the merged model", "lora_model_dir"
    ),
    **all_of(refused, "bases in GPTQ are not read; name the unquantised model, it is packed while it loads", "gptq"),
    **all_of(refused, "which weights learn is said by `adapter.targets` and `adapter.modules_to_save`", "unfrozen_parameters"),
    **all_of(refused, "plain text is a dataset with `type: completion`", "pretraining_dataset"),
    **all_of(refused, "axolotl refuses it too: use sequence_len and sample_packing", "max_packed_sequence_len s2_attention"),
}
