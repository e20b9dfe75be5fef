"""The forward pass over packed rows, up to the last hidden state; and the proof that examples in a row do not see each other.

Two routes. A model that runs on the "halfbyte" attention gets the boundaries (`documents`) and no mask. Any other
gets a dense block-diagonal mask, 2 tokens² bytes in 16 bits. The key/value cache is always off here.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.errors import ModelError, RecipeError
from halfbyte.kernels.attention import Documents, Wanted
from halfbyte.layers import attention
from halfbyte.layers.decoder import given
from halfbyte.shortage import is_shortage


def uses_boundaries(model: PreTrainedModel) -> bool:
    """Whether packed rows reach attention as boundaries (the "halfbyte" attention), or else as a dense mask."""
    return bool(model.config._attn_implementation == attention.NAME)


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, wanted: Wanted = "auto"
) -> Tensor:
    """The last hidden state `[1, S, hidden]` before the output head, of one packed row.

    input_ids, position_ids: int64 `[1, S]`. cu_seqlens: int32 `[D+1]`, 0 first, S last, repeats allowed (empty documents); best
    given on the CPU, where its values are read without a device sync. wanted: the method that the recipe asks for.
    Raises RecipeError where that cannot run.
    """
    return through(model, input_ids, position_ids, Documents.of(cu_seqlens, input_ids.device, input_ids.shape[1], wanted))


def through(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, documents: Documents) -> Tensor:
    """`hidden_states` of a row whose documents are known."""
    assert input_ids.shape[0] == 1, "packed rows run as [1, S]"
    tokens = input_ids.shape[1]
    if uses_boundaries(model):
        # A mask of rank 4 is taken as prepared by transformers and handed through: nothing dense is built.
        extra = {"attention_mask": torch.empty((1, 1, 0, 0), device=input_ids.device), "documents": documents}
    else:
        if documents.wanted != "auto":
            raise RecipeError(
                f"`attention: {documents.wanted}` cannot run here: {type(model).__name__} runs packed rows under a dense mask",
                hint="set `attention: auto`",
                code="attention.obstacle",
            )
        _refuse_window(model, documents.longest)
        extra = {"attention_mask": block_mask(documents.cu_seqlens, tokens, _dtype_of(model))}
    with given(documents) if uses_boundaries(model) else nullcontext():
        out = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **extra)
    last: Tensor = out.last_hidden_state
    return last


def _dtype_of(model: PreTrainedModel) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _refuse_window(model: PreTrainedModel, longest: int) -> None:
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and longest > window:
        raise ModelError(
            f"an example has {longest} tokens, more than the sliding window of {window}, and {type(model).__name__}'s layers "
            "were not adopted, so the window cannot be kept in a packed row",
            hint=f"set `data.tokens` to at most {window}",
            code="model.window",
        )


def block_mask(cu_seqlens: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """Additive `[1, 1, S, S]`: 0 where a token may look (its own document, not ahead), the dtype's minimum elsewhere."""
    position = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), position.to(cu_seqlens.dtype), right=True)
    allowed = (document[:, None] == document[None, :]) & (position[:, None] >= position[None, :])
    mask = torch.zeros((tokens, tokens), dtype=dtype, device=cu_seqlens.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[None, None]


# Relative to the largest hidden state. Rows of a product do not depend on other rows, so a sound model moves by nothing at
# all; the slack is for kernels that sum in another order.
_LEAK_ULPS = {torch.float32: 64, torch.float64: 64}
_LEAK_ULPS_16 = 4
_ALONE = {torch.float32: 1e-3, torch.float64: 1e-6}


@torch.no_grad()
def prove_isolation(model: PreTrainedModel, lengths: tuple[int, ...] = (7, 12, 5), seed: int = 0) -> None:
    """Shows on a probe that packed examples do not see each other; raises ModelError (`model.leak`) otherwise.

    Two tests on the example in the middle: its hidden states do not move when its neighbours' tokens change, and they equal
    those of the example alone. Cost: three forward passes of 24 tokens or fewer.
    """
    was_training = model.training
    model.train(False)
    try:
        _prove_isolation(model, lengths, seed)
    except (RuntimeError, TypeError, ValueError) as error:
        if is_shortage(error):
            raise
        raise _leak(model, f"its forward fails on a packed row: {str(error).splitlines()[0]}") from error
    finally:
        model.train(was_training)


def _prove_isolation(model: PreTrainedModel, lengths: tuple[int, ...], seed: int) -> None:
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    examples = [torch.randint(0, vocabulary, (n,), generator=generator) for n in lengths]
    others = [torch.randint(0, vocabulary, (n,), generator=generator) for n in lengths]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)

    def packed(parts: list[Tensor]) -> list[Tensor]:
        hidden = hidden_states(model, torch.cat(parts)[None].to(device), positions, cu_seqlens)
        return list(hidden[0].float().split(lengths))  # type: ignore[no-untyped-call]

    here = packed(examples)
    epsilon, ulps = torch.finfo(_dtype_of(model)).eps, _LEAK_ULPS.get(_dtype_of(model), _LEAK_ULPS_16)
    largest = max(float(h.abs().max()) for h in here)
    middle = len(lengths) // 2
    moved = packed([ids if i == middle else other for i, (ids, other) in enumerate(zip(examples, others, strict=True))])
    shift = float((moved[middle] - here[middle]).abs().max())
    if not shift <= ulps * epsilon * largest:
        raise _leak(model, f"an example's hidden states move by {shift:.3g} when its neighbours' tokens change")
    alone = model.base_model(input_ids=examples[middle][None].to(device), use_cache=False).last_hidden_state[0].float()
    error = float((alone - here[middle]).norm() / alone.norm().clamp_min(1e-30))
    if not error <= _ALONE.get(_dtype_of(model), 0.05):
        raise _leak(model, f"an example's hidden states in a packed row differ from the example's alone by {error:.3g}")


def _leak(model: nn.Module, what: str) -> ModelError:
    return ModelError(
        f"packed examples are not isolated in {type(model).__name__}: {what}",
        hint="this model cannot be trained on packed rows; please report it with the model's name",
        code="model.leak",
    )
