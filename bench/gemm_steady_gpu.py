"""Which algorithm of a product is the fastest for a chip at its power limit, and what it costs in energy. Needs a GPU.

    python bench/gemm_steady_gpu.py --out DIR [--candidates 8 --seconds 0.4]      # about a minute; writes DIR/gemm_steady_gpu.jsonl

`kernels.gemm` lets algorithms run in turn, each for a millisecond: at one clock. In a step the clock follows the power, so the
algorithm that needs the fewest joules is the fastest, and two that take turns slow each other. Here each runs alone, hot, until the
clock has settled: milliseconds a product, MHz, W, mJ. Products are the eight large ones of a layer of the 8B shape, 8,192 tokens,
with ranks padded to 16 and to 64. Last, sums over a layer: the library's first algorithm, what `kernels.gemm` takes, the best here.
The gate: every algorithm's result against the first one's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]
os.environ["HALFBYTE_CACHE"] = tempfile.mkdtemp()

import torch  # noqa: E402
from gputime import Watch  # noqa: E402
from reporting import Report  # noqa: E402
from torch import Tensor  # noqa: E402

from halfbyte.kernels.gemm import vendor  # noqa: E402
from halfbyte.kernels.gemm.cublaslt import Plan, Problem  # noqa: E402

GROUPS = {"qkv": (6144, 4096, 48), "o": (4096, 4096, 16), "gate+up": (28672, 4096, 32), "down": (4096, 14336, 16)}
TOKENS, SETTLE, HEAT = 8192, 0.3, 2.0


def operands(n: int, k: int, r: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """a, b and out of the product forward and of the one for dX, as the fused layer has them."""

    def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * scale

    x, s, dy = normal(TOKENS, k + r), normal(n + r, k + r, 0.02), normal(TOKENS, n + r)
    y, dx = torch.empty_like(dy)[:, :n], torch.empty(TOKENS, k, device="cuda", dtype=torch.bfloat16)
    return {"forward": (x, s[:n].T, y), "dX": (dy, s[:, :k], dx)}


def settled(call: Any, seconds: float, watch: Watch) -> dict[str, Any]:
    """One product again and again: the first part of the time lets the clock settle, the rest counts."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    count = max(1, round(seconds / (time.perf_counter() - start) * 10))
    for _ in range(max(1, round(count * SETTLE))):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    end = time.perf_counter()
    ms, clock = (end - start) / count * 1e3, watch.between(start, end)
    return {"ms": round(ms, 4), "mj": round(ms * clock["watts"], 1) if clock.get("watts") else None, **clock}


def product(
    report: Report, name: str, padded: int, three: tuple[Tensor, Tensor, Tensor], candidates: int, seconds: float, watch: Watch
) -> tuple[float, float, float]:
    """Milliseconds of the first algorithm, of the one that `kernels.gemm` takes, and of the best."""
    a, b, out = three
    stream = vendor.stream_of(0)
    problem = Problem.of(a, b, out, None, out, 0.0, 256)
    plan = Plan(vendor._library(), 0, problem, 0, (0, 0))
    algorithms, room = plan.algorithms(candidates), vendor._workspace(0, stream)
    addresses = [t.data_ptr() for t in (a, b, out, out)]
    calls = [partial(plan.bound(one, 1.0, 0.0, room, stream), *addresses) for one in algorithms]
    results = []
    for call in calls:
        assert call() == 0, f"{name}: an algorithm failed"
        results.append(out.float().norm())
    assert all(abs(float(norm / results[0]) - 1) < 1e-3 for norm in results), f"{name}: algorithms disagree"
    chosen, _ = vendor._measure(plan, algorithms, lambda one: plan.bound(one, 1.0, 0.0, room, stream), (a, b, out, out))
    found = [settled(call, seconds, watch) for call in calls]
    best = min(range(len(found)), key=lambda i: found[i]["ms"])
    for i, line in enumerate(found):
        report(what="algorithm", product=name, padded_to=padded, number=i, chosen=i == chosen, best=i == best, **line)
    return found[0]["ms"], found[chosen]["ms"], found[best]["ms"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each algorithm")
    parser.add_argument("--limit", type=float, default=240, help="seconds after which no further product is measured")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    watch = Watch()
    with (options.out / "gemm_steady_gpu.jsonl").open("w") as lines:
        report = Report(lines, options.limit)
        report.machine()
        heat = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        start = time.perf_counter()
        while time.perf_counter() - start < HEAT:
            heat @ heat
            torch.cuda.synchronize()
        for padded in (16, 64):
            sums = [0.0, 0.0, 0.0]
            for group, (n, k, r) in GROUPS.items():
                for way, three in operands(n, k, -(-r // padded) * padded).items():
                    if report.fits(f"{group} {way} padded to {padded}"):
                        each = product(report, f"{group} {way}", padded, three, options.candidates, options.seconds, watch)
                        sums = [total + ms for total, ms in zip(sums, each, strict=True)]
            first, chosen, best = (round(total, 3) for total in sums)
            report(what="layer", padded_to=padded, first_ms=first, chosen_ms=chosen, best_ms=best)
        report.done()
    watch.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
