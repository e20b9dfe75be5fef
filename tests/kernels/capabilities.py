"""Compute capabilities of the GPUs that kernels are compiled for without one: Ampere or Ada, Hopper, Blackwell's gaming cards."""

from __future__ import annotations

import pytest

ALL, FLOAT8 = (
    [*(pytest.param(one, marks=pytest.mark.cpu) for one in usual), pytest.param(120, marks=pytest.mark.slow)]
    for usual in ((80, 90), (89, 90))
)
"""FLOAT8: with products in e4m3."""
