"""What would make a plan fit: changes of the recipe, each with what it saves, all of them together, and the card that it takes.

Each saving is the plan's own count with that one change, so a line that says `fits` is a plan that fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from halfbyte.config import Recipe
from halfbyte.formats.packed import Format
from halfbyte.layers.report import SwapReport
from halfbyte.memory import gpus
from halfbyte.memory.budget import without_gaps
from halfbyte.memory.choose import Chooser, gib
from halfbyte.memory.fused import Layer
from halfbyte.memory.rungs import Rung
from halfbyte.memory.shapes import Shapes

SHORTEST = 256
"""Tokens of a row below which none is advised."""


@dataclass(frozen=True)
class Change:
    """text: of the recipe. chooser, rung: what the plan would then count."""

    text: str
    chooser: Chooser
    rung: Rung

    @property
    def bytes(self) -> int:
        return self.chooser.bytes_of(self.rung)


def advice(chooser: Chooser, rung: Rung, room: int) -> list[str]:
    """Lines for people, the largest saving first; one that suffices alone is marked. room: bytes of the device, 0 for any."""
    changes = [change for change in _changes(chooser, rung) if change.bytes < rung.bytes]
    changes.sort(key=lambda change: change.bytes)
    told = [
        f"{change.text} saves {gib(rung.bytes - change.bytes)}" + (" and fits" if change.bytes <= room else "")
        for change in changes
    ]
    least = rung.bytes
    if room and len(changes) > 1 and all(change.bytes > room for change in changes):
        least = _all(chooser, rung, changes).bytes
        fits = "which fits" if least <= room else f"still {gib(least - room)} too much"
        told.append(f"all of these together need {gib(least)}, {fits}")
    elif changes:
        least = min(change.bytes for change in changes)
    return [*told, *_otherwise(chooser, least if room else 0, room)]


def _otherwise(chooser: Chooser, least: int, room: int) -> Iterator[str]:
    """Beyond single changes. least: bytes of the leanest that was found, 0 where it is of no interest."""
    recipe = chooser.recipe
    if recipe.format.kind in ("none", "int8") and recipe.adapter.kind == "lora":
        yield "format=nf4 stores the base in about 4 bits a weight"
    if recipe.adapter.kind == "none":
        yield "a LoRA adapter (adapter.kind=lora, format=nf4) trains far fewer numbers"
    experts = sum(row.bytes for row in chooser.s.report.rows if row.kind == "experts")
    if experts:
        yield f"a dense model: {gib(experts)} are experts of a mixture, which no format packs yet"
    if least > room and chooser.budget.kind == "cuda":
        yield _card(least)
    elif least > room:
        yield "a smaller model, or a machine with more memory"


def _card(least: int) -> str:
    """The smallest cards that have so many bytes to use."""
    usable = {name: without_gaps(int(size * (1 << 30) * (1 - gpus.DRIVER_SHARE))) for name, size in gpus.CARDS.items()}
    able = {name: gpus.CARDS[name] for name, count in usable.items() if count >= least}
    if not able:
        return "a smaller model: no card that the plan knows has that much"
    size = min(able.values())
    return f"a smaller model, or with this a card of {size:g} GiB: {', '.join([n for n, s in able.items() if s == size][:3])}"


def _changes(chooser: Chooser, rung: Rung) -> Iterator[Change]:
    """One thing each."""
    recipe, cuda = chooser.recipe, chooser.budget.kind == "cuda"
    if not rung.recompute:
        yield Change("memory.recompute=on", chooser, replace(rung, recompute=True, lean="", rest="", lean_layers=0))
    if rung.microbatch > 1:
        yield Change("memory.microbatch=1", chooser, replace(rung, microbatch=1))
    if not rung.paged and cuda:
        yield Change("optim.paged=always", chooser, replace(rung, paged=True))
    if not rung.embedding_away and cuda and not chooser.s.embedding_stays:
        yield Change("memory.embedding=host", chooser, replace(rung, embedding_away=True))
    if recipe.optim.bits == 32:
        eight = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"bits": 8})})
        yield Change("optim.bits=8", replace(chooser, recipe=eight), rung)
    if (packed := _with_packed_head(chooser)) is not None:
        yield Change("format.head=nf4", packed, rung)
    if recipe.adapter.kind == "lora" and recipe.adapter.rank > 8:
        yield Change("adapter.rank=8", _with_rank(chooser, 8), rung)
    tokens = recipe.data.tokens // 2
    if tokens >= SHORTEST:
        yield Change(f"data.tokens={tokens}", replace(chooser, recipe=_shorter(recipe, tokens)), rung)


def _shorter(recipe: Recipe, tokens: int) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"tokens": tokens})})


def _with_packed_head(chooser: Chooser) -> Chooser | None:
    """None where the head is packed already, tied, or may learn."""
    s, fmt = chooser.s, Format("nf4", 64, nested=True)
    heads = [row for row in s.report.rows if row.kind == "head" and not row.packed and len(row.shape) == 2]
    if not heads or chooser.recipe.adapter.kind == "none" or chooser.recipe.adapter.modules_to_save:
        return None
    packed = [replace(r, packed=True, format=fmt, bytes=fmt.nbytes(r.shape)) if r in heads else r for r in s.report.rows]
    return replace(chooser, s=replace(s, report=SwapReport(packed)))


def _with_rank(chooser: Chooser, rank: int) -> Chooser:
    """What learns, scaled: every adapter's numbers are proportional to its rank."""
    s, share = chooser.s, rank / chooser.recipe.adapter.rank
    layer = s.layer
    if isinstance(layer, Layer):
        qkv, out, inputs, down = (replace(g, ranks=int(share * g.ranks)) for g in layer.groups)
        layer = replace(layer, qkv=qkv, out=out, inputs=inputs, down=down)
    trained, padded, ranks = (int(share * count) for count in (s.trained, s.padded, s.rank_sum))
    scaled: Shapes = replace(s, layer=layer, trained=trained, padded=padded, rank_sum=ranks)
    recipe = chooser.recipe
    return replace(
        chooser, s=scaled, recipe=recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"rank": rank})})
    )


def _all(chooser: Chooser, rung: Rung, changes: list[Change]) -> Change:
    """Everything that `changes` name, at once."""
    texts = {change.text.partition("=")[0] for change in changes}
    for change in changes:
        match change.text.partition("=")[0]:
            case "format.head":
                chooser = replace(chooser, s=change.chooser.s)
            case "optim.bits" | "data.tokens":
                section = change.text.partition(".")[0]
                update = {section: getattr(change.chooser.recipe, section)}
                chooser = replace(chooser, recipe=chooser.recipe.model_copy(update=update))
    if "adapter.rank" in texts:
        chooser = _with_rank(chooser, 8)
    leaner = replace(
        rung,
        microbatch=1,
        paged=rung.paged or "optim.paged" in texts,
        embedding_away=rung.embedding_away or "memory.embedding" in texts,
    )
    if "memory.recompute" in texts:
        leaner = replace(leaner, recompute=True, lean="", rest="", lean_layers=0)
    found = [Change("all", chooser, rung) for rung in (leaner, chooser.rungs()[-1])]
    return min(found, key=lambda change: change.bytes)
