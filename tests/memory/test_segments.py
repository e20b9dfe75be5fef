"""Segments that grow: asked for on a GPU, and never against what the user has set."""

from __future__ import annotations

import pytest
import torch

from halfbyte.memory import segments


@pytest.mark.parametrize(
    ("gpu", "environment", "asked"),
    [
        (True, {}, ["expandable_segments:True"]),
        (True, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, []),
        (True, {"PYTORCH_ALLOC_CONF": "backend:native"}, []),
        (False, {}, []),
    ],
)
def test_what_the_allocator_is_told(
    gpu: bool, environment: dict[str, str], asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append)
    for name in segments.NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    segments.grow()
    assert found == asked
