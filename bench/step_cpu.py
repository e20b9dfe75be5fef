"""A QLoRA training step on a CPU: ours against transformers + PEFT + bitsandbytes, in turn, in one process.

    python bench/step_cpu.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --work DIR [--rows 4] [--tokens 256] [--labelled 1.0]

Both: NF4 with nested scales, LoRA r=16 on all linear layers, fp32 adapters and AdamW states, bf16 compute, no recompute,
`--labelled` of the positions with a label (chats: about a half), one document a row. The peer runs under bf16 autocast, and
without; the faster of the two is the peer.
CPU seconds are given beside wall seconds: they are what a busy machine leaves comparable.
Correctness gate: both start from one base, so the losses of the first step must agree within 1 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

RANK = 16


Step = Callable[[Tensor, Tensor], float]
"""Takes ids and labels `[rows, tokens]` (labels not shifted); returns the loss."""


def ours(gguf: str, rows: int, tokens: int) -> Step:
    """One step of our loop's parts."""
    from halfbyte.adapters import lora
    from halfbyte.adapters.config import AdapterConfig
    from halfbyte.checkpoints import huggingface
    from halfbyte.formats.config import FormatConfig
    from halfbyte.layers import forward, head
    from halfbyte.objectives import sft
    from halfbyte.optim import adamw, flat
    from halfbyte.optim.config import OptimConfig

    base = huggingface.load(gguf, FormatConfig(), torch.bfloat16)
    adapter = lora.attach(base.model, AdapterConfig(rank=RANK, alpha=2 * RANK), 0)
    base.model.train()
    output = head.find(base.model)
    group = flat.flatten(adapter.parameters())
    optimizer = adamw.AdamW(group, OptimConfig())
    bounds = torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32)
    positions = torch.arange(tokens).repeat(rows)[None]

    def step(ids: Tensor, labels: Tensor) -> float:
        group.grads.zero_()
        labels = labels.roll(-1, 1)
        labels[:, -1] = -100
        hidden = forward.hidden_states(base.model, ids.view(1, -1), positions, bounds)
        loss = sft.loss(hidden, labels.view(1, -1), output, int((labels != -100).sum()))
        loss.backward()
        optimizer.step(1e-4, torch.zeros(()))
        return float(loss.detach())

    return step


def peer(gguf: str, work: Path, autocast: bool) -> Step:
    """transformers + PEFT + bitsandbytes on the dense bf16 checkpoint of the same file."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from halfbyte.checkpoints import huggingface
    from halfbyte.formats.config import FormatConfig

    if not (work / "config.json").exists():
        base = huggingface.load(gguf, FormatConfig(kind="none"), torch.bfloat16)
        base.model.config._attn_implementation = "sdpa"
        base.model.save_pretrained(work)
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        work, dtype=torch.bfloat16, quantization_config=quantized, device_map={"": "cpu"}, attn_implementation="sdpa"
    )
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)

    def step(ids: Tensor, labels: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--labelled", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ids = torch.randint(0, 40_000, (args.rows, args.tokens))
    labels = torch.where(torch.arange(args.tokens) >= args.tokens * (1 - args.labelled), ids, -100)
    steps = {
        "halfbyte": ours(args.gguf, args.rows, args.tokens),
        "peft-bnb autocast": peer(args.gguf, args.work, True),
        "peft-bnb": peer(args.gguf, args.work, False),
    }
    first = {name: step(ids, labels) for name, step in steps.items()}
    if max(first.values()) > 1.01 * min(first.values()):
        print(f"losses of the first step differ: {first}", file=sys.stderr)
        return 1
    wall: dict[str, list[float]] = {name: [] for name in steps}
    busy: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.steps):
        for name, step in steps.items():
            at, cpu = time.perf_counter(), time.process_time()
            step(ids, labels)
            wall[name].append(time.perf_counter() - at)
            busy[name].append(time.process_time() - cpu)
    positions = args.rows * args.tokens
    for name in steps:
        seconds, cpu = statistics.median(wall[name]), statistics.median(busy[name])
        print(
            json.dumps(
                {
                    "impl": name,
                    "rows": args.rows,
                    "tokens": args.tokens,
                    "labelled": args.labelled,
                    "threads": args.threads,
                    "wall_s": round(seconds, 3),
                    "cpu_s": round(cpu, 3),
                    "tokens_per_s": round(positions / seconds, 1),
                    "first_loss": round(first[name], 4),
                }
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
