"""The Triton kernels compile for the GPUs we name, without one: what the interpreter accepts, the compiler may refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels import runner

PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from halfbyte.kernels.cross_entropy import fused as loss
from halfbyte.kernels.cross_entropy import softmax, tiled
from halfbyte.kernels.dequantize import fused
from halfbyte.kernels.dropout import fused as dropout

target = GPUTarget("cuda", int(sys.argv[1]), 32)

def build(kernel, signature, constants, warps=4):
    types = {name: signature.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    triton.compile(ASTSource(kernel, types, constants), target=target, options={"enable_fp_fusion": False, "num_warps": warps})

for out in ("*bf16", "*fp16", "*fp32"):
    for kind, nested in (("codebook", True), ("codebook", False), ("none", False), ("int", False), ("min", False)):
        pointers = dict(out=out, codes="*u8", scales="*u8" if nested else "*fp32", nested_scales="*fp32", nested_offset="*fp32",
                        zeros="*fp32", table="*fp32", nested_levels="*fp32", K="i64")
        shape = dict(NESTED_BLOCK=256, BLOCK=64, SPAN=64, HALF=32, R=64)
        build(fused._four_bit, pointers, dict(KIND=kind, NESTED=nested, INTERPRETED=False) | shape)
    build(fused._eight_bit, dict(out=out, codes="*u8", scales="*fp32"), dict(TILE=4096, INTERPRETED=False))
    build(dropout._dropout, dict(out=out, x=out, state="*i64", cut="i64", inverse="fp32"), dict(QUADS=512, INTERPRETED=False))
for extra in (True, False):
    kind = dict(V=50257 if extra else 128256, BIAS=extra, SCALED=extra, CAPPED=extra, SMOOTH=extra)
    numbers = dict.fromkeys(("scale", "cap", "smoothing", "zeta"), "fp32")
    floats = dict.fromkeys(("losses", "factors", "tops", "sums", "plain_sums"), "*fp32")
    types = dict(z="*bf16", d="*bf16", h="*bf16", w="*bf16", hits="*i32", targets="*i64", bias="*fp32") | numbers | floats
    build(softmax._softmax, types, kind | dict(SQUARED=extra, GRAD=True, LANES=2048, VEC=8, KEEP=True, STAGES=1, INTERPRETED=False),
          softmax.Tuning().warps)
    build(tiled._combine, types, kind | dict(TILES=501, WIDE=512, SQUARED=extra, N=256))
    build(tiled._gradient, types, kind | dict(SPAN=8192, INTERPRETED=False), 8)
build(loss._expand, dict(out="*bf16", compact="*bf16", index="*i32", factor="*fp32"), dict(BLOCK=4096, INTERPRETED=False))
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    """Ampere, Hopper and Blackwell."""
    runner.compile_for(capability, PROGRAM, tmp_path)


TILED = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from halfbyte.kernels.cross_entropy import tiled

capability = int(sys.argv[1])
# An A100 has more than the cards that run its code.
shared = 166_912 if capability == 80 else SHARED
tile, kernel = tiled.fitting(shared), tiled._logits
assert (tile == tiled.TILE) is (shared > 101_376)
half = "*bf16" if capability >= 80 else "*fp16"
pointers = dict.fromkeys(("tops", "sums", "plain_sums"), "*fp32") | dict.fromkeys(("z", "h", "w"), half)
for extra in (False, True):
    constants = dict.fromkeys(("BIAS", "SCALED", "CAPPED", "SMOOTH"), extra)
    constants |= dict(V=50257 if extra else 128256, H=4096, M=tile.m, N=tile.n, K=tile.k, INTERPRETED=False)
    types = pointers | dict(bias="*fp32" if extra else half, scale="fp32", cap="fp32")
    types = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    even = ("h", "w", "z", "stride_h", "stride_w", "stride_z")
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    options = dict(num_warps=tile.warps, num_stages=tile.stages)
    source = ASTSource(kernel, types, constants, aligned)
    made = compiled_by_triton(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.metadata.shared <= shared, (tile, made.metadata.shared, shared)
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 120])
def test_the_tile_of_logits_fits_every_gpu(capability: int, tmp_path: Path) -> None:
    """With the sides and the stages that run there: four stages are more than a card for games has."""
    runner.compile_for(capability, TILED, tmp_path)
