"""The kernels of generation: their references here, their Triton forms under the interpreter, compiled ones on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfbyte.formats.packed import Format
from halfbyte.kernels.lora_linear.members import Member
from halfbyte.kernels.packed_gemv import build
from kernels import checks_generation as checks
from kernels.checks import random_packed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", checks.CHECKS)
def test_references(name: str) -> None:
    checks.CHECKS[name]("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", checks.CHECKS)
def test_kernels_on_a_gpu(name: str) -> None:
    checks.CHECKS[name]("cuda")


INTERPRETED = """
import torch
from kernels import checks_generation as checks
from halfbyte.kernels.packed_gemv import Shape
checks.check_packed_gemv("cpu", (torch.bfloat16,), Shape(1, 1))
checks.check_decode_step("cpu", (torch.float32,))
print("right")
"""


@pytest.mark.cpu
def test_kernels_interpreted() -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "HALFBYTE_KERNELS": "fused", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.stdout.strip() == "right", done.stderr


def test_what_the_kernel_cannot_take_is_named() -> None:
    def obstacle(shape: tuple[int, int], fmt: Format, dtype: torch.dtype = torch.bfloat16) -> str:
        return build([Member(random_packed(shape, fmt, "cpu"), None, None)], dtype).why_not

    nested = Format("nf4", 64, nested=True)
    assert obstacle((8, 128), nested) == ""
    assert "float32" in obstacle((8, 128), nested, torch.float32)
    assert "multiple of 64" in obstacle((8, 96), nested)
    assert "blocks of 32" in obstacle((8, 128), Format("nf4", 32))
    assert "blocks of 128" in obstacle((8, 192), Format("int4", 128))
