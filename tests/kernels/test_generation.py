"""The kernels of generation: their references here, their Triton forms under the interpreter, compiled ones on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halfbyte.formats.packed import Format
from halfbyte.kernels.lora_linear.members import Member
from halfbyte.kernels.packed_gemv import build
from halfbyte.kernels.packed_gemv.product import _obstacle
from kernels import checks_generation as checks
from kernels import runner
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
checks.check_packed_gemv("cpu", (torch.bfloat16,), Shape(1, 1, 1), (0, 1, 2, 5, 8, 10))
checks.check_fed_products("cpu", (torch.bfloat16,), Shape(1, 4, 1))
checks.check_decode_step("cpu", (torch.float32,))
checks.check_likeliest("cpu", (torch.bfloat16,))
print("right")
"""


@pytest.mark.slow
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


class Elsewhere(torch.Tensor):
    """On a GPU, where no tensor has to be."""

    device = torch.device("cuda", 0)


@pytest.mark.parametrize("packed", [True, False])
def test_gpus_before_ampere_decode(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's instructions are not theirs, and ptxas would refuse them at the first token."""
    on_gpu = torch.empty(8, 128, dtype=torch.float16, device="meta").as_subclass(Elsewhere)
    there = replace(random_packed((8, 128), Format("nf4", 64), "cpu"), codes=on_gpu) if packed else on_gpu
    for capability, expected in (((7, 0), "7.0"), ((7, 5), "7.5"), ((8, 0), None), ((12, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        why = _obstacle((Member(there, None, None),), torch.float16)
        assert why == ("" if expected is None else f"a GPU of compute capability {expected}, below 8.0")


COMPILED = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from halfbyte.kernels.decode_step import fused as step
from halfbyte.kernels.packed_gemv import Shape, fused, launch, low, ptx

capability = int(sys.argv[1])
hopper = capability >= 90

def build(kernel, pointers, constants, warps):
    types = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in kernel.arg_names}
    options = dict(num_warps=warps, num_stages=1) | (dict(launch_pdl=True) if hopper else {})
    return triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", capability, 32), options=options)

def gemv(half, kind="four", nested=True, zero="none", segments=1, paired=False, rank=16, m=1, warps=16, pieces=0, feed=0,
         norm=False, add=False, width=4096, ahead=0, ragged=False):
    shape = Shape(2 if paired else 1, warps, 1)
    pointers = dict(out="*" + half, x="*" + half, add="*" + half, segments="*i64", pairs="*u32", nested_levels="*fp32", xa="*fp32",
                    norm="*" + half, feed="*" + half, fed="*fp32", scratch="*fp32", multiplier="fp32", eps="fp32", offset="fp32")
    wide = triton.next_power_of_2(max(rank * segments, 1))
    groups = max(min(warps * 32, 256) // wide, 1) if pieces else 0
    kept = launch.kept(m)
    batch = launch.batched(kind, paired, shape.tiles, warps, kept, 7, groups * wide)
    constants = dict(K64=width // 64, KIND=kind, NESTED=nested, PER=1, ZERO=zero, SEGMENTS=segments, PAIRED=paired,
                     ACT="silu" if paired else "none", ADD=add, BIAS=zero != "none", RANK=rank, RT=shape.tiles,
                     SLOTS=launch.slots(m), NT=2 if m > 8 else 1, ROWS=kept, BATCH=batch, OUT=triton.next_power_of_2(16 * batch),
                     WARPS=warps,
                     HALF=tl.bfloat16 if half == "bf16" else tl.float16, SHARED=ptx.shared(kind, nested, warps * 32),
                     SUMS=ptx.sums_at(kind), XA=batch * 16 * shape.tiles * warps * kept, ROW_BYTES=width * launch.BITS[kind] // 8,
                     KEEP=launch.keeps(width, m, shape), A_ROWS=max(rank * segments, 1), PIECES=max(pieces, 1), GROUPS=groups,
                     WIDE=wide, NORM=norm, FEED=feed, PDL=hopper, AHEAD=ahead if hopper else 0, RAGGED=ragged, INTERPRETED=False)
    made = build(fused._gemv, pointers, constants, warps)
    name = half.replace("fp", "f")
    assert f"f32.{name}.{name}.f32" in made.asm["ptx"]
    # More than 48 KiB in all, and a launch fails.
    assert made.metadata.shared <= ptx.TRITON_BYTES, made.metadata.shared

gemv("bf16", segments=3, norm=True, pieces=132)
gemv("bf16", segments=3, ahead=3, ragged=True)
gemv("fp16", segments=2, paired=True, norm=True, pieces=132, feed=16, m=2)
gemv("bf16", pieces=132, feed=48, add=True, width=14336)
gemv("bf16", zero="float", nested=False, m=4, warps=8, ragged=True)
gemv("bf16", segments=2, paired=True, m=16, warps=4)
gemv("fp16", kind="dense", nested=False, rank=0, warps=8, norm=True)
gemv("bf16", kind="int8", nested=False, m=8, warps=8)
build(low._low_rank, dict(x="*bf16", a="*bf16", xa="*fp32", parts="*fp32", counters="*i32"),
      dict(A_ROWS=48, SPAN=512, CUTS=28, WIDE=32, PDL=hopper, INTERPRETED=False), 4)
same = dict(PDL=hopper, INTERPRETED=False)
for half in ("*bf16", "*fp32"):
    build(step._normalise, dict(x=half, weight=half, bias=half, out=half, eps="fp32", offset="fp32"),
          dict(LAYER=False, WEIGHT=True, BIAS=False, BLOCK=4096) | same, 8)
    build(step._likeliest, dict(scores=half, values="*fp32", places="*i32", counters="*i32", out="*i64"),
          dict(PIECES=128, BLOCK=1024, PDL=hopper), 4)
    for splits in (32, 1):
        build(step._attend, dict(qkv=half, position="*i64", q_weight=half, k_weight=half, cos=half, sin=half, keys=half,
              values=half, partial="*fp32", tops="*fp32", counters="*i32", out=half, eps="fp32", offset="fp32", scale="fp32",
              cap="fp32", feed=half, fed="*fp32"),
              dict(H=32, G=8, D=128, BLOCK=128, QUERIES=16, SPLITS=splits, KEYS=32 if half == "*fp32" else 64, HEADS=4,
                   CHUNK=min(splits, 16), ROTATION="half",
                   NORM=splits > 1, LAYER=False, CAP=splits > 1, WINDOW=splits > 1,
                   FEED=16 if splits > 1 else 0, FED_ROWS=2, ROWS=16 if splits > 1 else 1, COLUMNS=8) | same, 4)
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    """What the interpreter accepts, the compiler may refuse; instructions given as text are read here only."""
    runner.compile_for(capability, COMPILED, tmp_path)
