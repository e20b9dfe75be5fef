"""Attention on a CUDA GPU: which of torch's operators run, whether they are right, and how fast. Under a minute.

    python bench/attention_gpu.py --out DIR [--only facts,gate,time,graph,choice,flex,ragged]   # writes DIR/attention_gpu.jsonl

The gate comes before the clock: a method that is off float64 by more than honest PyTorch is reported as wrong and not timed.
Heads of an 8B Llama 3 (32 of 128, 8 for keys), bf16, q, k and v as views of one packed buffer. `flex` is compiled, hence
late; cuDNN over boundaries, which the library does not use, is last, since it may take the device down.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from gputime import CUDA, DEVICE, sync, turns  # noqa: E402
from torch import Tensor  # noqa: E402

from halfbyte.kernels.attention import Method, choice  # noqa: E402
from halfbyte.kernels.attention.cudnn import Cudnn  # noqa: E402
from halfbyte.kernels.attention.flash import Flash, installed  # noqa: E402
from halfbyte.kernels.attention.flex import Flex  # noqa: E402
from halfbyte.kernels.attention.sdpa import Sdpa  # noqa: E402
from kernels.checks_attention import Row, check, graphed, run  # noqa: E402

Report = Callable[..., None]
BF16 = torch.bfloat16
STARTED = time.perf_counter()
OPERATORS = (
    *("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"),
    *("_cudnn_attention_forward", "_cudnn_attention_backward", "_flash_attention_forward", "_flash_attention_backward"),
)
wrong: list[str] = []


def llama(*lengths: int) -> Row:
    return Row(lengths, 32, 8, 128, scale=128**-0.5)


def short_documents(tokens: int) -> tuple[int, ...]:
    """Log-normal lengths of mean 120, as many as fill a row; the last is cut."""
    draw, lengths = random.Random(0), []
    while sum(lengths) < tokens:
        lengths.append(max(8, round(draw.lognormvariate(4.5, 0.75))))
    lengths[-1] -= sum(lengths) - tokens
    return tuple(lengths)


def rows() -> dict[str, Row]:
    t = 2048 if CUDA else 32
    return {
        "4x2048": llama(*[t] * 4),
        "1x8192": llama(4 * t),
        "1x2048": llama(t),
        "ragged short": llama(*short_documents(4 * t)),
        "ragged long": llama(*(n * t // 2048 for n in (2500, 1000, 1700, 2100, 892))),
    }


def facts(report: Report) -> None:
    """Versions, and the operators' signatures in this torch."""
    report("facts", torch=torch.__version__, cudnn=torch.backends.cudnn.version(), gpu=torch.cuda.get_device_name() if CUDA else "")
    try:
        from torch.nn.attention import list_flash_attention_impls

        report("facts", known=list_flash_attention_impls(), installed=[one.name for one in installed()])
    except ImportError as error:
        report("facts", error=str(error))
    for name in OPERATORS:
        report("facts", operator=str(getattr(torch.ops.aten, name).default._schema))


def ragged(report: Report) -> None:
    """cuDNN over boundaries: forward and backward as torch has them, on dense q, k and v and on views; errors in their words."""
    forward, backward = torch.ops.aten._cudnn_attention_forward, torch.ops.aten._cudnn_attention_backward
    for name, row in {"ragged short": rows()["ragged short"], "64 and 100": llama(64, 100, 28)}.items():
        truth = run(Sdpa(), row, *row.inputs(DEVICE, BF16))
        bounds, longest = row.documents(DEVICE).cu_seqlens, max(row.lengths)
        for form in ("dense", "views"):
            inputs = row.inputs(DEVICE, BF16)
            q, k, v, dout = (x.contiguous() for x in inputs) if form == "dense" else inputs
            found: dict[str, Any] = {"row": name, "form": form}
            try:
                ahead = lambda: forward(q, k, v, None, bounds, bounds, longest, longest, True, 0.0, True, False, scale=row.scale)  # noqa: B023, E731
                out = ahead()
                found["out error"] = _error(out[0], truth[0])
                found["forward ms"] = _wall(ahead)
                end = (out[6], out[7], None, bounds, bounds, longest, longest, 0.0, True)
                back = lambda: backward(dout, q, k, v, out[0], out[1], *end, scale=row.scale)  # noqa: B023, E731
                grads = back()
                found["gradient errors"] = [_error(a, b) for a, b in zip(grads, truth[1:], strict=True)]
                found["backward ms"] = _wall(back)
            except (RuntimeError, TypeError) as error:
                found["error"] = _words(error)
            report("cudnn over boundaries", **found)


def _error(got: Tensor, truth: Tensor) -> float:
    return float((got.float().view(truth.shape) - truth.float()).norm() / truth.float().norm())


def _wall(f: Callable[[], Any]) -> float:
    sync()
    start = time.perf_counter()
    for _ in range(3):
        f()
    sync()
    return (time.perf_counter() - start) / 3 * 1e3


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:600]


def fast(row: Row) -> list[Method]:
    """The methods that are worth timing on a row."""
    equal = len({n for n in row.lengths if n}) == 1
    found: list[Method] = [*installed(), Flash()] if CUDA else []
    found = [Cudnn(), *found] if equal and CUDA else found
    return found or [Sdpa()]


def proven(one: Method, row: Row, dtype: torch.dtype, report: Report, name: str, apart: bool) -> bool:
    start = time.perf_counter()
    try:
        check(one, row, DEVICE, dtype, apart)
    except AssertionError as error:
        wrong.append(f"{one.name} {name} {dtype}")
        report("gate", method=one.name, row=name, dtype=str(dtype), ok=False, error=_words(error))
        return False
    except (RuntimeError, TypeError) as error:
        report("gate", method=one.name, row=name, dtype=str(dtype), ok=None, cannot=_words(error))
        return False
    report("gate", method=one.name, row=name, dtype=str(dtype), ok=True, seconds=round(time.perf_counter() - start, 2))
    return True


def gate(report: Report) -> None:
    """Odd shapes, both 16-bit types."""
    odd = [
        *(Row((256, 256), 8, 2, 128), Row((500,), 4, 4, 64), Row((77, 77, 77), 8, 1, 128), Row((1, 1), 4, 2, 64)),
        *(
            Row((130, 130), 4, 2, 96),
            Row((200,), 4, 2, 192),
            Row((200,), 4, 2, 256),
            Row((64, 64), 4, 2, 40),
            Row((300, 1, 0, 77, 513), 8, 2, 128),
            Row((1, 1, 1, 2), 4, 1, 256),
        ),
        *(Row((300, 1, 0, 77, 513), 4, 4, 64, window=100), Row((40, 64, 2), 6, 2, 96, window=1), Row((129,), 4, 2, 40)),
    ]
    for row in odd:
        for one in fast(row):
            if row.window is None or one.name != "cudnn":
                for dtype in (BF16, torch.float16):
                    proven(one, row, dtype, report, _name(row), apart=False)


def _name(row: Row) -> str:
    return f"{row.lengths} heads {row.heads}/{row.kv_heads} of {row.size}" + (f" window {row.window}" if row.window else "")


def timed(report: Report) -> None:
    """Forward, backward, memory beyond the inputs, repeated bits; FlashAttention also as torch's deterministic flag wants it."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    for name, row in rows().items():
        able = [one for one in fast(row) if proven(one, row, BF16, report, name, apart=True)]
        inputs = row.inputs(DEVICE, BF16)
        dense = tuple(x.contiguous() for x in inputs)
        for one, strict, form, given in _variants(able, inputs, dense):
            torch.use_deterministic_algorithms(strict)
            report("time", row=name, method=one.name, deterministic=strict, form=form, **figures(one, row, given))
            torch.use_deterministic_algorithms(False)


def _variants(able: list[Method], views: Any, dense: Any) -> Iterator[tuple[Method, bool, str, Any]]:
    for one in able:
        yield one, False, "views", views
        yield one, False, "dense", dense
        if one.name != "cudnn":
            yield one, True, "views", views


def figures(one: Method, row: Row, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    q, k, v, dout = inputs
    documents, arguments = row.documents(DEVICE), (row.scale, row.window, row.cap)
    out, residuals = one.forward(q, k, v, documents, *arguments)
    # The graph that `flex` keeps can be walked once: its backward is timed with the forward, which is then taken off.
    again = one.name == "flex"
    residuals = () if again else residuals
    ms = turns(
        {
            "forward": lambda: one.forward(q, k, v, documents, *arguments),
            "backward": lambda: one.backward(dout, q, k, v, out, residuals, documents, *arguments),
        }
    )
    ms["backward"] -= ms["forward"] if again else 0.0
    pairs = sum(n * (n + 1) / 2 for n in row.lengths)
    flop = 4 * row.heads * row.size * pairs
    first = run(one, row, *inputs)
    repeated = [run(one, row, *inputs) for _ in range(4)]
    bits = {n: all(torch.equal(a[i], first[i]) for a in repeated) for i, n in enumerate(("out", "dq", "dk", "dv"))}
    found = {
        "forward ms": round(ms["forward"], 3),
        "backward ms": round(ms["backward"], 3),
        "forward TFLOP/s": round(flop / ms["forward"] / 1e9),
        "backward TFLOP/s": round(2.5 * flop / ms["backward"] / 1e9),
        "bit-equal in 5 runs": bits,
        "host us": _host(one, row, inputs),
    }
    if CUDA:
        del first, repeated
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(one, row, *inputs)
        found["peak MiB beyond inputs, out and gradients"] = round(
            (torch.cuda.max_memory_allocated() - before) / 2**20 - 2 * sum(x.numel() * x.element_size() for x in (q, k)) / 2**20
        )
    return found


def _host(one: Method, row: Row, inputs: tuple[Tensor, ...]) -> int:
    """Microseconds of the host for forward and backward, while the GPU is kept busy."""
    sync()
    if CUDA:
        torch.cuda._sleep(200_000_000)
    start = time.perf_counter()
    for _ in range(5):
        run(one, row, *inputs)
    found = (time.perf_counter() - start) / 5 * 1e6
    sync()
    return round(found)


def graph(report: Report) -> None:
    """Whether forward and backward can be captured, and replay to the same."""
    for one, row in ((Flash(), Row((300, 1, 77, 513), 8, 2, 128)), (Cudnn(), Row((256, 256), 8, 2, 128))):
        try:
            graphed(one, row)
            report("graph", method=one.name, ok=True)
        except (AssertionError, RuntimeError) as error:
            report("graph", method=one.name, ok=False, error=_words(error))


def chosen(report: Report) -> None:
    """What the library would take, its log line, and what the choice costs."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("halfbyte").addHandler(handler)
    logging.getLogger("halfbyte").setLevel(logging.INFO)
    for name, row in (rows() | {"ragged short, window 64": replace(rows()["ragged short"], window=64)}).items():
        q, k, v, _ = row.inputs(DEVICE, BF16)
        documents = row.documents(DEVICE)
        sync()
        start = time.perf_counter()
        method = choice.method(q, k, v, documents, row.scale, row.window, None)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(100):
            choice.method(q, k, v, documents, row.scale, row.window, None)
        again = (time.perf_counter() - start) * 1e4
        report("choice", row=name, method=method.name, seconds=round(seconds, 3), again_us=round(again, 1), log=said[-1:])


def flex(report: Report) -> None:
    """Compile times and figures: capped, with a window, and (if there is time) plain; equal rows against cuDNN."""
    short = rows()["ragged short"]
    for name, row in {
        "ragged short, cap 50": replace(short, cap=50.0),
        "4x2048, cap 50, window 1024": replace(rows()["4x2048"], cap=50.0, window=1024),
        "ragged short": short,
    }.items():
        if time.perf_counter() - STARTED > 45 or not CUDA:
            report("flex", row=name, skipped="no time" if CUDA else "no GPU")
            continue
        inputs = row.inputs(DEVICE, BF16)
        try:
            start = time.perf_counter()
            out, _ = Flex().forward(*inputs[:3], row.documents(DEVICE), row.scale, row.window, row.cap)
            sync()
            ahead, start = time.perf_counter() - start, time.perf_counter()
            Flex().backward(inputs[3], *inputs[:3], out, (), row.documents(DEVICE), row.scale, row.window, row.cap)
            sync()
            report("flex", row=name, compile_forward_s=round(ahead, 1), compile_backward_s=round(time.perf_counter() - start, 1))
            start = time.perf_counter()
            other = row.documents(DEVICE)
            Flex().forward(*inputs[:3], other, row.scale, row.window, row.cap)
            sync()
            report("flex", row=name, new_documents_ms=round((time.perf_counter() - start) * 1e3, 2))
            if proven(Flex(), row, BF16, report, name, apart=True):
                report("time", row=name, method="flex", deterministic=False, form="views", **figures(Flex(), row, inputs))
                report("time", row=name, method="sdpa", deterministic=False, form="views", **figures(Sdpa(), row, inputs))
        except Exception as error:
            report("flex", row=name, error=f"{type(error).__name__}: {_words(error)}")


PARTS = {"facts": facts, "gate": gate, "time": timed, "graph": graph, "choice": chosen, "flex": flex, "ragged": ragged}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(PARTS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "attention_gpu.jsonl").open("w") as file:

        def report(kind: str, **values: Any) -> None:
            line = json.dumps({"kind": kind, **values, "at": round(time.perf_counter() - STARTED, 1)})
            file.write(line + "\n")
            file.flush()
            print(line, flush=True)

        for name in args.only.split(","):
            try:
                PARTS[name](report)
            except Exception as error:
                wrong.append(name)
                report("failed", part=name, error=f"{type(error).__name__}: {_words(error)}")
        report("end", wrong=wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
