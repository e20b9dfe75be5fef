"""Proofs of the kernels of generation on one device: packed products with few rows, and what stands between them.

`tests/kernels/test_generation.py` runs them on the CPU, `bench/generation_gpu.py` as its gate on a GPU. Bounds: `checks.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from halfbyte.formats import quantize as formats
from halfbyte.formats.packed import Format, Packed
from halfbyte.kernels.decode_step import Heads, Scratch, Tops, attend, likeliest, normalise
from halfbyte.kernels.decode_step import reference as step_reference
from halfbyte.kernels.lora_linear import LowRank
from halfbyte.kernels.lora_linear.members import Member
from halfbyte.kernels.norm import NormSpec
from halfbyte.kernels.packed_gemv import Activation, Pieces, RmsNorm, Shape, build, feeds, multiply, pieces, programs
from halfbyte.kernels.packed_gemv.reference import activated
from halfbyte.kernels.packed_gemv.reference import normed as reference_normed
from kernels.checks import as_wrong_as_honest, poisoned, random_packed

NF4 = Format("nf4", 64, nested=True)
# format, rows of each member, columns, rows of x, activation, adapter ranks, bias, added
CASES: tuple[tuple[Format | None, tuple[int, ...], int, int, Activation | None, tuple[int, ...], bool, bool], ...] = (
    (NF4, (48, 17, 16), 320, 1, None, (4, 0, 17), True, False),
    (NF4, (40, 40), 192, 3, "silu", (4, 4), False, False),
    (NF4, (33,), 448, 9, None, (8,), False, True),
    (Format("nf4", 64), (31,), 64, 16, "gelu_tanh", (), True, False),
    (Format("fp4", 128, nested=True), (16, 5), 384, 2, None, (), False, False),
    (Format("nf4", 256), (20,), 576, 4, None, (), False, True),
    (Format("int4", 64), (33, 17), 128, 2, None, (3, 3), False, False),
    (Format("int4", 128, zero="int"), (33,), 256, 1, None, (), False, False),
    (Format("int4", 64, zero="float"), (20, 20), 128, 12, "gelu", (), False, False),
    (Format("int4", 64, zero="min"), (33,), 128, 2, None, (), True, False),
    (Format("int8"), (33, 17), 320, 5, None, (3, 0), True, False),
    (None, (33, 17), 320, 8, None, (4, 4), False, True),
)


def _case(
    dtype: torch.dtype, device: str, fmt: Format | None, rows: tuple[int, ...], width: int, ranks: tuple[int, ...], bias: bool
) -> list[Member]:
    def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device)

    members = []
    for i, n in enumerate(rows):
        weight = random(n, width, seed=i, scale=0.05).to(dtype) if fmt is None else random_packed((n, width), fmt, device, i)
        rank = ranks[i] if ranks else 0
        lora = LowRank(random(rank, width, seed=10 + i, scale=0.1), random(n, rank, seed=20 + i, scale=0.3), 0.5) if rank else None
        members.append(Member(weight, random(n, seed=30 + i).to(dtype) if bias else None, lora))
    return members


def _plain(members: list[Member], x: Tensor, activation: Activation | None, add: Tensor | None, times: float) -> Tensor:
    """Honest PyTorch in the dtype of x; the truth when x is float64 (the stored weights as they are, in fp32)."""
    outputs = []
    for m in members:
        precise = torch.float32 if x.dtype == torch.float64 else x.dtype
        weight = formats.dequantize(m.weight, precise) if isinstance(m.weight, Packed) else m.weight
        y = torch.nn.functional.linear(x, weight.to(x.dtype), None if m.bias is None else m.bias.to(x.dtype))
        if m.lora is not None:
            y = y + m.lora.scale * (x @ m.lora.a.T.to(x.dtype)) @ m.lora.b.T.to(x.dtype)
        outputs.append(y)
    y = torch.cat(outputs, 1)
    if activation is not None:
        y = activated(outputs[0], activation) * (outputs[1] if len(outputs) == 2 else 1)
    return y * times if add is None else add.to(y.dtype) + y * times


def check_packed_gemv(
    device: str,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16),
    shape: Shape | None = None,
    cases: tuple[int, ...] = tuple(range(len(CASES))),
) -> None:
    """Every format and form against float64; twice, since the second launch counts on from the first."""
    for number in cases:
        fmt, rows, width, m, activation, ranks, bias, added = CASES[number]
        for dtype in dtypes:
            members = _case(dtype, device, fmt, rows, width, ranks, bias)
            product = build(members, dtype, activation)
            assert not product.why_not, product.why_not
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(m, width + 64, generator=generator).to(device, dtype)[:, :width]
            add = torch.randn(m, product.rows, generator=generator).to(device, dtype) if added else None
            times = 0.5 if added else 1.0
            honest, truth = _plain(members, x, activation, add, times), _plain(members, x.double(), activation, add, times)
            for _ in range(2):
                with poisoned():
                    out = torch.empty(m, product.rows, dtype=dtype, device=device) if add is None else add.clone()
                    multiply(product, x, out, None if add is None else out, times, shape=shape)
                as_wrong_as_honest(f"{fmt} {rows} {width} m={m} {activation} {dtype}", out, honest, truth)


def check_fed_products(
    device: str, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16), shape: Shape | None = None
) -> None:
    """Products that leave A x for the next one and norm what they read: o, gate and up, down, and q, k, v; one and two rows."""
    for dtype in dtypes:
        for m in (1, 2):
            _check_chain(device, dtype, m, shape)


def _check_chain(device: str, dtype: torch.dtype, m: int, shape: Shape | None) -> None:
    hidden, inner = 192, 128
    groups = [
        build(_case(dtype, device, fmt, rows, width, ranks, bias), dtype, activation)
        for fmt, rows, width, ranks, bias, activation in (
            (NF4, (hidden,), 128, (), False, None), (NF4, (inner, inner), hidden, (4, 3), False, "silu"),
            (Format("int4", 64), (hidden,), inner, (17,), True, None), (NF4, (33, 16, 17), hidden, (4, 0, 5), False, None),
            (None, (70,), hidden, (), False, None),
        )
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(m)
    x, residual = (torch.randn(m, n, generator=generator).to(device, dtype) for n in (128, hidden))
    norm = RmsNorm((torch.rand(hidden, generator=generator) + 0.5).to(device, dtype), 1e-5, 0.25)
    fed: Pieces | None = None
    normed = (False, True, False, True, True)
    for i, (product, norms) in enumerate(zip(groups, normed, strict=True)):
        reader = groups[i + 1] if i + 1 < len(groups) else None
        next_norm = norm if i + 1 < len(groups) and normed[i + 1] else None
        leaves = pieces(reader, programs(product, m, shape), next_norm) if reader and feeds(product, reader, m) else None
        adds = i in (0, 2)
        read = x.clone()
        results = []
        for t in (dtype, torch.float64):
            inside = reference_normed(read.to(t), norm).to(t) if norms else read.to(t)
            results.append(_plain(list(product.members), inside, product.activation, residual if adds else None, 1.0))
        with poisoned():
            out = residual.clone() if adds else torch.empty(m, product.rows, dtype=dtype, device=device)
            multiply(product, read, out, out if adds else None, norm=norm if norms else None, pieces=fed, feeds=leaves, shape=shape)
        as_wrong_as_honest(f"{i} of a chain, m={m} {dtype}", out, *results)
        if i != 3:
            x, fed = out, leaves
        if i == 2:
            residual = out
        if i == 3:
            x, fed = residual, None


def check_decode_step(device: str, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)) -> None:
    """Norms, every rotation with and without norms of heads, attention with windows and caps, rows at different positions."""
    for dtype in dtypes:
        _check_norm(device, dtype)
        for rotation, turns, spec, window, cap in (
            ("half", 16, None, None, None), ("interleaved", 16, NormSpec("rms", 1e-6, 1.0), 5, None),
            ("interleaved-halves", 8, None, 100, 2.0), ("none", 0, None, 5, 2.0),
            ("half", 8, NormSpec("layer", 1e-5, 0.0), None, None),
        ):  # fmt: skip
            _check_heads(device, dtype, Heads(6, 2, 16, 0.3, window, cap, rotation, spec), turns)  # type: ignore[arg-type]
        _check_heads(device, dtype, Heads(10, 1, 24, 0.2, None, None, "half"), 16, pieces=1)


def _check_norm(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator).to(device, dtype) for s in ((3, 60), (60,), (60,)))
    for spec in (NormSpec("rms", 1e-5, 1.0), NormSpec("layer", 1e-5, 0.0)):
        results = []
        for t in (dtype, torch.float64):
            out = torch.empty(3, 60, dtype=t, device=device)
            step_reference.normalise(x.to(t), spec, weight.to(t), bias.to(t), out)
            results.append(out)
        with poisoned():
            got = torch.empty(3, 60, dtype=dtype, device=device)
            normalise(x, spec, weight, bias, got)
        as_wrong_as_honest(f"norm {spec} {dtype}", got, *results)


def _check_heads(device: str, dtype: torch.dtype, heads: Heads, turns: int, pieces: int = 4) -> None:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    rows, places, width = 4, 330, heads.query * heads.size
    qkv, keys, values = (
        random(rows, (heads.query + 2 * heads.kv) * heads.size),
        *(random(rows, places, heads.kv, heads.size) for _ in "kv"),
    )
    cos, sin = (random(places, turns), random(places, turns)) if turns else (None, None)
    weights = (random(heads.size), random(heads.size)) if heads.spec else (None, None)
    position = torch.tensor([0, 64, 149, 329], device=device)
    scratch = Scratch.empty(rows, heads.query, heads.kv, heads.size, pieces, torch.device(device))
    feed = random(28, width)
    results: list[list[Tensor]] = []
    for kind in ("honest", "truth", "got", "again"):
        t = torch.float64 if kind == "truth" else dtype
        k, v = keys.to(t, copy=True), values.to(t, copy=True)
        many = [None if w is None else w.to(t) for w in weights]
        h = Heads(heads.query, heads.kv, heads.size, heads.scale, heads.window, heads.cap, heads.rotation, heads.spec, *many)
        tables = [None if c is None else c.to(t) for c in (cos, sin)]
        with poisoned():
            out = torch.empty(rows, width, dtype=t, device=device)
            fed = torch.empty(heads.query, rows, 28, dtype=torch.float64 if kind == "truth" else torch.float32, device=device)
            if kind in ("got", "again"):
                if device == "cuda":
                    torch.cuda.synchronize()  # an early launch reads the cache before the launch in front of it has ended
                attend(qkv, position, h, *tables, k, v, scratch, out, feed, fed)
            else:
                step_reference.attend(qkv.to(t), position, h, *tables, k, v, out, feed.to(t), fed)
        results.append([k, v, out, fed])
    for name, honest, truth, got, again in zip(("keys", "values", "out", "fed"), *results, strict=True):
        as_wrong_as_honest(f"{name} {heads} {dtype}", got, honest, truth)
        assert torch.equal(got, again), f"{name} {heads} {dtype}: the pieces were joined in another order"
    assert not scratch.counters.any(), "counters are not back at zero"


def check_likeliest(device: str, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)) -> None:
    """The first of equals, in rows shorter than the pieces and longer; twice, since the second launch counts on from the first."""
    for dtype in dtypes:
        for width in (5, 1000, 3001):
            scores = torch.randint(-9, 9, (3, width + 8), generator=torch.Generator().manual_seed(width)).to(dtype)[:, :width]
            scores[1] = -float("inf")
            scores[1, width // 2] = -1e30
            tops, given = Tops.empty(3, torch.device(device)), scores.to(device)
            for _ in range(2):
                out = torch.full((3,), -1, device=device)
                likeliest(given, tops, out)
                assert torch.equal(out.cpu(), scores.argmax(-1)), f"{dtype} {width}: {out}"
            assert not tops.counters.any(), "counters are not back at zero"


CHECKS: dict[str, Callable[[str], None]] = {
    "packed_gemv": check_packed_gemv,
    "fed products": check_fed_products,
    "decode_step": check_decode_step,
    "likeliest": check_likeliest,
}
