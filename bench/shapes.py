"""Model shapes of the benchmarks, and what a training step of LoRA on a frozen base must at least compute and move.

Operations: 4 a parameter of the linear layers a token (forward, and the gradient of the input; the frozen weight has none), as many
for the output head over the labelled tokens, and 7 D t^2 a layer for causal attention over a document of t tokens (2 forward and 5
backward, D = heads x head size). Rank products, norms and everything recomputed come on top: a step may be blamed for them.

Letters: T = tokens, N = outputs and K = inputs of a group of linear layers, D = heads x head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama: `whole` is the number of layers of the real model where `layers`, what is measured, are fewer."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    whole: int = 0

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def groups(self) -> dict[str, tuple[int, int]]:
        """Linear layers that share an input: (N, K)."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_size
        return {
            "qkv": (qkv, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate+up": (2 * self.mlp, self.hidden),
            "down": (self.hidden, self.mlp),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of one layer's linear layers."""
        return sum(n * k for n, k in self.groups.values())


SIZES = {
    "tiny": Shape(64, 192, 2, 4, 2, 49152),
    "1b": Shape(2048, 8192, 16, 32, 8, 128256),
    "8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "70b": Shape(8192, 28672, 4, 64, 8, 128256, whole=80),
}


def flops(shape: Shape, layers: int, tokens: int, labelled: int, documents: Sequence[int]) -> dict[str, float]:
    """Operations of one step that no implementation avoids, by part. documents: lengths of the packed documents, sum = tokens."""
    width = shape.heads * shape.head_size
    return {
        "base GEMM": 4.0 * shape.linear_parameters * layers * tokens,
        "head": 4.0 * shape.hidden * shape.vocabulary * labelled,
        "attention": 7.0 * width * layers * sum(t * t for t in documents),
    }


def moved(shape: Shape, layers: int, tokens: int, trainable: int, recompute: bool) -> dict[str, float]:
    """Bytes of one step in 16-bit activations, by part: each tensor of a kernel read or written once."""
    h, f, d = shape.hidden, shape.mlp, shape.head_size
    q, kv = shape.heads * d, shape.kv_heads * d
    passes = 3 if recompute else 2
    again = 2 if recompute else 1
    products = sum(2 * k + 2 * n for n, k in shape.groups.values())  # XA and dA read X, dYB and dB read dY
    return {
        "decode": layers * passes * shape.linear_parameters * (2 + 0.516),
        "LoRA products": layers * 2.0 * tokens * (products + (again - 1) * sum(k for _, k in shape.groups.values())),
        # The residual is added inside the product in front; backward reads d out, the residual and its gradient, and writes one.
        "norm": layers * 2.0 * tokens * h * 2 * (2 * again + 4),
        "rotary": layers * 2.0 * tokens * 2 * ((q + kv) * again + q + 2 * kv),
        "glu": layers * 2.0 * tokens * f * (3 * again + 6),
        "optimizer": 28.0 * trainable,
    }


def hot_rate(shape: Shape, layers: int, tokens: int, labelled: int, compute: str = "bf16") -> dict[str, Any]:
    """TFLOP/s of the step's GEMM shapes in the step's proportions, run in turn after half a second of them; {} without a GPU.

    hot_parts: of the layers' products and of the head's. compute: fp8 has the layers' in e4m3; the head is in 16 bits always.
    """
    import torch
    from gputime import CUDA, load, turns

    if not CUDA:
        return {}
    rows = min(labelled, 4096)
    sizes = {**shape.groups, "head": (shape.vocabulary, shape.hidden)}
    functions: dict[str, Callable[[], Any]] = {}
    for name, (n, k) in sizes.items():
        t = rows if name == "head" else tokens
        x = torch.randn(t, k, device="cuda", dtype=torch.bfloat16)
        dy = torch.randn(t, n, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
        make = _in_fp8 if compute == "fp8" and name != "head" else _in_16_bits
        functions[f"{name} forward"], functions[f"{name} dX"] = make(x, w), make(dy, w.t())
    load(functions, 0.5)
    ms = turns(functions, 10)
    layer = layers * sum(t for name, t in ms.items() if not name.startswith("head"))
    head = sum(t for name, t in ms.items() if name.startswith("head")) * labelled / rows
    work = flops(shape, layers, tokens, labelled, [])
    return {
        "hot_tflops": round((work["base GEMM"] + work["head"]) / (layer + head) / 1e9, 1),
        "hot_parts": {"base GEMM": round(work["base GEMM"] / layer / 1e9, 4), "head": round(work["head"] / head / 1e9, 4)},
        "hot_ms": {name: round(t, 3) for name, t in ms.items()},
    }


def _in_16_bits(x: Any, w: Any) -> Callable[[], Any]:
    """x `[T, K]` times w `[N, K]` transposed, as a function."""
    import torch

    y = x.new_empty(x.shape[0], w.shape[0])
    return lambda: torch.mm(x, w.t(), out=y)


def _in_fp8(x: Any, w: Any) -> Callable[[], Any]:
    """The same in e4m3, with a scale a row of either, as `compute: fp8` multiplies."""
    import torch

    from halfbyte.kernels.gemm import scaled

    x8, w8 = (t.contiguous().to(torch.float8_e4m3fn) for t in (x, w))
    of_x, of_w = (torch.ones(s, dtype=torch.float32, device=x.device) for s in ((x.shape[0], 1), (1, w.shape[0])))
    y = x.new_empty(x.shape[0], w.shape[0])
    return lambda: scaled(x8, w8.t(), of_x, of_w, y)
