"""One QLoRA training step on the CPU: ours against transformers + PEFT + bitsandbytes, side by side in one run.

    python bench/cpu_step.py [--model smollm2-135m] [--rows 4] [--tokens 256] [--labelled 1.0] [--rank 16] [--repeats 5]

Both sides hold the same packed weights (theirs are loaded from a bitsandbytes checkpoint that we wrote) and start from the same
adapter (theirs is loaded by PEFT from the directory that we saved), r on every linear layer, nf4 with nested scales. A step is
forward, backward, clipping to 1 and AdamW in fp32, on documents whose last `--labelled` part carries a loss (a chat: about half).
Ours computes in what `compute: auto` chose on this machine, and once more with the decoded weights held in memory; theirs is run
in fp32, in bf16 and under bf16 autocast, without gradient checkpointing, and its fastest counts. The sides take turns, so that a
noisy machine is noisy for all; medians and the spread are reported, CPU seconds beside wall seconds (a busy machine
distorts them less), and the load of the machine before and after.

The gate comes first: in fp32 compute, the losses of several steps on the same batch must agree. When it is red, nothing is timed.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from halfbyte.adapters import lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.checkpoints import huggingface, peft
from halfbyte.checkpoints.base import Base
from halfbyte.export import quantize
from halfbyte.formats.config import FormatConfig
from halfbyte.layers import forward, head
from halfbyte.layers.decoded import held
from halfbyte.objectives import sft
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.config import OptimConfig
from halfbyte.optim.flat import flatten
from halfbyte.train import choices

RESULTS = Path(__file__).parent / "results" / "cpu_step.json"
LR, CLIP = 2e-4, 1.0
GATE_STEPS, GATE_RELATIVE = 3, 2e-3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
THEIRS = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "autocast": (torch.bfloat16, True)}
Step = Callable[[], float]


@dataclass(frozen=True)
class Side:
    """One contender. around: entered before the clock starts."""

    step: Step
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Setup:
    """What both sides share. ids, labels: int64 `[rows, tokens]`, one document a row; labels are not shifted."""

    ids: Tensor
    labels: Tensor
    base: Path
    adapter: Path


def documents(tokenizer: Any, rows: int, tokens: int) -> Tensor:
    """Token ids `[rows, tokens]` of this interpreter's own standard library: real text, everywhere the same in kind."""
    text = "".join(inspect.getsource(module) for module in (json, statistics, inspect, argparse))
    ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    return ids[: rows * tokens].view(rows, tokens)


def ours(base: Base, setup: Setup, rank: int) -> tuple[Step, Any]:
    """Our step, as `train` runs it: one packed row, flat buffers, cross-entropy in chunks. Returns (step, adapter)."""
    ids = setup.ids
    rows, tokens = ids.shape
    adapter = lora.attach(base.model, AdapterConfig(rank=rank, alpha=2 * rank), 0)
    output = head.find(base.model)
    flat = flatten(adapter.parameters())
    optimizer = AdamW(flat, OptimConfig())
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = setup.labels[:, 1:]
    positions = torch.arange(tokens).repeat(rows)[None]
    bounds = torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32)
    base.model.train()

    def step() -> float:
        hidden = forward.hidden_states(base.model, ids.reshape(1, -1), positions, bounds)
        loss = sft.loss(hidden, labels.reshape(1, -1), output, int((labels != -100).sum()))
        loss.backward()
        optimizer.clip(loss.detach(), torch.ones(()), CLIP)
        optimizer.step(LR)
        return loss.item()

    return step, adapter


def theirs(setup: Setup, dtype: torch.dtype, autocast: bool = False) -> Step:
    """The peers' step on the same weights and the same adapter."""
    model = AutoModelForCausalLM.from_pretrained(setup.base, dtype=dtype)
    model.config.use_cache = False
    model = PeftModel.from_pretrained(model, setup.adapter, is_trainable=True)
    for module in model.modules():
        if "Linear4bit" in {kind.__name__ for kind in type(module).__mro__}:
            module.compute_dtype = dtype
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    options = OptimConfig()
    optimizer = torch.optim.AdamW(
        trained, lr=LR, betas=(options.beta1, options.beta2), eps=options.eps, weight_decay=options.weight_decay, fused=True
    )

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype) if autocast else nullcontext():
            loss = model(input_ids=setup.ids, labels=setup.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        return float(loss.detach())

    return step


def gate(base: Base, setup: Setup, rank: int) -> dict[str, Any]:
    """Losses of some fp32 steps on both sides. Exits with an error when they differ."""
    mine, adapter = ours(base, setup, rank)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for _, parameter, role in adapter.parameters():
            if role == "lora_b":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1e-3)
    peft.save(adapter, setup.adapter, base)
    other = theirs(setup, torch.float32)
    losses = [(mine(), other()) for _ in range(GATE_STEPS)]
    adapter.remove()
    gap = max(abs(a - b) / b for a, b in losses)
    print(f"gate: losses (ours, theirs) {[(round(a, 5), round(b, 5)) for a, b in losses]}; largest gap {gap:.1e}", flush=True)
    if not gap < GATE_RELATIVE or not losses[-1][0] < losses[0][0]:
        raise SystemExit("the gate is red: the two sides do not train the same model; nothing was timed")
    return {"losses": losses, "largest_gap": gap}


def measure(sides: dict[str, Side], repeats: int) -> None:
    """Seconds a step of each side, taking turns; one step each to warm up."""
    for turn in range(repeats + 1):
        for name, side in sides.items():
            with side.around():
                started, busy = time.perf_counter(), time.process_time()
                side.step()
                took, worked = time.perf_counter() - started, time.process_time() - busy
            if turn:
                side.wall.append(took)
                side.cpu.append(worked)
            print(f"  turn {turn} {name:<20} {took:6.2f} s", flush=True)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    cpu = torch.device("cpu")
    threads = choices.threads(cpu)
    torch.set_num_threads(threads.value)
    chosen = choices.compute("auto", cpu)
    load_before = os.getloadavg()[0]
    print(f"compute: {chosen}\nthreads: {threads}\nload of the machine: {load_before:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        base = huggingface.load(arguments.model, FormatConfig(kind="nf4", nested=True), torch.float32)
        ids = documents(base.tokenizer, arguments.rows, arguments.tokens)
        labelled = torch.arange(arguments.tokens) >= arguments.tokens * (1 - arguments.labelled)
        setup = Setup(ids, torch.where(labelled, ids, -100), Path(scratch) / "base", Path(scratch) / "adapter")
        quantize.save(base, setup.base)
        checked = gate(base, setup, arguments.rank)
        del base
        gc.collect()
        base = huggingface.load(arguments.model, FormatConfig(kind="nf4", nested=True), DTYPES[chosen.value])
        step, _ = ours(base, setup, arguments.rank)
        holding = Side(step, lambda: held(base.model, DTYPES[chosen.value]))
        sides = {"ours": Side(step), "ours, weights held": holding}
        sides |= {f"theirs, {name}": Side(theirs(setup, *THEIRS[name])) for name in arguments.theirs}
        measure(sides, arguments.repeats)
    return report(arguments, sides, checked, {"compute": str(chosen), "threads": str(threads), "load_before": load_before})


def report(
    arguments: argparse.Namespace, sides: dict[str, Side], checked: dict[str, Any], machine: dict[str, Any]
) -> dict[str, Any]:
    tokens = arguments.rows * arguments.tokens
    medians = {name: statistics.median(side.wall) for name, side in sides.items()}
    busy = {name: statistics.median(side.cpu) for name, side in sides.items()}
    best = min((name for name in medians if name.startswith("theirs")), key=lambda name: medians[name])
    for name, side in sides.items():
        spread = f"{min(side.wall):.2f} to {max(side.wall):.2f} s, CPU {busy[name]:.2f} s"
        print(f"{name:<20} median {medians[name]:6.2f} s a step ({spread}), {tokens / medians[name]:6.1f} tokens/s")
    print(f"ours is {medians[best] / medians['ours']:.2f} times as fast as the best of theirs ({best})")
    return {
        "model": arguments.model,
        "shape": {name: getattr(arguments, name) for name in ("rows", "tokens", "labelled", "rank", "repeats")},
        "gate": checked,
        "seconds": {name: side.wall for name, side in sides.items()},
        "median_seconds": medians,
        "median_cpu_seconds": busy,
        "tokens_per_second": {name: tokens / value for name, value in medians.items()},
        "best_of_theirs": best,
        "ratio": medians[best] / medians["ours"],
        "machine": machine | {"load_after": os.getloadavg()[0], "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
        | {"python": sys.version.split()[0]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--labelled", type=float, default=1.0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--theirs", nargs="+", default=list(THEIRS), choices=list(THEIRS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    result = run(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
