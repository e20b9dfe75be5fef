"""The learning rate by step."""

from __future__ import annotations

import itertools

import pytest

from halfbyte.optim.schedule import learning_rate, warmup_steps
from halfbyte.train.config import TrainConfig


def rates(total: int, **changes: object) -> list[float]:
    config = TrainConfig(lr=1.0, **changes)  # type: ignore[arg-type]
    return [learning_rate(step, total, config) for step in range(total)]


def test_warmup_is_linear_and_learns_from_the_first_step() -> None:
    assert rates(100, warmup=4, schedule="constant")[:6] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.03, 3), (0.031, 4), (5, 5), (500, 100), (1, 1)])
def test_warmup_is_a_share_below_one_and_a_number_from_one_on(warmup: float, steps: int) -> None:
    assert warmup_steps(100, TrainConfig(warmup=warmup)) == steps


def test_cosine_and_line_fall_to_nearly_zero() -> None:
    cosine, line = rates(100, warmup=0, schedule="cosine"), rates(100, warmup=0, schedule="linear")
    assert cosine[0] == line[0] == 1.0
    assert cosine[50] == pytest.approx(0.5)
    assert line[25] == pytest.approx(0.75)
    assert 0 < cosine[-1] < 0.001
    assert line[-1] == pytest.approx(0.01)
    assert all(a > b for a, b in itertools.pairwise(cosine))


def test_one_step_is_enough() -> None:
    assert rates(1, warmup=0.03) == [1.0]
