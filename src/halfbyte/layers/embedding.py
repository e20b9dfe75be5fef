"""The input embedding in host memory: pinned there, and read by the GPU row by row over the bus.

Why: a step reads one row a token, 8 KB at 8B, and the table of 128k rows takes a GiB that nothing else may have. The parameter
stays the model's own, of the same shape, dtype and device, with the same numbers: only its memory is elsewhere, so forward,
generation, checkpoints and merging read it as before, at the speed of the bus.
Not so an embedding that is the output head too: the loss reads all of it for every chunk of tokens. And not one that learns.
Cost: T H c bytes over the bus a microbatch, host memory for the table.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.layers import swap
from halfbyte.pinned import Arena

_AWAY: weakref.WeakKeyDictionary[nn.Module, Arena] = weakref.WeakKeyDictionary()
"""Embeddings whose table is in host memory."""


def path_of(model: PreTrainedModel) -> str:
    """Of the input embedding's parameter, `model.embed_tokens.weight`; "" where there is none of the usual kind."""
    module = model.get_input_embeddings()
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Embedding) or not isinstance(weight, nn.Parameter):
        return ""
    return next(f"{path}.weight" for path, m in model.named_modules() if m is module)


def stays(model: PreTrainedModel) -> str:
    """Why the table must be on the device; "" where it need not. Works on the meta device."""
    path = path_of(model)
    if not path:
        return "the model has no plain input embedding"
    weight, tied = model.get_parameter(path), swap.tied(model)
    if id(weight) in tied or path in tied:
        return "it is the output head too (tied), which the loss reads as a whole"
    return "it learns" if weight.requires_grad else ""


def send(model: PreTrainedModel, device: torch.device) -> str:
    """Moves the table to host memory, from wherever it is, readable on `device`; the reason if it cannot, and then it stays."""
    if _table(model) is not None:
        return ""
    if reason := stays(model):
        return reason
    weight = model.get_parameter(path_of(model))
    arena = Arena([(weight.numel(), weight.dtype)], device)
    there = arena.on_device()
    if there is None:
        return "this device cannot read host memory"
    arena.tensors[0].copy_(weight.detach().reshape(-1))
    weight.data = there[0].view(weight.shape)
    _AWAY[model.get_input_embeddings()] = arena
    return ""


def bring_back(model: PreTrainedModel, device: torch.device) -> None:
    """The mirror of `send`."""
    if _table(model) is not None:
        weight = model.get_parameter(path_of(model))
        weight.data = weight.detach().to(device, copy=True)
        del _AWAY[model.get_input_embeddings()]


def away(model: PreTrainedModel) -> Tensor | None:
    """The table if it is in host memory."""
    return None if _table(model) is None else model.get_parameter(path_of(model))


def _table(model: PreTrainedModel) -> Arena | None:
    return _AWAY.get(model.get_input_embeddings())
