"""The learning rate as a pure function of the step: nothing to save, nothing to forget on resume."""

from __future__ import annotations

import math

from halfbyte.train.config import TrainConfig


def warmup_steps(total: int, config: TrainConfig) -> int:
    """A share of all steps (rounded up) when `warmup` is below 1, a number of steps otherwise; at most `total`."""
    asked = math.ceil(config.warmup * total) if config.warmup < 1 else round(config.warmup)
    return min(asked, total)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The rate of optimizer step `step` (0-based) of `total`.

    Warm-up is linear and its first step already learns: lr * (step + 1) / warmup. After it a cosine or a line falls from lr
    towards 0, which would be reached at step `total`; or nothing changes.
    """
    ramp = warmup_steps(total, config)
    if step < ramp:
        return config.lr * (step + 1) / ramp
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - ramp) / max(1, total - ramp))
    return config.lr * (0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done)
