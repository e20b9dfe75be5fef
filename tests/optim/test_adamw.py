"""AdamW over flat groups: the paper's formula in float64, skipped steps, decay of matrices only, LoRA+."""

from __future__ import annotations

import math

import torch
from torch import nn

from halfbyte.optim.adamw import AdamW
from halfbyte.optim.config import OptimConfig
from halfbyte.optim.flat import Flat, flatten
from halfbyte.optim.scaling import GROWTH_EVERY, LossScale

NO, YES = torch.zeros(()), torch.ones(())
ROLES = ("lora_a", "lora_b", "dense", "no_decay")


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
        optimizer.step(1e-2, NO)
    at = 0
    for g in flat.groups:
        mine = [grad[at : at + len(g.values)] for grad in grads]
        at += len(g.values)
        expected = reference(
            start[g.role], mine, 1e-2 * (4.0 if g.role == "lora_b" else 1.0), 0.0 if g.role == "no_decay" else 0.1, config
        )
        torch.testing.assert_close(g.values.double(), expected, rtol=1e-5, atol=1e-6)


def test_found_inf_leaves_values_moments_and_count_untouched() -> None:
    flat = group_of_four()
    optimizer = AdamW(flat, OptimConfig())
    flat.grads.fill_(0.5)
    optimizer.step(1e-2, NO)
    values, state = flat.values.clone(), {k: v.clone() for k, v in optimizer.state_dict().items()}
    flat.grads.fill_(float("nan"))
    optimizer.step(1e-2, YES)
    assert torch.equal(flat.values, values)
    assert all(torch.equal(v, state[k]) for k, v in optimizer.state_dict().items())
    assert float(optimizer.count["dense"]) == 1


def test_state_round_trips_bit_for_bit() -> None:
    one, other = group_of_four(), group_of_four()
    first, second = AdamW(one, OptimConfig()), AdamW(other, OptimConfig())
    one.grads.normal_(generator=torch.Generator().manual_seed(3))
    first.step(1e-2, NO)
    other.values.copy_(one.values)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for flat, optimizer in ((one, first), (other, second)):
        flat.grads.fill_(0.25)
        optimizer.step(1e-2, NO)
    assert all(torch.equal(values, other.named()[name]) for name, values in one.named().items())


def test_the_loss_scale_halves_on_overflow_grows_after_clean_steps_and_stays_in_bounds() -> None:
    scale = LossScale.create(torch.float16, torch.device("cpu"))
    scale.update(YES)
    assert float(scale.scale) == 2.0**15
    for _ in range(GROWTH_EVERY):
        scale.update(NO)
    assert float(scale.scale) == 2.0**16
    assert float(scale.clean) == 0
    for _ in range(40):
        scale.update(YES)
    assert float(scale.scale) == 1.0
    still = LossScale.create(torch.bfloat16, torch.device("cpu"))
    still.update(YES)
    assert float(still.scale) == 1.0
    assert math.isfinite(float(still.scale))
