"""Two ways from a prompt to tokens: the token engine on a GPU, transformers' `generate` for the rest. Said once a model, with the
reason.

Both stop at the same tokens and, when the most likely token is taken, say the same; drawn tokens depend on the seed alone on each
way, and differ between them.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from halfbyte.generate.engine import Choose, Engine
from halfbyte.generate.reading import read
from halfbyte.generate.stream import TextStream
from halfbyte.layers.structure import NotUnderstood

log = logging.getLogger("halfbyte")
_SAID: weakref.WeakKeyDictionary[PreTrainedModel, str] = weakref.WeakKeyDictionary()
ROOM = 256
"""The engine's buffers are a multiple of this many tokens."""


@dataclass(frozen=True)
class Request:
    """One prompt: ids, at most `room` new tokens, `ends` stop it; temperature 0 takes the likeliest. pad: for transformers."""

    ids: list[int]
    room: int
    ends: set[int]
    temperature: float
    top_p: float
    seed: int
    pad: int


class Session:
    """The engine of a conversation, kept between its turns: graph, buffers, and the cache of what was said.

    A new one is made when weights or adapter are others than it was made of, for another way to draw tokens, and, with the cache
    taken over, when a turn needs more room.
    """

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self._key: object = None

    def ready(self, model: PreTrainedModel, request: Request) -> Engine:
        """The engine that answers `request`. Raises NotUnderstood for a model that the token step cannot run."""
        key = (_made_of(model), request.temperature, request.top_p)
        old = self.engine if self._key == key else None
        self.engine, self._key = old, key
        needed = len(request.ids) + request.room
        if old is None or needed > old.b.cache.shape[3] or request.room > len(old.history):
            places = needed if old is None else max(needed, 2 * old.b.cache.shape[3])
            choose = Choose(request.temperature, request.top_p, request.seed, request.room, 1, next(model.parameters()).device)
            self.engine = Engine(model, 1, -(-places // ROOM) * ROOM, request.room, choose)
            if old is not None:
                self.engine.take_over(old)
        assert self.engine is not None
        self.engine.choose.seed(request.seed)
        return self.engine


@torch.no_grad()
def _made_of(model: PreTrainedModel) -> tuple[object, ...]:
    """What an engine is made of: the stored weights' addresses, the adapters that are on, and how large each of their matrices is.

    Optimizers write without torch's noticing, so a change is seen by the norm. Cost: a small launch a matrix, one wait a turn.
    """
    operands = [o for layer in read(model).layers for group in layer.operands() for o in group]
    on = [(id(t), o.lora.scale) for o in operands if o.lora is not None for t in (o.lora.a, o.lora.b)]
    learned = [t for o in operands if o.lora is not None for t in (o.lora.a, o.lora.b)]
    sizes = torch.stack([torch.linalg.vector_norm(t) for t in learned]).tolist() if learned else []
    return (id(model), *((id(p), p._version) for p in model.parameters()), *on, *sizes)


def tokens_of(model: PreTrainedModel, request: Request, streamer: TextStream, session: Session) -> list[int]:
    """The new tokens, the end token included; `streamer` gets them while they are made. Random state: the caller's business."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        try:
            return _by_engine(model, request, streamer, session)
        except NotUnderstood as reason:
            _say(model, f"transformers (auto: {reason})")
    return _by_transformers(model, request, streamer, device)


def _by_engine(model: PreTrainedModel, request: Request, streamer: TextStream, session: Session) -> list[int]:
    engine = session.ready(model, request)
    plain = f"; decoded at every token: {', '.join(engine.plain)}" if engine.plain else ""
    _say(model, f"token engine (auto: CUDA, every layer adopted{plain})")
    streamer.put(torch.tensor(request.ids))
    answer = engine.answer([request.ids], request.room, request.ends, lambda row, token: streamer.put(torch.tensor([token])))
    streamer.end()
    return answer[0]


def _by_transformers(model: PreTrainedModel, request: Request, streamer: TextStream, device: torch.device) -> list[int]:
    drawn = request.temperature > 0
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=request.room,
        do_sample=drawn,
        temperature=request.temperature if drawn else None,
        top_p=request.top_p if drawn else None,
        top_k=0 if drawn else None,
        eos_token_id=sorted(request.ends) or None,
        pad_token_id=request.pad,
        use_cache=True,
    )
    inputs = torch.tensor([request.ids], device=device)
    with _own_settings_aside(model):
        out: Tensor = model.generate(  # type: ignore[operator]
            inputs, attention_mask=torch.ones_like(inputs), generation_config=config, streamer=streamer
        )
    new: list[int] = out[0, len(request.ids) :].tolist()
    return new


@contextmanager
def _own_settings_aside(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model brings no generation settings of its own: transformers takes them for all that a call leaves open (a
    repetition penalty, beams, a time limit), and the answer would not be the one that was asked for."""
    own, model.generation_config = model.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own


def _say(model: PreTrainedModel, how: str) -> None:
    if _SAID.get(model) != how:
        _SAID[model] = how
        log.info("generation: %s", how)
