"""AdamW over flat groups: the paper's formula in float64, clipping, skipped steps, decay of matrices only, LoRA+, 8 bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from halfbyte.optim.adamw import AdamW
from halfbyte.optim.config import OptimConfig
from halfbyte.optim.flat import Flat, flatten
from halfbyte.optim.scaling import GROWTH_EVERY, LossScale

NO, YES = torch.zeros(()), torch.ones(())
ROLES = ("lora_a", "lora_b", "dense", "no_decay")


def take(optimizer: AdamW, lr: float, *, largest: float = 0.0, loss: float = 1.0) -> torch.Tensor:
    """One step on the gradients in the buffer; returns loss, norm, found_inf, scale."""
    report = optimizer.clip(torch.tensor(loss), torch.ones(()), largest)
    optimizer.step(lr)
    return report


def group_of_four() -> Flat:
    generator = torch.Generator().manual_seed(1)
    return flatten([(role, nn.Parameter(torch.randn(300, generator=generator)), role) for role in ROLES])


def reference(values: torch.Tensor, grads: list[torch.Tensor], lr: float, decay: float, config: OptimConfig) -> torch.Tensor:
    """arXiv 1711.05101, algorithm 2, in float64."""
    x, m, v = values.double(), torch.zeros_like(values).double(), torch.zeros_like(values).double()
    for t, grad in enumerate(grads, 1):
        g = grad.double()
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g * g
        x = x - lr * decay * x
        x = x - lr * (m / (1 - config.beta1**t)) / ((v / (1 - config.beta2**t)).sqrt() + config.eps)
    return x


def test_it_is_the_papers_formula_per_role() -> None:
    config = OptimConfig(weight_decay=0.1, lora_plus=4.0)
    flat = group_of_four()
    start = {g.role: g.values.clone() for g in flat.groups}
    optimizer = AdamW(flat, config)
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(flat.grads.shape, generator=generator) for _ in range(5)]
    for grad in grads:
        flat.grads.copy_(grad)
        take(optimizer, 1e-2)
    at = 0
    for g in flat.groups:
        mine = [grad[at : at + len(g.values)] for grad in grads]
        at += len(g.values)
        expected = reference(
            start[g.role], mine, 1e-2 * (4.0 if g.role == "lora_b" else 1.0), 0.0 if g.role == "no_decay" else 0.1, config
        )
        torch.testing.assert_close(g.values.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("fault", "loss"), [(float("nan"), 1.0), (float("inf"), 1.0), (0.5, float("nan"))])
def test_what_is_not_finite_leaves_values_moments_and_count_untouched(bits: int, fault: float, loss: float) -> None:
    flat = group_of_four()
    optimizer = AdamW(flat, OptimConfig(bits=bits))  # type: ignore[arg-type]
    flat.grads.fill_(0.5)
    assert float(take(optimizer, 1e-2)[2]) == 0.0
    values, state = flat.values.clone(), {k: v.clone() for k, v in optimizer.state_dict().items()}
    flat.grads.fill_(0.5)
    flat.grads[5] = fault
    assert float(take(optimizer, 1e-2, loss=loss)[2]) == 1.0
    assert torch.equal(flat.values, values)
    assert all(torch.equal(v, state[k]) for k, v in optimizer.state_dict().items())
    assert float(optimizer.state_dict()["count"]) == 1
    assert not flat.grads.any()


def test_clipping_is_torchs_and_the_loss_scale_divides() -> None:
    for largest in (0.0, 0.5, 1e6):
        ends = []
        for scale in (1.0, 1024.0):
            flat = group_of_four()
            optimizer = AdamW(flat, OptimConfig(eps=1e-2))
            copies = [nn.Parameter(values.clone()) for values in flat.named().values()]
            gradients = torch.randn(4, 300, generator=torch.Generator().manual_seed(4))
            for copy, group, gradient in zip(copies, flat.groups, gradients, strict=True):
                copy.grad = gradient.clone()
                group.view(group.grads, group.segments[0]).copy_(gradient * scale)
            norm = torch.nn.utils.clip_grad_norm_(copies, largest or float("inf"))
            torch.optim.AdamW(copies, lr=1e-2, eps=1e-2, weight_decay=0.0).step()
            _, found, _, at = optimizer.clip(torch.zeros(()), torch.tensor(scale), largest)
            optimizer.step(1e-2)
            torch.testing.assert_close(found, norm)
            assert float(at) == scale
            ends.append(torch.cat([v.flatten() for v in flat.named().values()]))
            torch.testing.assert_close(ends[-1], torch.cat([c.detach().flatten() for c in copies]))
        torch.testing.assert_close(ends[0], ends[1])


@pytest.mark.parametrize("bits", [32, 8])
def test_state_round_trips_bit_for_bit(bits: int) -> None:
    one, other = group_of_four(), group_of_four()
    first, second = (AdamW(flat, OptimConfig(bits=bits)) for flat in (one, other))  # type: ignore[arg-type]
    one.grads.normal_(generator=torch.Generator().manual_seed(3))
    take(first, 1e-2)
    other.values.copy_(one.values)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for flat, optimizer in ((one, first), (other, second)):
        flat.grads.fill_(0.25)
        take(optimizer, 1e-2)
    assert all(torch.equal(values, other.named()[name]) for name, values in one.named().items())


def test_8_bit_states_are_saved_as_they_are() -> None:
    optimizer = AdamW(group_of_four(), OptimConfig(bits=8))
    optimizer.flat.grads.fill_(0.5)
    take(optimizer, 1e-2)
    state = optimizer.state_dict()
    kinds = ("first", "second", "first_scales", "second_scales")
    assert set(state) == {"count", *(f"{kind}.{role}" for kind in kinds for role in ROLES)}
    for role in ROLES:
        assert state[f"first.{role}"].dtype == torch.uint8 and state[f"first.{role}"].shape == (300,)
        assert state[f"first_scales.{role}"].shape == (2,)
        torch.testing.assert_close(state[f"first_scales.{role}"], torch.full((2,), 0.05))
        torch.testing.assert_close(state[f"second_scales.{role}"], torch.full((2,), 0.00025))


def test_the_loss_scale_halves_on_overflow_grows_after_clean_steps_and_stays_in_bounds() -> None:
    scale = LossScale.create(torch.float16, torch.device("cpu"))
    scale.take(scale.after(YES))
    assert float(scale.scale) == 2.0**15
    for _ in range(GROWTH_EVERY):
        scale.take(scale.after(NO))
    assert float(scale.scale) == 2.0**16
    assert float(scale.clean) == 0
    for _ in range(40):
        scale.take(scale.after(YES))
    assert float(scale.scale) == 1.0
    still = LossScale.create(torch.bfloat16, torch.device("cpu"))
    still.take(still.after(YES))
    assert float(still.scale) == 1.0
    assert math.isfinite(float(still.scale))
