"""Where the time of a training step goes: one profiled step of ours, by kind of kernel, against what the chip would need for it.

    python bench/roofline.py run --dir M --out bench/results/NAME.jsonl [--rows 4 --tokens 2048 --recompute full ...]
    python bench/roofline.py table --out bench/results/NAME.jsonl

`run` appends a line for the case and prints the table. Kernels are sorted by name, GEMMs by the shapes that torch was called with:
a side of at most 512 is a rank product, a side of the vocabulary the output head. `limit` is operations over the rate of the same
GEMM shapes run hot right after, or bytes over the rate of a large copy (`shapes.py`). Idle is the step's time without a profiler
less the time in which any kernel ran.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from engines import Case
from shapes import SIZES, flops, hot_rate, moved

# The first that matches a kernel's name, lower case: our own kernels by their whole name, the libraries' by a part of it. GEMMs are
# told apart by their shapes.
RULES = (
    ("copies, memsets", r"memcpy|memset"),
    ("optimizer", r"^_(sums|finish|step)$|adam|multi_tensor|normtwoops"),
    ("attention", r"flash|fmha|sdpa|attention|flex|varlen|cudnn"),
    ("LoRA products", r"^_outer$"),
    ("decode", r"^_(augmented|four_bit|eight_bit|words|row|transposed|dense|adapters)$|dequant"),
    ("quantise", r"^_(quantize|tail)$"),
    ("rotary", r"^_(rotate|gather|norm_rotate|norm_gather)$|rope"),
    ("norm", r"^_(add_norm|norm_backward)|norm"),
    ("glu", r"^_glu|silu|gelu"),
    ("loss", r"^_(expand|logits|combine|gradient|softmax)$|cross_entropy|softmax|nll"),
    ("GEMM", r"gemm|nvjet|cutlass|splitk|xmma|cublas"),
    ("embedding", r"embedding|index_select|indexselect"),
)
PARTS = ("base GEMM", "LoRA products", "head", "attention", "decode", "quantise", "norm", "rotary", "glu", "loss", "optimizer")
SKINNY = 512


def part_of(kernel: str, op: str = "", shapes: Sequence[Sequence[int]] = (), vocabulary: int = 0) -> str:
    """The part a kernel belongs to. op, shapes: the torch operation that launched it and the shapes of its inputs, if known."""
    name = kernel.lower()
    found = next((part for part, pattern in RULES if re.search(pattern, name)), "other")
    if found != "GEMM":
        return found
    sides = {side for shape in shapes if len(shape) >= 2 for side in shape[-2:]}
    if not sides or not re.search(r"mm|linear|matmul", op):
        return "GEMM of unknown shape"
    if vocabulary in sides:
        return "head"
    return "LoRA products" if min(sides) <= SKINNY else "base GEMM"


def sort_kernels(events: Iterable[Any], vocabulary: int) -> tuple[dict[str, dict[str, float]], float]:
    """(part -> kernel name -> milliseconds with the launch count under "n <name>", milliseconds in which any kernel ran)."""
    from torch.autograd import DeviceType

    events = list(events)
    device = [e for e in events if e.device_type == DeviceType.CUDA]
    parts: dict[str, dict[str, float]] = {}
    linked: dict[str, list[float]] = {}

    def add(part: str, name: str, microseconds: float, count: int) -> None:
        names = parts.setdefault(part, {})
        names[name] = names.get(name, 0.0) + microseconds / 1e3
        names["n " + name] = names.get("n " + name, 0) + count

    for e in events:
        if e.device_type == DeviceType.CPU:
            for kernel in e.kernels:
                add(part_of(kernel.name, e.name, e.input_shapes or (), vocabulary), kernel.name, kernel.duration, 1)
                seen = linked.setdefault(kernel.name, [0.0, 0])
                seen[0] += kernel.duration
                seen[1] += 1
    alone: dict[str, list[float]] = {}
    for e in device:
        total = alone.setdefault(e.name, [0.0, 0])
        total[0] += e.time_range.elapsed_us()
        total[1] += 1
    for name, (microseconds, count) in alone.items():
        done = linked.get(name, [0.0, 0])
        if count > done[1]:
            add(part_of(name), name, microseconds - done[0], int(count - done[1]))
    return parts, _busy([(e.time_range.start, e.time_range.end) for e in device]) / 1e3


def _busy(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def run(case: Case, root: str, data: str | None) -> dict[str, Any]:
    """The JSON line of a case."""
    import torch
    from engines import engine
    from gputime import DEVICE, Watch, sync, turns
    from torch.profiler import ProfilerActivity, profile

    watch = Watch()
    machine = engine(case, case.directory(root), data, DEVICE)
    for i in range(4):
        machine.step(i)
    sync()
    start = time.perf_counter()
    for i in range(6):
        machine.step(i)
    sync()
    end = time.perf_counter()
    clock = watch.between(start, end)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as profiler:
        machine.step(0)
        sync()
    shape, rows = SIZES[case.size], machine.batches[0]
    layers, tokens = case.layers or shape.layers, rows.ids.numel()
    rate = hot_rate(shape, layers, tokens, rows.trained)
    source = torch.empty(1 << 28, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / turns({"copy": lambda: target.copy_(source)}, 5)["copy"] / 1e6
    parts, busy = sort_kernels(profiler.events(), machine.model.config.vocab_size)
    watch.close()
    ms = (end - start) / 6 * 1e3
    device = sum(e.time_range.elapsed_us() for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA) / 1e3
    told = sum(_summary(names)["ms"] for names in parts.values())
    assert abs(told / device - 1) < 0.01, f"kernels took {device:.1f} ms and {told:.1f} are accounted for"
    limits = {
        name: work / rate["hot_tflops"] / 1e9 for name, work in flops(shape, layers, tokens, rows.trained, rows.documents).items()
    }
    limits |= {n: b / copy / 1e6 for n, b in moved(shape, layers, tokens, machine.trainable, case.recompute == "full").items()}
    return asdict(case) | {
        "what": "roofline",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "layers": layers,
        "step_ms": round(ms, 2),
        "busy_ms": round(busy, 2),
        "copy_gb_per_s": round(copy),
        "hot_tflops": rate["hot_tflops"],
        **clock,
        "parts": {part: _summary(names) for part, names in parts.items()},
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
    return "\n\n".join(table(json.loads(line)) for line in results.read_text().splitlines())


def table(line: dict[str, Any]) -> str:
    """One step as Markdown."""
    recompute = "full" if line["recompute"] == "full" else "no"
    offload = ", layer inputs offloaded" if line["offload"] else ""
    head = f"{line['size']}, {line['rows']} x {line['tokens']:,}, {recompute} recompute{offload}, {line['compute']}: "
    head += f"{line['step_ms']:.1f} ms a step at {line['sm_mhz']} MHz, GEMM shapes alone {line['hot_tflops']:.0f} TFLOP/s hot"
    text = [
        head,
        "",
        "| part | ms | share | launches a layer | limit, ms | over it, ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    parts, limits, step = line["parts"], line["limit_ms"], line["step_ms"]
    order = [p for p in PARTS if p in parts] + sorted(p for p in parts if p not in PARTS)
    for part in order:
        ms, limit = parts[part]["ms"], limits.get(part)
        known = f"{limit:.1f} | {ms - limit:.1f}" if limit else "0 | " + f"{ms:.1f}"
        text.append(f"| {part} | {ms:.1f} | {ms / step:.1%} | {parts[part]['launches'] / line['layers']:.1f} | {known} |")
    idle = max(0.0, step - line["busy_ms"])
    text.append(f"| idle | {idle:.1f} | {idle / step:.1%} | | 0 | {idle:.1f} |")
    launches = sum(p["launches"] for p in parts.values()) / line["layers"]
    limit = sum(limits.get(name, 0.0) for name in ("base GEMM", "head", "attention"))
    text.append(f"| step | {step:.1f} | {limit / step:.1%} of the limit | {launches:.1f} | {limit:.1f} | {step - limit:.1f} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--dir", default="model")
    parser.add_argument("--data")
    parser.add_argument("--out", type=Path, default=Path("bench/results/roofline.jsonl"))
    for field in fields(Case):
        if field.name in ("offload", "packed", "held", "graphs"):
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
    print(table(line))
    for part in ("other", "GEMM of unknown shape", "copies, memsets"):
        print(part, json.dumps(line["parts"].get(part, {}).get("slowest", {})))


if __name__ == "__main__":
    main()
