"""A group of weights, and how it travels through an operator: flat lists of tensors, and one string that deals them out.

An operator takes tensors, numbers and strings. The tensors of a group travel in flat lists (five for each packed weight, one for
each dense one); the string says which member gets which, and is parsed once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from halfbyte.formats.packed import SLOTS, Packed

DENSE = "dense"


@dataclass(frozen=True)
class LowRank:
    """An adapter of one weight: `a [r, K]`, `b [N, r]`, `scale`.

    The masters are fp32 and cast to the compute dtype inside; `layer` numbers the dropout mask.
    """

    a: Tensor
    b: Tensor
    scale: float
    layer: int = 0


@dataclass(frozen=True)
class Member:
    """One weight `[N, K]` of a group, with its bias `[N]` and adapter."""

    weight: Packed | Tensor
    bias: Tensor | None
    lora: LowRank | None


def describe(group: Sequence[Member]) -> str:
    """The string: `spec,bias,lora,scale,layer` a member, joined by ";"."""
    return ";".join(
        f"{m.weight.spec if isinstance(m.weight, Packed) else DENSE},{int(m.bias is not None)},"
        + ("0,0,0" if m.lora is None else f"1,{m.lora.scale!r},{m.lora.layer}")
        for m in group
    )


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[tuple[str, bool, bool, float, int], ...]:
    rows = [member.split(",") for member in text.split(";")]
    return tuple((spec, bias == "1", lora == "1", float(scale), int(layer)) for spec, bias, lora, scale, layer in rows)


def deal(
    text: str, packed: Sequence[Tensor], dense: Sequence[Tensor], biases: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor]
) -> list[Member]:
    """The inverse: the flat lists dealt out to the members, in order."""
    slots, denses, bias_iter, a_iter, b_iter = iter(packed), iter(dense), iter(biases), iter(a), iter(b)
    return [
        Member(
            next(denses) if spec == DENSE else Packed.from_spec(spec, [next(slots) for _ in SLOTS]),
            next(bias_iter) if bias else None,
            LowRank(next(a_iter), next(b_iter), scale, layer) if lora else None,
        )
        for spec, bias, lora, scale, layer in _parse(text)
    ]
