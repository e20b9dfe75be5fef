"""The plan: how a run will use memory, decided before the first step, with the bytes of every part.

Rows are the same in every step, so what fits once fits always. The choice is between more rows in a microbatch (fewer
decodes of the weights a step) and keeping activations instead of recomputing them (a third less arithmetic): keeping comes
first, since a product saturates the device at a few thousand tokens; within either, the most rows that still help.
Cost: about a second for the shapes; no weight is read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from transformers import PretrainedConfig

from halfbyte import machine
from halfbyte.checkpoints import description, hub
from halfbyte.config import Recipe
from halfbyte.errors import MemoryPlanError
from halfbyte.kernels.dispatch import twin
from halfbyte.memory.budget import Budget
from halfbyte.memory.budget import budget as budget_of
from halfbyte.memory.fused import Layer, waiting
from halfbyte.memory.paging import size
from halfbyte.memory.part import Part
from halfbyte.memory.parts import DTYPES, count, keep_of
from halfbyte.memory.rungs import Rung, below, ways
from halfbyte.memory.shapes import Shapes, shapes, skeleton

ENOUGH_TOKENS = {"cuda": 16384, "cpu": 2048}
"""Tokens of a microbatch beyond which more rows gain nothing."""
HOST_SHARE = 0.5
"""Of the host memory that is free, what layers may pin for what waits there: pinned memory is out of reach for everybody else."""
VERSION = 2
ASKED = "asked for"


@dataclass(frozen=True)
class Parameters:
    """base: weights of the model; packed: those stored in a format; trained: what learns."""

    base: int
    packed: int
    trained: int


@dataclass(frozen=True)
class Plan:
    """version: of this layout. fits: whether `bytes` <= `budget.bytes`. bytes: the peak, the sum of `parts`.

    microbatch: rows at once; microbatches: of them in a step. recompute: `none` or `all` layers. offloaded: bytes of what layers
    keep that wait in host memory, offload: why, or why not. paged: bytes of the optimizer's moments there, paging: why, or why
    not. streamed: bytes of weights there (0 here). tokens_per_second: predicted speed, null where it is not predicted. reason: of
    the choice. advice: what would make it fit; help: what the smallest rung would gain by. rung: the choice; rungs: all there
    were, the most wanted first.
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
    recompute: Literal["none", "all"]
    offloaded: int
    offload: str
    paged: int
    paging: str
    streamed: int
    tokens_per_second: float | None
    parameters: Parameters
    reason: str
    advice: tuple[str, ...]
    help: tuple[str, ...]
    rung: Rung
    rungs: tuple[Rung, ...]

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
        message = f"{self.model} needs {_gib(self.bytes)} and {self.budget.name} has {_gib(self.budget.bytes)} to use"
        raise MemoryPlanError(message, hint="; ".join(self.advice), code="memory.no-fit")


def plan(recipe: Recipe, budget: str | Budget | None = None, *, config: dict[str, Any] | PretrainedConfig | None = None) -> Plan:
    """The plan of a recipe. budget: a card, a size, or None for `memory.gpu`. config: of the model, else read from its source.

    Raises RecipeError for a budget that is not understood; a plan that does not fit is returned, not raised (see `Plan.require`).
    """
    given = budget if isinstance(budget, Budget) else budget_of(budget or recipe.memory.gpu)
    if config is None:
        config = description.config_of(hub.locate(recipe.model, weights=False).path)
    compute = compute_of(recipe, given)
    s = shapes(skeleton(config, DTYPES[compute]), recipe.format, recipe.adapter)
    rungs = _rungs(s, recipe, given, compute)
    best = next((rung for rung in rungs if rung.bytes <= given.bytes), None)
    return _plan(s, recipe, given, compute, rungs, best or min(rungs, key=lambda rung: rung.bytes))


def compute_of(recipe: Recipe, budget: Budget) -> str:
    """The compute dtype to plan with: what was asked, else bf16 on a GPU and fp32, which needs the most, on a CPU."""
    if recipe.compute != "auto":
        return recipe.compute
    return "fp32" if budget.kind == "cpu" else "bf16"


def json_schema() -> dict[str, Any]:
    """The JSON schema of `Plan.as_dict()`."""
    from pydantic import TypeAdapter

    return TypeAdapter(Plan).json_schema()


def _rungs(s: Shapes, recipe: Recipe, budget: Budget, compute: str) -> list[Rung]:
    """Every way that the recipe allows, the best first."""
    batch, tokens = recipe.train.batch, recipe.data.tokens
    if isinstance(recipe.memory.microbatch, int):
        rows = [recipe.memory.microbatch]
    else:
        rows = [m for m in range(batch, 0, -1) if batch % m == 0]
        rows = [m for m in rows if m * tokens <= ENOUGH_TOKENS[budget.kind]] or [1]
    return ways(
        rows,
        recipe.memory.recompute,
        lambda m, recompute: _offload(s, recipe, m, recompute, budget, DTYPES[compute])[0] > 0,
        _paging(s, recipe, budget)[0],
        lambda rung: sum(p.bytes for p in _parts(s, recipe, rung, budget, compute)),
    )


def _reason(rungs: list[Rung], rung: Rung, fits: bool) -> str:
    if not fits:
        return "nothing smaller is left to choose"
    asked = len({(r.microbatch, r.recompute) for r in rungs}) == 1
    first = replace(rung, bytes=0) == replace(rungs[0], bytes=0)
    return f"{rung.words()}: {'as asked' if asked else 'the first choice' if first else 'the most that fits'}"


def _paging(s: Shapes, recipe: Recipe, budget: Budget) -> tuple[list[bool], str]:
    """Whether the optimizer's moments may be in host memory, in the order of what is wanted; and the reason why not, or ""."""
    if budget.kind == "cpu":
        return [False], "this device's memory is the host's"
    if recipe.optim.paged != "auto":
        return [recipe.optim.paged == "always"], ASKED
    wanted, free = size(s.padded, recipe.optim.bits), machine.ram().free
    if budget.here and wanted > HOST_SHARE * free:
        told = f"they would take {_gib(wanted)} of host memory, {_gib(free)} are free"
        return [False], f"auto: {told}, and no more than {HOST_SHARE:.0%} of that is pinned"
    return [False, True], ""


def _parts(s: Shapes, recipe: Recipe, rung: Rung, budget: Budget, compute: str) -> list[Part]:
    keep = keep_of(rung.recompute, rung.offload) if _is_fused(s, budget) else None
    dtype = DTYPES[compute]
    return count(s, recipe, rung.microbatch, rung.recompute, dtype, budget.kind, keep, rung.paged, rung.chunks)


def _is_fused(s: Shapes, budget: Budget) -> bool:
    """Whether the layers will run fused; of another machine it is assumed that Triton is there."""
    return budget.kind == "cuda" and isinstance(s.layer, Layer) and (not budget.here or twin(torch.device("cuda")) == "fused")


def _offload(s: Shapes, recipe: Recipe, m: int, recompute: bool, budget: Budget, dtype: torch.dtype) -> tuple[int, str]:
    """Bytes that wait in host memory, 0 for none, and the reason."""
    if not _is_fused(s, budget) or not isinstance(s.layer, Layer):
        return 0, "auto: only fused layers can"
    wanted = s.layers * waiting(s.layer, keep_of(recompute, True), m * recipe.data.tokens, dtype.itemsize)
    if recipe.memory.offload != "auto":
        return wanted if recipe.memory.offload == "on" else 0, ASKED
    if not recompute:
        return 0, "auto: everything is kept on the GPU"
    if not budget.here:
        return wanted, f"auto: needs {_gib(wanted)} of host memory"
    free = machine.ram().free
    told = f"it takes {_gib(wanted)} of host memory, {_gib(free)} are free"
    if wanted > HOST_SHARE * free:
        return 0, f"auto: {told}, and no more than {HOST_SHARE:.0%} of that is pinned"
    return wanted, f"auto: {told}"


def _plan(s: Shapes, recipe: Recipe, budget: Budget, compute: str, rungs: list[Rung], rung: Rung) -> Plan:
    m, recompute = rung.microbatch, rung.recompute
    found = tuple(_parts(s, recipe, rung, budget, compute))
    offloaded, offload = _offload(s, recipe, m, recompute, budget, DTYPES[compute])
    paging = _paging(s, recipe, budget)[1]
    fits = rung.bytes <= budget.bytes
    return Plan(
        version=VERSION,
        model=recipe.model.name,
        format=recipe.format.kind,
        compute=compute,
        budget=budget,
        fits=fits,
        bytes=rung.bytes,
        parts=found,
        microbatch=m,
        microbatches=recipe.train.batch // m,
        tokens=recipe.data.tokens,
        recompute="all" if recompute else "none",
        offloaded=offloaded,
        offload=offload,
        paged=sum(p.host for p in found if p.name == "optimizer"),
        paging=paging or ("auto: nothing else makes it fit" if rung.paged else "auto: they stay while memory is not short"),
        streamed=0,
        tokens_per_second=None,
        parameters=Parameters(s.report.params, sum(r.params for r in s.report.packed), s.trained),
        reason=_reason(rungs, rung, fits),
        advice=() if fits else tuple(_advice(s, recipe, budget, compute, rung)),
        help=tuple(_advice(s, recipe, replace(budget, bytes=0), compute, min(rungs, key=lambda r: r.bytes))),
        rung=rung,
        rungs=tuple(rungs),
    )


def _advice(s: Shapes, recipe: Recipe, budget: Budget, compute: str, rung: Rung) -> list[str]:
    """Changes of the recipe, each with what it saves; one that suffices alone is marked."""
    changes: list[tuple[str, Recipe, Rung]] = []
    if not rung.recompute:
        changes.append(("memory.recompute=on", recipe, replace(rung, recompute=True)))
    if rung.microbatch > 1:
        changes.append(("memory.microbatch=1", recipe, replace(rung, microbatch=1)))
    if not rung.paged and budget.kind == "cuda":
        changes.append(("optim.paged=always", recipe, replace(rung, paged=True)))
    if recipe.data.tokens > 512:
        shorter = recipe.model_copy(update={"data": recipe.data.model_copy(update={"tokens": recipe.data.tokens // 2})})
        changes.append((f"data.tokens={recipe.data.tokens // 2}", shorter, rung))
    told = []
    for text, changed, option in changes:
        left = sum(p.bytes for p in _parts(s, changed, option, budget, compute))
        if left < rung.bytes:
            told.append(f"{text} saves {_gib(rung.bytes - left)}" + (" and fits" if left <= budget.bytes else ""))
    if recipe.format.kind in ("none", "int8") and recipe.adapter.kind == "lora":
        told.append("format=nf4 stores the base in about 4 bits a weight")
    if recipe.adapter.kind == "none":
        told.append("a LoRA adapter (adapter.kind=lora, format=nf4) trains far fewer numbers")
    return told or ["a smaller model, or a device with more memory"]


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB" if abs(count) >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"
