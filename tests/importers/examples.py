"""Settings of four trainers as their users write them, by hand from the tools' documentation.

Values differ from every default, theirs and ours, where a test depends on it.
"""

from __future__ import annotations

AXOLOTL = """\
base_model: NousResearch/Meta-Llama-3.1-8B
revision_of_model: abc123
load_in_8bit: false
load_in_4bit: true
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_fan_in_fan_out:
datasets:
  - path: fozziethebeat/alpaca_messages_2k_test
    type: chat_template
    split: train[:20%]
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
    roles_to_train: [assistant]
    train_on_eos: turn
chat_template: llama3
val_set_size: 0.1
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
bf16: auto
tf32: true
gradient_checkpointing: true
attn_implementation: flash_attention_2
logging_steps: 1
weight_decay: 0.01
wandb_project:
resume_from_checkpoint:
special_tokens:
  pad_token: <|end_of_text|>
output_dir: ./outputs/qlora-out
"""

LLAMAFACTORY = """\
### model
model_name_or_path: Qwen/Qwen3-4B-Instruct-2507
trust_remote_code: true
quantization_bit: 4
quantization_method: bnb
double_quantization: false
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: q_proj,v_proj
### dataset
dataset: mine,theirs
template: qwen3_nothink
cutoff_len: 512
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
### output
output_dir: saves/qwen3-4b/lora/sft
logging_steps: 10
save_steps: 250
plot_loss: true
overwrite_output_dir: true
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
"""

DATASET_INFO = """\
{"mine": {"file_name": "mine.json"},
 "theirs": {"hf_hub_url": "org/theirs", "subset": "en", "split": "validation", "formatting": "sharegpt", "num_samples": 50,
            "columns": {"messages": "messages"}, "tags": {"role_tag": "role", "content_tag": "content"}},
 "pairs": {"file_name": "pairs.json", "ranking": true, "columns": {"chosen": "chosen", "rejected": "rejected"}},
 "pictures": {"file_name": "p.json", "formatting": "sharegpt", "columns": {"images": "images"}},
 "script": {"script_url": "loader.py"}}
"""

TRL = """\
#!/bin/bash
export HF_TOKEN=hf_private
accelerate launch --num_processes 4 --config_file zero3.yaml trl/scripts/sft.py \\
    --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name trl-lib/Capybara --dataset_config en \\
    --learning_rate 1.0e-4 --num_train_epochs 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 \\
    --packing --eval_strategy steps --eval_steps 50 --max_length 2048 --assistant_only_loss \\
    --use_peft --load_in_4bit --use_bnb_nested_quant --lora_r 32 --lora_alpha 64 --lora_target_modules q_proj k_proj v_proj \\
    --eos_token '<|im_end|>' --output_dir out --push_to_hub --hub_token hf_private
"""

UNSLOTH = (
    'python unsloth-cli.py --model_name "unsloth/llama-3-8b" --max_seq_length 8192 --dtype None --load_in_4bit --r 64 '
    '--lora_alpha 32 --lora_dropout 0.1 --bias "none" --use_gradient_checkpointing "unsloth" --random_state 3407 --use_rslora '
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 8 --warmup_steps 5 --max_steps 400 --learning_rate 2e-6 "
    '--logging_steps 1 --optim "adamw_8bit" --weight_decay 0.005 --lr_scheduler_type "linear" --seed 3407 --output_dir "outputs" '
    '--report_to "tensorboard" --save_model --save_path "model" --push_model --hub_path "me/model" --hub_token "hf_private"'
)

AXOLOTL_QLORA_KEYS = """
base_model load_in_4bit output_dir datasets adapter lora_r lora_alpha sequence_len micro_batch_size num_epochs optimizer
lr_scheduler learning_rate bf16 tf32 warmup_ratio evals_per_epoch gradient_accumulation_steps logging_steps saves_per_epoch
val_set_size sample_packing gradient_checkpointing attn_implementation lora_dropout wandb_project wandb_entity wandb_watch
wandb_log_model wandb_name weight_decay dataset_prepared_path resume_from_checkpoint special_tokens lora_target_modules
load_in_8bit lora_model_dir lora_target_linear plugins gradient_checkpointing_kwargs chat_template model_type tokenizer_type
eval_sample_packing fsdp_config lora_mlp_kernel lora_qkv_kernel lora_o_kernel remove_unused_columns fsdp pad_to_sequence_len
quantize_moe_experts liger_glu_activation liger_rms_norm trust_remote_code processor_type skip_prepare_dataset liger_layer_norm
eot_tokens fp16 tokenizer_use_mistral_common ddp_find_unused_parameters strict loss_watchdog_threshold loss_watchdog_patience
lora_modules_to_save llama4_linearized_experts liger_rope liger_rms_norm_gated push_dataset_to_hub torchdistx_path
gptq_groupsize gptq_model_v1 flash_attention unfrozen_parameters model_config flex_attn_compile_kwargs torch_compile use_kernels
use_scattermoe bnb_config_kwargs gemma4_hybrid_attn_impl activation_offloading rl max_packed_sequence_len cut_cross_entropy
low_cpu_mem_usage deepspeed experts_implementation lora_target_parameters fused_attn_kernel max_steps gptq
early_stopping_patience auto_resume_from_checkpoints revision_of_model use_tensorboard context_parallel_size orpo_alpha
eval_batch_size wandb_run_id eval_steps save_steps save_total_limit batch_size adam_beta2 adam_epsilon max_grad_norm
resize_token_embeddings_to_32x liger_fused_linear_cross_entropy peft_use_rslora use_otel_metrics otel_metrics_host
otel_metrics_port use_wandb rl_beta kto_desirable_weight relora relora_prune_ratio relora_cpu_offload jagged_restart_steps
jagged_restart_warmup_steps jagged_restart_anneal_steps
"""
"""Every key of axolotl's own QLoRA examples but the misspelt one."""
LLAMAFACTORY_QLORA_KEYS = """
model_name_or_path trust_remote_code quantization_bit quantization_method double_quantization quantization_type
quantization_device_map stage do_train finetuning_type lora_rank lora_alpha lora_dropout lora_target dataset dataset_dir
template cutoff_len max_samples overwrite_cache preprocessing_num_workers dataloader_num_workers output_dir logging_steps
save_steps plot_loss overwrite_output_dir save_only_model report_to per_device_train_batch_size gradient_accumulation_steps
learning_rate num_train_epochs lr_scheduler_type warmup_ratio bf16 ddp_timeout resume_from_checkpoint val_size
per_device_eval_batch_size eval_strategy eval_steps eval_dataset adapter_name_or_path export_dir export_size export_device
export_legacy_format infer_backend
"""
"""Every key of LLaMA-Factory's QLoRA, merge and inference examples."""
