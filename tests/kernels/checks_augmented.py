"""Proofs of `kernels/augmented` on one device: every part of S bit for bit, nothing else written.

python tests/kernels/checks_augmented.py cpu | cuda
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from halfbyte.formats import quantize as formats
from halfbyte.formats.packed import Format, Packed
from halfbyte.kernels.augmented import Group
from halfbyte.kernels.lora_linear.members import LowRank, Member
from kernels.checks import DTYPES, as_wrong_as_honest, poisoned, random_packed
from kernels.runner import main, named

NESTED = Format("nf4", 64, nested=True)
PLAIN = Format("nf4", 64)
INT4 = [Format("int4", 32, zero=zero) for zero in ("none", "int", "float", "min")]  # type: ignore[arg-type]
# Outputs and formats (None: dense) of the members, ranks (0: no adapter), width.
GROUPS: dict[str, tuple[list[tuple[int, Format | None]], list[int], int]] = {
    "qkv": ([(96, NESTED), (32, NESTED), (32, NESTED)], [16, 16, 16], 128),
    "gate+up, straddling blocks": ([(40, NESTED), (24, NESTED)], [8, 3], 72),
    "a single one": ([(70, PLAIN)], [64], 2056),
    "no adapter": ([(48, PLAIN), (16, PLAIN)], [0, 0], 64),
    "some adapters": ([(5, NESTED), (63, NESTED), (1, NESTED)], [0, 7, 1], 320),
    "odd width": ([(63, NESTED), (60, NESTED)], [4, 4], 431),
    "fp4, block 4096": ([(31, Format("fp4", 4096, nested=True)), (9, Format("fp4", 4096))], [5, 0], 264),
    "int4": ([(17, fmt) for fmt in INT4], [2, 0, 3, 4], 96),
    "int4, short groups": ([(9, fmt) for fmt in INT4], [2, 1, 0, 4], 40),
    "int8": ([(33, Format("int8")), (3, Format("int8"))], [2, 2], 130),
    "dense": ([(33, None), (20, None)], [8, 8], 88),
    "mixed": ([(33, None), (20, NESTED), (7, Format("int8")), (8, INT4[2])], [8, 2, 1, 16], 192),
}


def group_of(name: str, device: str, dtype: torch.dtype = torch.bfloat16, master: torch.dtype = torch.float32) -> Group:
    """A group of `GROUPS` with random members; dense ones in `dtype`."""
    outputs, ranks, width = GROUPS[name]
    generator = torch.Generator().manual_seed(len(name))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    members = []
    for i, ((rows, fmt), rank) in enumerate(zip(outputs, ranks, strict=True)):
        weight = normal(rows, width).to(dtype) if fmt is None else random_packed((rows, width), fmt, device, seed=i)
        lora = LowRank(normal(rank, width).to(master), normal(rows, rank).to(master), 0.7 + i, i) if rank else None
        members.append(Member(weight, None, lora))
    return Group(members)


def expected(group: Group, dtype: torch.dtype) -> Tensor:
    """S from its definition, with NaN where nothing may be written."""
    n, k, r = group.rows, group.width, group.rank
    want = torch.zeros(n + r, k + r, dtype=dtype, device=group.device)
    want[n:, k:] = float("nan")
    for m, rows, ranks in zip(group.members, group.row_slices, group.rank_slices, strict=True):
        want[rows, :k] = formats.dequantize(m.weight, dtype) if isinstance(m.weight, Packed) else m.weight.to(dtype)
        if m.lora is not None and ranks is not None:
            want[rows, k:][:, ranks] = (m.lora.b.float() * m.lora.scale).to(dtype)
            want[n:, :k][ranks] = m.lora.a.to(dtype)
    return want


def same(got: Tensor, want: Tensor) -> bool:
    return got.dtype == want.dtype and torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())


def prove_group(device: str, name: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """All of S of one group; a second call, which may take a shorter way, gives the same."""
    group = group_of(name, device, dtype)
    want = expected(group, dtype)
    for _ in range(2):
        with poisoned():
            assert same(group.matrix(dtype), want), f"{name} {dtype}"


def check_matrix(device: str) -> None:
    """All of S, every format, odd shapes, every dtype."""
    for name in GROUPS:
        for dtype in DTYPES:
            prove_group(device, name, dtype)


def check_masters(device: str) -> None:
    """A and B in 16 bits, and new values in place or in other memory between two calls."""
    group = group_of("qkv", device, master=torch.bfloat16)
    with poisoned():
        assert same(group.matrix(torch.bfloat16), expected(group, torch.bfloat16))
    group = group_of("some adapters", device)
    for m in group.members:
        if m.lora is not None:
            with poisoned():
                m.lora.a.mul_(2)
                m.lora.b.data = m.lora.b.data.clone() + 1
                assert same(group.matrix(torch.bfloat16), expected(group, torch.bfloat16))


def check_hold(device: str) -> None:
    """A held S follows its adapters; dense weights become views of it; release goes back to fresh ones."""
    for name in ("qkv", "dense", "mixed", "odd width", "no adapter"):
        group = group_of(name, device)
        want = expected(group, torch.bfloat16)
        with poisoned():
            held = group.hold(torch.bfloat16)
        assert same(held, want), name
        for m, view in zip(group.members, group.views(), strict=True):
            assert isinstance(m.weight, Packed) or m.weight.data_ptr() == view.data_ptr()
            if m.lora is not None:
                m.lora.a.add_(1)
                m.lora.b.add_(1)
        assert group.matrix(torch.bfloat16) is held and group.hold(torch.bfloat16) is held
        want = expected(group, torch.bfloat16)
        assert same(held, want), name
        group.release()
        with poisoned():
            fresh = group.matrix(torch.bfloat16)
        assert fresh.data_ptr() != held.data_ptr() and same(fresh, want), name


def check_products(device: str) -> None:
    """Forward and backward through S against float64, beside plain PyTorch."""
    dtype = torch.bfloat16
    for name in ("qkv", "some adapters", "mixed"):
        group = group_of(name, device)
        n, k = group.rows, group.width
        x, dy = torch.randn(13, k, device=device).to(dtype), torch.randn(13, n, device=device).to(dtype)
        s = group.matrix(dtype)
        y = torch.cat([x, x @ s[n:, :k].T], 1) @ s[:n].T
        dx = torch.cat([dy, dy @ s[:n, k:]], 1) @ s[:, :k]
        for got, f in ((y, _forward), (dx, _backward)):
            given = x if f is _forward else dy
            as_wrong_as_honest(f"{name} {f.__name__}", got, f(group, given), f(group, given.double()))


def _forward(group: Group, x: Tensor) -> Tensor:
    ys = []
    for m in group.members:
        y = x @ _dense(m).to(x.dtype).T
        if m.lora is not None:
            y = y + m.lora.scale * ((x @ m.lora.a.to(x.dtype).T) @ m.lora.b.to(x.dtype).T)
        ys.append(y)
    return torch.cat(ys, 1)


def _backward(group: Group, dy: Tensor) -> Tensor:
    dx = torch.zeros(len(dy), group.width, dtype=dy.dtype, device=dy.device)
    for m, rows in zip(group.members, group.row_slices, strict=True):
        dx = dx + dy[:, rows] @ _dense(m).to(dy.dtype)
        if m.lora is not None:
            dx = dx + (m.lora.scale * (dy[:, rows] @ m.lora.b.to(dy.dtype))) @ m.lora.a.to(dy.dtype)
    return dx


def _dense(m: Member) -> Tensor:
    return formats.dequantize(m.weight, torch.float32) if isinstance(m.weight, Packed) else m.weight


CHECKS = named(globals())

if __name__ == "__main__":
    sys.exit(main(CHECKS))
