"""The twins against the formulas: the CPU's here, Triton's interpreted in a process of its own, and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from kernels import checks, runner


@pytest.mark.parametrize("name", checks.CHECKS)
def test_cpu_twin(name: str) -> None:
    checks.CHECKS[name]("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", checks.CHECKS)
def test_cuda_twin(name: str) -> None:
    checks.CHECKS[name]("cuda")


@pytest.mark.parametrize("twin", [pytest.param("fused", marks=pytest.mark.slow), pytest.param("reference", marks=pytest.mark.cpu)])
def test_forced_twin(twin: str) -> None:
    runner.prove_forced(checks, twin)


@pytest.mark.parametrize(
    "fault", [lambda t: t * 0, lambda t: t * 1.01, lambda t: t + 0.01 * t.abs().max(), lambda t: t * float("nan")]
)
def test_the_bound_can_fail(fault) -> None:  # type: ignore[no-untyped-def]
    """Zeros, a hundredth too much, an offset and NaN are all refused, in bf16 too."""
    truth = torch.randn(63, 60, dtype=torch.float64)
    honest = truth.to(torch.bfloat16)
    checks.as_wrong_as_honest("itself", honest, honest, truth)
    with pytest.raises(AssertionError):
        checks.as_wrong_as_honest("fault", fault(honest), honest, truth)


def test_fresh_memory_is_poisoned() -> None:
    with checks.poisoned():
        assert torch.empty(1000).isnan().all()
