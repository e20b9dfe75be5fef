"""The loss on a CUDA GPU against its own two products alone: first the proof, then time and peak memory. Under a minute.

    python bench/loss_gpu.py --out DIR         # writes DIR/loss_gpu.jsonl and DIR/loss_gate.json
    python bench/loss_gpu.py --table FILE      # such a file as Markdown

The gate is `tests/kernels/checks_loss.py` on this GPU: if a check is red nothing is reported and the exit code is 1. The bare
products are those of the labelled rows alone, in one piece and in the same chunks, on the same numbers (the second one reads a real
gradient); every ratio compares things measured in turn in one run. Peak is of the allocator, besides inputs and the gradient.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from gputime import turns  # noqa: E402
from reporting import Report, passed, read  # noqa: E402
from torch import Tensor  # noqa: E402

from halfbyte.formats.packed import Format  # noqa: E402
from halfbyte.formats.quantize import quantize  # noqa: E402
from halfbyte.kernels.cross_entropy import Extras, Head, cross_entropy, softmax, tiled  # noqa: E402
from halfbyte.kernels.cross_entropy.parts import IGNORE, PLAIN, Task, Wants  # noqa: E402
from kernels import checks_loss  # noqa: E402
from kernels.runner import outcomes  # noqa: E402

CASES = (
    ("8B, half labelled", 16384, 8192, 128256, 4096),
    ("8B, all labelled", 8192, 8192, 128256, 4096),
    ("135M, all labelled", 8192, 8192, 49152, 576),
)
ROWS = (256, 512, 768, 1024, 1536, 2048, 4096, 8192)
TUNINGS = {
    "2048x8 16w": softmax.Tuning(),
    "2048x8 16w, no hints": softmax.Tuning(keep=False),
    "2048x8 16w, 3 stages": softmax.Tuning(stages=3),
    "2048x8 32w, 3 stages": softmax.Tuning(warps=32, stages=3),
    "4096x8 32w": softmax.Tuning(lanes=4096, warps=32),
    "1024x8 16w": softmax.Tuning(lanes=1024),
    "1024x8 32w, 3 stages": softmax.Tuning(lanes=1024, warps=32, stages=3),
}
TILES = (
    tiled.Tile(),
    tiled.Tile(stages=3),
    tiled.Tile(256, 128),
    tiled.Tile(128, 128, warps=4),
)


def times(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, measured in turn after a first call."""
    for f in functions.values():
        f()
    return turns(functions, repeats)


def example(tokens: int, labelled: int, vocabulary: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (after a norm: of size one), weight, labels; logits of a trained model's size."""
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16) * (2.5 / width**0.5)
    labels = torch.randint(0, vocabulary, (tokens,), device="cuda")
    labels[torch.randperm(tokens, device="cuda")[labelled:]] = IGNORE
    return hidden, weight, labels


def bare(h: Tensor, weight: Tensor, d: Tensor, size: int) -> Callable[[], None]:
    """The two products on the labelled rows h `[n, H]`, `size` rows at a time; d `[c, V]`: one chunk of a real gradient."""
    z = torch.empty(size, len(weight), dtype=h.dtype, device=h.device)
    out = torch.empty_like(h)

    def run() -> None:
        for start in range(0, len(h), size):
            part = h[start : start + size]
            torch.mm(part, weight.T, out=z[: len(part)])
            torch.mm(d[: len(part)], weight, out=out[start : start + size])

    return run


def gradient(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int) -> Tensor:
    """A real gradient of the logits, `[rows, V]`."""
    d = torch.mm(hidden[:rows], weight.T)
    task = Task(hidden[:rows], labels[:rows].clamp_min(0), Head(weight), PLAIN, Wants(True, False, False), rows, 0)
    softmax.softmax_(d, d, task.labels, torch.empty(rows, device="cuda"), torch.empty(rows, dtype=torch.int32, device="cuda"), task)
    return d


def peak(f: Callable[[], Any]) -> float:
    """MiB that f takes at its peak beyond what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def bench_kernel(report: Callable[..., None]) -> None:
    """The kernel alone on chunks of 1,024 rows in turn, as after a GEMM: bytes read once and written once over the time."""
    rows, vocabulary = 1024, 128256
    hidden, weight, labels = example(rows, rows, vocabulary, 4096)
    chunks = [torch.mm(hidden, weight.T) for _ in range(3)]
    losses, hits = torch.empty(rows, device="cuda"), torch.empty(rows, dtype=torch.int32, device="cuda")
    task = Task(hidden, labels, Head(weight), PLAIN, Wants(True, False, False), rows, 0)
    work = torch.empty_like(chunks[0])

    def one(tuning: softmax.Tuning) -> Callable[[], None]:
        def run() -> None:
            for z in chunks:
                softmax.softmax_(z, z, labels, losses, hits, task, tuning)

        return run

    functions: dict[str, Callable[[], Any]] = {name: one(tuning) for name, tuning in TUNINGS.items()}
    functions["copy"] = lambda: [work.copy_(z) for z in chunks]
    ms = times(functions, 10)
    for name, tuning in TUNINGS.items():
        here = ms[name] / len(chunks)
        report(what="kernel", name=name, **asdict(tuning), us=round(1e3 * here, 1), gb_per_s=round(2 * work.nbytes / here / 1e6),
               of_copy=round(ms["copy"] / ms[name], 3))  # fmt: skip


def bench_tiles(report: Callable[..., None]) -> None:
    """Logits and gradient of 1,024 rows: the vendor's GEMM and the kernel, its GEMM alone, and our GEMM in several tiles."""
    rows, vocabulary = 1024, 128256
    hidden, weight, labels = example(rows, rows, vocabulary, 4096)
    losses, hits = torch.empty(rows, device="cuda"), torch.empty(rows, dtype=torch.int32, device="cuda")
    task = Task(hidden, labels, Head(weight), PLAIN, Wants(True, False, False), rows, 0)
    z = torch.empty(rows, vocabulary, device="cuda", dtype=torch.bfloat16)

    def vendor() -> None:
        torch.mm(hidden, weight.T, out=z)
        softmax.softmax_(z, z, labels, losses, hits, task)

    functions: dict[str, Callable[[], Any]] = {"vendor": vendor, "vendor, product alone": lambda: torch.mm(hidden, weight.T, out=z)}
    for tile in TILES:
        functions[str(tile)] = lambda tile=tile: tiled.chunk(hidden, weight, z, z, labels, losses, hits, task, tile)
    for name, ms in times(functions, 8).items():
        report(what="tile", name=name, us=round(1e3 * ms, 1), tflops=round(2 * rows * vocabulary * 4096 / ms / 1e9))


def bench_case(report: Callable[..., None], case: str, tokens: int, labelled: int, vocabulary: int, width: int) -> None:
    """Time and peak of the loss by method and chunk, against the bare products."""
    hidden, weight, labels = example(tokens, labelled, vocabulary, width)
    hidden.requires_grad_()
    head, kept = Head(weight), labels != IGNORE
    h = hidden.detach()[kept]
    d = gradient(h, weight, labels[kept], labelled)

    def step(rows: int = 0, method: str = "chunked", extras: Extras = PLAIN, this: Head = head) -> Callable[[], Any]:
        size = rows * 2 * vocabulary or None

        def run() -> Any:
            loss, _ = cross_entropy(hidden, labels, this, labelled=labelled, chunk_bytes=size, method=method, extras=extras)  # type: ignore[arg-type]
            return torch.autograd.grad(loss, hidden)

        return run

    functions: dict[str, Callable[[], Any]] = {"bare": bare(h, weight, d, labelled)}
    for rows in ROWS:
        functions[f"bare {rows}"] = bare(h, weight, d, rows)
        functions[f"chunked {rows}"] = step(rows)
    functions["default"] = step()
    functions["exact"] = step(method="exact")
    functions["tiled"] = step(method="tiled")
    functions["smoothing and z"] = step(extras=Extras(0.1, 1e-4))
    for fmt in (Format("nf4", 64, nested=True), Format("int8")):
        functions[f"{fmt.kind} head"] = step(this=Head(quantize(weight, fmt, name="bench")))
    ms = times(functions, 5 if width > 1000 else 10)
    flop = 4 * labelled * vocabulary * width
    del d
    for name, f in functions.items():
        extra = None if name.startswith("bare") else round(peak(f) - hidden.nbytes / 2**20, 1)
        report(what="loss", case=case, tokens=tokens, labelled=labelled, vocabulary=vocabulary, width=width, name=name,
               ms=round(ms[name], 3), of_bare=round(ms[name] / ms["bare"], 4), tflops=round(flop / ms[name] / 1e9),
               extra_mib=extra)  # fmt: skip


def bench_bits(report: Callable[..., None]) -> None:
    """Two runs of the whole layer: the same bits?"""
    hidden, weight, labels = example(3000, 1500, 128256, 1024)
    hidden.requires_grad_()
    found = []
    for _ in range(2):
        loss, correct = cross_entropy(hidden, labels, Head(weight), labelled=1500, method="chunked")
        found.append([loss.detach(), correct, *torch.autograd.grad(loss, hidden)])
    report(what="bits", equal=all(torch.equal(a, b) for a, b in zip(*found, strict=True)))


def markdown(results: Path) -> str:
    """Times over the bare products, and the memory, case by case."""
    rows = read(results)
    text = ["| case | | ms | of the bare products | TFLOP/s | MiB |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        if row["what"] == "loss":
            extra = "" if row["extra_mib"] is None else f"{row['extra_mib']:.0f}"
            text.append(f"| {row['case']} | {row['name']} | {row['ms']:.2f} | {row['of_bare']:.3f} | {row['tflops']} | {extra} |")
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path)
    where.add_argument("--table", type=Path)
    parser.add_argument("--limit", type=float, default=50, help="seconds after which nothing more is begun")
    options = parser.parse_args()
    if options.table:
        print(markdown(options.table))
        return 0
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if not passed(outcomes(checks_loss.CHECKS, "cuda"), out / "loss_gate.json"):
        return 1
    with (out / "loss_gpu.jsonl").open("w") as file:
        report = Report(file, options.limit)
        report.machine()
        torch.manual_seed(0)
        for name, part in (("kernel", bench_kernel), ("tiles", bench_tiles), ("bits", bench_bits)):
            if report.fits(name):
                part(report)
        for case in CASES:
            if report.fits(case[0]):
                bench_case(report, *case)
                torch.cuda.empty_cache()
        report.done()
    return 0


if __name__ == "__main__":
    sys.exit(main())
