"""The loss's further proofs (`checks_loss.py`): the CPU's twin here, the others in processes of their own, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from halfbyte.formats.packed import Format
from halfbyte.formats.quantize import quantize
from halfbyte.kernels.cross_entropy import Extras, Head, cross_entropy
from kernels import checks_loss, runner


@pytest.mark.parametrize("name", checks_loss.CHECKS)
def test_cpu_twin(name: str) -> None:
    checks_loss.CHECKS[name]("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", checks_loss.CHECKS)
def test_cuda_twin(name: str) -> None:
    checks_loss.CHECKS[name]("cuda")


@pytest.mark.parametrize("twin", [pytest.param("fused", marks=pytest.mark.slow), pytest.param("reference", marks=pytest.mark.cpu)])
def test_forced_twin(twin: str) -> None:
    runner.prove_forced(checks_loss, twin)


def test_smoothing_and_z_move_the_loss_as_the_formula_says() -> None:
    hidden, weight, labels = checks_loss.example("cpu", torch.float32)
    kept = labels != -100
    z = hidden.detach()[kept] @ weight.T
    lse, target = torch.logsumexp(z, 1), z.gather(1, labels[kept][:, None])[:, 0]
    expected = (lse + 0.01 * lse**2 - 0.8 * target - 0.2 * z.mean(1)).sum()
    found, _ = cross_entropy(hidden, labels, Head(weight), extras=Extras(0.2, 0.01))
    torch.testing.assert_close(found, expected)


def test_a_packed_head_has_no_gradient_and_needs_none() -> None:
    packed = quantize(torch.randn(100, 64), Format("int8"), name="head")
    hidden = torch.randn(5, 64, requires_grad=True)
    loss, _ = cross_entropy(hidden, torch.arange(5), Head(packed))
    loss.backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0
