"""Training throughput and peak memory on one GPU: ours and the peers, real shapes, random weights, one run.

    python bench/throughput.py make --dir M --size 8b --tokenizer DIR
    python bench/throughput.py run  --dir M --impl halfbyte --rows 4 --tokens 2048 [--recompute]
    python bench/throughput.py all  --dir M --out bench/results/NAME.jsonl      every implementation in turn, fresh processes
    python bench/throughput.py table --out bench/results/NAME.jsonl             as Markdown

`run` prints one JSON line. A step is forward, backward, clipping (ours) and AdamW on `rows` rows of random tokens, one document a
row. Ours runs fp32 AdamW states, the peers bitsandbytes' 8-bit AdamW. Peak is the allocator's. Peers need bitsandbytes, PEFT,
Liger and Unsloth installed. Correctness gate: the loss of a base with random weights must be finite and near ln(vocabulary).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = {  # hidden, mlp, layers, heads, kv heads, vocabulary
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
WARMUP, STEPS = 3, 6
KNOWN_TOKENS = 49_000
"""Random tokens are drawn below this: every tokenizer in question has them."""

MATRIX = [  # implementation, recompute
    ("halfbyte", False),
    ("unsloth", False),
    ("peft-bnb-liger", False),
    ("peft-bf16-liger", False),
    ("halfbyte", True),
    ("unsloth", True),
    ("peft-bnb-liger", True),
    ("peft-bnb", True),
    ("halfbyte-bf16", False),
    ("halfbyte", False),
]


def make(args: argparse.Namespace) -> None:
    """Write a Llama checkpoint with random bf16 weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, mlp, layers, heads, kv_heads, vocabulary = SIZES[args.size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(args.dir, max_shard_size="4GB")
    for file in Path(args.tokenizer).iterdir():
        shutil.copy(file, args.dir)
    print(json.dumps({"made": args.dir, "parameters": sum(p.numel() for p in model.parameters())}))


def ours(args: argparse.Namespace) -> tuple[Any, Any, int]:
    """(model, step function, trainable parameters) of this package."""
    import torch

    from halfbyte.adapters import lora
    from halfbyte.adapters.config import AdapterConfig
    from halfbyte.checkpoints import huggingface
    from halfbyte.formats.config import FormatConfig
    from halfbyte.layers import forward, head, recompute
    from halfbyte.objectives import sft
    from halfbyte.optim import flat as flat_buffers
    from halfbyte.optim.adamw import AdamW
    from halfbyte.optim.config import OptimConfig

    kind = "none" if args.impl.endswith("bf16") else "nf4"
    base = huggingface.load(args.dir, FormatConfig(kind=kind), torch.bfloat16, "cuda")  # type: ignore[arg-type]
    adapter = lora.attach(base.model, AdapterConfig(rank=RANK, alpha=RANK, targets="all-linear"), seed=0)
    recompute.set_recompute(base.model, args.recompute)
    base.model.train()
    flat = flat_buffers.flatten(adapter.parameters())
    optimizer, one = AdamW(flat, OptimConfig()), torch.ones((), device="cuda")
    output = head.find(base.model)
    rows, tokens = args.rows, args.tokens
    positions = torch.arange(tokens, device="cuda").repeat(rows)[None]
    bounds = torch.arange(0, (rows + 1) * tokens, tokens, dtype=torch.int32)

    def step() -> Any:
        ids = torch.randint(0, KNOWN_TOKENS, (1, rows * tokens), device="cuda")
        labels = ids.roll(-1)
        labels[0, tokens - 1 :: tokens] = -100
        hidden = forward.hidden_states(base.model, ids, positions, bounds)
        loss = sft.loss(hidden, labels, output, rows * (tokens - 1))
        loss.backward()
        optimizer.clip(loss.detach(), one, 1.0)
        optimizer.step(1e-4)
        return loss.detach()

    return base.model, step, flat.numel


def peer_model(args: argparse.Namespace) -> Any:
    """A peer's model with its LoRA attached, in training mode."""
    if args.impl == "unsloth":
        os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", UNSLOTH_STABLE_DOWNLOADS="1")
        import torch
        import unsloth  # noqa: F401  (must come before torch)
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            args.dir, max_seq_length=args.tokens, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=RANK,
            lora_alpha=RANK,
            lora_dropout=0,
            target_modules=TARGETS,
            bias="none",
            use_gradient_checkpointing="unsloth" if args.recompute else False,
        )
        FastLanguageModel.for_training(model, use_gradient_checkpointing=args.recompute)
        return model
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if args.impl.endswith("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    quantized = {}
    if "bnb" in args.impl:
        quantized["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoModelForCausalLM.from_pretrained(
        args.dir, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="sdpa", **quantized
    )
    model.config.use_cache = False
    if args.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM"))
    return model.train()


def peer(args: argparse.Namespace) -> tuple[Any, Any, int]:
    """(model, step function, trainable parameters) of a peer."""
    model = peer_model(args)
    import bitsandbytes as bnb
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.AdamW8bit(trainable, lr=1e-4)

    def step() -> Any:
        ids = torch.randint(0, KNOWN_TOKENS, (args.rows, args.tokens), device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return model, step, sum(p.numel() for p in trainable)


def run(args: argparse.Namespace) -> None:
    """Time one implementation and print its JSON line."""
    began = time.perf_counter()
    model, step, trainable = ours(args) if args.impl.startswith("halfbyte") else peer(args)
    import torch

    loaded = time.perf_counter() - began
    resident = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    first = time.perf_counter()
    for _ in range(WARMUP):
        loss = step()
    torch.cuda.synchronize()
    warm = time.perf_counter() - first
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = sorted(times)[len(times) // 2]
    value = loss.item()
    vocabulary = model.config.vocab_size
    gate = math.isfinite(value) and abs(value - math.log(vocabulary)) < 1.5
    line = {
        "impl": args.impl,
        "recompute": args.recompute,
        "rows": args.rows,
        "tokens": args.tokens,
        "rank": RANK,
        "trainable": trainable,
        "gate": "green" if gate else "red",
        "loss": round(value, 4),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "load_s": round(loaded, 1),
        "warmup_s": round(warm, 1),
        "resident_GiB": round(resident / 2**30, 3),
    }
    if gate:
        line |= {
            "step_s": round(seconds, 4),
            "tokens_per_s": round(args.rows * args.tokens / seconds),
            "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        }
    print(json.dumps(line), flush=True)


def everything(args: argparse.Namespace) -> None:
    """Every row of MATRIX in a fresh process, in turn; lines to --out and the terminal."""
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        for impl, recompute in MATRIX:
            command = [sys.executable, __file__, "run", "--dir", args.dir, "--impl", impl]
            command += ["--rows", str(args.rows), "--tokens", str(args.tokens), *(["--recompute"] if recompute else [])]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith('{"impl"')]
            text = lines[-1] if lines else json.dumps({"impl": impl, "recompute": recompute, "failed": done.stderr[-1500:]})
            print(text, flush=True)
            file.write(text + "\n")
            file.flush()


def table(args: argparse.Namespace) -> None:
    """The results as Markdown."""
    print(markdown(Path(args.out)))


def markdown(results: Path) -> str:
    """One row a run, in the order they ran; a red gate or a failure shows no figure."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    text = ["| implementation | recompute | tokens/s | peak GiB | resident GiB |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        figures = (
            [f"{row['tokens_per_s']:,}", f"{row['peak_GiB']:.1f}", f"{row['resident_GiB']:.1f}"] if "step_s" in row else ["-"] * 3
        )
        text.append(f"| {row['impl']} | {'full' if row['recompute'] else 'none'} | {' | '.join(figures)} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["make", "run", "all", "table"])
    parser.add_argument("--dir", default="model")
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--tokenizer")
    parser.add_argument("--impl", default="halfbyte")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--out", default="bench/results/throughput.jsonl")
    args = parser.parse_args()
    {"make": make, "run": run, "all": everything, "table": table}[args.command](args)


if __name__ == "__main__":
    main()
