"""Gradients of several B's in one launch, against float64: the reference here, Triton's kernel interpreted, or on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels import capabilities, runner
from kernels import checks_outer as checks

PROGRAM = """
import re
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from halfbyte.kernels.outer import WIDEST, fused

kernel, tile = fused._outer, fused.Tile()
for count, width in ((2, 16), (3, 16), (4, WIDEST)):
    constants = {f"{name}{i}": None for i in range(count, 4) for name in ("total", "big", "small")}
    constants |= dict(COUNT=count, SPAN=512, WIDTH=width, COLUMNS=tile.columns, ROWS=tile.rows, SPLITS=16, STAGES=tile.stages)
    constants |= dict(INTERPRETED=False)
    types = {}
    for name in kernel.arg_names:
        pointer = "*fp32" if name.startswith("total") or name == "scratch" else "*i32" if name == "arrived" else "*bf16"
        number = "i32" if re.fullmatch("(n|r|(big|small)_stride)[0-9]|T", name) else "fp32" if "scale" in name else pointer
        types[name] = "constexpr" if name in constants else number
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if types[n][0] in "*i" and n != "T"}
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    ptx = triton.compile(ASTSource(kernel, types, constants, aligned), target=target, options={"num_warps": tile.warps}).asm["ptx"]
    assert "cp.async.cg" in ptx and "mma" in ptx
print("compiled")
"""


@pytest.mark.parametrize("name", checks.CHECKS)
def test_reference(name: str) -> None:
    checks.CHECKS[name]("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", checks.CHECKS)
def test_cuda_twin(name: str) -> None:
    checks.CHECKS[name]("cuda")


@pytest.mark.cpu
def test_interpreted() -> None:
    runner.prove_forced(checks, "fused")


@pytest.mark.parametrize("capability", capabilities.ALL)
def test_it_compiles_to_wide_loads_and_matrix_instructions(capability: int, tmp_path: Path) -> None:
    """For Ampere, Hopper and Blackwell, without a GPU."""
    runner.compile_for(capability, PROGRAM, tmp_path)
