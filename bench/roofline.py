"""Where the time of a training step goes: profiled steps of ours, by kind of kernel, against what the chip would need for them.

    python bench/roofline.py run --dir M --out bench/results/NAME.jsonl [--rows 4 --tokens 2048 --recompute full ...]
    python bench/roofline.py table --out bench/results/NAME.jsonl

`run` appends a line for the case and prints two tables: the parts of a step, and its GEMMs by shape with their TFLOP/s. Kernels are
sorted by name, GEMMs by what they multiply (`kernel_trace.py`): a side of at most 512 is a rank product, a side of the vocabulary
the output head, and so is a loss that makes its logits itself. `limit` is operations over the rate of the same GEMM shapes run hot
right after, in the step's `compute`, or bytes over the rate of a large copy (`shapes.py`).

The step is timed without a profiler. Idle and the time that shares are of come from a second run of several steps under a profiler
that only looks at the GPU: the span of their kernels, and that less the time in which any ran. The chip's clock differs between the
two, so neither is taken from the other. The parts are those of one more step, whose operations are recorded as well. `--graphs`
hides what the graphs multiply. Without a GPU the script runs, and there are no kernels.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from engines import Case
from kernel_trace import Kernel, Product, busy, by_product, kernels, named_products, profiled, steady
from reporting import read
from shapes import SIZES, flops, hot_rate, moved

# The first that matches a kernel's name, lower case: our own kernels by their whole name, the libraries' by a part of it. GEMMs are
# told apart by their shapes.
RULES = (
    ("copies, memsets", r"memcpy|memset"),
    ("optimizer", r"^_(sums|finish|step)$|adam|multi_tensor|normtwoops"),
    ("attention", r"flash|fmha|sdpa|attention|flex|varlen|cudnn"),
    ("LoRA products", r"^_outer$"),
    ("decode", r"^_(augmented|four_bit|eight_bit|words|stored|transposed|dense|adapters)$|dequant"),
    ("quantise", r"^_(quantize|tail)$"),
    ("rotary", r"^_(rotate|gather|norm_rotate|norm_gather)$|rope"),
    ("norm", r"^_(add_norm|norm_backward)|norm"),
    ("glu", r"^_glu|silu|gelu"),
    ("head", r"^_logits$"),
    ("loss", r"^_(expand|combine|gradient|softmax)$|cross_entropy|softmax|nll"),
    ("GEMM", r"gemm|nvjet|cutlass|splitk|xmma|cublas"),
    ("embedding", r"embedding|index_select|indexselect"),
)
PARTS = ("base GEMM", "LoRA products", "head", "attention", "decode", "quantise", "norm", "rotary", "glu", "loss", "optimizer")
SKINNY = 512
STEPS = 6
"""Timed, and as many profiled."""


def part_of(kernel: str, product: Product | None = None, vocabulary: int = 0) -> str:
    """The part a kernel belongs to. product: what it computes, if that is known."""
    name = kernel.lower()
    found = next((part for part, pattern in RULES if re.search(pattern, name)), "other")
    if found != "GEMM":
        return found
    if product is None:
        return "GEMM of unknown shape"
    if vocabulary in product:
        return "head"
    return "LoRA products" if min(product) <= SKINNY else "base GEMM"


def sort_kernels(found: Iterable[Kernel], vocabulary: int) -> dict[str, dict[str, float]]:
    """Part -> kernel name -> milliseconds, with the launch count under "n <name>"."""
    parts: dict[str, dict[str, float]] = {}
    for kernel in found:
        names = parts.setdefault(part_of(kernel.name, kernel.product, vocabulary), {})
        names[kernel.name] = names.get(kernel.name, 0.0) + kernel.us / 1e3
        names["n " + kernel.name] = names.get("n " + kernel.name, 0) + 1
    return parts


def run(case: Case, root: str, data: str | None) -> dict[str, Any]:
    """The JSON line of a case."""
    import torch
    from engines import engine
    from gputime import CUDA, DEVICE, Watch, sync

    watch = Watch()
    machine = engine(case, case.directory(root), data, DEVICE)
    for i in range(4):
        machine.step(i)
    sync()
    start = time.perf_counter()
    for i in range(STEPS):
        machine.step(i)
    sync()
    end = time.perf_counter()
    clock = watch.between(start, end)
    watch.close()
    line = asdict(case) | {
        "what": "roofline",
        "gpu": torch.cuda.get_device_name() if CUDA else "cpu",
        "torch": torch.__version__,
        "layers": case.layers or SIZES[case.size].layers,
        "step_ms": round((end - start) / STEPS * 1e3, 2),
        **clock,
    }
    return line | _timeline(machine) | _parts(machine) | _limits(case, machine)


def _timeline(machine: Any) -> dict[str, Any]:
    """Milliseconds of a step under a light profiler, and of them those in which nothing ran; {} without a GPU."""
    import torch
    from gputime import CUDA, MARKER, sync

    if not CUDA:
        return {}

    def steps() -> None:
        for i in range(STEPS):
            torch.cuda._sleep(100)
            machine.step(i)
        sync()

    profiled(lambda: (torch.cuda._sleep(100), sync()), host=False)  # the first session of a process can miss kernels
    found = steady(kernels(profiled(steps, host=False)), MARKER)
    return {"profiled_ms": round(found["span_ms"], 2), "idle_ms": round(found["idle_ms"], 2), "profiled_steps": found["steps"]}


def _parts(machine: Any) -> dict[str, Any]:
    """The kernels of a step by part, and its products."""
    from gputime import CUDA, sync

    with named_products():
        found = kernels(profiled(lambda: (machine.step(0), sync()), host=True))
    assert found or not CUDA, "the profiler saw no kernel"
    parts = sort_kernels(found, machine.model.config.vocab_size)
    return {
        "busy_ms": round(busy(found) / 1e3, 2),
        "parts": {part: _summary(names) for part, names in parts.items()},
        "gemms": by_product(found),
    }


def _limits(case: Case, machine: Any) -> dict[str, Any]:
    """What the parts would need, in milliseconds, and the rates that say so."""
    import torch
    from gputime import CUDA, DEVICE, turns

    shape, rows = SIZES[case.size], machine.batches[0]
    layers, tokens = case.layers or shape.layers, rows.ids.numel()
    rate = hot_rate(shape, layers, tokens, rows.trained, case.compute)
    source = torch.empty(1 << (28 if CUDA else 20), dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / turns({"copy": lambda: target.copy_(source)}, 5)["copy"] / 1e6
    limits = {n: b / copy / 1e6 for n, b in moved(shape, layers, tokens, machine.trainable, case.recompute == "full").items()}
    if rate:
        # Attention is in 16 bits, as the head is.
        rates = rate["hot_parts"] | {"attention": rate["hot_parts"]["head"]}
        work = flops(shape, layers, tokens, rows.trained, rows.documents)
        limits = {name: value / rates[name] / 1e9 for name, value in work.items()} | limits
    return {
        "copy_gb_per_s": round(copy),
        "hot_tflops": rate.get("hot_tflops", 0.0),
        "hot_parts": rate.get("hot_parts", {}),
        "limit_ms": {name: round(value, 2) for name, value in limits.items()},
    }


def _summary(names: dict[str, float]) -> dict[str, Any]:
    """Time, launches and the eight slowest kernels of a part."""
    own = {name: ms for name, ms in names.items() if not name.startswith("n ")}
    slowest = sorted(own, key=lambda name: -own[name])[:8]
    return {
        "ms": round(sum(own.values()), 3),
        "launches": int(sum(count for name, count in names.items() if name.startswith("n "))),
        "slowest": {name[:100]: [round(own[name], 3), int(names["n " + name])] for name in slowest},
    }


def markdown(results: Path) -> str:
    """A table for every line: time by part, its share, launches a layer, its limit, and what is lost over it."""
    return "\n\n".join(table(line) for line in read(results))


def table(line: dict[str, Any]) -> str:
    """One step as Markdown. Shares are of the profiled step."""
    recompute = "full" if line["recompute"] == "full" else "no"
    offload = ", layer inputs offloaded" if line["offload"] else ""
    head = f"{line['size']}, {line['rows']} x {line['tokens']:,}, {recompute} recompute{offload}, {line['compute']}: "
    head += f"{line['step_ms']:.1f} ms a step at {line['sm_mhz']} MHz, GEMM shapes alone {line['hot_tflops']:.0f} TFLOP/s hot"
    parts, limits, step = line["parts"], line["limit_ms"], line["step_ms"]
    whole, idle = line.get("profiled_ms", step), line.get("idle_ms")
    if idle is not None:
        head += f"; under the profiler {whole:.1f} ms, which shares are of, and nothing ran for {idle:.1f} of them"
    text = [
        head,
        "",
        "| part | ms | share | launches a layer | limit, ms | over it, ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    order = [p for p in PARTS if p in parts] + sorted(p for p in parts if p not in PARTS)
    for part in order:
        ms, limit = parts[part]["ms"], limits.get(part)
        known = f"{limit:.1f} | {ms - limit:.1f}" if limit else "0 | " + f"{ms:.1f}"
        text.append(f"| {part} | {ms:.1f} | {ms / whole:.1%} | {parts[part]['launches'] / line['layers']:.1f} | {known} |")
    if idle is not None:
        text.append(f"| idle | {idle:.1f} | {idle / whole:.1%} | | 0 | {idle:.1f} |")
    launches = sum(p["launches"] for p in parts.values()) / line["layers"]
    limit = sum(limits.get(name, 0.0) for name in ("base GEMM", "head", "attention"))
    text.append(f"| step | {step:.1f} | {limit / step:.1%} of the limit | {launches:.1f} | {limit:.1f} | {step - limit:.1f} |")
    return "\n".join(text)


def products(line: dict[str, Any]) -> str:
    """The GEMMs of one step as Markdown."""
    text = ["| M x N x K | ms | calls | TFLOP/s |", "| --- | ---: | ---: | ---: |"]
    for name, found in line["gemms"].items():
        text.append(f"| {name.replace('x', ' x ')} | {found['ms']:.2f} | {found['calls']} | {found['tflops']:.0f} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--dir", default="model")
    parser.add_argument("--data")
    parser.add_argument("--out", type=Path, default=Path("bench/results/roofline.jsonl"))
    for field in fields(Case):
        if field.type == "bool":
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            default = "halfbyte" if field.name == "impl" else field.default
            parser.add_argument(f"--{field.name}", type=type(default), default=default)
    args = parser.parse_args()
    if args.command == "table":
        print(markdown(args.out))
        return
    line = run(Case(**{field.name: getattr(args, field.name) for field in fields(Case)}), args.dir, args.data)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(table(line), products(line), sep="\n\n")
    for part in ("other", "loss", "GEMM of unknown shape", "copies, memsets"):
        print(part, json.dumps(line["parts"].get(part, {}).get("slowest", {})))


if __name__ == "__main__":
    main()
