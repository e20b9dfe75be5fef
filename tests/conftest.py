"""Tiers by marker: an unmarked test is `fast`; a `gpu` test is skipped where no CUDA device is."""

from __future__ import annotations

import os

import pytest

# One thread a test process: two cores are shared by xdist's workers, and sums keep their order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TIERS = {"fast", "cpu", "slow", "gpu"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = {mark.name for mark in item.iter_markers()}
        if not names & TIERS:
            item.add_marker("fast")
        if "gpu" in names and not _cuda():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
