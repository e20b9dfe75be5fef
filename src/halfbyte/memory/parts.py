"""The bytes of each part of a run, from a model's config and a recipe alone: nothing is loaded and nothing is run.

The weights are exact: the same shapes go through the same rules as at load. What learns is exact. Activations are counted
tensor by tensor as the decoder layer keeps them for backward; buffers of libraries and the allocator's rounding are
estimates, and are shown as parts of their own.

Letters: T = tokens in a microbatch (m rows), H = hidden, N/K = outputs/inputs of a linear layer, c = bytes of a number.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import PretrainedConfig

from halfbyte.config import Recipe
from halfbyte.kernels.cross_entropy import CHUNK_BYTES
from halfbyte.kernels.cross_entropy.slices import SLICE_BYTES
from halfbyte.memory import fused, paging, timeline
from halfbyte.memory.part import Part
from halfbyte.memory.rungs import Rung
from halfbyte.memory.shapes import Shapes, shapes, skeleton
from halfbyte.memory.tape import Work
from halfbyte.memory.timeline import Ends

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}
"""What is stored and kept; with fp8 only the large products are made in e4m3."""
CONTEXT = {"cuda": 720 << 20, "cpu": 620 << 20}
"""What is there before the model: CUDA context and library workspaces; on a CPU, Python with its libraries (measured)."""

WORKSPACES = 96 << 20
"""cuBLAS's on each of two streams and cuBLASLt's, 32 MiB each (measured on an H200; other cards take less)."""
HEAP_SHARE = {2: 0.9, 4: 0.5}
"""Of the activations, on a CPU, by bytes a number: the heap grows so far over a run before it stays (measured on SmolLM2-135M; 0.5
to 0.9 in 16 bits, 0.35 to 0.37 in fp32, where tensors are alike in size and take the places of those that were freed)."""


def parts(
    config: dict[str, Any] | PretrainedConfig,
    recipe: Recipe,
    *,
    microbatch: int = 1,
    recompute: bool = False,
    compute: str = "bf16",
    device: Literal["cuda", "cpu"] = "cuda",
    offload: bool = False,
) -> list[Part]:
    """The parts of a run of `recipe` on the model of `config` (a config.json), the largest first; on a GPU with fused layers."""
    s = shapes(skeleton(config, DTYPES[compute]), recipe.format, recipe.adapter)
    layer = fused_layer(s, compute) if device == "cuda" else None
    return count(s, recipe, Rung(microbatch, recompute, offload), DTYPES[compute], device, layer)


def fused_layer(s: Shapes, compute: str) -> fused.Layer | None:
    """The layer as it runs fused in `compute`; None where it cannot."""
    if not isinstance(s.layer, fused.Layer):
        return None
    return s.layer.in_float8() if compute == "fp8" else s.layer


def count(
    s: Shapes, recipe: Recipe, rung: Rung, dtype: torch.dtype, device: Literal["cuda", "cpu"], one: fused.Layer | None
) -> list[Part]:
    """The same from shapes that are known. one: the layer as it runs fused, None where layers run as modules."""
    tokens = rung.microbatch * recipe.data.tokens
    found = [*weights(s, recipe, rung.embedding_away), *learning(s, recipe, rung.paged)]
    if one is not None:
        found += fused_activations(s, one, tokens, rung, dtype)
    else:
        found += [*activations(s, tokens, rung.recompute, dtype), working(s, tokens, rung.recompute, dtype, device, rung.chunks)]
    kept = next(p.bytes for p in found if p.name == "activations")
    if recipe.adapter.kind == "none":
        found += casts(s, dtype)
    if s.report.packed and one is None:
        scratch = 2 * s.largest * dtype.itemsize
        found.append(Part("decode scratch", scratch, f"the largest weight decoded ({s.largest:,} numbers), and what it is made of"))
        if device == "cpu" and recipe.train.prompts:
            held = sum(r.params for r in s.report.packed) * dtype.itemsize
            found.append(Part("answers", held, "decoded weights, held while the fixed prompts are answered"))
    if device == "cpu":
        found.append(
            Part("heap", int(HEAP_SHARE[dtype.itemsize] * kept), "what the C allocator keeps of freed tensors", grows=True)
        )
    found += outside(device)
    return sorted((p for p in found if p.bytes or p.host), key=lambda p: -p.bytes)


def outside(device: Literal["cuda", "cpu"]) -> list[Part]:
    """What no tensor of ours is in. The context is not the allocator's; the workspaces are."""
    if device == "cpu":
        return [Part("context", CONTEXT["cpu"], "Python and its libraries")]
    return [
        Part("context", CONTEXT["cuda"], "CUDA's own, and kernels"),
        Part("workspaces", WORKSPACES, "of the libraries that multiply"),
    ]


def casts(s: Shapes, dtype: torch.dtype) -> list[Part]:
    """Full fine-tuning in 16 bits: autocast's copies of the weights, kept for backward; and the head's gradient in fp32."""
    copies = 0 if dtype == torch.float32 else sum(r.params for r in s.report.rows) * dtype.itemsize
    return [
        Part("casts", copies + 4 * s.vocab * s.hidden, "weights in the compute dtype for backward, the head's gradient in fp32")
    ]


def weights(s: Shapes, recipe: Recipe, embedding_away: bool = False) -> list[Part]:
    """The base: exact. embedding_away: the input embedding is in host memory."""
    packed = sum(r.bytes for r in s.report.packed)
    away = s.embedding if embedding_away else 0
    kept = sum(r.bytes for r in s.report.kept) - away
    if recipe.adapter.kind == "none":
        return [Part("weights", 4 * s.report.params, "fp32 masters of every weight")]
    bits = 8 * packed / max(1, sum(r.params for r in s.report.packed))
    nested = ", nested scales" if recipe.format.nested and recipe.format.kind in ("nf4", "fp4") else ""
    return [
        Part("packed weights", packed, f"{recipe.format.kind}{nested}: {bits:.3f} bits a weight"),
        Part("other weights", kept, _others(s, bool(packed), bool(away))),
        Part("embedding", 0, "in host memory", host=away),
    ]


OTHERS = {
    "embedding": "embeddings",
    "head": "head",
    "norm": "norms",
    "experts": "experts (no format packs them yet)",
    "bias": "biases",
    "linear": "layers that format.skip names",
    "other": "other parameters",
}
"""Kinds of rows that are kept, for people."""


def _others(s: Shapes, packed: bool, away: bool) -> str:
    """What is not packed, the largest first."""
    if not packed:
        return "all weights of the frozen base" + (" but the embedding" if away else "")
    sizes = dict.fromkeys(OTHERS, 0)
    for row in s.report.kept:
        sizes["linear" if row.kind == "conv1d" else row.kind] += row.bytes
    if away:
        sizes["embedding"] -= s.embedding
    return ", ".join(OTHERS[kind] for kind in sorted(sizes, key=lambda kind: -sizes[kind]) if sizes[kind])


def learning(s: Shapes, recipe: Recipe, paged: bool = False) -> list[Part]:
    """What learns and its gradients, fp32 in flat buffers, and Adam's two moments: exact."""
    n = 4 * s.padded
    own = [] if recipe.adapter.kind == "none" else [Part("adapter", n, f"{s.trained:,} numbers in fp32")]
    return [*own, Part("gradients", n, "fp32"), paging.moments(s.padded, recipe.optim.bits, paged)]


def activations(s: Shapes, tokens: int, recompute: bool, dtype: torch.dtype) -> list[Part]:
    """What forward keeps for backward."""
    c = dtype.itemsize
    layer = tokens * layer_bytes(s, c)
    ends = tokens * s.hidden * (4 + 2 * c)
    if recompute:
        boundaries = s.layers * tokens * s.hidden * c
        return [Part("activations", boundaries + layer + ends, "each layer's input, and one layer recomputed", grows=True)]
    return [Part("activations", s.layers * layer + ends, f"what {s.layers} layers keep for backward", grows=True)]


def working(s: Shapes, tokens: int, recompute: bool, dtype: torch.dtype, device: Literal["cuda", "cpu"], chunks: float = 1) -> Part:
    """What comes and goes at the peak: the loss's logits, or later the gradients inside one layer, never both.

    With recompute, no layer is held yet while the loss is computed.
    """
    c = dtype.itemsize
    wide = max((n for n, _ in s.linears), default=s.hidden)
    backward = tokens * (3 * wide + 4 * s.hidden) * c
    logits, note = _logits(s, tokens, c, device, chunks)
    loss = logits - (tokens * layer_bytes(s, c) if recompute else 0)
    if loss > backward:
        return Part("loss", loss, note, grows=True)
    return Part("backward", backward, "gradients on their way through one layer", grows=True)


def _logits(s: Shapes, tokens: int, c: int, device: Literal["cuda", "cpu"], chunks: float) -> tuple[int, str]:
    """Bytes of a chunk of logits and what is made of them, and of a packed head decoded for it; and their names."""
    size = int(CHUNK_BYTES[device] / chunks)
    if device == "cuda":
        logits, note = min(tokens * s.vocab * c, size), "logits of a chunk of tokens"
    else:
        logits, note = 3 * min(tokens * s.vocab * 4, size), "logits of a chunk of tokens, exponentials and gradient"
    if any(row.kind == "head" for row in s.report.packed):
        whole = s.vocab * s.hidden * c
        return logits + (min(whole, SLICE_BYTES) if device == "cuda" else whole), f"{note}; the packed head decoded"
    return logits, note


def ends(s: Shapes, tokens: int, head_size: int, dtype: torch.dtype, chunks: float = 1) -> Ends:
    """What is outside the layers when they run fused: loss, tables of the rotary embedding, token and position numbers."""
    c = dtype.itemsize
    tables = tokens * (2 * head_size * c + 24)
    return Ends(tokens * s.hidden * c, _logits(s, tokens, c, "cuda", chunks)[0], tables)


def fused_activations(s: Shapes, layer: fused.Layer, tokens: int, rung: Rung, dtype: torch.dtype) -> list[Part]:
    """Fused layers on a GPU at the largest moment of a microbatch: what waits for backward, and what comes and goes."""
    w = Work(layer, tokens, dtype.itemsize, rung.decoded)
    keeps = rung.keeps(s.layers)
    stages = {keep: timeline.stage(w, keep) for keep in set(keeps)}
    top = timeline.peak([stages[keep] for keep in keeps], ends(s, tokens, layer.head_size, dtype, rung.chunks))
    host = sum(stages[keep].host for keep in keeps)
    notes = {
        "loss": _logits(s, tokens, dtype.itemsize, "cuda", rung.chunks)[1] + ", the last hidden state and its gradient",
        "forward": "one layer while it runs",
        "backward": "one layer and its gradients while it runs backwards",
        "scored": "one layer while held-out rows are scored, with products in 16 bits",
    }
    where = f"what {s.layers} fused layers keep for backward" + (", less what waits in host memory" if host else "")
    passing = top.bytes - top.kept - top.scratch - top.library
    return [
        Part("activations", top.kept, where, grows=True, host=host),
        Part(top.name, passing, notes[top.name], grows=True),
        Part("decode scratch", top.scratch, "the weights of one product, decoded, with the adapters beside them"),
        Part("attention workspace", top.library, "of the library's backward", grows=True),
        Part("gaps", timeline.gaps(stages.values()), "that large tensors on their way leave between others", grows=True),
        Part("decoded weights", s.layers * layer.decoded(dtype.itemsize) * rung.decoded, "held with the adapters beside them"),
        Part("matrices", s.layers * layer.beside(dtype.itemsize), _beside(layer)),
    ]


def _beside(layer: fused.Layer) -> str:
    if layer.float8:
        return "bounds of the weights' sizes, which scales in e4m3 are made of"
    return "adapters in the compute dtype beside the weights in 16 bits"


def layer_bytes(s: Shapes, c: int) -> int:
    """Bytes a token that one decoder layer keeps for backward, by what its linear layers read and write.

    Norms keep their input in fp32 (two norms). Attention keeps q, k, v as rotated (k and v repeated to all heads), its output and a
    log-sum a head. An MLP keeps the inputs of its activation and product: 3 of its inner width when gated, 8 when
    not (the pieces of a tanh gelu). Every linear layer with an adapter keeps its input, shared in a group, and x Aᵀ.
    """
    inner = max((k for _, k in s.linears), default=s.hidden)
    inputs = [n for n, k in s.linears if k != inner and n >= inner]
    gated = sum(inputs) >= 2 * inner
    query = s.hidden
    norms = 2 * 4 * s.hidden
    attention = c * (s.hidden + 3 * query + query) + 4 * s.heads
    mlp = c * (s.hidden + (4 if gated else 9) * inner)
    return norms + attention + mlp + c * s.rank_sum
