"""One token step over any adopted model, as launches on static buffers: what a CUDA graph captures and replays for every token.

A layer of the usual kind is five launches: norm, q/k/v and adapter in one, attention with rotation and cache, output added to the
residual, norm, gate/up, adapter and activation in one, down added to the residual. What an adapter's A makes of a group's input is
left by the launch in front (`Links`). Other layers (norms after, parallel halves, fused gate and up), and more than two rows, take
the same pieces with a few launches more. Nothing here looks at a value: positions and tokens stay on the device.

Letters: M rows, P places of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.generate.reading import Layer, Reading, tables
from halfbyte.kernels.decode_step import Scratch, attend, normalise
from halfbyte.kernels.glu import glu
from halfbyte.kernels.lora_linear.members import Member
from halfbyte.kernels.packed_gemv import Pieces, Product, RmsNorm, build, feeds, multiply, pieces, programs, takes_norm
from halfbyte.layers.fused.parts import Norm
from halfbyte.layers.linear import Operand

PROGRAMS = 256
"""Pieces of attention over all rows and key heads: about two a multiprocessor of a large GPU."""
MOST_PIECES = 64


@dataclass(frozen=True)
class Products:
    """The four groups of a layer, with whatever adapter is on now."""

    qkv: Product
    out: Product
    inputs: Product
    down: Product


@dataclass(frozen=True)
class Links:
    """What a layer's launches do beside their product: norms that q/k/v and gate/up take in, A x of a group by the one before."""

    qkv_norm: RmsNorm | None
    inputs_norm: RmsNorm | None
    qkv: Pieces | None
    out: Pieces | None
    inputs: Pieces | None
    down: Pieces | None


@dataclass(frozen=True)
class Buffers:
    """Everything that a step reads and writes. cache `[layers, 2, M, P, G, d]`; token int64 `[M]`; logits `[M, V]`.

    counted: int64 `[M + 1]`, the rows' positions and the number of the token of the answer: one addition moves them all.
    """

    cache: Tensor
    cos: Tensor | None
    sin: Tensor | None
    token: Tensor
    counted: Tensor
    residual: Tensor
    normed: Tensor
    qkv: Tensor
    mixed: Tensor
    side: Tensor
    wide: Tensor
    inner: Tensor
    scratch: Scratch
    logits: Tensor

    @property
    def position(self) -> Tensor:
        """int64 `[M]`."""
        return self.counted[:-1]

    @property
    def number(self) -> Tensor:
        """int64 `[1]`."""
        return self.counted[-1:]


def products(layer: Layer, operands: list[list[Operand]], dtype: torch.dtype) -> Products:
    """Of the layer's weights and adapters as they are now."""
    s = layer.module.structure
    groups = [[Member(o.weight, o.bias, o.lora) for o in group] for group in operands]
    alone = s.gated and len(groups[2]) == 1  # gate and up in one weight: the activation is a launch of its own
    return Products(
        build(groups[0], dtype), build(groups[1], dtype), build(groups[2], dtype, None if alone else layer.activation),
        build(groups[3], dtype),
    )  # fmt: skip


def taken(norm: Norm | None, product: Product, rows: int) -> RmsNorm | None:
    """The norm in front of a product, if that can take it in."""
    if norm is None or norm.spec.kind != "rms" or norm.bias is not None or norm.weight is None:
        return None
    found = RmsNorm(norm.weight, norm.spec.eps, norm.spec.offset)
    return found if takes_norm(product, rows, found) else None


def links(reading: Reading, made: list[Products], rows: int) -> list[Links]:
    """What goes together, by layer. Fed is a group whose input, but for a norm that it takes in, is the output of one launch."""
    found: list[Links] = []
    for number, (layer, p) in enumerate(zip(reading.layers, made, strict=True)):
        before = reading.layers[number - 1] if number else None
        parallel = layer.module.structure.norms.parallel
        feeder = None if before is None or before.after_mlp is not None else made[number - 1].down
        qkv_norm, qkv = (None, None) if parallel else _joined(layer.before_attention, p.qkv, feeder, rows)
        feeder = None if parallel or layer.after_attention is not None else p.out
        inputs_norm, inputs = (None, None) if parallel else _joined(layer.before_mlp, p.inputs, feeder, rows)
        out = pieces(p.out, layer.heads.query, None) if feeds(None, p.out, rows) else None
        whole = p.inputs.rows == p.down.width and feeds(p.inputs, p.down, rows)
        down = pieces(p.down, programs(p.inputs, rows), None) if whole else None
        found.append(Links(qkv_norm, inputs_norm, qkv, out, inputs, down))
    return found


def _joined(norm: Norm | None, reader: Product, feeder: Product | None, rows: int) -> tuple[RmsNorm | None, Pieces | None]:
    """The norm that a group takes in, and the pieces that it is fed by; a normed group with an adapter has both or neither."""
    inside = taken(norm, reader, rows)
    fed = feeder is not None and feeds(feeder, reader, rows) and (norm is None or inside is not None)
    if inside is not None and not fed and reader.launch is not None and reader.launch.rank:
        inside = None
    return inside, pieces(reader, programs(feeder, rows), inside) if fed and feeder is not None else None


def buffers(reading: Reading, made: list[Products], rows: int, places: int, embedding: Tensor) -> Buffers:
    """Static memory for `rows` rows of at most `places` tokens."""
    device, dtype, hidden = embedding.device, embedding.dtype, embedding.shape[1]
    first = reading.layers[0].heads
    kinds = {(layer.heads.kv, layer.heads.size) for layer in reading.layers}
    assert len(kinds) == 1, "layers of different key heads"
    pieces = 1
    while pieces * 2 * rows * first.kv <= PROGRAMS and pieces < MOST_PIECES:
        pieces *= 2

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    queries = max(layer.heads.query for layer in reading.layers)
    cos, sin = (None, None) if reading.rotary is None else tables(reading.rotary, places, dtype, device)
    inner = max(p.down.width for p in made)
    return Buffers(
        torch.zeros(len(reading.layers), 2, rows, places, first.kv, first.size, dtype=dtype, device=device), cos, sin,
        torch.zeros(rows, dtype=torch.int64, device=device), torch.zeros(rows + 1, dtype=torch.int64, device=device),
        empty(rows, hidden), empty(rows, hidden), empty(rows, max(p.qkv.rows for p in made)), empty(rows, queries * first.size),
        empty(rows, hidden), empty(rows, max(p.inputs.rows for p in made)), empty(rows, inner),
        Scratch.empty(rows, queries, first.kv, first.size, pieces, device), empty(rows, reading.head.weight.shape[0]),
    )  # fmt: skip


def token_step(
    reading: Reading, embedding: Tensor, made: list[Products], linked: list[Links], head: Product, b: Buffers
) -> None:  # fmt: skip
    """`b.token` at `b.position` through the model: writes the cache and `b.logits`. embedding `[V, hidden]`."""
    torch.index_select(embedding, 0, b.token, out=b.residual)
    if reading.embedding_scale != 1.0:
        b.residual.mul_(reading.embedding_scale)
    following = [*(link.qkv for link in linked[1:]), None]
    for number, (layer, weights) in enumerate(zip(reading.layers, made, strict=True)):
        _layer(layer, weights, linked[number], following[number], b.cache[number], b)
    norm = taken(reading.norm, head, len(b.token))
    logits(reading, head, b.residual if norm else _norm(reading.norm, b.residual, b.normed), b.logits, norm)


def logits(reading: Reading, head: Product, hidden: Tensor, out: Tensor, norm: RmsNorm | None = None) -> None:
    """out `[M, V]` = cap * tanh(scale * (norm(hidden) W^T + b) / cap), rounded where the model rounds."""
    multiply(head, hidden, out, norm=norm)
    if reading.head.scale != 1.0:
        out.mul_(reading.head.scale)
    if reading.head.cap:
        out.div_(reading.head.cap).tanh_().mul_(reading.head.cap)


def _norm(norm: Norm | None, x: Tensor, out: Tensor) -> Tensor:
    if norm is None:
        return x
    normalise(x, norm.spec, norm.weight, norm.bias, out)
    return out


def _layer(layer: Layer, weights: Products, link: Links, following: Pieces | None, cache: Tensor, b: Buffers) -> None:
    """following: the next layer's q/k/v, to be fed by the last product."""
    s, heads = layer.module.structure, layer.heads
    normed = b.residual if link.qkv_norm else _norm(layer.before_attention, b.residual, b.normed)
    qkv = b.qkv[:, : weights.qkv.rows]
    multiply(weights.qkv, normed, qkv, norm=link.qkv_norm, pieces=link.qkv)
    if layer.full_norms is not None:
        width = heads.query * heads.size
        for norm, part in zip(layer.full_norms, (qkv[:, :width], qkv[:, width : width + heads.kv * heads.size]), strict=True):
            _norm(norm, part, part)
    launch = weights.out.launch
    feed, fed = (None, None) if link.out is None or launch is None else (launch.a, link.out.sums)
    mixed = b.mixed[:, : heads.query * heads.size]
    attend(qkv, b.position, heads, b.cos, b.sin, cache[0], cache[1], b.scratch, mixed, feed, fed)
    # Parallel halves read the same norm, which must outlive the residual's change: it does, being another buffer.
    keeps = normed is b.residual and s.norms.parallel
    assert not keeps, "a parallel layer without a norm"
    _added(weights.out, mixed, layer.after_attention, s.residual_multiplier, link.out, link.inputs, b)
    if not s.norms.parallel:
        normed = b.residual if link.inputs_norm else _norm(layer.before_mlp, b.residual, b.normed)
    inner = b.inner[:, : weights.down.width]
    if weights.inputs.rows == weights.down.width:
        multiply(weights.inputs, normed, inner, norm=link.inputs_norm, pieces=link.inputs, feeds=link.down)
    else:
        wide = b.wide[:, : weights.inputs.rows]
        multiply(weights.inputs, normed, wide, norm=link.inputs_norm, pieces=link.inputs)
        glu(wide[:, : inner.shape[1]], wide[:, inner.shape[1] :], layer.activation, inner)
    _added(weights.down, inner, layer.after_mlp, s.residual_multiplier, link.down, following, b)


def _added(
    weights: Product, x: Tensor, norm: Norm | None, multiplier: float, left: Pieces | None, leaves: Pieces | None, b: Buffers
) -> None:
    """residual += multiplier * norm(x W^T)."""
    if norm is None:
        multiply(weights, x, b.residual, add=b.residual, multiplier=multiplier, pieces=left, feeds=leaves)
        return
    assert leaves is None, "a norm stands between"
    multiply(weights, x, b.side, pieces=left)
    _norm(norm, b.side, b.side)
    b.residual.add_(b.side, alpha=multiplier)
