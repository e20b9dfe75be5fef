"""fp8 by its reference here, by the Triton kernels interpreted in a process of its own. The proofs: checks_fp8.py."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
import torch

from halfbyte.kernels import fp8
from halfbyte.kernels.augmented import Group
from halfbyte.kernels.lora_linear.members import LowRank, Member
from halfbyte.kernels.products import Augmented, Float8
from kernels import capabilities, checks_fp8, runner

SOURCE = Path(__file__).parents[2] / "src"
INTERPRETED = ("fp8_rows", "fp8_rows_not_finite", "fp8_tail", "fp8_both", "fp8_elementwise", "fp8_weights", "fp8_held", "fp8_moved")
"""What Triton does; the products are torch's in both twins of a CPU."""


@pytest.mark.parametrize("name", checks_fp8.CHECKS)
def test_check(name: str) -> None:
    checks_fp8.CHECKS[name]("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", checks_fp8.CHECKS)
def test_cuda(name: str) -> None:
    if (reason := fp8.can_compute(torch.device("cuda"))) is not None:
        pytest.skip(f"this GPU has no fp8 products: {reason}")
    checks_fp8.CHECKS[name]("cuda")


@pytest.mark.slow
def test_interpreted() -> None:
    runner.prove_forced(checks_fp8, "fused", INTERPRETED)


PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from halfbyte.kernels.fp8 import decode, elementwise, fused

target = GPUTarget("cuda", int(sys.argv[1]), 32)

def build(kernel, signature, constants):
    types = {name: signature.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    triton.compile(ASTSource(kernel, types, constants), target=target, options={"enable_fp_fusion": False})

words = dict(out="*i32", inverse="*fp32", changed="*i32", where="*i64", nested_levels="*fp32", table="*fp32")
for kind, nested in (("nf4", True), ("fp4", False)):
    shape = dict(COUNT=2, FIELDS=8, SPAN=64, BLOCK=128, NESTED=nested, NESTED_BLOCK=256, INTERPRETED=False)
    shape |= dict(TABLE=decode.table_asm(kind)) | ({} if nested else dict(changed=None))
    build(decode._stored, words, shape | dict(UNITS=64))
    build(decode._transposed, words, shape | dict(QUADS=32, SPANS=2))
beside = dict(out="*u8", scale="*fp32", inverse="*fp32", changed="*i32", bound="*fp32", plain="*bf16", where="*i64")
numbers = dict(LARGEST=448.0, TINY=1e-30, INTERPRETED=False)
for back in (False, True):
    build(fused._adapters, beside, dict(BACK=back, SPAN=64, ROWS=16, COLUMNS=32, COUNT=2, HEADROOM=16.0) | numbers)
    build(decode._dense, dict(out="*u8", source="*bf16", inverse="*fp32"), dict(BACK=back, SPAN=16, BLOCK=64, INTERPRETED=False))
rows = dict(out="*u8", scale="*fp32", small="*bf16", x="*bf16")
for columns in (0, 32):
    build(fused._quantize, rows, dict(LOOPS=2, BLOCK=4096, COLUMNS=columns, HEADROOM=16.0) | numbers)
build(fused._tail, rows, dict(ROWS=64, COLUMNS=32, HEADROOM=16.0, INTERPRETED=False))
act = dict(ACTIVATION="silu", K=0.8, C=0.04, F=2000, BLOCK=1024) | numbers
both = dict(gate="*bf16", up="*bf16", out="*bf16", dh="*bf16", out8="*u8", scale="*fp32")
build(elementwise._glu, both, act | dict(LOOPS=2))
build(elementwise._glu_backward, both, act | dict(LOOPS=2))
norm = {name: "*bf16" for name in ("x", "delta", "residual", "out", "weight")}
norm |= dict(rstd="*fp32", out8="*u8", scale="*fp32", eps="fp32", offset="fp32")
build(elementwise._add_norm, norm, dict(mean=None, bias=None, H=1000, BLOCK=1024) | numbers)
norm |= dict(d_out="*bf16", add="*bf16")
build(elementwise._norm_backward, norm, dict(mean=None, H=1000, BLOCK=1024) | numbers)
print("compiled")
"""


@pytest.mark.parametrize("capability", capabilities.FLOAT8)
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    """For the first GPUs with fp8 products, Hopper and Blackwell; none is needed."""
    runner.compile_for(capability, PROGRAM, tmp_path)


def _permuted(a: int, b: int, selector: int) -> int:
    """`prmt.b32`: four bytes of the eight of b:a, or their signs."""
    pool, word = (b << 32) | a, 0
    for i in range(4):
        choice = selector >> (4 * i) & 15
        byte = pool >> (8 * (choice & 7)) & 255
        word |= (255 * (byte >> 7) if choice & 8 else byte) << (8 * i)
    return word


def _executed(ptx: str, registers: dict[str, int]) -> dict[str, int]:
    """The few instructions of PTX that look-ups are made of."""
    step = {
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
        "shr.u32": lambda a, b: a >> b,
        "prmt.b32": _permuted,
    }
    for line in ptx.strip("{}\n ").splitlines():
        if not line.startswith("."):
            name, rest = line.rstrip(";").split(None, 1)
            target, *sources = (part.strip() for part in rest.split(","))
            values = [registers[s] if s in registers else int(s, 0) for s in sources]
            registers[target] = step[name](*values)
    return registers


def test_byte_permutations() -> None:
    """The PTX, which neither the interpreter nor a CPU can run: eight codes look their bytes up; 4 x 4 bytes turn."""
    pytest.importorskip("triton")
    from halfbyte.kernels.fp8 import decode

    draw = random.Random(0)
    for _ in range(200):
        table = bytes(draw.randrange(256) for _ in range(16))
        codes = [draw.randrange(16) for _ in range(8)]
        word = sum((codes[2 * i] << 4 | codes[2 * i + 1]) << (8 * i) for i in range(4))
        words = {f"${3 + i}": int.from_bytes(table[4 * i : 4 * i + 4], "little") for i in range(4)}
        found = _executed(decode.LOOK_UP.value, {"$2": word} | words)
        got = b"".join(found[f"${i}"].to_bytes(4, "little") for i in range(2))
        assert got == bytes(table[c] for c in codes)
        rows = [bytes(draw.randrange(256) for _ in range(4)) for _ in range(4)]
        found = _executed(decode.TURN.value, {f"${4 + i}": int.from_bytes(row, "little") for i, row in enumerate(rows)})
        assert [found[f"${i}"].to_bytes(4, "little") for i in range(4)] == [bytes(column) for column in zip(*rows, strict=True)]


def test_a_group_that_does_not_fit_runs_in_16_bits_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def member() -> Member:
        return Member(torch.randn(24, 40), None, LowRank(torch.randn(4, 40), torch.randn(24, 4), 1.0))

    group = Group([member()])
    assert "24 x 40" in str(fp8.why_not(group)) and Float8().rows(group, 5) is None
    results = []
    with caplog.at_level(logging.WARNING, "halfbyte"):
        for products in (Float8(), Augmented()):
            x, dy = torch.ones(5, 40 + group.rank), torch.ones(5, 24 + group.rank)
            y, dx = torch.empty(5, 24), torch.empty(5, 40)
            products.project(group, x, y, None, None)
            products.project_back(group, dy, dx, None)
            results.append((y, dx))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert sum("24 x 40" in record.message for record in caplog.records) == 1


def test_rows_that_come_quantised_are_taken() -> None:
    """What a kernel in front writes into `rows` is what is multiplied."""
    group = checks_fp8.group_of("nested", "cpu")
    x = torch.zeros(9, group.width + group.rank, dtype=torch.bfloat16)
    x[:, : group.width] = checks_fp8.normal(9, group.width, seed=1, device="cpu")
    expected, y = torch.empty(9, group.rows, dtype=torch.bfloat16), torch.empty(9, group.rows, dtype=torch.bfloat16)
    Float8().project(group, x.clone(), expected, None, None)
    rows = Float8().rows(group, 9)
    assert rows is not None
    fp8.quantize_rows(x[:, : group.width], rows.main, rows.scale)
    Float8().project(group, x, y, None, None, rows)
    assert (y - expected).norm() / expected.norm() < 0.002
    assert fp8.can_compute(torch.device("cpu")) is not None
