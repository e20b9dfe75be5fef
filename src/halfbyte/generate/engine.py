"""The token engine: a prompt goes through the fused layers once, then every token is one replay of a CUDA graph.

Why: for a single row a token costs reading the weights once, 0.9 ms for 8B packed weights on an H200; everything else (thousands of
launches, a cache that grows, a look at every token) has to disappear beside that. So buffers are static, positions and tokens stay
on the device, the choice of a token is part of the graph, and the host looks at tokens a few at a time while the next ones are
made. The cache outlives an answer: of the next prompt only what differs from it is read (`prompt.py`). On a CPU the same step runs
without a graph on the references: that is how it is tested. Cost: the cache, 2 layers G d numbers a token of room; 16-bit copies of
the adapter, 2 r (K + N) bytes a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.generate.prompt import Span, read_prompts
from halfbyte.generate.reading import read
from halfbyte.generate.step import Links, Products, buffers, links, logits, products, token_step
from halfbyte.kernels.decode_step import Tops, likeliest, normalise
from halfbyte.kernels.lora_linear.members import Member
from halfbyte.kernels.packed_gemv import MOST_ROWS, build

AT_A_TIME = 4
"""Tokens made between two looks: the host is never waited for, and a stream still flows (10 ms at 400 tokens a second)."""


class Choose:
    """How a token is chosen from logits, on the device: the likeliest, or drawn from the likeliest of probability top_p.

    draws: uniform numbers, one a token and row, made from the seed alone beforehand; so a graph draws what a loop would.
    """

    def __init__(self, temperature: float, top_p: float, seed: int, tokens: int, rows: int, device: torch.device) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.tops = Tops.empty(rows, device)
        self.draws = torch.empty(tokens if temperature > 0 else 1, rows, dtype=torch.float64, device=device)
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """The draws of another seed, in place; the first ones do not depend on how many there are."""
        self.draws.copy_(torch.rand(self.draws.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))

    def __call__(self, scores: Tensor, number: Tensor, out: Tensor) -> None:
        """Into `out`, int64 `[M]`, from logits `[M, V]`. number: int64 `[1]`, which token of the answer this is."""
        if self.temperature == 0:
            likeliest(scores, self.tops, out)
            return
        likely = (scores.float() / self.temperature).softmax(-1)
        order = None
        if self.top_p < 1:
            likely, order = likely.sort(-1, descending=True)
            likely = likely.where(likely.cumsum(-1) - likely < self.top_p, 0.0)
        sums = likely.double().cumsum(-1)
        draw = self.draws.index_select(0, number)[0, :, None] * sums[:, -1:]
        found = torch.searchsorted(sums, draw, right=True).clamp_(max=scores.shape[-1] - 1)
        out.copy_((found if order is None else order.gather(-1, found))[:, 0])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Engine:
    """Answers for up to 16 rows at once, with the adapter as it is when the engine is made.

    places: tokens of the longest prompt and its answer. tokens: of the longest answer. Raises NotUnderstood for a model that
    the step cannot run.
    """

    def __init__(self, model: PreTrainedModel, rows: int, places: int, tokens: int, choose: Choose | None = None) -> None:
        assert 1 <= rows <= MOST_ROWS, f"{rows} rows"
        self.model, self.reading = model, read(model)
        self.embedding = next(model.get_input_embeddings().parameters())
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        with torch.no_grad():
            operands = [layer.operands() for layer in self.reading.layers]
            pairs = list(zip(self.reading.layers, operands, strict=True))
            self.products: list[Products] = [products(layer, groups, self.dtype) for layer, groups in pairs]
            self.parts = [layer.parts(groups, self.dtype) for layer, groups in pairs]
            self.head = build([Member(self.reading.head.weight, self.reading.head.bias, None)], self.dtype)
            self.links: list[Links] = links(self.reading, self.products, rows)
            self.b = buffers(self.reading, self.products, rows, places, self.embedding)
        self.choose = choose or Choose(0.0, 1.0, 0, tokens, rows, self.device)
        self.history = torch.zeros(tokens + AT_A_TIME, rows, dtype=torch.int64, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.cached: list[list[int]] = [[] for _ in range(rows)]
        """Of each row, the tokens whose keys and values are in the cache."""

    def forget(self) -> None:
        """The next prompts are read from their first token."""
        self.cached = [[] for _ in self.cached]

    def take_over(self, other: Engine) -> None:
        """What `other`, of the same weights and adapter, has in its cache."""
        places = min(self.b.cache.shape[3], other.b.cache.shape[3])
        self.capture()
        self.b.cache[:, :, :, :places].copy_(other.b.cache[:, :, :, :places])
        self.cached = [row[:places] for row in other.cached]

    @property
    def plain(self) -> list[str]:
        """Reasons why some products are decoded and multiplied instead of read packed; empty when none is."""
        groups = [g for p in self.products for g in (p.qkv, p.out, p.inputs, p.down)]
        return sorted({g.why_not for g in [*groups, self.head] if g.why_not})

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Reads of each prompt what the cache does not hold, its last token at least; chooses every row's first token."""
        assert len(prompts) == len(self.b.token), "one prompt a row"
        starts = [_common(kept, prompt[:-1]) for kept, prompt in zip(self.cached, prompts, strict=True)]
        self.cached = [list(prompt[:start]) for prompt, start in zip(prompts, starts, strict=True)]
        spans = [Span(row, start, prompts[row][start:]) for row, start in enumerate(starts)]
        hidden = read_prompts(self.reading, self.parts, self.embedding, self.b.cache, (self.b.cos, self.b.sin), spans)
        norm = self.reading.norm
        normalise(hidden, norm.spec, norm.weight, norm.bias, self.b.normed)
        logits(self.reading, self.head, self.b.normed, self.b.logits)
        self.cached = [list(prompt) for prompt in prompts]
        self.b.counted.copy_(torch.tensor([*(len(p) - 1 for p in prompts), 0]))
        self._chosen()

    def _chosen(self) -> None:
        """The next token from `logits`: into the history and before the next step."""
        self.choose(self.b.logits, self.b.number, self.b.token)
        self.history.index_copy_(0, self.b.number, self.b.token[None])
        self.b.counted.add_(1)

    def _step(self) -> None:
        token_step(self.reading, self.embedding, self.products, self.links, self.head, self.b)
        self._chosen()

    @torch.no_grad()
    def capture(self) -> None:
        """Compiles what is new and records the step. Call it before `prefill`: it walks over the buffers."""
        if self.device.type != "cuda" or self.graph is not None:
            return
        self.forget()
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self.b.counted.zero_()
            self._step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.b.counted.zero_()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        self.graph = graph

    @torch.no_grad()
    def advance(self) -> None:
        """One more token for every row."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()

    def answer(
        self, prompts: Sequence[Sequence[int]], room: int, ends: set[int], emit: Callable[[int, int], object] | None = None
    ) -> list[list[int]]:
        """At most `room` tokens for each prompt, up to and with one of `ends`. emit: receives (row, token) as they are read.

        The device runs at most 2 * AT_A_TIME tokens ahead of what the host has read.
        """
        assert room <= len(self.history) and max(map(len, prompts)) + room <= self.b.cache.shape[3], "longer than the engine's room"
        self.capture()
        self.prefill(prompts)
        found: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        made, pending = 1, [self._look(0, 1)]
        while pending and open_rows:
            if made < room:
                count = min(AT_A_TIME, room - made)
                for _ in range(count):
                    self.advance()
                pending.append(self._look(made, made + count))
                made += count
            tokens, ready = pending.pop(0)
            if ready is not None:
                ready.synchronize()
            for line in tokens.tolist():
                for row in sorted(open_rows):
                    found[row].append(line[row])
                    if emit is not None:
                        emit(row, line[row])
                    if line[row] in ends:
                        open_rows.discard(row)
        # The last token chosen has not been through the model.
        self.cached = [[*prompt, *answer[: made - 1]] for prompt, answer in zip(prompts, found, strict=True)]
        return found

    def _look(self, start: int, stop: int) -> tuple[Tensor, torch.cuda.Event | None]:
        """The tokens start..stop on their way to the host, and the event that says they are there."""
        part = self.history[start:stop]
        if self.device.type != "cuda":
            return part.clone(), None
        host = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
        host.copy_(part, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return host, event
