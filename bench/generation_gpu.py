"""Generation on a CUDA GPU: the proof, then tokens a second of an 8B model. The products alone: `gemv_gpu.py`.

    python bench/generation_gpu.py --out DIR [--only gate|engine]      # JSON lines in DIR/generation_gpu.jsonl, flushed

The script starts itself with `--part` for each piece of the gate and of the compiling, in parallel.

The gate: kernels against float64 (`tests/kernels/checks_generation.py`), and the engine's greedy tokens equal to the model's own
forward wherever that one's two likeliest tokens are apart. If it is red nothing is reported and the exit code is 1.
The baseline runs bf16 weights in the same engine through cuBLAS, without an adapter.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "bench")]

import torch  # noqa: E402
from gemv_gpu import NESTED, random_packed, together  # noqa: E402
from torch import nn  # noqa: E402

from halfbyte.adapters import lora  # noqa: E402
from halfbyte.adapters.config import AdapterConfig  # noqa: E402
from halfbyte.formats.packed import Packed  # noqa: E402
from halfbyte.generate.engine import Engine  # noqa: E402
from halfbyte.generate.step import links  # noqa: E402
from halfbyte.kernels.lora_linear.members import Member  # noqa: E402
from halfbyte.kernels.packed_gemv import Product  # noqa: E402
from halfbyte.kernels.packed_gemv import launch as gemv_launch  # noqa: E402
from halfbyte.layers import swap  # noqa: E402

PLACES = 2048
Report = Callable[..., None]


def model_of(**sizes: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **sizes, rope_theta=500000.0, rms_norm_eps=1e-5, tie_word_embeddings=False)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.requires_grad_(False)
    return model


def pack(model: Any, make: Callable[[nn.Linear], Packed]) -> None:
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not path.endswith("lm_head"):
            swap.pack_module(model, path, make(module))


def adapt(model: Any) -> lora.Adapter:
    adapter = lora.attach(model, AdapterConfig(rank=16), 0)
    with torch.no_grad():
        for _, parameter, role in adapter.parameters():
            if role == "lora_b":
                parameter.normal_(0, 0.02)
    return adapter


def gate_engine() -> None:
    """Greedy tokens of two rows against the model's own forward over the same text, where its choice is clear."""
    from halfbyte.formats.quantize import quantize

    model = model_of(hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
                     vocab_size=4096, max_position_embeddings=4096)  # fmt: skip
    pack(model, lambda module: quantize(module.weight, NESTED, name="gate"))
    assert all(row.adopted for row in swap.adopt(model).layers), "not adopted"
    adapt(model)
    prompts = [list(range(5, 45)), [7, 8, 9]]
    for rows in (prompts, prompts[:1]):
        engine = Engine(model, len(rows), 512, 100)
        assert not engine.plain, engine.plain
        answers = engine.answer(rows, 100, set())
        assert engine.answer(rows, 100, set()) == answers, "the second answer differs"
        for prompt, answer in zip(rows, answers, strict=True):
            ids = torch.tensor([[*prompt, *answer]], device="cuda")
            with torch.no_grad():
                scores = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            top = scores.topk(2).values
            clear = (top[:, 0] - top[:, 1]) > 0.05 * scores.std()
            same = scores.argmax(-1).cpu() == torch.tensor(answer)
            assert clear.sum() >= 50, f"only {int(clear.sum())} clear choices"
            assert same[clear.cpu()].all(), f"{int((~same & clear.cpu()).sum())} of {int(clear.sum())} clear tokens differ"


def parts() -> dict[str, Callable[[], None]]:
    """The gate's pieces by name."""
    from kernels import checks_generation as checks

    found: dict[str, Callable[[], None]] = {"engine": gate_engine}
    for dtype in (torch.bfloat16, torch.float32):
        found[f"decode_step {dtype}"] = lambda dtype=dtype: checks.check_decode_step("cuda", (dtype,))
    for number in range(len(checks.CASES)):
        found[f"packed_gemv {number}"] = lambda number=number: checks.check_packed_gemv("cuda", (torch.bfloat16,), cases=(number,))
    found["fed products"] = lambda: checks.check_fed_products("cuda", (torch.bfloat16,))
    found["packed_gemv fp16"] = lambda: checks.check_packed_gemv("cuda", (torch.float16,), cases=(1, 2))
    return found


def as_cublas(engine: Engine) -> None:
    """The engine's products as plain matrices multiplied by cuBLAS: q/k/v stacked, gate/up stacked, no kernels of ours in them."""

    def stacked(product: Product) -> Product:
        weight = torch.cat([m.weight for m in product.members])  # type: ignore[misc]
        return Product((Member(weight, None, None),), None, product.width, weight.shape[0], None, "cuBLAS")

    made = [
        replace(p, qkv=stacked(p.qkv), out=stacked(p.out), inputs=stacked(p.inputs), down=stacked(p.down)) for p in engine.products
    ]
    engine.products = made
    engine.links = links(engine.reading, made, len(engine.b.token))
    engine.head = stacked(engine.head)
    rows = len(engine.b.token)
    engine.b = replace(engine.b, wide=torch.empty(rows, made[0].inputs.rows, dtype=engine.dtype, device="cuda"))


def speed(engine: Engine, label: str, report: Report) -> None:
    """Milliseconds a token: an answer from a short prompt as a caller sees it, and replays deep in the cache."""
    rows = len(engine.b.token)
    started = time.perf_counter()
    engine.capture()
    captured = time.perf_counter() - started
    prompts = [list(range(1, 17))] * rows
    engine.answer(prompts, 8, set())
    started = time.perf_counter()
    engine.answer(prompts, 256, set())
    wall = time.perf_counter() - started
    fields: dict[str, Any] = {}
    for place in (256, PLACES - 64):
        engine.b.position.fill_(place)
        engine.number.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(32):
            engine.advance()
        end.record()
        torch.cuda.synchronize()
        fields[f"ms_at_{place}"] = round(start.elapsed_time(end) / 32, 4)
    report(what="engine", weights=label, rows=rows, tokens_per_s=round(256 * rows / wall, 1), capture_s=round(captured, 2),
           tokens_per_s_replays=round(rows * 1e3 / fields["ms_at_256"], 1), **fields)  # fmt: skip


def profile(engine: Engine, label: str, report: Report) -> None:
    """Kernels of one token, by name. With early launches a kernel's time includes its waiting for the one before."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    with recorded(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(4):
            engine.advance()
        torch.cuda.synchronize()
    table: dict[str, list[float]] = {}
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            table.setdefault(event.name[:60], []).append(event.time_range.elapsed_us())
    for name, times in sorted(table.items(), key=lambda item: -sum(item[1]))[:16]:
        figures = {"us": round(sum(times) / 4, 1), "least": round(min(times), 1), "most": round(max(times), 1)}
        report(what="token", weights=label, kernel=name, launches=len(times) // 4, **figures)


SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
         "max_position_embeddings": 8192}  # fmt: skip
WARMED = {"bf16": 1, "nf4": 1, "nf4 + adapter": 1, "nf4 + adapter, 4 rows": 4, "nf4 + adapter, 16 rows": 16}
"""Rows of each engine that is measured."""


def warm(label: str) -> None:
    """Compiles what an engine launches, into Triton's cache on disk: with two layers."""
    model = model_of(**SIZES, num_hidden_layers=2)
    swap.adopt(model)
    if label != "bf16":
        pack(model, lambda module: random_packed(*module.weight.shape))
    if "adapter" in label:
        adapt(model)
    Engine(model, WARMED[label], PLACES, 300).capture()
    torch.cuda.synchronize()


def bench_engine(report: Report) -> None:
    started = time.perf_counter()
    model = model_of(**SIZES, num_hidden_layers=32)
    swap.adopt(model)
    report(what="built", seconds=round(time.perf_counter() - started, 1))
    engine = Engine(model, 1, PLACES, 300)
    speed(engine, "bf16, our kernel", report)
    as_cublas(engine)
    engine.graph = None
    speed(engine, "bf16, cuBLAS", report)
    del engine
    pack(model, lambda module: random_packed(*module.weight.shape))
    torch.cuda.empty_cache()
    speed(Engine(model, 1, PLACES, 300), "nf4", report)
    adapt(model)
    engine = Engine(model, 1, PLACES, 300)
    speed(engine, "nf4 + adapter", report)
    profile(engine, "nf4 + adapter", report)
    del engine
    for rows in (4, 16):
        speed(Engine(model, rows, PLACES, 300), "nf4 + adapter", report)
    gemv_launch.hopper = lambda device: False  # what starting early and fetching ahead are worth
    from halfbyte.kernels.decode_step import fused

    fused.hopper = gemv_launch.hopper
    engine = Engine(model, 1, PLACES, 300)
    speed(engine, "nf4 + adapter, no early launches", report)
    profile(engine, "nf4 + adapter, no early launches", report)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("gate", "engine"))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.part in WARMED:
        warm(options.part)
        return 0
    if options.part:
        parts()[options.part]()
        return 0
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    wanted = (options.only,) if options.only else ("gate", "engine")
    lines = (out / "generation_gpu.jsonl").open("w")

    def report(**fields: Any) -> None:
        print(json.dumps(fields), file=lines, flush=True)
        print(json.dumps(fields), flush=True)

    report(what="machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    warming = list(WARMED) if "engine" in wanted else []
    found = together(__file__, [*parts(), *warming])
    (out / "generation_gate.json").write_text(json.dumps(found, indent=1))
    if any(found.values()):
        print("no figures: a kernel that is wrong has no speed")
        return 1
    if "engine" in wanted:
        bench_engine(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
