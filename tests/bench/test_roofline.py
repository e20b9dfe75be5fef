"""A profiled step read back: which part and which product a kernel belongs to, and how long nothing ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from .test_tables import bench

MICROSECONDS = 1e3
TABLE = "| norm | 1.0 | 25.0% | 1.0 | 0 | 1.0 |"


@pytest.mark.parametrize(
    ("kernel", "product", "part"),
    [
        ("nvjet_hsh_192x192_64x4_2x1_v_bz_TNT", (8192, 6144, 4096), "base GEMM"),
        ("nvjet_sm90_qqtst_128x128_128x6_2x1_v_bz_ovscale_TNT", (8192, 6144, 4352), "base GEMM"),
        ("nvjet_hsh_64x8_64x16_1x4_h_bz_splitK_TNN", (8192, 48, 4096), "LoRA products"),
        ("void cutlass::Kernel2<...>", (8192, 4096, 16), "LoRA products"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_TNT", (1024, 128256, 4096), "head"),
        ("nvjet_hsh_192x192", None, "GEMM of unknown shape"),
        ("_logits", None, "head"),
        ("_gradient", None, "loss"),
        ("_add_norm", (8192, 6144, 4096), "norm"),
        ("_norm_gather", None, "rotary"),
        ("_augmented", None, "decode"),
        ("_stored", None, "decode"),
        ("_step", None, "optimizer"),
        ("triton_tem_fused_flex_attention_0", None, "attention"),
        ("void at::native::reduce_kernel<512, 1, NormTwoOps<float>>", None, "optimizer"),
        ("pytorch_flash::flash_bwd_dq_dk_dv_loop", None, "attention"),
        ("_rotate", None, "rotary"),
        ("indexSelectLargeIndex", None, "embedding"),
        ("Memset (Device)", None, "copies, memsets"),
        ("vectorized_elementwise_kernel", None, "other"),
    ],
)
def test_the_part_of_a_kernel(kernel: str, product: tuple[int, int, int] | None, part: str) -> None:
    assert bench("roofline").part_of(kernel, product, 128256) == part


def on_host(cat: str, name: str, start: float, us: float, thread: int, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": thread, "ts": start, "dur": us, "args": args}


def on_gpu(name: str, start: float, us: float, correlation: int, linked: int = 0) -> dict[str, Any]:
    args = {"External id": linked, "correlation": correlation, "stream": 7}
    return {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": start, "dur": us, "args": args}


def test_kernels_find_their_products() -> None:
    """By the profiler's link; by the time of the launch, on its thread first, the innermost; and not at all."""
    outer = {"External id": 2, "Input Dims": [[8, 512, 4096], [4096, 48]]}
    inner = {"External id": 3, "Input Dims": [[40], [4096, 4096], [4096, 40], [], []]}
    events = [
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "ts": 0, "args": {"name": "python"}},
        on_host("cpu_op", "gemm 8192x6144x4160", 100, 10, 1, **{"External id": 1}),
        on_host("cpu_op", "aten::matmul", 200, 50, 1, **outer),
        on_host("cpu_op", "aten::addmm", 210, 20, 1, **inner),
        on_host("cpu_op", "aten::add", 300, 10, 1, **{"External id": 4, "Input Dims": [[64, 64], [64, 64]]}),
        on_host("user_annotation", "gemm 5x6x7", 200, 500, 2, **{"External id": 5}),
        on_host("cuda_runtime", "cudaLaunchKernelExC", 999, 1, 1, correlation=11),
        on_host("cuda_driver", "cuLaunchKernelEx", 104, 2, 1, correlation=12),
        on_host("cuda_runtime", "cudaLaunchKernel", 215, 2, 1, correlation=13),
        on_host("cuda_runtime", "cudaLaunchKernel", 240, 2, 1, correlation=14),
        on_host("cuda_driver", "cuLaunchKernel", 600, 2, 99, correlation=15),
        on_host("cuda_runtime", "cudaLaunchKernel", 305, 2, 1, correlation=16),
        on_host("cuda_runtime", "cudaGraphLaunch", 800, 2, 1, correlation=17),
        on_gpu("linked", 1000, 10, 11, linked=1),
        on_gpu("by time", 1010, 20, 12),
        on_gpu("inner", 1030, 5, 13, linked=4),  # the link names no product
        on_gpu("outer", 1035, 5, 14),
        on_gpu("another thread", 1040, 5, 15),
        on_gpu("not of thread 2", 1050, 5, 16, linked=4),
        on_gpu("graph", 1060, 5, 17),
        on_gpu("launch unknown", 1070, 5, 18),
    ]
    trace = bench("kernel_trace")
    found = trace.kernels(reversed(events))
    assert {k.name: k.product for k in found} == {
        "linked": (8192, 6144, 4160),
        "by time": (8192, 6144, 4160),
        "inner": (4096, 40, 4096),
        "outer": (4096, 48, 4096),
        "another thread": (5, 6, 7),
        "not of thread 2": None,
        "graph": None,
        "launch unknown": None,
    }
    lines = trace.by_product(found)
    assert next(iter(lines)) == "8192x6144x4160" and lines["8192x6144x4160"]["calls"] == 1
    assert lines["8192x6144x4160"]["tflops"] == pytest.approx(2 * 8192 * 6144 * 4160 / 30e-6 / 1e12, rel=1e-3)
    assert lines["4096x40x4096"] == {"ms": 0.005, "calls": 1, "tflops": 268.4}


def test_our_products_are_operations_of_the_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever name a module imported them; a kernel that the driver links with one has its shapes."""
    from halfbyte.kernels import gemm
    from halfbyte.kernels.gemm import vendor

    trace = bench("kernel_trace")

    class OnGpu(torch.Tensor):
        is_cuda = True

    def pretended(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *rest: object) -> bool:
        out.fill_(len(rest))
        return True

    monkeypatch.setattr(vendor, "matmul", pretended)
    a, b, out = torch.zeros(4, 6, dtype=torch.bfloat16).as_subclass(OnGpu), torch.zeros(6, 5), torch.zeros(4, 5)

    def work() -> None:
        gemm.matmul(a, b, out)
        gemm.scaled(a, b.T[:, :6].T, out, out, out)
        torch.mm(torch.zeros(2, 3), torch.zeros(3, 7))

    with trace.named_products():
        events = trace.profiled(work, host=True)
    assert vendor.matmul is pretended and out[0, 0] == 5
    numbers = {e["name"]: e["args"]["External id"] for e in events if e.get("cat") == "cpu_op"}
    added = [on_gpu(name, i, 1, i, linked=number) for i, (name, number) in enumerate(numbers.items())]
    found = {k.name: k.product for k in trace.kernels([*events, *added])}
    assert found["gemm 4x5x6"] == (4, 5, 6) and found["aten::mm"] == (2, 7, 3)
    assert [e["name"] for e in events].count("gemm 4x5x6") == 2


def test_idle_is_what_no_kernel_of_the_later_steps_covers() -> None:
    trace = bench("kernel_trace")
    spans = [("spin", 0, 1), ("a", 50, 10), ("spin", 100, 1), ("a", 101, 50), ("copy", 120, 51), ("spin", 181, 1), ("a", 182, 19)]
    found = [trace.Kernel(name, start * MICROSECONDS, us * MICROSECONDS) for name, start, us in spans]
    # From 101 to 201 in two steps; nothing from 171 to 181.
    assert trace.steady(found, "spin") == {"steps": 2, "span_ms": 50.0, "idle_ms": 5.0}
    with pytest.raises(AssertionError, match="1 kernels"):
        trace.steady(found[:2], "spin")


def test_a_roofline_counts_every_kernel_once(tmp_path: Path) -> None:
    roofline, trace = bench("roofline"), bench("kernel_trace")
    found = [
        trace.Kernel("gemm", 0, 2000, (8192, 6144, 4096), 1),
        trace.Kernel("_add_norm", 1900, 500),
        trace.Kernel("_add_norm", 3000, 500),
    ]
    assert trace.busy(found) == 2900
    parts = {part: roofline._summary(names) for part, names in roofline.sort_kernels(found, 128256).items()}
    assert parts["base GEMM"]["ms"] == 2 and parts["norm"] == {"ms": 1.0, "launches": 2, "slowest": {"_add_norm": [1.0, 2]}}
    line = {
        **{"size": "8b", "rows": 4, "tokens": 2048, "recompute": "none", "offload": False, "compute": "bf16", "layers": 2},
        **{"step_ms": 5.0, "profiled_ms": 4.0, "idle_ms": 0.5, "sm_mhz": 1500, "hot_tflops": 700.0},
        **{"limit_ms": {"base GEMM": 1.5}, "parts": parts},
    }
    (tmp_path / "r.jsonl").write_text(json.dumps(line) + "\n")
    text = roofline.markdown(tmp_path / "r.jsonl")
    assert TABLE in text and "| base GEMM | 2.0 | 50.0% | 0.5 | 1.5 | 0.5 |" in text
    assert "| idle | 0.5 | 12.5% |" in text and "| step | 5.0 | 30.0% of the limit | 1.5 | 1.5 | 3.5 |" in text


def test_the_hot_products_are_those_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward by the weight, backward by its transpose; in fp8 with the operands as `kernels.gemm.scaled` wants them."""
    from halfbyte.kernels import gemm

    shapes, found = bench("shapes"), []

    def scaled(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, out: torch.Tensor) -> None:
        assert a.dtype == b.dtype == torch.float8_e4m3fn and a.is_contiguous() and b.t().is_contiguous()
        out.copy_(a.float() @ b.float() * scale_a * scale_b)
        found.append(out)

    monkeypatch.setattr(gemm, "scaled", scaled)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: found.append(out.copy_(a @ b)))
    x, dy, w = (torch.randint(-2, 3, size).bfloat16() for size in ((5, 16), (5, 32), (32, 16)))
    for make in (shapes._in_16_bits, shapes._in_fp8):
        make(x, w)()
        make(dy, w.t())()
    assert torch.equal(found[0], x @ w.t()) and torch.equal(found[1], dy @ w)
    assert torch.equal(found[2], found[0]) and torch.equal(found[3], found[1])
