"""Models with random packed weights under a plan: what the benchmarks of memory are made of.

A model is made from shapes alone on the GPU, in seconds, without a checkpoint: what is packed is a copy of one random weight of its
shape. A card that is not here is stood for by a cap on the allocator, 0.75 GiB below the card's size, for context and driver.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

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
from halfbyte.memory import segments, speed  # noqa: E402
from halfbyte.memory.budget import Budget  # noqa: E402
from halfbyte.memory.choose import Chooser  # noqa: E402
from halfbyte.memory.part import NOBODYS  # noqa: E402
from halfbyte.memory.rungs import Rung  # noqa: E402
from halfbyte.memory.shapes import shapes, skeleton  # noqa: E402
from halfbyte.objectives import sft  # noqa: E402
from halfbyte.optim.adamw import AdamW  # noqa: E402
from halfbyte.optim.flat import flatten  # noqa: E402
from halfbyte.recipe import recipe_from  # noqa: E402
from halfbyte.train import fusing  # noqa: E402

segments.grow()
GIB = 1 << 30
BESIDE = 0.75
"""GiB of a card that no allocator has: context and driver."""
# hidden, MLP, layers measured, layers of the model, heads, kv heads, vocabulary, tied
SIZES: dict[str, tuple[int, int, int, int, int, int, int, bool]] = {
    "tiny": (64, 192, 2, 2, 4, 2, 4096, False),
    "tiny4": (64, 192, 4, 4, 4, 2, 4096, False),
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
    embedding_away: the input embedding is in host memory. layers: of the model, 0 for those of SIZES. head: `format.head`."""

    size: str
    rank: int
    rows: int
    tokens: int
    policy: str
    bits: int = 32
    paged: bool = False
    chunks: int = 1
    cap: float = 0
    compute: str = "bf16"
    decoded: bool = False
    embedding_away: bool = False
    layers: int = 0
    head: str = "16bit"

    @property
    def made_of(self) -> tuple[str, int, int, str]:
        """Cases that are alike here share a model."""
        return self.size, self.rank, self.layers, self.head


def config_of(case: Case) -> dict[str, Any]:
    hidden, mlp, layers, _, heads, kv, vocabulary, tied = SIZES[case.size]
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": case.layers or layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": 128 if case.size in ("32b", "3b", "14b") else hidden // heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
    }


def recipe_for(case: Case) -> Any:
    return recipe_from(
        {
            "model": case.size,
            "data": {"train": "none.jsonl", "tokens": case.tokens},
            "format": {"head": case.head},
            "adapter": {"rank": case.rank, "targets": "all-linear"},
            "optim": {"bits": case.bits, "paged": "auto" if case.policy == "plan" else "always" if case.paged else "never"},
            "train": {"batch": case.rows},
            "memory": {"microbatch": "auto" if case.policy == "plan" else case.rows},
            "compute": case.compute,
        }
    )


def model_of(case: Case, dtype: torch.dtype, device: str) -> Any:
    """Random weights: what is packed is a copy of one weight of its shape."""
    torch.manual_seed(0)
    model = skeleton(config_of(case), dtype)
    made: dict[tuple[int, int], Packed] = {}
    fmt = recipe_for(case).format
    output = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        stored = Format.of_head(fmt) if module is output else Format.from_config(fmt)
        if is_linear(module) and stored is not None:
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
    model = model_of(case, dtype, device)
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


def chooser_of(case: Case, rates: speed.Rates, dtype: torch.dtype, device: str, room: int = 1 << 50) -> Chooser:
    """room: bytes that the plan may use, CUDA's context included."""
    recipe = recipe_for(case)
    s = shapes(skeleton(config_of(case), dtype), recipe.format, recipe.adapter)
    return Chooser(s, recipe, Budget("cuda", "a cap", room, room, device == "cuda", ""), case.compute, rates)


def allocated(chooser: Chooser, rung: Rung) -> dict[str, int]:
    """Predicted bytes by part as the allocator counts: without CUDA's context, and what nobody can use."""
    return {p.name: p.bytes for p in chooser.parts(rung) if p.name not in NOBODYS}


def chosen(chooser: Chooser) -> Rung:
    """The plan: the fastest that fits, or the leanest."""
    rungs = chooser.rungs()
    return next((r for r in rungs if r.bytes <= chooser.budget.bytes), rungs[-1])


def use(case: Case, it: Ready, rung: Rung, device: str) -> Callable[[], torch.Tensor]:
    """Puts the model on `rung` under the case's cap; returns a step of one microbatch: forward, backward, clip, AdamW."""
    it.computes(case.compute, rung.decoded)
    fusing.use(it.model, rung)
    if rung.embedding_away:
        assert not (why := embedding.send(it.model, torch.device(device))), why
    else:
        embedding.bring_back(it.model, torch.device(device))
    host.forget()
    gc.collect()
    cap(case.cap, device)
    optimizer = AdamW(it.flat, recipe_for(case).optim, paged=rung.paged)
    one = torch.ones((), device=device)
    total = rung.microbatch * case.tokens
    ids = torch.randint(0, 4000, (1, total), device=device)
    labels = ids.cpu().roll(-1)
    positions = torch.arange(case.tokens, device=device).repeat(rung.microbatch)[None]
    bounds = torch.arange(0, total + 1, case.tokens, dtype=torch.int32)

    def step(microbatches: int = 1) -> torch.Tensor:
        for _ in range(microbatches):
            hidden = forward.hidden_states(it.model, ids, positions, bounds)
            loss = sft.loss(hidden, labels, it.output, total * microbatches, chunks=rung.chunks)
            del hidden
            loss.backward()
        optimizer.clip(loss.detach(), one, 1.0)
        optimizer.step(1e-4)
        return loss.detach()

    return step


def cap(gib: float, device: str) -> None:
    """From now on the allocator of a CUDA device may use so much less than a card of `gib` GiB has as BESIDE says; 0: all."""
    if device == "cuda":
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (gib - BESIDE) * GIB / whole) if gib else 1.0)


def peaks() -> dict[str, Any]:
    """Since the peaks were reset: bytes of tensors, what the allocator held, what is taken of the device; calls that emptied the
    allocator's cache. {} on a CPU."""
    if not torch.cuda.is_available():
        return {}
    free, whole = torch.cuda.mem_get_info()
    return {
        "peak": torch.cuda.max_memory_allocated(),
        "peak_GiB": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "reserved_GiB": round(torch.cuda.max_memory_reserved() / GIB, 3),
        "driver_GiB": round((whole - free) / GIB, 3),
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
    }


def timed(step: Callable[[], Any], device: str, warm: float = 0.0, seconds: float = 0.0) -> tuple[float, int]:
    """Seconds of a step, and how many were timed: after one that is not, and more for `warm` seconds, at least one and as many as
    `seconds` take. Peaks are those of what is timed."""
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    began = time.perf_counter()
    step()
    sync()
    while time.perf_counter() - began < warm:
        step()
        sync()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began, count = time.perf_counter(), 0
    while not count or time.perf_counter() - began < seconds:
        step()
        sync()
        count += 1
    return (time.perf_counter() - began) / count, count


def first(step: Callable[[], Any], device: str) -> tuple[float, int]:
    """Seconds of one step with nothing before it, and 1. Peaks are its own."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, 1
