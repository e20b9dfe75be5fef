"""Predicted against measured memory and speed of a step, over shapes, row lengths, ranks, policies and optimizers, on one GPU.

    python bench/memory_gpu.py --out DIR [--only 8b,70b] [--budget 230]       # writes DIR/memory_gpu.jsonl, a line a case
    python bench/memory_gpu.py --out DIR --caps                               # 8B, what is planned for smaller cards, about 60 s
    python bench/memory_gpu.py --cpu                                          # the script itself, on a tiny model

Models have random packed weights, made on the GPU. 32B and 70B run with fewer layers (`layers` of `whole`): layers are alike, and
the peak is a sum over them. Each case runs four steps; the last three are measured: the allocator's peak (allocated, reserved),
and the median of their seconds. `error` is predicted over measured peak, less one; `speed_error` the same of tokens/s. Predictions
come from shapes alone, before the model is built; rates of the GPU from `memory.calibrate`. The last line sums up: worst over,
worst under, mean of the absolute errors. With --caps the policy is the plan for a card of so many GiB, and the allocator may use
0.75 GiB less than that; beside it the same with every layer's input kept, where that fits.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]
for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
    os.environ.setdefault(name, "expandable_segments:True")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from halfbyte.adapters import lora  # noqa: E402
from halfbyte.formats.packed import Format, Packed  # noqa: E402
from halfbyte.formats.quantize import quantize  # noqa: E402
from halfbyte.kernels.products import Augmented, Float8  # noqa: E402
from halfbyte.layers import embedding, forward, head, swap  # noqa: E402
from halfbyte.layers.fused import host  # noqa: E402
from halfbyte.layers.fused.keep import EVERYTHING, INPUTS, OFFLOADED, Keep, keeping  # noqa: E402
from halfbyte.layers.fused.prepare import prepare  # noqa: E402
from halfbyte.layers.linear import Linear4bit  # noqa: E402
from halfbyte.layers.operands import is_linear  # noqa: E402
from halfbyte.memory import calibrate, speed  # noqa: E402
from halfbyte.memory.budget import Budget, budget  # noqa: E402
from halfbyte.memory.choose import Chooser  # noqa: E402
from halfbyte.memory.rungs import Rung  # noqa: E402
from halfbyte.memory.shapes import shapes, skeleton  # noqa: E402
from halfbyte.objectives import sft  # noqa: E402
from halfbyte.optim.adamw import AdamW  # noqa: E402
from halfbyte.optim.flat import flatten  # noqa: E402
from halfbyte.recipe import recipe_from  # noqa: E402
from halfbyte.train import fusing  # noqa: E402

GIB = 1 << 30
TIMED = 3
SHOWN = (
    "size",
    "rank",
    "rows",
    "tokens",
    "policy",
    "cap",
    "failed",
    "bits",
    "compute",
    "decoded",
    "embedding_away",
    "peak_GiB",
    "predicted_GiB",
    "error",
    "tokens_per_s",
    "speed_error",
)
# hidden, MLP, layers measured, layers of the model, heads, kv heads, vocabulary, tied
SIZES: dict[str, tuple[int, int, int, int, int, int, int, bool]] = {
    "tiny": (64, 192, 2, 2, 4, 2, 4096, False),
    "1b": (2048, 8192, 16, 16, 32, 8, 128256, True),
    "3b": (3072, 8192, 28, 28, 24, 8, 128256, True),
    "8b": (4096, 14336, 32, 32, 32, 8, 128256, False),
    "14b": (5120, 17408, 40, 40, 40, 8, 151936, False),
    "32b": (5120, 25600, 16, 64, 64, 8, 151936, False),
    "70b": (8192, 28672, 8, 80, 64, 8, 128256, False),
}
ATTENDED, NO_MLP = keeping(("qkv", "attended", "mid")), keeping(("attended",))
TILED = keeping(("attended",), away=("x",), tile=4096)
SENT = keeping(("qkv", "attended", "mid", "inputs"), away=("x", "qkv", "attended", "mid", "inputs"))
Mix = tuple[Keep, float, Keep]
POLICIES: dict[str, Mix] = {
    "everything": (EVERYTHING, 0.0, EVERYTHING),
    "inputs": (INPUTS, 1.0, INPUTS),
    "offloaded": (OFFLOADED, 1.0, OFFLOADED),
    "attended": (ATTENDED, 1.0, ATTENDED),
    "half": (INPUTS, 0.5, EVERYTHING),
    "third sent": (SENT, 0.3, ATTENDED),
    "tiled": (TILED, 1.0, TILED),
    "attention only": (NO_MLP, 0.8, ATTENDED),
}


@dataclass(frozen=True)
class Case:
    """rows x tokens of one microbatch (of a step where the policy is `plan`); chunks: how many times smaller those of the loss
    are. cap: GiB of the card that is stood for, 0 for the whole one. compute: bf16 or fp8. decoded: weights are held decoded.
    embedding_away: the input embedding is in host memory."""

    size: str
    rank: int
    rows: int
    tokens: int
    policy: str
    bits: int = 32
    paged: bool = False
    chunks: int = 1
    cap: int = 0
    compute: str = "bf16"
    decoded: bool = False
    embedding_away: bool = False


def cases() -> list[Case]:
    """65 of them; models of one size and rank behind each other."""
    found = [Case("1b", 16, m, t, p) for m, t in ((4, 2048), (1, 16384)) for p in ("everything", "inputs", "offloaded", "half")]
    found += [Case("1b", 64, 8, 512, p, 8) for p in ("everything", "attended")]
    found += [Case("3b", 8, m, t, p) for m, t in ((2, 2048), (1, 8192)) for p in ("everything", "inputs", "third sent")]
    found += [Case("3b", 8, 2, 2048, "attended", 8, True, 8)]
    found += [Case("8b", 16, m, t, p) for m, t in ((4, 2048), (1, 2048)) for p in list(POLICIES)[:6]]
    found += [Case("8b", 16, 1, t, p, 8, paged, 8) for t, p, paged in ((16384, "inputs", False), (32768, "tiled", True))]
    found += [Case("8b", 16, 1, 8192, p) for p in ("everything", "attention only", "tiled")]
    found += [
        Case("8b", 16, 4, 2048, p, compute="fp8", decoded=d)
        for p, d in (("everything", False), ("everything", True), ("half", False))
    ]
    found += [Case("8b", 16, 1, 8192, p, compute="fp8") for p in ("inputs", "tiled", "third sent")]
    found += [Case("8b", 16, 1, 2048, "inputs", 8, embedding_away=True, compute=c) for c in ("bf16", "fp8")]
    found += [Case("8b", 128, 2, 2048, p, bits) for p, bits in (("everything", 32), ("inputs", 8), ("half", 32))]
    found += [Case("14b", 32, 1, t, p) for t in (1024, 4096) for p in ("everything", "offloaded", "half")]
    found += [Case("32b", 16, 1, t, p) for t in (2048, 8192) for p in ("everything", "inputs", "third sent")]
    found += [Case("70b", 16, 1, t, p) for t in (1024, 4096) for p in ("everything", "inputs", "offloaded", "attention only")]
    return found


def caps() -> list[Case]:
    """8B under caps: the plan, and the usual choice."""
    found = []
    for tokens, rows in ((8192, 1), (2048, 4)):
        for gib in (8, 12, 16, 24, 48):
            found += [Case("8b", 16, rows, tokens, policy, cap=gib) for policy in ("plan", "inputs", "everything")]
    return found


def tiny() -> list[Case]:
    some = [Case("tiny", 8, m, 64, p) for m in (1, 2) for p in POLICIES]
    return [*some, Case("tiny", 8, 1, 64, "half", compute="fp8"), Case("tiny", 8, 1, 64, "inputs", embedding_away=True)]


def config_of(size: str) -> dict[str, Any]:
    hidden, mlp, layers, _, heads, kv, vocabulary, tied = SIZES[size]
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": 128 if size in ("32b", "3b", "14b") else hidden // heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
    }


def recipe_for(case: Case) -> Any:
    return recipe_from(
        {
            "model": case.size,
            "data": {"train": "none.jsonl", "tokens": case.tokens},
            "adapter": {"rank": case.rank, "targets": "all-linear"},
            "optim": {"bits": case.bits, "paged": "auto" if case.policy == "plan" else "always" if case.paged else "never"},
            "train": {"batch": case.rows},
            "memory": {"microbatch": "auto" if case.policy == "plan" else case.rows},
            "compute": case.compute,
        }
    )


def model_of(size: str, dtype: torch.dtype, device: str) -> Any:
    """Random weights: what is packed is a copy of one weight of its shape."""
    torch.manual_seed(0)
    model = skeleton(config_of(size), dtype)
    made: dict[tuple[int, int], Packed] = {}
    fmt = recipe_from({"model": "m", "data": {"train": "none.jsonl"}}).format
    stored = Format.from_config(fmt)
    output = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if is_linear(module) and module is not output:
            n, k = module.weight.shape
            if (n, k) not in made:
                made[n, k] = quantize(torch.randn(n, k, device=device).mul_(0.02).to(dtype), stored)
            one = made[n, k]
            copies = [t.clone() for t in one.tensors()]
            swap.replace(model, path, Linear4bit(Packed(one.format, one.shape, one.dtype, *copies)))
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.is_meta:
                value = torch.ones if p.ndim == 1 else torch.randn
                scale = 1.0 if p.ndim == 1 else 0.02
                module._parameters[name] = nn.Parameter(value(p.shape, device=device, dtype=dtype).mul_(scale), requires_grad=False)
    model.tie_weights()
    return model.to(device)


@dataclass
class Ready:
    model: Any
    adapter: Any
    output: Any
    flat: Any
    made_for: tuple[str, bool] = ("bf16", False)

    def computes(self, compute: str, decoded: bool) -> None:
        """Products in bf16 or fp8 from now on. decoded: weights are held so, which products in fp8 are told when they are made."""
        if self.made_for != (wanted := (compute, decoded and compute == "fp8")):
            products = Float8() if compute == "fp8" else Augmented()
            done = prepare(self.model, INPUTS, products, in_place=True, decoded=wanted[1])
            assert not done.left, done.summary()
            self.made_for = wanted


def ready(case: Case, dtype: torch.dtype, device: str) -> Ready:
    """The model with its adapter, fused, gradients in place."""
    model = model_of(case.size, dtype, device)
    swap.adopt(model)
    adapter = lora.attach(model, recipe_for(case).adapter, 0)
    flat = flatten(adapter.parameters())
    done = prepare(model, INPUTS, Augmented(), in_place=True)
    assert not done.left, done.summary()
    return Ready(model.train(), adapter, head.find(model), flat)


def rung_of(case: Case, layers: int) -> Rung:
    lean, share, rest = POLICIES[case.policy]
    k = round(share * layers)
    return Rung(
        case.rows,
        recompute=case.policy != "everything",
        offload=bool(lean.away or rest.away),
        paged=case.paged,
        chunks=case.chunks,
        lean=lean.spec(),
        lean_layers=k,
        rest=rest.spec(),
        decoded=case.decoded,
        embedding_away=case.embedding_away,
    )


def predicted(case: Case, rates: speed.Rates, dtype: torch.dtype, device: str) -> tuple[Rung, dict[str, int], float]:
    """The rung, bytes by part without the context, seconds of a step."""
    recipe = recipe_for(case)
    s = shapes(skeleton(config_of(case.size), dtype), recipe.format, recipe.adapter)
    room = budget(f"{case.cap}GiB").bytes if case.cap else 1 << 50
    chooser = Chooser(s, recipe, Budget("cuda", "a cap", room, room, device == "cuda", ""), case.compute, rates)
    if case.policy == "plan":
        rung = next((r for r in chooser.rungs() if r.bytes <= room), chooser.rungs()[-1])
    else:
        rung = rung_of(case, s.layers)
    found = {p.name: p.bytes for p in chooser.parts(rung) if p.name != "context"}
    return rung, found, chooser.seconds(rung)


def measured(case: Case, it: Ready, rung: Rung, device: str) -> dict[str, Any]:
    """Peaks and seconds of the steps behind the first."""
    cuda = device == "cuda"
    it.computes(case.compute, rung.decoded)
    fusing.use(it.model, rung)
    if rung.embedding_away:
        assert not (why := embedding.send(it.model, torch.device(device))), why
    else:
        embedding.bring_back(it.model, torch.device(device))
    host.forget()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (case.cap - 0.75) * GIB / total_bytes) if case.cap else 1.0)
    optimizer = AdamW(it.flat, recipe_for(case).optim, paged=rung.paged)
    one = torch.ones((), device=device)
    total = rung.microbatch * case.tokens
    ids = torch.randint(0, 4000, (1, total), device=device)
    labels = ids.cpu().roll(-1)
    positions = torch.arange(case.tokens, device=device).repeat(rung.microbatch)[None]
    bounds = torch.arange(0, total + 1, case.tokens, dtype=torch.int32)

    def step() -> Any:
        hidden = forward.hidden_states(it.model, ids, positions, bounds)
        loss = sft.loss(hidden, labels, it.output, total, chunks=rung.chunks)
        del hidden
        loss.backward()
        optimizer.clip(loss.detach(), one, 1.0)
        optimizer.step(1e-4)
        return loss.detach()

    step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(TIMED):
        began = time.perf_counter()
        loss = float(step())
        seconds.append(time.perf_counter() - began)
    took = median(seconds)
    line = {"seconds": round(took, 4), "tokens_per_s": round(total / took), "loss": round(loss, 3)}
    if cuda:
        stats = torch.cuda.memory_stats()
        line |= {
            "peak": torch.cuda.max_memory_allocated(),
            "peak_GiB": round(torch.cuda.max_memory_allocated() / GIB, 3),
            "reserved_GiB": round(torch.cuda.max_memory_reserved() / GIB, 3),
            "retries": stats["num_alloc_retries"],
        }
    return line


def run(found: list[Case], device: str, budget: float) -> Iterator[dict[str, Any]]:
    """A line a case."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    began = time.monotonic()
    rates = calibrate.rates(dtype) or speed.tabulated("h200")
    yield {"what": "rates", **asdict(rates), "gpu": torch.cuda.get_device_name() if device == "cuda" else "none"}
    it, key = None, None
    for case in found:
        if time.monotonic() - began > budget:
            yield {"skipped": asdict(case), "why": "no time left"}
            continue
        rung, bytes_, seconds = predicted(case, rates, dtype, device)
        if (case.size, case.rank) != key:
            it = None
            gc.collect()
            key = case.size, case.rank
            it = ready(case, dtype, device)
        assert it is not None
        sizes = SIZES[case.size]
        line: dict[str, Any] = {**asdict(case), "layers": sizes[2], "whole": sizes[3], "rung": rung.words()}
        line["predicted_GiB"] = round(sum(bytes_.values()) / GIB, 3)
        try:
            line |= measured(case, it, rung, device)
        except torch.OutOfMemoryError as error:
            yield line | {"failed": str(error)}
            continue
        # One microbatch and an optimizer step were timed, whatever the step of the plan has.
        times = case.rows // rung.microbatch
        line |= {
            "microbatch": rung.microbatch,
            "predicted_tokens_per_s": round(case.rows * case.tokens / seconds),
        }
        line["speed_error"] = round(line["seconds"] * times / seconds - 1, 4)
        if "peak" in line:
            line["error"] = round(sum(bytes_.values()) / line["peak"] - 1, 4)
        yield line | {"parts_MiB": {name: round(size / 2**20, 1) for name, size in bytes_.items()}}


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"what": "summary", "cases": sum("speed_error" in line for line in lines)}
    for name in ("error", "speed_error"):
        errors = [line[name] for line in lines if name in line]
        if errors:
            mean = sum(abs(e) for e in errors) / len(errors)
            found[name] = {"worst_over": max(errors), "worst_under": min(errors), "mean": round(mean, 4)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--only", default="", help="sizes, comma-separated")
    parser.add_argument("--budget", type=float, default=230.0, help="seconds after which no further case starts")
    parser.add_argument("--caps", action="store_true", help="plans for smaller cards instead of the grid")
    parser.add_argument("--cpu", action="store_true", help="a tiny model, no figures of memory")
    args = parser.parse_args()
    found = (
        tiny() if args.cpu else [c for c in (caps() if args.caps else cases()) if not args.only or c.size in args.only.split(",")]
    )
    where = Path(args.out)
    where.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    with (where / "memory_gpu.jsonl").open("a") as file:
        for line in run(found, "cpu" if args.cpu else "cuda", args.budget):
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(*([f"{k}={line[k]}" for k in SHOWN if k in line] or [json.dumps(line)]), flush=True)
        last = summary(lines)
        file.write(json.dumps(last) + "\n")
        print(json.dumps(last), flush=True)


if __name__ == "__main__":
    main()
