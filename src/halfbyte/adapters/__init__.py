"""What learns: LoRA on any linear module, its targets, its state in PEFT's names; and full fine-tuning."""
