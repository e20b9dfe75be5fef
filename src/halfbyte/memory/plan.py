"""The plan: how a run will use memory, decided before the first step, with the bytes of every part.

Rows are the same in every step, so what fits once fits always. Of all ways to use memory (`memory.choose`) the fastest that fits is
planned; what is slower and needs less stands below it as rungs, for a run that finds less memory than was planned.
Cost: about a second for the shapes and the choice; no weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from transformers import PretrainedConfig

from halfbyte.checkpoints import description, hub
from halfbyte.config import Recipe
from halfbyte.errors import MemoryPlanError, RecipeError
from halfbyte.memory import advice as advising
from halfbyte.memory import calibrate, speed
from halfbyte.memory.budget import Budget
from halfbyte.memory.budget import budget as budget_of
from halfbyte.memory.choose import ASKED, Chooser, gib
from halfbyte.memory.gpus import CARDS, FLOAT8, NO_BF16
from halfbyte.memory.lengths import Lengths
from halfbyte.memory.part import Part
from halfbyte.memory.parts import DTYPES
from halfbyte.memory.rungs import Rung, below
from halfbyte.memory.shapes import shapes, skeleton
from halfbyte.memory.speed import Rates

__all__ = ["ASKED", "Neighbour", "Parameters", "Plan", "chooser", "compute_of", "json_schema", "plan", "settled"]

VERSION = 7
MORE = 2 << 30
"""Bytes less and more for which a plan tells what would be chosen."""


@dataclass(frozen=True)
class Parameters:
    """base: weights of the model; packed: those stored in a format; trained: what learns; added: what the adapter adds to the
    base."""

    base: int
    packed: int
    trained: int
    added: int


@dataclass(frozen=True)
class Neighbour:
    """What would be chosen with `bytes` more or, negative, less. need: bytes that it takes. gain: tokens/s against the plan's, 0.05
    for 5 % more, null where layers run as modules, whose speed is not predicted. words: the rung's."""

    bytes: int
    need: int
    gain: float | None
    words: str


@dataclass(frozen=True)
class Plan:
    """version: of this layout. fits: whether `bytes` <= `budget.bytes`. bytes: the peak, the sum of `parts`.

    microbatch: rows at once; microbatches: of them in a step. recompute: in `none`, `some` or `all` layers. offloaded: bytes of
    what layers keep that wait in host memory, offload: why, or why not. paged: bytes of the optimizer's moments there, paging: why,
    or why not. embedded: bytes of the input embedding there, embedding: why, or why not. streamed: bytes of weights there (0 here).
    reason: of the choice. advice: what would make it fit. help: the same of the leanest way. rung: the choice; rungs: all that no
    other beats, fastest first. tokens_per_second, seconds (of a step), run_seconds (of all `steps`): predicted, null where the
    device's speed or the number of steps is not known. rates: where the speeds of the device are from. neighbours: what less and
    more memory would choose. longest: tokens of the longest row that this device trains. lengths: of the data's documents, null
    where it is not prepared yet. steps: from them, or `train.max_steps`.
    """

    version: int
    model: str
    format: str
    compute: str
    budget: Budget
    fits: bool
    bytes: int
    parts: tuple[Part, ...]
    microbatch: int
    microbatches: int
    tokens: int
    recompute: Literal["none", "some", "all"]
    offloaded: int
    offload: str
    paged: int
    paging: str
    embedded: int
    embedding: str
    streamed: int
    tokens_per_second: float | None
    parameters: Parameters
    reason: str
    advice: tuple[str, ...]
    help: tuple[str, ...]
    rung: Rung
    rungs: tuple[Rung, ...]
    seconds: float | None
    run_seconds: float | None
    rates: str
    neighbours: tuple[Neighbour, ...]
    longest: int | None
    lengths: Lengths | None
    steps: int | None

    @property
    def spare(self) -> int:
        """Bytes of the budget that stay free; negative when it does not fit."""
        return self.budget.bytes - self.bytes

    def smaller(self, than: Rung) -> Rung | None:
        """What a run falls back on that stands on rung `than`: the next one that needs less; None when there is none."""
        return below(self.rungs, than)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, laid out as `json_schema` says."""
        return asdict(self)

    def table(self) -> str:
        """The plan as text."""
        from halfbyte.memory.table import as_text

        return as_text(self)

    def require(self) -> Plan:
        """The plan itself; raises MemoryPlanError, with the numbers and what would help, when it does not fit."""
        if self.fits:
            return self
        message = f"{self.model} needs {gib(self.bytes)} and {self.budget.name} has {gib(self.budget.bytes)} to use"
        raise MemoryPlanError(message, hint="; ".join(self.advice), code="memory.no-fit")


def plan(
    recipe: Recipe,
    budget: str | Budget | None = None,
    *,
    config: dict[str, Any] | PretrainedConfig | None = None,
    lengths: Lengths | None = None,
) -> Plan:
    """The plan of a recipe. budget: a card, a size, or None for `memory.gpu`. config: of the model, else read from its source.
    lengths: of the data's documents; without them a row is taken as one document.

    Raises RecipeError for a budget that is not understood, or a card without the products that are asked for; a plan that does not
    fit is returned, not raised (see `Plan.require`).
    """
    return settled(chooser(recipe, budget, config=config, lengths=lengths))


def chooser(
    recipe: Recipe,
    budget: str | Budget | None = None,
    *,
    config: dict[str, Any] | PretrainedConfig | None = None,
    lengths: Lengths | None = None,
) -> Chooser:
    """What `plan` chooses with; for who also wants the plan's curve (`memory.curve`)."""
    given = budget if isinstance(budget, Budget) else budget_of(budget or recipe.memory.gpu)
    if recipe.compute == "fp8" and given.name in CARDS and not given.name.startswith(FLOAT8):
        message = f"compute: fp8 needs compute capability 8.9 or newer, which {given.name} has not"
        raise RecipeError(message, hint="set `compute: bf16` or `auto`", code="recipe.compute")
    if config is None:
        config = description.config_of(hub.locate(recipe.model, weights=False).path)
    compute = compute_of(recipe, given)
    s = shapes(skeleton(config, DTYPES[compute]), recipe.format, recipe.adapter)
    return Chooser(s, recipe, given, compute, rates_of(recipe, given, DTYPES[compute]), lengths)


def settled(chooser: Chooser) -> Plan:
    """The plan of a recipe on a device."""
    rungs = chooser.rungs()
    best = next((rung for rung in rungs if rung.bytes <= chooser.budget.bytes), None)
    return _plan(chooser, rungs, best or min(rungs, key=lambda rung: rung.bytes))


def rates_of(recipe: Recipe, budget: Budget, dtype: torch.dtype) -> Rates:
    """Measured where the plan is for a GPU that is here (a size of memory is taken as a cap on it), else from a table.

    A deterministic run chooses nothing by the clock.
    """
    if budget.kind == "cuda" and budget.name not in CARDS and not recipe.train.deterministic and (found := calibrate.rates(dtype)):
        return found
    return speed.tabulated(re.sub(r"nvidia|geforce|[\s_]", "", budget.name.lower()))


def compute_of(recipe: Recipe, budget: Budget) -> str:
    """The compute dtype to plan with: what was asked, else 16 bits as a GPU has them, and fp32, which needs the most, on a CPU."""
    if recipe.compute != "auto":
        return recipe.compute
    if budget.kind == "cpu":
        return "fp32"
    if budget.name not in CARDS and torch.cuda.is_available():  # the GPU that is here, or a cap on it
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp16" if budget.name.startswith(NO_BF16) else "bf16"


def json_schema() -> dict[str, Any]:
    """The JSON schema of `Plan.as_dict()`."""
    from pydantic import TypeAdapter

    return TypeAdapter(Plan).json_schema()


def _plan(chooser: Chooser, rungs: list[Rung], rung: Rung) -> Plan:
    s, recipe, budget = chooser.s, chooser.recipe, chooser.budget
    found = tuple(chooser.parts(rung))
    fits, seconds = rung.bytes <= budget.bytes, chooser.predicted(rung)
    known = seconds > 0 and bool(chooser.rates.source)
    steps = chooser.lengths.steps if chooser.lengths else recipe.train.max_steps
    leanest = min(rungs, key=lambda r: r.bytes)
    offloaded = sum(p.host for p in found if p.name == "activations")
    return Plan(
        version=VERSION,
        model=recipe.model.name,
        format=recipe.format.kind,
        compute=chooser.compute,
        budget=budget,
        fits=fits,
        bytes=rung.bytes,
        parts=found,
        microbatch=rung.microbatch,
        microbatches=recipe.train.batch // rung.microbatch,
        tokens=recipe.data.tokens,
        recompute=_recomputed(rung, s.layers),
        offloaded=offloaded,
        offload=chooser.offload_reason(rung, offloaded),
        paged=sum(p.host for p in found if p.name == "optimizer"),
        paging=chooser.paging_reason(rung),
        embedded=sum(p.host for p in found if p.name == "embedding"),
        embedding=chooser.embedding_reason(rung),
        streamed=0,
        tokens_per_second=recipe.train.batch * recipe.data.tokens / seconds if known else None,
        parameters=Parameters(s.report.params, sum(r.params for r in s.report.packed), s.trained, s.added),
        reason=chooser.reason(rungs, rung, fits),
        advice=() if fits else tuple(advising.advice(chooser, rung, budget.bytes)),
        help=tuple(advising.advice(chooser, leanest, 0)),
        rung=rung,
        rungs=tuple(rungs),
        seconds=seconds if known else None,
        run_seconds=seconds * steps if known and steps else None,
        rates=chooser.rates.source,
        neighbours=_neighbours(rungs, rung, budget.bytes) if fits else (),
        longest=chooser.longest(),
        lengths=chooser.lengths,
        steps=steps,
    )


def _recomputed(rung: Rung, layers: int) -> Literal["none", "some", "all"]:
    """Of how many layers something is computed again, norms left out."""
    if not rung.recompute:
        return "none"
    again = [keep.tile > 0 or not (keep.qkv and keep.attended and keep.mid and keep.inputs) for keep in rung.keeps(layers)]
    return "all" if all(again) else "some"


def _neighbours(rungs: Sequence[Rung], rung: Rung, room: int) -> tuple[Neighbour, ...]:
    """What MORE bytes less and more would choose, where that is another rung."""
    found = []
    for more in (-MORE, MORE):
        other = next((r for r in rungs if r.bytes <= room + more), None)
        if other is not None and other != rung:
            gain = rung.seconds / other.seconds - 1 if other.seconds and rung.seconds else None
            found.append(Neighbour(more, other.bytes, gain, other.words()))
    return tuple(found)
