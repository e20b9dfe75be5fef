"""The lengths of a run's documents for its plan: from the sets that a run has, or from the cache before there is a run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from halfbyte.checkpoints import cache, description, hub
from halfbyte.config import Recipe
from halfbyte.data.loader import Loader
from halfbyte.data.prepare import Prepared, prepare, stored
from halfbyte.errors import HalfbyteError
from halfbyte.memory.budget import Budget
from halfbyte.memory.lengths import Lengths
from halfbyte.memory.plan import Plan
from halfbyte.memory.plan import plan as planned


def lengths(prepared: Prepared, recipe: Recipe) -> Lengths:
    """Of the training set's first epoch; the steps are those of epochs that have as many rows. Cost: what packing an epoch takes,
    once."""
    row, batch, train = recipe.data.tokens, recipe.train.batch, recipe.train
    loader = Loader(prepared.train, row, batch, train.seed)
    packing = loader.packing()
    sizes, left = packing.length, packing.left()
    steps = max(1, math.ceil(train.epochs * packing.rows / batch - 1e-9))
    squares = float((sizes.astype(np.float64) ** 2).sum() + (left.astype(np.float64) ** 2).sum())
    return Lengths(
        documents=len(sizes),
        tokens=int(sizes.sum()),
        shortest=int(sizes.min()),
        median=int(np.median(sizes)),
        longest=int(sizes.max()),
        document=squares / (packing.rows * row),
        row=row,
        rows=packing.rows,
        efficiency=packing.efficiency,
        steps=steps if train.max_steps is None else min(steps, train.max_steps),
    )


def plan(recipe: Recipe, budget: str | Budget | None = None, *, config: dict[str, Any] | PretrainedConfig | None = None) -> Plan:
    """The plan of a recipe, as `halfbyte plan` shows it: with the lengths of its data's documents where the data is prepared.

    budget: a card, a size, or None for `memory.gpu`. config: of the model, else read from its source. Raises what
    `memory.plan.plan` raises; a plan that does not fit is returned, not raised (see `Plan.require`).
    """
    return planned(recipe, budget, config=config, lengths=known(recipe))


def known(recipe: Recipe) -> Lengths | None:
    """From the cache, without tokenising or downloading anything; None where the data is not prepared, or cannot be.

    What is wrong with the data is no business of a plan: `data check` and `train` tell it.
    """
    root = cache.cache_root()
    try:
        tokenizer = description.read(hub.locate(recipe.model, weights=False).path).tokenizer
        if not stored(recipe.data, tokenizer, root):
            return None
        return lengths(prepare(recipe.data, tokenizer, recipe.train.seed, root), recipe)
    except HalfbyteError:
        return None
