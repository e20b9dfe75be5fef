"""The memory that a plan may use: what the device has free, a size, or a card by name.

Why a reserve: allocators round up and fragment; a plan that uses the last byte fails in the middle of a run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from halfbyte.errors import RecipeError
from halfbyte.memory import measure
from halfbyte.memory.gpus import CARDS, DRIVER_SHARE
from halfbyte.mistakes import nearest

GIB = 1 << 30
UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
BEGUN = 480 << 20
"""Of a CUDA context, what is there once a program has asked how much is free. The plan counts the whole context."""
RESERVE = 0.03
"""Share of the memory that stays free for the allocator's rounding on a CPU."""
GAPS, GAPS_SHARE = (384 << 20, 0.05), 0.01
"""What stays free on a GPU: so many bytes, or that share of a small one, and a share of all: gaps between tensors that the
allocator cannot hand out. With segments that grow (`memory.segments`) 0.1 to 0.5 GiB are lost so, without them up to 2 GiB; more
where the largest tensors of a layer cross the bus (`timeline.gaps`)."""


@dataclass(frozen=True)
class Budget:
    """kind: of the device (a size or a card is a CUDA device). name: as shown. bytes: usable, the reserve taken off.

    total: bytes of the device. here: whether it is this machine's device. note: how the number came about.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    bytes: int
    total: int
    here: bool
    note: str


def budget(asked: str = "auto") -> Budget:
    """The budget of `memory.gpu` or `--gpu`: `auto`, a size such as `24GiB`, or a card. Raises RecipeError (`memory.gpu`)."""
    if asked == "auto":
        return _of_this_machine()
    if (total := _bytes(asked)) is not None:
        return Budget("cuda", asked.strip(), without_gaps(total), total, False, f"{_gaps(total)} of it stay free")
    name = re.sub(r"nvidia|geforce|tesla|[\s_-]", "", asked.lower())
    if (card := _card(name)) is not None:
        total = int(CARDS[card] * GIB)
        given = int(total * (1 - DRIVER_SHARE))
        note = f"{CARDS[card]:g} GiB, {DRIVER_SHARE:.0%} held by the driver, {_gaps(given)} stay free"
        return Budget("cuda", card, without_gaps(given), total, False, note)
    guess = nearest(name, CARDS)
    hint = f"did you mean `{guess}`?" if guess else "give a size such as 24GiB, or a card such as rtx4090, a100-80g, t4"
    if name.isdigit():
        hint = f"a size has a unit: {name}GiB"
    raise RecipeError(f"`{asked}` is neither a size nor a card that the plan knows", hint=hint, code="memory.gpu")


def budget_here(asked: str = "auto") -> Budget:
    """The budget of a run on this machine's device: what is free, and no more than `memory.gpu` where that is a size or a card.

    On a machine without a GPU a size caps what is free of its RAM. Raises RecipeError (`memory.gpu`) for what is not understood,
    and for a card where there is none.
    """
    here = _of_this_machine()
    if asked == "auto":
        return here
    given = budget(asked)
    if here.kind == "cpu":
        if given.name in CARDS:
            message = f"memory.gpu is {asked}, and this machine has no GPU that torch can use"
            hint = "leave it out to run on the CPU, or give a size such as 8GiB to cap its RAM"
            raise RecipeError(message, hint=hint, code="memory.gpu")
        given = replace(given, bytes=int(given.total * (1 - RESERVE)), note=f"{RESERVE:.0%} of it stay free")
    if given.bytes >= here.bytes:
        return here
    return replace(here, bytes=given.bytes, note=f"memory.gpu: {asked}, {given.note}")


def _card(name: str) -> str | None:
    """The card of a name without blanks and hyphens: `4090`, `a10080gb`, also with the size that it has anyway: `h10080gb`."""
    spelled = {card.replace("-", ""): card for card in CARDS}
    for one in (name, f"rtx{name}"):
        short = re.sub(r"gi?b$", "g", one)
        for spelling, card in spelled.items():
            if short in (spelling, f"{spelling}{CARDS[card]:g}g"):
                return card
    return None


def host_size(asked: str) -> int:
    """Bytes of `memory.host`, a size such as `24GiB`. Raises RecipeError (`memory.host`) for anything else."""
    found = _bytes(asked)
    if found is None:
        raise RecipeError(f"memory.host: `{asked}` is no size", hint="give a size such as 24GiB, or auto", code="memory.host")
    return found


def _bytes(text: str) -> int | None:
    size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = size.group(2).lower() if size else ""
    return int(float(size.group(1)) * UNITS[unit]) if size and unit in UNITS and unit not in ("", "b") else None


def _of_this_machine() -> Budget:
    if card := measure.cuda_device():
        note = f"free now and this process's context, {_gaps(card.free + BEGUN)} of it stay free"
        return Budget("cuda", card.name, without_gaps(card.free + BEGUN), card.total, True, note)
    ram = measure.ram()
    return Budget("cpu", "CPU", int(ram.free * (1 - RESERVE)), ram.total, True, f"available RAM, {RESERVE:.0%} of it stay free")


def without_gaps(size: int) -> int:
    """Bytes of a GPU that a plan may use."""
    most, share = GAPS
    return int(size * (1 - GAPS_SHARE)) - min(most, int(share * size))


def _gaps(size: int) -> str:
    return f"{(size - without_gaps(size)) / GIB:.2f} GiB"
