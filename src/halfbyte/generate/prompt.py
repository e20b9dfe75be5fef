"""Reading prompts: their tokens through the fused layer's forward, keys and values straight into the engine's cache.

Why not the model's own forward: that runs module by module and returns a cache of its own to be copied; a turn of a conversation
would also need its old cache copied back. Here a prompt may begin at any place of the cache: what stands before is only looked at.
Tokens of several rows are packed into one pass. Cost: the weights are decoded once a pass of at most `AT_ONCE` tokens, whose
activations are all that it holds: about 2 (H + N + F) bytes a token of one layer.

Letters: T tokens of a pass, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.generate.reading import Reading
from halfbyte.kernels.attention import Documents
from halfbyte.kernels.products import Augmented
from halfbyte.layers import attention
from halfbyte.layers.fused import forward as stages
from halfbyte.layers.fused.forward import Activations, Call, Room
from halfbyte.layers.fused.keep import EVERYTHING
from halfbyte.layers.fused.parts import LayerParts

AT_ONCE = 1024
"""Tokens of a pass: enough for products at full speed, and too few for one to be worth a measurement (`kernels.gemm`)."""


@dataclass(frozen=True)
class Span:
    """Tokens of one row of the cache, from place `start` on."""

    row: int
    start: int
    tokens: Sequence[int]


def read_prompts(
    reading: Reading, layers: Sequence[LayerParts], embedding: Tensor, cache: Tensor, tables: tuple[Tensor | None, Tensor | None],
    spans: Sequence[Span],
) -> Tensor:  # fmt: skip
    """Hidden states `[len(spans), H]` of each span's last token, before the last norm; fills the cache at the spans' places.

    cache: `[layers, 2, M, P, G, d]`, holding what stands before each span. embedding `[V, H]`. tables: cos and sin, `[P, r]`.
    """
    last = embedding.new_empty(len(spans), embedding.shape[1])
    for numbers, batch in _passes(spans):
        hidden = _pass(reading, layers, embedding, cache, tables, batch)
        end = 0
        for number, span in zip(numbers, batch, strict=True):
            end += len(span.tokens)
            last[number] = hidden[end - 1]
    return last


def _passes(spans: Sequence[Span]) -> Iterator[tuple[list[int], list[Span]]]:
    """The spans cut into passes, in order; the numbers of the spans that each piece belongs to."""
    numbers: list[int] = []
    batch: list[Span] = []
    free = AT_ONCE
    for number, span in enumerate(spans):
        done = 0
        while done < len(span.tokens):
            piece = span.tokens[done : done + free]
            numbers.append(number)
            batch.append(Span(span.row, span.start + done, piece))
            done, free = done + len(piece), free - len(piece)
            if not free:
                yield numbers, batch
                numbers, batch, free = [], [], AT_ONCE
    if batch:
        yield numbers, batch


def _pass(
    reading: Reading, layers: Sequence[LayerParts], embedding: Tensor, cache: Tensor, tables: tuple[Tensor | None, Tensor | None],
    batch: list[Span],
) -> Tensor:  # fmt: skip
    ids = torch.tensor([t for span in batch for t in span.tokens], device=embedding.device)
    places = torch.tensor([span.start + i for span in batch for i in range(len(span.tokens))], device=embedding.device)
    x = embedding[ids]
    if reading.embedding_scale != 1.0:
        x.mul_(reading.embedding_scale)
    cos, sin = (None if t is None else t[places] for t in tables)
    boundaries = [0]
    for span in batch:
        boundaries.append(boundaries[-1] + len(span.tokens))
    bounds = torch.tensor(boundaries, dtype=torch.int32)
    documents = Documents.of(bounds, embedding.device, len(ids))
    room, products = Room(), Augmented()
    for number, (layer, parts) in enumerate(zip(reading.layers, layers, strict=True)):
        turned = parts.structure.rotation != "none"
        call = Call(parts, EVERYTHING, documents, cos if turned else None, sin if turned else None, None, products, False, room)
        a = Activations(x=x)
        stages.projected(call, a)
        a.attended = _attended(layer.module, call, a, cache[number], batch)
        stages.fill(call, a)
        x = stages.down(call, a)
    return x


def _attended(module: torch.nn.Module, call: Call, a: Activations, cache: Tensor, batch: list[Span]) -> Tensor:
    """`[T, H d]`: each span over its row of the cache, its own keys and values included. cache `[2, M, P, G, d]`."""
    s = call.parts.structure
    q, k, v = stages.heads(call, a)
    outputs = []
    begin = 0
    for span in batch:
        end, stop = begin + len(span.tokens), span.start + len(span.tokens)
        for kept, new in zip(cache, (k, v), strict=True):
            kept[span.row, span.start : stop] = new[begin:end]
        keys, values = (kept[span.row, :stop].transpose(0, 1)[None] for kept in cache)
        query = q[begin:end].transpose(0, 1)[None]
        mixed, _ = attention.attention(
            module, query, keys, values, scaling=stages.scale_of(s), sliding_window=s.window, softcap=s.cap
        )
        outputs.append(mixed[0].flatten(1))
        begin = end
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
