"""Kernels on a CUDA GPU: first the proof, then the figures. Needs torch and triton, no install.

    python bench/kernels_gpu.py --out DIR         # a few minutes; writes DIR/kernels_gpu.jsonl and DIR/gate.json
    python bench/kernels_gpu.py --table FILE      # such a file as Markdown

The gate is `tests/kernels/checks.py` on this GPU: if any twin is off, nothing is reported and the exit code is 1.
Shapes are those of an 8B Llama 3; every ratio compares two things measured in the same run, in turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from gputime import turns  # noqa: E402
from reporting import Report, passed, read  # noqa: E402
from torch import Tensor  # noqa: E402

from halfbyte.formats.packed import Format, Packed  # noqa: E402
from halfbyte.formats.quantize import quantize  # noqa: E402
from halfbyte.kernels.cross_entropy import Head, cross_entropy  # noqa: E402
from halfbyte.kernels.dequantize import dequantize  # noqa: E402
from halfbyte.kernels.dropout import Dropout, dropout  # noqa: E402
from halfbyte.kernels.lora_linear import LowRank, lora_linear  # noqa: E402
from kernels import checks  # noqa: E402
from kernels.runner import outcomes  # noqa: E402

SHAPES = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}
GROUPS = {"q+k+v": ((4096, 1024, 1024), 4096), "o": ((4096,), 4096), "gate+up": ((14336, 14336), 4096), "down": ((4096,), 14336)}
NESTED = Format("nf4", 64, nested=True)
RANK = 16


def times(functions: dict[str, Callable[[], Any]], repeats: int = 20) -> dict[str, float]:
    """Median milliseconds of each, measured in turn after three calls."""
    for f in functions.values():
        for _ in range(3):
            f()
    return turns(functions, repeats)


def packed(shape: tuple[int, int], fmt: Format) -> Packed:
    return quantize(torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02, fmt, name="bench")


def bench_dequantize(report: Callable[..., None]) -> None:
    """GB/s moved (stored bytes read + bf16 written) against a copy; 6 weights in turn, so that the cache holds none of them."""
    source = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / times({"copy": lambda: target.copy_(source)})["copy"] / 1e6
    report(what="copy", gb_per_s=round(copy))
    for fmt in (NESTED, Format("nf4"), Format("fp4", nested=True), Format("int4", 128, zero="float"), Format("int8")):
        for name, shape in SHAPES.items() if fmt == NESTED else [("gate, up", SHAPES["gate, up"])]:
            weights = [packed(shape, fmt) for _ in range(6)]
            outs = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in weights]

            def all_of_them(weights: list[Packed] = weights, outs: list[Tensor] = outs) -> None:
                for w, out in zip(weights, outs, strict=True):
                    dequantize(w, out=out)

            ms = times({"decode": all_of_them})["decode"] / len(weights)
            rate = (weights[0].nbytes + outs[0].nbytes) / ms / 1e6
            report(what="dequantize", format=f"{fmt.kind} {fmt.zero} nested={fmt.nested}", weight=name, shape=shape,
                   us=round(ms * 1e3, 1), gb_per_s=round(rate), of_copy=round(rate / copy, 3))  # fmt: skip


def bench_lora_linear(report: Callable[..., None]) -> None:
    """Forward, and forward + backward (dx, dA, dB), against bf16 weights: with the same adapters, and plain without any."""
    for tokens in (2048, 8192):
        total: dict[str, float] = {}
        for name, (outputs, width) in GROUPS.items():
            x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            dense = [torch.randn(n, width, device="cuda", dtype=torch.bfloat16) * 0.02 for n in outputs]
            nf4 = [quantize(w, NESTED, name="bench") for w in dense]
            loras = [
                LowRank(
                    torch.randn(RANK, width, device="cuda", requires_grad=True),
                    torch.zeros(n, RANK, device="cuda", requires_grad=True),
                    2.0,
                )
                for n in outputs
            ]
            grads = [torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16) for n in outputs]
            leaves = [x, *(t for lora in loras for t in (lora.a, lora.b))]
            none: list[None] = [None] * len(outputs)
            forwards: dict[str, Callable[[], list[Tensor]]] = {
                "qlora": lambda x=x, w=nf4, n=none, m=loras: lora_linear(x, w, n, m),
                "lora16": lambda x=x, w=dense, n=none, m=loras: lora_linear(x, w, n, m),
                "plain16": lambda x=x, w=dense: [torch.nn.functional.linear(x, v) for v in w],
            }

            def both(name: str, forwards: Any = forwards, x: Tensor = x, leaves: Any = leaves, grads: Any = grads) -> Any:
                return torch.autograd.grad(forwards[name](), [x] if name == "plain16" else leaves, grads)

            ms = times({f"{k} fwd": f for k, f in forwards.items()} | {f"{k} fwd+bwd": lambda k=k: both(k) for k in forwards})
            for k, v in ms.items():
                total[k] = total.get(k, 0.0) + v
            report(
                what="lora_linear", tokens=tokens, group=name, **{k.replace(" ", "_") + "_ms": round(v, 3) for k, v in ms.items()}
            )
        report(what="lora_linear", tokens=tokens, group="a layer",
               **{k.replace(" ", "_") + "_ms": round(v, 3) for k, v in total.items()},
               qlora_speed_of_lora16=round(total["lora16 fwd+bwd"] / total["qlora fwd+bwd"], 4))  # fmt: skip


def bench_rest(report: Callable[..., None]) -> None:
    """Dropout against a copy of the same bytes; the head of an 8B Llama 3 with a third of the positions labelled, and with all."""
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16)
    mask = Dropout(0.05, torch.tensor([1, 2, 3], device="cuda"), 2048)
    ms = times({"dropout": lambda: dropout(x, mask, 0), "copy": lambda: x.clone()})
    report(what="dropout", shape=tuple(x.shape), dropout_us=round(ms["dropout"] * 1e3, 1), copy_us=round(ms["copy"] * 1e3, 1))
    head = Head(torch.randn(128256, 4096, device="cuda", dtype=torch.bfloat16) * 0.02)
    hidden = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for share in (0.33, 1.0):
        labels = torch.randint(0, 128256, (8192,), device="cuda")
        labels[torch.rand(8192, device="cuda") >= share] = -100
        count = int((labels != -100).sum())

        def step(labels: Tensor = labels, count: int = count) -> Tensor:
            return torch.autograd.grad(cross_entropy(hidden, labels, head, labelled=count)[0], hidden)[0]

        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ms = times({"both": step})["both"]
        extra = (torch.cuda.max_memory_allocated() - before) / 2**20
        rate = 4 * count * 128256 * 4096 / ms / 1e9
        report(what="cross_entropy", positions=8192, labelled=count, ms=round(ms, 2), tflops=round(rate), extra_mib=round(extra))


def markdown(results: Path) -> str:
    """Two tables: decoding beside a copy of the same bytes, and a decoder layer's linear layers beside bf16 weights."""
    rows = read(results)
    text = ["| decoded | weight | shape | us | GB/s | of a copy |", "| --- | --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        if row["what"] == "dequantize":
            kind, zero, nested = row["format"].split()
            name = kind + (f", zero {zero}" if zero != "none" else "") + (", nested" if nested == "nested=True" else "")
            shape = " x ".join(map(str, row["shape"]))
            text.append(f"| {name} | {row['weight']} | {shape} | {row['us']:.1f} | {row['gb_per_s']:,} | {row['of_copy']:.0%} |")
    text += ["", "| tokens | linear layers | nf4 + LoRA, ms | bf16 + LoRA, ms | bf16 alone, ms | nf4 of bf16 + LoRA |"]
    text += ["| ---: | --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        if row["what"] == "lora_linear":
            ms = [row[f"{name}_fwd+bwd_ms"] for name in ("qlora", "lora16", "plain16")]
            figures = " | ".join(f"{value:.2f}" for value in ms)
            text.append(f"| {row['tokens']:,} | {row['group']} | {figures} | {ms[1] / ms[0]:.1%} |")
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path)
    where.add_argument("--table", type=Path)
    parser.add_argument("--limit", type=float, default=180, help="seconds after which nothing more is begun")
    options = parser.parse_args()
    if options.table:
        print(markdown(options.table))
        return 0
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    if not passed(outcomes(checks.CHECKS, "cuda"), out / "gate.json"):
        return 1
    with (out / "kernels_gpu.jsonl").open("w") as file, torch.random.fork_rng():
        report = Report(file, options.limit)
        report.machine()
        torch.manual_seed(0)
        for bench in (bench_dequantize, bench_lora_linear, bench_rest):
            if report.fits(bench.__name__):
                bench(report)
                torch.cuda.empty_cache()
        report.done()
    return 0


if __name__ == "__main__":
    sys.exit(main())
