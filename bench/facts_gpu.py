"""What a GPU gives, measured before a kernel is written: GEMM rates and clocks, small products, the bus, the host's calls.

    python bench/facts_gpu.py --out DIR [--only gemm,skinny,bus,calls,algorithms]      # under a minute; writes DIR/facts_gpu.jsonl

Shapes are the four groups of linear layers of an 8B Llama 3 with r = 16, 8,192 tokens. `cold`: the first calls after half a second
of rest; `hot`: in turn with all others after 1.5 s of continuous load, with the SM clock read meanwhile. Every product is compared
with float64 on a sample of rows first; what is wrong is reported as wrong and not timed. `--tokens 64` on a CPU tests the script.

Letters: T = tokens, N = outputs and K = inputs of a group, R = ranks of its adapters together.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cublaslt import algorithms
from facts_rest import bus, calls, skinny
from gputime import CUDA, DEVICE, Watch, error, kernels, load, sync, turns
from torch import Tensor

Report = Callable[..., None]
PAD = 64
QUIET = ("kernels", "watts", "celsius", "sm_mhz_least")
"""In the file, not on the terminal."""


@dataclass(frozen=True)
class Group:
    name: str
    rows: int
    width: int
    rank: int


GROUPS = (
    Group("qkv", 6144, 4096, 48),
    Group("o", 4096, 4096, 16),
    Group("gate+up", 28672, 4096, 32),
    Group("down", 4096, 14336, 16),
)


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16) * scale


def wide(matrix: Tensor, columns: int, rows: int = 0) -> Tensor:
    """A copy of `matrix` with so many more columns and rows of small random numbers behind it."""
    out = random(matrix.shape[0] + rows, matrix.shape[1] + columns, scale=0.02)
    out[: matrix.shape[0], : matrix.shape[1]] = matrix
    return out


def products(g: Group, tokens: int) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Every way to compute Y = X W^T (+ XA sB^T) and dX = dY W (+ dYB A) of a group; and each way's error against float64."""
    n, k, r = g.rows, g.width, g.rank
    x, dy, w = random(tokens, k), random(tokens, n), random(n, k, scale=0.02)
    w_t = w.t().contiguous()
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    x_r, dy_r, s_r, y_r = wide(x, r), wide(dy, r), wide(w, r, r), wide(dy, r)
    x_64, dy_64, s_64 = wide(x, PAD), wide(dy, PAD), wide(w, PAD, PAD)
    xa, dyb = x_r[:, k:].contiguous(), dy_r[:, n:].contiguous()
    sb, a = s_r[:n, k:].contiguous(), s_r[n:, :k].contiguous()

    def separate(out: Tensor, left: Tensor, right: Tensor, low: Tensor, high: Tensor) -> None:
        torch.mm(left, right, out=out)
        out.addmm_(low, high)

    forward: dict[str, tuple[Callable[[], Any], Tensor, Tensor, Tensor]] = {
        "plain": (lambda: torch.mm(x, w.t(), out=y), x, w.t(), y),
        "plain, wide rows": (lambda: torch.mm(x_r[:, :k], s_r[:n, :k].t(), out=y), x, w.t(), y),
        "plain, weight as [K, N]": (lambda: torch.mm(x, w_t, out=y), x, w.t(), y),
        "plain, into wide rows": (lambda: torch.mm(x, w.t(), out=y_r[:, :n]), x, w.t(), y_r[:, :n]),
        "augmented R": (lambda: torch.mm(x_r, s_r[:n].t(), out=y), x_r, s_r[:n].t(), y),
        "augmented R, rows of 64": (
            lambda: torch.mm(x_64[:, : k + r], s_64[:n, : k + r].t(), out=y), x_64[:, : k + r], s_64[:n, : k + r].t(), y),
        "augmented 64": (lambda: torch.mm(x_64, s_64[:n].t(), out=y), x_64, s_64[:n].t(), y),
        "separate add": (lambda: separate(y, x, w.t(), xa, sb.t()), x_r, s_r[:n].t(), y),
    }  # fmt: skip
    backward: dict[str, tuple[Callable[[], Any], Tensor, Tensor, Tensor]] = {
        "plain": (lambda: torch.mm(dy, w, out=dx), dy, w, dx),
        "plain, wide rows": (lambda: torch.mm(dy_r[:, :n], s_r[:n, :k], out=dx), dy, w, dx),
        "plain, weight as [K, N]": (lambda: torch.mm(dy, w_t.t(), out=dx), dy, w, dx),
        "augmented R": (lambda: torch.mm(dy_r, s_r[:, :k], out=dx), dy_r, s_r[:, :k], dx),
        "augmented R, rows of 64": (
            lambda: torch.mm(dy_64[:, : n + r], s_64[: n + r, :k], out=dx), dy_64[:, : n + r], s_64[: n + r, :k], dx),
        "augmented 64": (lambda: torch.mm(dy_64, s_64[:, :k], out=dx), dy_64, s_64[:, :k], dx),
        "separate add": (lambda: separate(dx, dy, w, dyb, a), dy_r, s_r[:, :k], dx),
    }  # fmt: skip
    ways: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    for direction, kinds in (("forward", forward), ("dX", backward)):
        for kind, (f, left, right, out) in kinds.items():
            ways[f"{g.name}|{direction}|{kind}"] = f
            out.fill_(float("nan"))
            f()
            last = slice(tokens - 32, tokens)
            errors[f"{g.name}|{direction}|{kind}"] = error(out[last], left[last].double() @ right.double())
    return ways, errors


def gemm(report: Report, tokens: int, watch: Watch) -> None:
    """The eight GEMMs of a layer, each way, cold, and hot through cuBLAS and through cuBLASLt."""
    ways: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    for g in GROUPS:
        more, wrong = products(g, tokens)
        ways |= more
        errors |= wrong
    for name in [name for name, value in errors.items() if not value < 1e-2]:
        report(what="gemm", way=name, wrong=errors[name])
        del ways[name]
    plain = {name: f for name, f in ways.items() if name.endswith("|plain")}
    flops = {f"{g.name}|{d}": 2 * tokens * g.rows * g.width for g in GROUPS for d in ("forward", "dX")}
    launched = kernels(ways)
    for name, f in plain.items():
        sync()
        time.sleep(0.5 if CUDA else 0.0)
        start = time.perf_counter()
        ms = turns({name: f}, 3)[name]
        seen = watch.between(start, time.perf_counter())
        tflops = round(flops[name.rsplit("|", 1)[0]] / ms / 1e9)
        report(what="gemm", state="cold", blas="cublas", way=name, ms=round(ms, 4), tflops=tflops, **seen)
    for blas in ("cublas", "cublaslt") if CUDA else ("cublas",):
        torch.backends.cuda.preferred_blas_library(blas)
        load(plain, 1.5)
        start = time.perf_counter()
        milliseconds = turns(ways, 10)
        state = {"state": "hot", "blas": blas} | watch.between(start, time.perf_counter())
        for name, ms in milliseconds.items():
            seen = {"kernels": launched[name]} if blas == "cublas" else {}
            tflops = round(flops[name.rsplit("|", 1)[0]] / ms / 1e9)
            report(what="gemm", way=name, ms=round(ms, 4), tflops=tflops, error=float(f"{errors[name]:.2g}"), **state, **seen)
        for direction, kinds in _sums(milliseconds).items():
            for kind, ms in kinds.items():
                report(what="gemm layer", direction=direction, kind=kind, ms=round(ms, 3), **state)
    torch.backends.cuda.preferred_blas_library("default")


def _sums(milliseconds: dict[str, float]) -> dict[str, dict[str, float]]:
    """Sums over the four groups, by direction and kind; only of kinds that every group has."""
    sums: dict[str, dict[str, list[float]]] = {}
    for name, ms in milliseconds.items():
        _, direction, kind = name.split("|")
        sums.setdefault(direction, {}).setdefault(kind, []).append(ms)
    return {d: {k: sum(v) for k, v in kinds.items() if len(v) == len(GROUPS)} for d, kinds in sums.items()}


PARTS: dict[str, Callable[[Report, int, Watch], None]] = {
    "gemm": gemm,
    "skinny": lambda report, tokens, watch: skinny(report, tokens, GROUPS),
    "bus": lambda report, tokens, watch: bus(report, tokens),
    "calls": lambda report, tokens, watch: calls(report),
    "algorithms": lambda report, tokens, watch: algorithms(report, tokens, GROUPS),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated, of " + ", ".join(PARTS))
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    watch = Watch()
    with (options.out / "facts_gpu.jsonl").open("w") as file:

        def report(**fields: Any) -> None:
            file.write(json.dumps(fields) + "\n")
            file.flush()
            if not fields.get("right"):
                print(*(f"{key}={value}" for key, value in fields.items() if key not in QUIET), flush=True)

        report(what="machine", gpu=torch.cuda.get_device_name() if CUDA else "none", torch=torch.__version__, tokens=options.tokens)
        torch.manual_seed(0)
        for part in options.only.split(","):
            start = time.perf_counter()
            PARTS[part](report, options.tokens, watch)
            if CUDA:
                torch.cuda.empty_cache()
            report(what="took", part=part, seconds=round(time.perf_counter() - start, 1))
    watch.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
