"""Unsloth's settings by speed and memory on one GPU: what `fits_gpu.py --table` holds our plans against.

    python bench/peer_fits.py --out DIR --dir M --tokenizer DIR [--budget 150]     # writes DIR/peer_fits.jsonl, a line a setting
    python bench/peer_fits.py --cpu --out DIR                                 # the script itself, with a tiny model in its place

One process, one 8B model in nf4 (random weights, `random_model.py`), rank 16, 8-bit AdamW: its rows at once by the three ways that
it has to recompute (none, `unsloth`: inputs offloaded, and inputs on the GPU), over a batch of 1 x 8,192 and of 4 x 2,048 tokens.
No cap is set: a setting fits a card where what its tensors took at the peak does, which is the kindest count. Times are those of
`fits_gpu.py`: whole steps on a hot chip. Gate: the loss of a random head (`measured.py`).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from engines import Case, feed

WARM, TIMED = 0.7, 1.0
BATCHES = ((1, 8192), (4, 2048))
"""Rows and tokens of a step."""
WAYS = {"none": False, "unsloth": "unsloth", "on the GPU": True}
SHOWN = ("setting", "tokens", "failed", "gate", "tokens_per_s", "peak_GiB", "reserved_GiB", "driver_GiB", "loss")


def settings() -> list[tuple[str, int, int, int]]:
    """Way, rows at once, rows and tokens of a step; ways behind each other, since to change one costs seconds."""
    return [(way, m, rows, tokens) for way in ("unsloth", "none", "on the GPU") for rows, tokens in BATCHES for m in at_once(rows)]


def at_once(rows: int) -> list[int]:
    return [m for m in range(rows, 0, -1) if rows % m == 0]


def recompute(model: Any, way: str) -> None:
    """Sets one of WAYS on a model that was made with `unsloth`'s."""
    from unsloth import FastLanguageModel
    from unsloth_zoo.gradient_checkpointing import unpatch_unsloth_smart_gradient_checkpointing as unpatch

    if way == "on the GPU":
        unpatch()
        model.gradient_checkpointing_enable({"use_reentrant": True})
    FastLanguageModel.for_training(model, use_gradient_checkpointing=WAYS[way])


def steps_of(model: Any, optimizer: Any, case: Case, rows: int, device: str) -> Callable[[], Any]:
    """A step of `rows` rows, `case.rows` at once."""
    import torch

    batches = feed(case, Path(), None, device)
    inputs = [batch.ids.view(case.rows, case.tokens) for batch in batches]
    times = rows // case.rows

    def step() -> Any:
        for i in range(times):
            with torch.autocast(device, torch.bfloat16):
                loss = model(input_ids=inputs[i], labels=inputs[i]).loss / times
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach() * times

    return step


def measured(step: Callable[[], Any], tokens: int, config: Any, device: str) -> dict[str, Any]:
    """Figures of hot steps, none where the loss is not that of a model that runs as it should."""
    import planned
    from measured import plausible

    loss: Any = math.nan

    def once() -> None:
        nonlocal loss
        loss = step()

    seconds, count = planned.timed(once, device, WARM, TIMED)
    near = plausible(float(loss), config)
    line = {"gate": "green" if near else "red", "loss": round(float(loss), 3), "steps": count, **planned.peaks()}
    return line | ({"tokens_per_s": round(tokens / seconds), "seconds": round(seconds, 4)} if near else {})


def model_of(root: str, tokenizer: str | None, device: str) -> tuple[Any, Any]:
    """Unsloth's 8B with its optimizer; on a CPU a tiny model of PEFT's with torch's."""
    if device == "cpu":
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(vocab_size=49152, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4)
        tiny = LlamaForCausalLM(config)
        return tiny, torch.optim.AdamW(tiny.parameters(), lr=1e-6)
    import unsloth  # type: ignore[import-not-found,unused-ignore]  # noqa: F401  (before torch)
    from engines import unsloth as build
    from random_model import exists, make

    case = Case("unsloth", recompute="full", tokens=8192)
    if not exists(case.directory(root)):
        print(json.dumps(make(case, root, tokenizer)), flush=True)
    model = build(case, case.directory(root), 8192)
    import bitsandbytes  # type: ignore[import-not-found,unused-ignore]

    return model, bitsandbytes.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def run(root: str, tokenizer: str | None, device: str, budget: float, file: TextIO) -> None:
    begun = time.monotonic()

    def tell(line: dict[str, Any]) -> None:
        line["at_s"] = round(time.monotonic() - begun, 1)
        file.write(json.dumps(line) + "\n")
        file.flush()
        print(*(f"{k}={line[k]}" for k in SHOWN if k in line), flush=True)

    model, optimizer = model_of(root, tokenizer, device)
    import torch

    now = "unsloth"
    for way, m, rows, tokens in settings():
        line: dict[str, Any] = {"setting": f"{m} at once, recompute: {way}", "batch": rows, "tokens": tokens}
        if time.monotonic() - begun > budget:
            tell(line | {"failed": "no time left"})
            continue
        case = replace(Case("unsloth", "8b" if device == "cuda" else "tiny"), rows=m, tokens=tokens if device == "cuda" else 32)
        try:
            if device == "cuda":
                if way != now:
                    recompute(model, now := way)
                gc.collect()
                torch.cuda.empty_cache()
            step = steps_of(model, optimizer, case, rows, device)
            tell(line | measured(step, rows * case.tokens, model.config, device))
        except (RuntimeError, ImportError) as error:  # a way that this version does not have leaves the others
            optimizer.zero_grad(set_to_none=True)
            tell(line | {"failed": str(error)[:200]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dir", default="model", help="where the checkpoint is, or is made")
    parser.add_argument("--tokenizer", help="a tokenizer's folder, for a checkpoint that is made")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds after which no further setting is begun")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", UNSLOTH_STABLE_DOWNLOADS="1")
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "peer_fits.jsonl").open("w") as file:
        run(args.dir, args.tokenizer, "cpu" if args.cpu else "cuda", args.budget, file)


if __name__ == "__main__":
    sys.exit(main())
