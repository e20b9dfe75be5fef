"""The kernels that decode in words compile for the GPUs we name, without one, and are as lean as `words.py` says."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels import capabilities, runner

PROGRAM = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from halfbyte.kernels.augmented import fused as augmented
from halfbyte.kernels.dequantize import fused

target = GPUTarget("cuda", int(sys.argv[1]), 32)

def build(kernel, signature, constants, aligned):
    types = {name: signature.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, constants, attributes)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False, "num_warps": 8})
    ptx = compiled.asm["ptx"]
    assert ptx.count("shfl.sync.idx") == 32, ptx.count("shfl.sync.idx")
    if signature["out"] == "*fp32":  # 8 neighbours are two stores, which Triton joins by way of shared memory
        return
    assert compiled.metadata.shared == 0, "a layout is converted through shared memory"
    assert "st.global.v4.b32" in ptx and "st.global.b16" not in ptx, "stores of less than 16 bytes"

for out in ("*bf16", "*fp32"):
    for zero, nested, even in (("none", True, True), ("none", False, False), ("min", False, True)):
        words = dict(ZERO=zero, NESTED=nested, BLOCK=64, ROWS=4, COLUMNS=2048, EVEN=even, LOOKUP="shuffle4", POLICY="",
                     INTERPRETED=False)
        pointers = dict(out=out, codes="*u8", scales="*u8" if nested else "*fp32", nested_scales="*fp32", nested_offset="*fp32",
                        zeros="*fp32", table="*fp32", nested_levels="*fp32")
        build(fused._words, pointers, words, ("out", "table", "nested_levels"))
        group = dict(MEMBERS=3, ALIGNED=True, MASTER=tl.float32, A_WIDTH=2048, B_ROWS=32, B_COLUMNS=64, DEPENDENT=False)
        pointers = dict(out=out, members="*i64", table="*fp32", nested_levels="*fp32")
        build(augmented._augmented, pointers, group | words, tuple(pointers))
print("compiled")
"""


@pytest.mark.parametrize("capability", capabilities.ALL)
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    """Ampere, Hopper and Blackwell."""
    runner.compile_for(capability, PROGRAM, tmp_path)
