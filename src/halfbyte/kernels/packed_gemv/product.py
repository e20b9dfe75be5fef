"""A group of weights made ready for products with few rows: what a launch needs beside x, built once, used every token.

Segments are runs of rows with one output each: a member is one, or two where gate and up are one weight. The adapters' A of a group
are stacked in one 16-bit copy, s * B beside each member in another: made here from the fp32 masters (product in fp32, one
rounding), so a group is rebuilt when they have moved. Cost: 2 r (K + N) bytes a member; the weights themselves are not copied.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from halfbyte.formats.packed import Packed
from halfbyte.kernels.dequantize.levels import levels
from halfbyte.kernels.lora_linear.members import Member

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
MOST_ROWS = 16
"""Rows of x that one launch takes."""
FED_ROWS = 2
"""Rows of x up to which a norm goes into the product, and a product feeds the next."""
MOST_FED = 256
"""Ranks of a group up to which it is fed."""
NEEDED = (8, 0)
"""Compute capability of the kernel's matrix instructions and cache policies: they are given as text, so triton replaces none."""


@dataclass(frozen=True)
class Shape:
    """How the kernel cuts the work. tiles: 16 rows of the weight each, at a time. warps: of a program. programs: a multiprocessor.

    registers: most a thread. ahead: tiles asked into the L2 cache ahead of use. early: start before the launch before has ended.
    Both on sm_90 and newer only.
    """

    tiles: int
    warps: int
    programs: int
    registers: int | None = None
    ahead: int = 0
    early: bool = True


@dataclass(frozen=True)
class RmsNorm:
    """x * rsqrt(mean(x^2) + eps) * (weight + offset), rounded. weight `[K]` in the dtype of x."""

    weight: Tensor
    eps: float
    offset: float


@dataclass(frozen=True)
class Pieces:
    """A x of a group, left by the launch that made x, a sum a program: nobody waits for anybody, and no launch is spent on it.

    at `[K, R]`: A^T in 16 bits, times the norm's weight where a norm stands between. sums: fp32 `[programs, FED_ROWS, R]`.
    """

    at: Tensor
    sums: Tensor


@dataclass(frozen=True)
class Product:
    """members as given; activation of the first output (times the second where there are two), or None.

    rows: outputs, N (after the activation: of one). launch: what the fused twin needs; None where it cannot run this group.
    """

    members: tuple[Member, ...]
    activation: Activation | None
    width: int
    rows: int
    launch: Launch | None
    why_not: str = ""


@dataclass(frozen=True)
class Launch:
    """segments: by `Shape.tiles`, int64 `[S, FIELDS]` on the device (see the kernel), number of tiles, whether one is not whole.

    keep: tensors whose addresses stand in there. a `[R, K]`: the adapters' A; xa: A x, fp32 `[MOST_ROWS, R]`. parts, fp32
    `[R / 16, cuts, 16, 16]`, and counters, int32 `[R / 16]`: scratch of the launch that makes it, the latter zero outside.
    """

    kind: Literal["four", "int8", "dense"]
    nested: bool
    per: int
    zero: str
    count: int
    paired: bool
    rank: int
    bias: bool
    pairs: Tensor
    a: Tensor
    xa: Tensor
    parts: Tensor
    counters: Tensor
    keep: tuple[Tensor, ...]
    segments: dict[int, tuple[Tensor, int, bool]]


def build(members: Sequence[Member], dtype: torch.dtype, activation: Activation | None = None) -> Product:
    """The product of a group that shares its input. activation: over one member, or gate and up (two, or one of both)."""
    members = tuple(members)
    first = members[0].weight
    width = first.shape[1]
    outputs = sum(m.weight.shape[0] for m in members)
    paired = activation is not None and (len(members) == 2)
    why_not = _obstacle(members, dtype)
    launch = None if why_not else _launch(members, dtype, paired)
    return Product(members, activation, width, outputs // 2 if paired else outputs, launch, why_not)


def pieces(reader: Product, programs: int, norm: RmsNorm | None) -> Pieces:
    """For `reader`, to be filled by a launch of so many programs. norm: what stands between that one's output and the group."""
    launch = reader.launch
    assert launch is not None and launch.rank, "nothing to feed"
    rows = [
        torch.zeros(launch.rank, reader.width, device=launch.a.device)
        if m.lora is None
        else torch.nn.functional.pad(m.lora.a.detach().float(), (0, 0, 0, launch.rank - m.lora.a.shape[0]))
        for m in reader.members
    ]
    a = torch.cat(rows)
    if norm is not None:
        a = a * (norm.weight.float() + norm.offset)
    return Pieces(a.T.to(launch.a.dtype).contiguous(), torch.zeros(programs, FED_ROWS, len(a), device=a.device))


def _obstacle(members: tuple[Member, ...], dtype: torch.dtype) -> str:
    """Why the kernel cannot take the group; "" if it can."""
    kinds = {m.weight.format if isinstance(m.weight, Packed) else None for m in members}
    if dtype not in (torch.bfloat16, torch.float16):
        return f"activations of {dtype}"
    if len(kinds) > 1:
        return "weights of several formats in a group"
    device = _device(members)
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < NEEDED:
        return "a GPU of compute capability {}.{}, below {}.{}".format(*capability, *NEEDED)
    for member in members:
        weight = member.weight
        if weight.shape[1] % 64:
            return f"{weight.shape[1]} columns, no multiple of 64"
        if isinstance(weight, Tensor):
            if not weight.is_contiguous() or weight.dtype != dtype or weight.data_ptr() % 16:
                return f"a weight of {weight.dtype}, transposed, or not at a multiple of 16 bytes"
            continue
        block = weight.format.block
        if weight.format.kind != "int8" and (block % 64 or (weight.format.kind == "int4" and weight.shape[1] % block)):
            return f"blocks of {block} on rows of {weight.shape[1]}"
        if weight.codes.data_ptr() % 16:
            return "codes that do not start at a multiple of 16 bytes"
    return ""


def _device(members: tuple[Member, ...]) -> torch.device:
    weight = members[0].weight
    return weight.device if isinstance(weight, Tensor) else weight.codes.device


def _launch(members: tuple[Member, ...], dtype: torch.dtype, paired: bool) -> Launch:
    weight, device = members[0].weight, _device(members)
    width = weight.shape[1]
    fmt = weight.format if isinstance(weight, Packed) else None
    kind: Literal["four", "int8", "dense"] = "dense" if fmt is None else "int8" if fmt.kind == "int8" else "four"
    ranks = [0 if m.lora is None else m.lora.a.shape[0] for m in members]
    rank = -(-max(ranks) // 16) * 16
    a = torch.zeros(max(rank * len(members), 1), width, dtype=dtype, device=device)
    keep, table, output = [], [], 0
    for i, member in enumerate(members):
        b = torch.zeros(member.weight.shape[0] if rank else 0, rank, dtype=dtype, device=device)
        if member.lora is not None:
            a[i * rank : i * rank + ranks[i]] = member.lora.a.detach()
            b[:, : ranks[i]] = member.lora.b.detach().float() * member.lora.scale
        bias = None if member.bias is None else member.bias.detach().to(dtype).contiguous()
        stored = (member.weight,) if isinstance(member.weight, Tensor) else member.weight.tensors()
        addresses = [t.data_ptr() for t in stored] + [0] * (5 - len(stored))
        rows = member.weight.shape[0]
        table.append([*addresses, 0 if bias is None else bias.data_ptr(), b.data_ptr(), 0, rows, output, 0, i * rank])
        keep += [*stored, b, *([] if bias is None else [bias])]
        output += rows
    # Copied from the host: an early launch may read before what a kernel wrote last is there.
    tables = {tiles: _with_tiles(table, 16 if paired else 16 * tiles, 1 if paired else len(table)) for tiles in (1, 2, 3)}
    segments = {tiles: (t.to(device), count, ragged) for tiles, (t, count, ragged) in tables.items()}
    tiles = rank * len(members) // 16
    return Launch(
        kind, bool(fmt and fmt.nested), (fmt.block // 64 if fmt and kind == "four" else 1), fmt.zero if fmt else "none",
        len(members), paired, rank, any(m.bias is not None for m in members), pairs(weight, dtype, str(device)),
        a, torch.empty(MOST_ROWS, max(rank * len(members), 1), device=device),
        torch.empty(tiles, cut(width)[1], 16, 16, device=device), torch.zeros(tiles, dtype=torch.int32).to(device),
        tuple(keep), segments,
    )  # fmt: skip


def cut(width: int) -> tuple[int, int]:
    """How columns are cut where A x is made: columns a part, and parts (at most 32, which one program adds up)."""
    span = 256
    while -(-width // span) > 32:
        span *= 2
    return span, -(-width // span)


def _with_tiles(table: list[list[int]], rows: int, counted: int) -> tuple[Tensor, int, bool]:
    """The table with each segment's first tile, of so many rows, filled in; tiles of the first `counted` segments; see `Launch`."""
    first, filled = [0], []
    for line in table:
        filled.append([*line[:10], first[-1], line[11]])
        first.append(first[-1] + -(-line[8] // rows))
    return torch.tensor(filled, dtype=torch.int64), first[counted], any(line[8] % rows for line in table)


def pairs(weight: Packed | Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """uint32 `[256]`: the two 16-bit levels of a byte of codes, the first of the weight's order in the low half."""
    if isinstance(weight, Tensor):
        return torch.zeros(1, dtype=torch.uint32, device=device)
    symmetric = weight.format.kind == "int4" and weight.format.zero == "none"
    return _pairs(weight.format.kind, symmetric, dtype, device)


@functools.cache
def _pairs(kind: str, symmetric: bool, dtype: torch.dtype, device: str) -> Tensor:
    byte = torch.arange(256)
    if kind == "int8":
        value = byte.to(torch.uint8).view(torch.int8).float()
        both = torch.stack([value, value], 1)
    else:
        table = levels(kind) if kind in ("nf4", "fp4") else torch.arange(16.0) - (8 if symmetric else 0)
        both = torch.stack([table[byte >> 4], table[byte & 15]], 1)
    return both.to(dtype).contiguous().view(torch.uint32).view(-1).to(device)
