"""Two ways from a prompt to tokens: the token engine on a GPU, transformers' `generate` for the rest. Said once a model, with the
reason.

Both stop at the same tokens and, when the most likely token is taken, say the same; drawn tokens depend on the seed alone on each
way, and differ between them.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from halfbyte.generate.engine import Choose, Engine
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


def tokens_of(model: PreTrainedModel, request: Request, streamer: TextStream) -> list[int]:
    """The new tokens, the end token included; `streamer` gets them while they are made. Random state: the caller's business."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        try:
            return _by_engine(model, request, streamer, device)
        except NotUnderstood as reason:
            _say(model, f"transformers (auto: {reason})")
    return _by_transformers(model, request, streamer, device)


def _by_engine(model: PreTrainedModel, request: Request, streamer: TextStream, device: torch.device) -> list[int]:
    places = -(-(len(request.ids) + request.room) // ROOM) * ROOM
    choose = Choose(request.temperature, request.top_p, request.seed, request.room, 1, device)
    engine = Engine(model, 1, places, request.room, choose)
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
    out: Tensor = model.generate(  # type: ignore[operator]
        inputs, attention_mask=torch.ones_like(inputs), generation_config=config, streamer=streamer
    )
    new: list[int] = out[0, len(request.ids) :].tolist()
    return new


def _say(model: PreTrainedModel, how: str) -> None:
    if _SAID.get(model) != how:
        _SAID[model] = how
        log.info("generation: %s", how)
