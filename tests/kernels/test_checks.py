"""The twins against the formulas: the CPU's here, Triton's interpreted in a process of its own, and compiled on a GPU.

Why another process: Triton decides when it is imported whether its kernels are interpreted, and other tests import it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import checks

SOURCE = Path(__file__).parents[2] / "src"


@pytest.mark.parametrize("name", checks.CHECKS)
def test_cpu_twin(name: str) -> None:
    checks.CHECKS[name]("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", checks.CHECKS)
def test_cuda_twin(name: str) -> None:
    checks.CHECKS[name]("cuda")


@pytest.fixture(scope="module", params=["fused", "reference"])
def outcome(request: pytest.FixtureRequest) -> dict[str, str]:
    """What a process with this twin forced found, every check."""
    environment = os.environ | {"HALFBYTE_KERNELS": request.param, "TRITON_INTERPRET": "1", "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, str(Path(checks.__file__)), "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.cpu
@pytest.mark.parametrize("name", checks.CHECKS)
def test_forced_twin(outcome: dict[str, str], name: str) -> None:
    assert not outcome[name], outcome[name]


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
