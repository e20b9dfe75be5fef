"""Held-out loss after equal steps: full fine-tuning, 16-bit LoRA, QLoRA nf4 + nested, QLoRA fp4, and PEFT + bitsandbytes.

    python bench/quality.py dense --gguf SmolLM2-135M-Instruct.Q4_1.gguf --model DIR       bf16 checkpoint that all of them load
    python bench/quality.py run   --model DIR --data alpaca.json --method nf4 --seed 0     one run, one JSON line
    python bench/quality.py all   --model DIR --data alpaca.json --out bench/results/NAME.jsonl [--jobs 5]
    python bench/quality.py table --out bench/results/NAME.jsonl                           means, standard errors, the verdict

Every method sees the same batches in the same order, the same schedule, clip and AdamW (32-bit states), LoRA r=16, alpha=32 on all
linear layers, bf16 compute. `peft-bnb` is transformers + PEFT + bitsandbytes nf4 nested with bf16 autocast, fed our packed rows
with a block-diagonal mask. Data: the public 999-row English GPT-4 Alpaca sample of LLaMA-Factory; 90 % train, 10 % held out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reporting import read

METHODS = ("full", "lora16", "nf4", "fp4", "peft-bnb")
SEEDS = (0, 1, 2)
STEPS, ROWS, TOKENS = 200, 2, 1024
LORA_LR, FULL_LR = 2e-4, 2e-5


def recipe(args: argparse.Namespace, output: str) -> Any:
    """The recipe of a method."""
    from halfbyte.config import Recipe

    method = args.method
    return Recipe.model_validate(
        {
            "model": args.model,
            "format": {
                "kind": {"full": "none", "lora16": "none", "peft-bnb": "none"}.get(method, method),
                "nested": method != "fp4",
            },
            "compute": "bf16",
            "adapter": {"kind": "none" if method == "full" else "lora", "rank": 16, "alpha": 32},
            "data": {"train": [{"path": args.data}], "eval": 0.1, "tokens": TOKENS},
            "train": {
                "batch": ROWS,
                "max_steps": STEPS,
                "epochs": 100,
                "lr": FULL_LR if method == "full" else LORA_LR,
                "seed": args.seed,
                "eval_every": 0,
                "save_every": 0,
                "log_every": 50,
                "best": False,
            },
            "memory": {"recompute": "off", "microbatch": ROWS},
            "output": output,
        }
    )


def dense(args: argparse.Namespace) -> None:
    """The GGUF file as a bf16 checkpoint that transformers alone can load."""
    import torch

    from halfbyte.checkpoints import huggingface
    from halfbyte.formats.config import FormatConfig

    base = huggingface.load(args.gguf, FormatConfig(kind="none"), torch.bfloat16)
    base.model.config._attn_implementation = "sdpa"
    base.model.save_pretrained(args.model)
    base.tokenizer.save_pretrained(args.model)


def run(args: argparse.Namespace) -> None:
    """Train with one method and print its JSON line."""
    import torch

    output = f"{args.work}/{args.method}-{args.seed}"
    if args.method == "peft-bnb":
        before, after, seconds = peer(args, recipe(args, output))
    else:
        from halfbyte.train.run import train

        result = train(recipe(args, output))
        before, after, seconds = pooled(result.eval_before), pooled(result.eval_after), result.seconds
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    line = {
        "method": args.method,
        "seed": args.seed,
        "steps": STEPS,
        "rows": ROWS,
        "tokens": TOKENS,
        "before": before,
        "after": after,
    }
    print(json.dumps(line | {"seconds": round(seconds, 1), "device": device, "torch": torch.__version__}), flush=True)


def pooled(scores: Any) -> float:
    """Mean loss over the tokens of all sets."""
    tokens = sum(s["tokens"] for s in scores.values())
    return float(sum(s["loss"] * s["tokens"] for s in scores.values()) / tokens)


def peer(args: argparse.Namespace, plan: Any) -> tuple[float, float, float]:
    """transformers + PEFT + bitsandbytes on our batches; (held-out loss before, after, seconds)."""
    import time

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from halfbyte.data.loader import Loader
    from halfbyte.data.prepare import prepare
    from halfbyte.layers.forward import block_mask
    from halfbyte.optim.schedule import learning_rate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepared = prepare(plan.data, AutoTokenizer.from_pretrained(args.model), args.seed, Path(args.work) / "cache")
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, quantization_config=quantized, device_map={"": device}, attn_implementation="sdpa"
    )
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LORA_LR, weight_decay=0.0)

    def loss_sum(part: Any) -> Any:
        mask = block_mask(part.cu_seqlens.to(device), part.input_ids.shape[1], torch.bfloat16)
        with torch.autocast(device, torch.bfloat16):
            logits = model(
                input_ids=part.input_ids.to(device),
                position_ids=part.position_ids.to(device),
                attention_mask=mask,
                use_cache=False,
            ).logits
        return torch.nn.functional.cross_entropy(logits[0].float(), part.labels[0].to(device), ignore_index=-100, reduction="sum")

    @torch.no_grad()
    def held_out() -> float:
        model.eval()
        total, tokens = 0.0, 0
        for data in prepared.eval.values():
            for batch in Loader(data, TOKENS, ROWS, args.seed).sweep():
                total += sum(loss_sum(part).item() for part in batch.microbatches(1))
                tokens += batch.trained_tokens
        model.train()
        return total / tokens

    before = held_out()
    loader = Loader(prepared.train, TOKENS, ROWS, args.seed)
    start = time.perf_counter()
    for step in range(STEPS):
        batch = loader.at(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, plan.train)
        for part in batch.microbatches(ROWS):
            (loss_sum(part) / batch.trained_tokens).backward()
        torch.nn.utils.clip_grad_norm_(trainable, plan.train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - start
    return before, held_out(), seconds


def everything(args: argparse.Namespace) -> None:
    """Every method and seed, `--jobs` at a time, each in a fresh process."""
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)

    def one(job: tuple[str, int]) -> str:
        method, seed = job
        command = [sys.executable, __file__, "run", "--model", args.model, "--data", args.data, "--work", args.work]
        done = subprocess.run([*command, "--method", method, "--seed", str(seed)], capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"method"')]
        return lines[-1] if lines else json.dumps({"method": method, "seed": seed, "failed": (done.stdout + done.stderr)[-1500:]})

    jobs = [(method, seed) for seed in SEEDS for method in METHODS]
    with ThreadPoolExecutor(args.jobs) as pool, out.open("a") as file:
        for text in pool.map(one, jobs):
            print(text, flush=True)
            file.write(text + "\n")
            file.flush()
    table(args)


def table(args: argparse.Namespace) -> None:
    """The results as Markdown."""
    print(markdown(Path(args.out)))


def markdown(results: Path) -> str:
    """Means over seeds, gap to 16-bit LoRA, and whether nf4's gap is at most the peer's plus two standard errors."""
    rows = read(results)
    after = {m: {r["seed"]: r["after"] for r in rows if r["method"] == m and "after" in r} for m in METHODS}
    before = {m: statistics.mean(r["before"] for r in rows if r["method"] == m and "after" in r) for m in METHODS if after[m]}
    base = after["lora16"]
    gaps = {m: [after[m][s] - base[s] for s in after[m] if s in base] for m in METHODS}
    text = ["| method | before | after, each seed | mean | gap to 16-bit LoRA |", "| --- | --- | --- | --- | --- |"]
    for m in METHODS:
        if not after[m]:
            continue
        mean, gap = statistics.mean(after[m].values()), statistics.mean(gaps[m])
        seeds = ", ".join(f"{after[m][s]:.4f}" for s in sorted(after[m]))
        text.append(f"| {m} | {before[m]:.4f} | {seeds} | {mean:.4f} | {gap:+.4f} ({gap / statistics.mean(base.values()):+.2%}) |")
    ours, theirs = gaps["nf4"], gaps["peft-bnb"]
    if len(ours) > 1 and len(ours) == len(theirs):
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
        verdict = "within" if mean <= 2 * error else "NOT within"
        text += ["", f"nf4 minus peft-bnb, paired by seed: {mean:+.4f}, standard error {error:.4f}: {verdict} two standard errors."]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["dense", "run", "all", "table"])
    parser.add_argument("--model")
    parser.add_argument("--gguf")
    parser.add_argument("--data")
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=5)
    parser.add_argument("--work", default="runs/quality")
    parser.add_argument("--out", default="bench/results/quality.jsonl")
    args = parser.parse_args()
    {"dense": dense, "run": run, "all": everything, "table": table}[args.command](args)


if __name__ == "__main__":
    main()
