"""Generation on a CUDA GPU: the proof, then packed products against a copy, then tokens a second of an 8B model.

    python bench/generation_gpu.py --out DIR             # gate, products, engine; JSON lines in DIR/generation_gpu.jsonl, flushed
    python bench/generation_gpu.py --out DIR --only gate|products|engine      # engine: `generation_engine.py`, with its own gate

The script starts itself with `--part` for each piece of the gate and of the compiling, in parallel.

The gate: kernels against float64 (`tests/kernels/checks_generation.py`). If it is red nothing is reported and the exit code is 1.
Products: each launch of a graph reads another copy of the weights, more than 4 x the L2 in all. Rates count the bytes of the packed
weights and adapters, read once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "bench")]

import generation_engine  # noqa: E402
import torch  # noqa: E402
from generation_setups import random_packed  # noqa: E402
from torch import Tensor  # noqa: E402

from halfbyte.kernels.lora_linear.members import LowRank, Member  # noqa: E402
from halfbyte.kernels.packed_gemv import Product, Shape, build, multiply  # noqa: E402

GROUPS: dict[str, tuple[tuple[int, ...], int, str | None]] = {
    "q+k+v": ((4096, 1024, 1024), 4096, None),
    "o": ((4096,), 4096, None),
    "gate+up": ((14336, 14336), 4096, "silu"),
    "down": ((4096,), 14336, None),
    "head": ((128256,), 4096, None),
}
PACKED_SHAPES = {
    "8 warps": Shape(1, 8), "4 warps": Shape(1, 4), "16 warps": Shape(1, 16), "8 warps, 80 registers": Shape(1, 8, 80),
    "8 warps, 32 rows": Shape(2, 8), "4 warps, no fetch": Shape(1, 4, None, False), "8 warps, no fetch": Shape(1, 8, None, False),
    "8 warps, not early": Shape(1, 8, None, True, False),
}  # fmt: skip
DENSE_SHAPES = {"4 warps": Shape(1, 4), "8 warps": Shape(1, 8), "4 warps, no fetch": Shape(1, 4, None, False),
                "4 warps, 80 registers": Shape(1, 4, 80)}  # fmt: skip
ADDED = ("o", "down")
"""Groups whose output is added to the residual."""
ROWS = (1, 2, 4, 8, 16)
Report = Callable[..., None]


def group(name: str, rank: int = 16) -> Product:
    rows, width, activation = GROUPS[name]
    members = []
    for n in rows:
        if name == "head":
            members.append(Member(torch.randn(n, width, device="cuda", dtype=torch.bfloat16) * 0.02, None, None))
            continue
        low = LowRank(torch.randn(rank, width, device="cuda") * 0.02, torch.randn(n, rank, device="cuda") * 0.02, 2.0)
        members.append(Member(random_packed(n, width), None, low if rank else None))
    return build(members, torch.bfloat16, activation)  # type: ignore[arg-type]


def stored(product: Product) -> int:
    """Bytes that a product reads: weights as stored, A and s * B in 16 bits."""
    total = 0
    for m in product.members:
        total += m.weight.nbytes
        total += 0 if m.lora is None else 2 * (m.lora.a.numel() + m.lora.b.numel())
    return total


def replayed(f: Callable[[], Any], repeats: int = 5) -> float:
    """Median milliseconds of one replay of what `f` launches."""
    f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    times = []
    for _ in range(repeats + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[1:])[repeats // 2]


def bench_products(report: Report) -> None:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / replayed(lambda: target.copy_(source)) / 1e6
    report(what="copy", gb_per_s=round(copy))
    for name in GROUPS:
        one = group(name)
        copies = [one, *(group(name) for _ in range(max(1, 300_000_000 // stored(one))))]
        for label, shape in (DENSE_SHAPES if name == "head" else PACKED_SHAPES).items():
            for m in ROWS if label in ("8 warps", "4 warps") else (1, 16):
                x = torch.randn(m, one.width, device="cuda", dtype=torch.bfloat16)
                out = torch.zeros(m, one.rows, device="cuda", dtype=torch.bfloat16)
                add = out if name in ADDED else None

                def all_of_them(
                    shape: Shape = shape, x: Tensor = x, out: Tensor = out, add: Any = add, copies: Any = copies
                ) -> None:
                    for product in copies:
                        multiply(product, x, out, add, shape=shape)

                us = replayed(all_of_them) / len(copies) * 1e3
                rate = stored(one) / us / 1e3
                report(what="product", group=name, rows=m, shape=label, us=round(us, 2), gb_per_s=round(rate),
                       of_copy=round(rate / copy, 3))  # fmt: skip
        del copies


def bench_bitsandbytes(report: Report) -> None:
    """Its 4-bit product for one row, on the same shapes, where it is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        report(what="bitsandbytes", left_out="not installed")
        return
    import bitsandbytes as bnb

    for name, (rows, width, _) in GROUPS.items():
        if name == "head":
            continue
        n = max(rows)
        copies = []
        for _ in range(max(2, 300_000_000 // (n * width // 2))):
            weight = torch.randn(n, width, device="cuda", dtype=torch.bfloat16) * 0.02
            copies.append(bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
        x = torch.randn(1, width, device="cuda", dtype=torch.bfloat16)

        def all_of_them(x: Tensor = x, copies: Any = copies) -> None:
            for codes, state in copies:
                bnb.matmul_4bit(x, codes.t(), state)

        us = replayed(all_of_them) / len(copies) * 1e3
        report(what="bitsandbytes", version=bnb.__version__, rows=n, columns=width, us=round(us, 2),
               gb_per_s=round(n * width * 0.516 / us / 1e3))  # fmt: skip


def run(name: str, product: Product, m: int, shape: Shape | None) -> None:
    x = torch.randn(m, product.width, device="cuda", dtype=torch.bfloat16)
    out = torch.zeros(m, product.rows, device="cuda", dtype=torch.bfloat16)
    multiply(product, x, out, out if name in ADDED else None, shape=shape)


def warm(name: str) -> None:
    """Compiles every variant of a group, into Triton's cache on disk."""
    product = group(name)
    for shape in (DENSE_SHAPES if name == "head" else PACKED_SHAPES).values():
        for m in (1, 16):
            run(name, product, m, shape)
    torch.cuda.synchronize()


def parts() -> dict[str, Callable[[], None]]:
    """The gate's pieces by name."""
    from kernels import checks_generation as checks

    found: dict[str, Callable[[], None]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        found[f"decode_step {dtype}"] = lambda dtype=dtype: checks.check_decode_step("cuda", (dtype,))
    for number in range(len(checks.CASES)):
        found[f"packed_gemv {number}"] = lambda number=number: checks.check_packed_gemv("cuda", (torch.bfloat16,), cases=(number,))
    found["packed_gemv fp16"] = lambda: checks.check_packed_gemv("cuda", (torch.float16,), cases=(1, 2))
    return found


def together(names: list[str], limit: float = 150) -> dict[str, str]:
    """Runs parts of this script as processes of their own, all at once; what each says if it fails, or "" """
    started = time.perf_counter()
    running = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--part", name], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        for name in names
    }
    found = {}
    for name, process in running.items():
        try:
            said = process.communicate(timeout=max(1.0, limit - (time.perf_counter() - started)))[1]
            found[name] = "" if process.returncode == 0 else said[-3000:]
        except subprocess.TimeoutExpired:
            process.kill()
            found[name] = f"did not end within {limit} s"
        print(f"{name}: {'RED' if found[name] else 'green'}, {time.perf_counter() - started:.0f} s\n{found[name]}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("gate", "products", "engine"))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.part in GROUPS:
        warm(options.part)
        return 0
    if options.part:
        parts()[options.part]()
        return 0
    out: Path = options.out
    if options.only == "engine":
        return generation_engine.main(out)
    out.mkdir(parents=True, exist_ok=True)
    wanted = (options.only,) if options.only else ("gate", "products", "engine")
    lines = (out / "generation_gpu.jsonl").open("w")

    def report(**fields: Any) -> None:
        print(json.dumps(fields), file=lines, flush=True)
        print(json.dumps(fields), flush=True)

    report(what="machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    warming = list(GROUPS) if "products" in wanted else []
    found = together([*parts(), *warming])
    (out / "generation_gate.json").write_text(json.dumps(found, indent=1))
    if any(found.values()):
        print("no figures: a kernel that is wrong has no speed")
        return 1
    if "products" in wanted:
        bench_products(report)
        bench_bitsandbytes(report)
    # In a process of its own: its children must find CUDA untouched.
    engine = [sys.executable, str(Path(__file__).with_name("generation_engine.py")), "--out", str(out)]
    return subprocess.run(engine, check=False).returncode if "engine" in wanted else 0


if __name__ == "__main__":
    sys.exit(main())
