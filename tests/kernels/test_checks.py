"""The twins against the formulas: the CPU's here, Triton's interpreted in a process of its own, and compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable

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
def test_the_bound_can_fail(fault: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Zeros, a hundredth too much, an offset and NaN are all refused, in bf16 too."""
    truth = torch.randn(63, 60, dtype=torch.float64)
    honest = truth.to(torch.bfloat16)
    checks.as_wrong_as_honest("itself", honest, honest, truth)
    with pytest.raises(AssertionError):
        checks.as_wrong_as_honest("fault", fault(honest), honest, truth)


@pytest.mark.parametrize("n", [320, 27_000])
def test_numbers_cut_off_are_not_rounded(n: int) -> None:
    """fp32 to bf16 by dropping bits is within twice the error of rounding, and refused all the same."""
    truth = torch.randn(n, generator=torch.Generator().manual_seed(0)).double()
    cut = (truth.float().view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    assert float((cut - truth).norm()) <= 2.1 * float((truth.bfloat16() - truth).norm())
    with pytest.raises(AssertionError, match="not rounded to nearest"):
        checks.as_wrong_as_honest("cut", cut, truth.bfloat16(), truth)


def test_fresh_memory_is_poisoned() -> None:
    with checks.poisoned():
        assert torch.empty(1000).isnan().all()
