"""Packed products with one row of x on a CUDA GPU: every shape of the kernel against a copy, the proof before.

    python bench/gemv_gpu.py --out DIR [--only gate|products|layer]      # JSON lines in DIR/gemv_gpu.jsonl, flushed

The script starts itself with `--part` for each piece of the gate, in parallel: the checks of `tests/kernels/checks_generation.py`,
and every shape at full size against the decoded weight in fp32. That also compiles every kernel into Triton's cache. A group
with a red piece is left out, and said to be; layers need all. The exit code is 1 if anything is red.

product: one graph of launches of one group, each of which reads another copy of the weights, more than 4 x the L2 in all; A x
comes in pieces. layer: a graph of whole layers' four groups in turn, as a token runs them, norms inside (without attention); A x
fed by the product before, left as it is, or by launches of its own. Rates count the bytes of the packed weights and adapters, read
once. bitsandbytes: its product for one row, where it can be imported.
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
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402

from halfbyte.formats.packed import Format, Packed  # noqa: E402
from halfbyte.kernels.dequantize import decode  # noqa: E402
from halfbyte.kernels.lora_linear.members import LowRank, Member  # noqa: E402
from halfbyte.kernels.packed_gemv import Pieces, Product, RmsNorm, Shape, build, multiply, pieces, programs  # noqa: E402

NESTED = Format("nf4", 64, nested=True)
GROUPS: dict[str, tuple[tuple[int, ...], int, str | None]] = {
    "q+k+v": ((4096, 1024, 1024), 4096, None),
    "o": ((4096,), 4096, None),
    "gate+up": ((14336, 14336), 4096, "silu"),
    "down": ((4096,), 14336, None),
    "head": ((128256,), 4096, None),
}
ADDED = ("o", "down")
"""Groups whose output is added to the residual."""
PACKED_SHAPES = {
    "16 warps x 1": Shape(1, 16, 1), "16 warps x 1, none ahead": Shape(1, 16, 1, ahead=0),
    "16 warps x 1, 6 ahead": Shape(1, 16, 1, ahead=6), "16 warps x 1, not early": Shape(1, 16, 1, early=False),
    "16 warps x 1, 64 registers": Shape(1, 16, 1, 64), "16 warps x 2, 64 registers": Shape(1, 16, 2, 64),
    "8 warps x 1": Shape(1, 8, 1, 128), "8 warps x 2": Shape(1, 8, 2, 128), "8 warps x 3": Shape(1, 8, 3, 80),
    "32 rows, 16 warps x 1": Shape(2, 16, 1), "32 rows, 8 warps x 2": Shape(2, 8, 2, 128), "48 rows, 16 warps x 1": Shape(3, 16, 1),
}  # fmt: skip
DENSE_SHAPES = {
    "8 warps x 2": Shape(1, 8, 2, 128), "16 warps x 1": Shape(1, 16, 1), "8 warps x 2, none ahead": Shape(1, 8, 2, 128, 0),
    "16 warps x 1, 1 ahead": Shape(1, 16, 1, ahead=1), "8 warps x 2, 1 ahead": Shape(1, 8, 2, 128, 1),
    "8 warps x 1": Shape(1, 8, 1),
}  # fmt: skip
SHARES = 4
"""Processes that share a group's shapes in the gate."""
LEFT = 132
"""Pieces of A x: programs of the launch in front."""
Report = Callable[..., None]


def shapes_of(name: str) -> dict[str, Shape]:
    """Gate and up have 16 rows each at a time, whatever the shape says; 48 rows a program are all of q, k and v."""
    if name == "head":
        return DENSE_SHAPES
    most = {"gate+up": 1, "q+k+v": 3}.get(name, 2)
    return {label: shape for label, shape in PACKED_SHAPES.items() if shape.tiles <= most}


def random_packed(n: int, k: int) -> Packed:
    """Random bytes as a nested nf4 weight of ordinary size: no time is spent on quantising."""
    blocks = n * k // 64
    codes = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device="cuda")
    scales = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda")
    outer = torch.full((-(-blocks // 256),), 0.01, device="cuda").view(torch.uint8)
    offset = torch.full((1,), 0.04, device="cuda").view(torch.uint8)
    return Packed(NESTED, (n, k), torch.bfloat16, codes, scales, outer, offset, torch.empty(0, dtype=torch.uint8, device="cuda"))


def group(name: str, rank: int = 16, dense: bool = False) -> Product:
    rows, width, activation = GROUPS[name]
    members = []
    for n in rows:
        if name == "head" or dense:
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


def together(script: str, names: list[str], limit: float = 150) -> dict[str, str]:
    """Runs parts of a script as processes of their own, all at once; what each says if it fails, or "" """
    started = time.perf_counter()
    quiet: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    running = {name: subprocess.Popen([sys.executable, script, "--part", name], **quiet) for name in names}
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


def left_for(product: Product) -> Pieces | None:
    """A x as the launch in front leaves it (here: nothing)."""
    return None if product.launch is None or not product.launch.rank else pieces(product, LEFT, None)


def prove(name: str, share: int) -> None:
    """Shapes share, share + SHARES, ... of a group, against the decoded weights multiplied in fp32."""
    product = group(name)
    x = torch.randn(1, product.width, device="cuda", dtype=torch.bfloat16)
    outputs = []
    for m in product.members:
        weight = decode(m.weight, torch.float32) if isinstance(m.weight, Packed) else m.weight.float()
        low = 0 if m.lora is None else m.lora.scale * (x.float() @ m.lora.a.T) @ m.lora.b.T
        outputs.append(x.float() @ weight.T + low)
    truth = torch.nn.functional.silu(outputs[0]) * outputs[1] if product.activation else torch.cat(outputs, 1)
    before = torch.randn(1, product.rows, device="cuda", dtype=torch.bfloat16) if name in ADDED else None
    truth = truth if before is None else before.float() + truth
    for label, shape in list(shapes_of(name).items())[share::SHARES]:
        left = left_for(product)
        if left is not None:
            a = torch.cat([m.lora.a for m in product.members if m.lora is not None])
            left.sums[7, 0] = x.float()[0] @ a.bfloat16().float().T
        for fed in (None, left):
            out = torch.full_like(truth, float("nan"), dtype=torch.bfloat16) if before is None else before.clone()
            multiply(product, x, out, None if before is None else out, pieces=fed, shape=shape)
            error = float((out.float() - truth).norm() / truth.norm())
            assert error < 6e-3, f"{name}, {label}: off by {error}"


def parts() -> dict[str, Callable[[], None]]:
    """The gate's pieces by name."""
    from kernels import checks_generation as checks

    found: dict[str, Callable[[], None]] = {}
    for label in layer_shapes():
        found[f"layer {label}"] = lambda label=label: bench_layers(1.0, lambda **fields: None, 1, label)
    for name in GROUPS:
        for share in range(SHARES):
            found[f"{name} {share}"] = lambda name=name, share=share: prove(name, share)
    for number in range(len(checks.CASES)):
        found[f"packed_gemv {number}"] = lambda number=number: checks.check_packed_gemv("cuda", (torch.bfloat16,), cases=(number,))
    for dtype in (torch.bfloat16, torch.float16):
        found[f"fed products {dtype}"] = lambda dtype=dtype: checks.check_fed_products("cuda", (dtype,))
    found["packed_gemv fp16"] = lambda: checks.check_packed_gemv("cuda", (torch.float16,), cases=(1, 2))
    return found


def copy_rate(report: Report) -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / replayed(lambda: target.copy_(source)) / 1e6
    report(what="copy", gb_per_s=round(rate))
    return rate


def bench_products(groups: list[str], copy: float, report: Report) -> None:
    for name in groups:
        one = group(name)
        copies = [one, *(group(name) for _ in range(max(1, 300_000_000 // stored(one))))]
        left = left_for(one)
        x = torch.randn(1, one.width, device="cuda", dtype=torch.bfloat16)
        out = torch.zeros(1, one.rows, device="cuda", dtype=torch.bfloat16)
        for label, shape in shapes_of(name).items():

            def all_of_them(
                shape: Shape = shape, x: Any = x, out: Any = out, name: str = name, copies: Any = copies, left: Any = left
            ) -> None:
                for product in copies:
                    multiply(product, x, out, out if name in ADDED else None, pieces=left, shape=shape)

            us = replayed(all_of_them) / len(copies) * 1e3
            rate = stored(one) / us / 1e3
            report(what="product", group=name, shape=label, us=round(us, 2), gb_per_s=round(rate), of_copy=round(rate / copy, 3))
        del copies


def layer_shapes() -> dict[str, Shape | None]:
    """For all four groups alike; None: as chosen for each."""
    return {"chosen": None, **{k: s for k, s in shapes_of("gate+up").items() if s.registers != 64}}


def bench_layers(copy: float, report: Report, layers: int = 8, only: str | None = None) -> None:
    """Whole layers: what a token's products cost when the groups follow each other."""
    names = [n for n in GROUPS if n != "head"]
    made = [{n: group(n) for n in names} for _ in range(layers)]
    x = {n: torch.randn(1, GROUPS[n][1], device="cuda", dtype=torch.bfloat16) for n in names}
    out = {n: torch.zeros(1, made[0][n].rows, device="cuda", dtype=torch.bfloat16) for n in names}
    count = sum(stored(p) for p in made[0].values())
    norm = RmsNorm(torch.ones(GROUPS["q+k+v"][1], device="cuda", dtype=torch.bfloat16), 1e-5, 0.0)
    normed = {"q+k+v": norm, "gate+up": norm}
    following = dict(zip(names, [*names[1:], names[0]], strict=True))

    def run(how: str, shape: Shape | None, fed: Any) -> None:
        for layer, left in zip(made, fed, strict=True):
            for n in names:
                add = out[n] if n in ADDED else None
                if how == "launched":
                    multiply(layer[n], x[n], out[n], add, shape=shape)
                else:
                    feeds = None if how == "left" or n == "q+k+v" else left[following[n]]
                    multiply(layer[n], x[n], out[n], add, norm=normed.get(n), pieces=left[n], feeds=feeds, shape=shape)

    for label, shape in layer_shapes().items():
        if only not in (None, label):
            continue
        counts = {following[n]: programs(made[0][n], 1, shape) for n in names}
        fed = [{n: pieces(layer[n], counts[n], normed.get(n)) for n in names} for layer in made]
        for how in ("fed", "left", "launched") if shape is None else ("fed",):
            us = replayed(lambda how=how, shape=shape, fed=fed: run(how, shape, fed)) / layers * 1e3
            report(what="layer", shape=label, a_x=how, us=round(us, 2), of_copy=round(count / us / 1e3 / copy, 3))


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

        def all_of_them(x: Any = x, copies: Any = copies) -> None:
            for codes, state in copies:
                bnb.matmul_4bit(x, codes.t(), state)

        us = replayed(all_of_them) / len(copies) * 1e3
        report(what="bitsandbytes", version=bnb.__version__, rows=n, columns=width, us=round(us, 2),
               gb_per_s=round(n * width * 0.516 / us / 1e3))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("gate", "products", "layer"))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.part:
        parts()[options.part]()
        torch.cuda.synchronize()
        return 0
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    wanted = (options.only,) if options.only else ("gate", "products", "layer")
    lines = (out / "gemv_gpu.jsonl").open("w")

    def report(**fields: Any) -> None:
        print(json.dumps(fields), file=lines, flush=True)
        print(json.dumps(fields), flush=True)

    report(what="machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    found = together(__file__, list(parts()))
    (out / "gemv_gate.json").write_text(json.dumps(found, indent=1))
    red = sorted(name for name, said in found.items() if said)
    groups = [name for name in GROUPS if not any(piece.startswith(f"{name} ") for piece in red)]
    report(what="gate", red=red, left_out=[name for name in GROUPS if name not in groups])
    copy = copy_rate(report)
    if "layer" in wanted and len(groups) == len(GROUPS):
        bench_layers(copy, report)
    if "products" in wanted:
        bench_products(groups, copy, report)
        bench_bitsandbytes(report)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
