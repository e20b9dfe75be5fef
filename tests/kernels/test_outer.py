"""Gradients of several B's in one launch, against float64: the reference here, Triton's kernel interpreted, or on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import checks_outer as checks

TESTS = Path(__file__).parents[1]
PROGRAM = """
import re
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from halfbyte.kernels.outer import fused

kernel, tile = fused._outer, fused.Tile()
for count in (2, 3, 4):
    constants = {f"{name}{i}": None for i in range(count, 4) for name in ("total", "big", "small")}
    constants |= dict(COUNT=count, SPAN=512, WIDTH=16, COLUMNS=tile.columns, ROWS=tile.rows, SPLITS=16, STAGES=tile.stages)
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
    path = os.pathsep.join((str(TESTS.parent / "src"), str(TESTS)))
    environment = os.environ | {"HALFBYTE_KERNELS": "fused", "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "kernels.checks_outer", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    assert not any(found.values()), "\n".join(found.values())


@pytest.mark.cpu
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_to_wide_loads_and_matrix_instructions(capability: int, tmp_path: Path) -> None:
    """For Ampere and Hopper, without a GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(TESTS.parent / "src")}
    program = tmp_path / "build.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program), str(capability)], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.stdout.strip() == "compiled", done.stderr
