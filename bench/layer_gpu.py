"""One fused decoder layer, its time, launches, memory and host time by how it is set up. Needs a GPU, torch, triton, transformers.

    python bench/layer_gpu.py --out DIR      # under a minute; writes DIR/layer_gpu.jsonl
    python bench/layer_gpu.py --out DIR --tiny      # the script itself, on a CPU

Two layers of the 8B Llama-3 shape (one whose input needs no gradient, one whose does) and the norm behind them, rank 16, 4 x 2,048
tokens in bf16. First the gate: `kernels.outer` against float64, and every way of setting the layer up against the first one's
gradients. Then, in turn on a hot chip: forward and backward as they are, with ranks padded to 32 and 64, with decoded weights held,
with full recompute, and 16-bit weights; then the gradients of the B's together and one by one.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "bench")]

import gputime  # noqa: E402
import torch  # noqa: E402
from reporting import Report  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from halfbyte.adapters import lora  # noqa: E402
from halfbyte.adapters.config import AdapterConfig  # noqa: E402
from halfbyte.formats.packed import Format  # noqa: E402
from halfbyte.kernels.outer import Outer, reference  # noqa: E402
from halfbyte.kernels.products import Augmented  # noqa: E402
from halfbyte.layers import swap  # noqa: E402
from halfbyte.layers.forward import hidden_states  # noqa: E402
from halfbyte.layers.fused.keep import EVERYTHING, INPUTS  # noqa: E402
from halfbyte.layers.fused.prepare import prepare  # noqa: E402
from halfbyte.optim.flat import flatten  # noqa: E402
from kernels import checks_outer, runner  # noqa: E402

LAYERS, DTYPE = 2, torch.bfloat16
WAYS: dict[str, dict[str, Any]] = {
    "padded to 16": {},
    "padded to 32": {"products": Augmented(32)},
    "padded to 64": {"products": Augmented(64)},
    "decoded held": {"decoded": True},
    "recompute": {"keep": INPUTS},
    "recompute, padded to 64": {"keep": INPUTS, "products": Augmented(64)},
}


class Step:
    """The model at `rows` documents of `tokens`, and its forward and backward. fmt: None for a base in 16 bits."""

    def __init__(self, tiny: bool, fmt: Format | None, rows: int = 4) -> None:
        sizes = (64, 160, 4, 2, 8) if tiny else (4096, 14336, 32, 8, 2048)
        hidden, inner, heads, kv, self.tokens = sizes
        config = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=kv,
                             num_hidden_layers=LAYERS, vocab_size=1024, rope_theta=5e5, max_position_embeddings=4096)  # fmt: skip
        torch.manual_seed(0)
        with torch.device(gputime.DEVICE):
            self.model = LlamaForCausalLM(config).to(DTYPE)
        swap.pack(self.model, None, fmt)
        swap.adopt(self.model)
        self.adapter = lora.attach(self.model, AdapterConfig(rank=16), seed=0)
        with torch.no_grad():
            for layer in self.adapter.layers.values():
                layer.lora_b.normal_(0, 0.02)
        self.flat = flatten(self.adapter.parameters())
        self.model.train()
        length = rows * self.tokens
        self.ids = (torch.arange(length, device=gputime.DEVICE) * 7919 % 1024)[None]
        self.positions = torch.arange(self.tokens, device=gputime.DEVICE).repeat(rows)[None]
        self.bounds = torch.arange(0, length + 1, self.tokens, dtype=torch.int32)
        self.grad = torch.randn(1, length, hidden, device=gputime.DEVICE, dtype=DTYPE)

    def take(self, way: dict[str, Any]) -> None:
        keep, products = way.get("keep", EVERYTHING), way.get("products")
        done = prepare(self.model, keep, products, in_place=True, decoded=way.get("decoded", False))
        assert done.layers == LAYERS and not done.norm, done.summary()

    def __call__(self) -> None:
        hidden_states(self.model, self.ids, self.positions, self.bounds).backward(self.grad)

    def gradient(self) -> Tensor:
        self.flat.grads.zero_()
        self()
        return self.flat.grads.clone()

    def host_ms(self) -> float:
        """Of a call, when the device has nothing else to do and is not waited for."""
        gputime.sync()
        start = time.perf_counter()
        self()
        taken = (time.perf_counter() - start) * 1e3
        gputime.sync()
        return taken


def ways(report: Callable[..., None], tiny: bool) -> None:
    for name, fmt in (("nf4", Format("nf4", 64, nested=True)), ("16 bits", None)):
        step = Step(tiny, fmt)
        expected: Tensor | None = None
        for way, settings in WAYS.items():
            if fmt is None and ("held" in way or "recompute" in way):
                continue
            step.take(settings)
            for _ in range(3):
                step()
            got = step.gradient()
            expected = got if expected is None else expected
            error = gputime.error(got, expected.double())
            if error > 0.03:
                report(what="red", base=name, way=way, error=error)
                continue
            gputime.load({way: step}, 0 if tiny else 1.0)
            if gputime.CUDA:
                torch.cuda.reset_peak_memory_stats()
            ms = gputime.turns({way: step}, 2 if tiny else 12)[way]
            peak = torch.cuda.max_memory_allocated() / 2**20 if gputime.CUDA else 0.0
            names = gputime.kernels({way: step})[way]
            report(what="layer", base=name, way=way, ms=round(ms / LAYERS, 3), launches=len(names) / LAYERS, peak_mib=round(peak),
                   host_ms=round(sorted(step.host_ms() for _ in range(5))[2] / LAYERS, 3), error=error,
                   kernels=Counter(n[:60] for n in names))  # fmt: skip
        del step


GROUPS = {"down, gate, up": (4096, 14336, 14336), "o, q, k, v": (4096, 4096, 1024, 1024), "gate, up": (14336, 14336),
          "q, k, v": (4096, 1024, 1024)}  # fmt: skip


def outers(report: Callable[..., None]) -> None:
    from halfbyte.kernels.outer import fused

    tiles = [fused.Tile(), *(fused.Tile(c, r, p, w, s) for c, r, p, w, s in (
        (128, 64, 264, 4, 4), (64, 64, 528, 4, 4), (64, 64, 1056, 4, 3), (128, 64, 1056, 4, 3), (64, 128, 528, 4, 3),
        (128, 32, 1056, 4, 4), (256, 64, 264, 8, 3)))]  # fmt: skip
    for tokens in (8192, 2048):
        for name, widths in GROUPS.items():
            bigs = [torch.randn(tokens, n + 48, device="cuda", dtype=DTYPE)[:, :n] for n in widths]
            small = torch.randn(tokens, 16 * len(widths), device="cuda", dtype=DTYPE)
            products = [
                Outer(torch.zeros(n, 16, device="cuda"), big, small[:, 16 * i : 16 * i + 16], 2.0)
                for i, (n, big) in enumerate(zip(widths, bigs, strict=True))
            ]
            calls: dict[str, Callable[[], None]] = {"one by one": functools.partial(reference.outer, products)}
            calls |= {",".join(map(str, t)): functools.partial(fused.outer, products, t) for t in tiles}
            for f in calls.values():
                f()
            us = {key: round(1e3 * ms, 1) for key, ms in gputime.turns(calls, 12, lead=True).items()}
            report(what="dB", group=name, tokens=tokens, us=us, launches=len(gputime.kernels({"": calls["one by one"]})[""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a machine without a GPU")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "layer_gpu.jsonl").open("w") as file:
        report = Report(file)
        red = {name: text[-300:] for name, text in runner.outcomes(checks_outer.CHECKS, gputime.DEVICE).items() if text}
        report(what="gate", red=red)
        if gputime.CUDA and not red:
            outers(report)
        ways(report, given.tiny)


if __name__ == "__main__":
    main()
