"""The loss's further proofs (`checks_loss.py`): the CPU's twin here, the others in processes of their own, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.errors import OutOfResources

from halfbyte.formats.packed import Format
from halfbyte.formats.quantize import quantize
from halfbyte.kernels.cross_entropy import Extras, Head, choice, cross_entropy
from halfbyte.kernels.cross_entropy.parts import PLAIN, Task, Wants
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


@pytest.mark.parametrize("fits", [True, False])
def test_auto_goes_on_where_a_way_cannot_be_launched(fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's error is no RuntimeError: it would end the first step of a card with little shared memory."""

    def milliseconds(task: Task, way: str) -> float:
        if way == "tiled" and not fits:
            raise OutOfResources(147_456, 101_376, "shared memory")
        return {"chunked": 2.0, "tiled": 1.0}[way]

    monkeypatch.setattr(choice, "_milliseconds", milliseconds)
    hidden, weight, labels = checks_loss.example("cpu", torch.bfloat16)
    way, why = choice._fastest(Task(hidden, labels, Head(weight), PLAIN, Wants(True, False, False), 3, 1 << 20))
    assert way == ("tiled" if fits else "chunked")
    assert ("Required: 147456, Hardware limit: 101376" in why) is not fits and ("tiled 1.00 ms" in why) is fits


def test_a_packed_head_has_no_gradient_and_needs_none() -> None:
    packed = quantize(torch.randn(100, 64), Format("int8"), name="head")
    hidden = torch.randn(5, 64, requires_grad=True)
    loss, _ = cross_entropy(hidden, torch.arange(5), Head(packed))
    loss.backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0
