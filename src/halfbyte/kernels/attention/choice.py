"""Which method runs: by rules (what each can do), then by measuring those that are left, once for each kind of row.

Why measured: cuDNN and FlashAttention change places with the GPU, the head size and the lengths of the documents. What is
measured is forward and backward on the activations of the first microbatch that comes along; before that, every candidate must
agree with the reference on a short piece of them. Cost: less than a second, once; of very long rows a piece is measured. Where
memory is short, a smaller piece is; and where there is none at all, nothing is settled: the first method in the fixed order runs
until the next measurement. Where bit-equal runs are asked for, nothing is measured, since two runs might then choose differently.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import RecipeError
from halfbyte.kernels.attention.cudnn import Cudnn, deterministic
from halfbyte.kernels.attention.documents import Documents
from halfbyte.kernels.attention.flash import Flash, activate, current, installed, overflows
from halfbyte.kernels.attention.flex import Flex
from halfbyte.kernels.attention.heads import overflow, query_heads
from halfbyte.kernels.attention.protocol import Method
from halfbyte.kernels.attention.sdpa import Sdpa
from halfbyte.shortage import is_shortage

log = logging.getLogger("halfbyte")

SHORT = 1024
"""Rows of fewer tokens (probes, questions) are not worth a measurement, nor compiling."""
MEASURED = 16384
"""Tokens of the row that are measured, at most."""
AGAIN = 512
"""Calls after which a choice that found no memory to measure with is made anew: some steps."""
ROUNDS = 3
# As in `agrees`: what the methods may differ by on the same 16-bit numbers. A wrong mask or a wrong head moves them by 10 to 100 %.
TOLERANCE = 0.03


@dataclass(frozen=True)
class Choice:
    """A method and why. settled: it stays; else it stands in until there is memory to measure with."""

    method: Method
    reason: str
    settled: bool = True


_chosen: dict[tuple[object, ...], Choice] = {}
_waiting: dict[tuple[object, ...], int] = {}
"""Calls left before a choice that is not settled is made anew."""


def method(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, cap: float | None) -> Method:
    """The method for these shapes and documents: q `[T, H, d]`, k and v `[T, G, d]`; cheap after the first call for each.

    Raises RecipeError where the recipe asks for one that cannot run, with the obstacle.
    """
    tokens, heads, size = q.shape
    crowded = overflows(tokens, documents.cu_seqlens.shape[0] - 1, query_heads(tokens, heads, k.shape[1]), size)
    far = overflow(q, k, v) is not None
    window = documents.window(window)
    strict = deterministic()
    key = (q.dtype, q.device, tokens, heads, k.shape[1], size, documents.equal, crowded, far, window, cap, documents.wanted, strict)
    found = _chosen.get(key)
    if found is None or (not found.settled and _is_due(key)):
        before, found = found, choose(q, k, v, documents, scale, window, cap)
        _chosen[key] = found
        if not found.settled:
            _waiting[key] = AGAIN
        if before != found:
            level, what = logging.DEBUG if tokens < SHORT else logging.INFO, _described(documents, window, cap)
            log.log(level, "attention: %s (%s; %s tokens, %s)", found.method.name, found.reason, tokens, what)
    return found.method


def _is_due(key: tuple[object, ...]) -> bool:
    """Counts a call of a choice that is not settled."""
    _waiting[key] -= 1
    return _waiting[key] <= 0


def choose(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, cap: float | None) -> Choice:
    """By the recipe, the rules and a measurement, in this order."""
    every = methods()
    obstacles = {one.name: one.obstacle(q, k, v, documents, window, cap) for one in every}
    if documents.wanted != "auto":
        return _asked(every, obstacles, documents.wanted)
    able = [one for one in every if obstacles[one.name] is None]
    # `flex` is compiled for tens of seconds and `sdpa` runs everything twice: for what the others cannot do.
    fast = [one for one in able if one.name not in ("flex", "sdpa")]
    short = q.shape[0] < SHORT
    capturing = q.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if len(fast) > 1 and deterministic():
        return Choice(fast[0], "auto: bit-equal runs do not choose by the clock")
    if len(fast) > 1 and (short or capturing):
        return Choice(fast[-1], "auto: a short row" if short else "auto: nothing can be measured in a graph")
    if len(fast) > 1:
        return measured(fast, q, k, v, documents, scale, window, cap)
    if fast:
        return Choice(fast[0], f"auto: {_why(obstacles)}")
    if short or able[0].name == "sdpa":
        return Choice(Sdpa(), f"auto: {_why(obstacles)}")
    try:
        _everything(able[0], q, k, v, documents, scale, window, cap)
    except RuntimeError as error:
        if is_shortage(error):
            why = f"{_why(obstacles)}; for now, since there is no memory to try {able[0].name}"
            return Choice(able[0], f"auto: {why}", settled=False)
        return Choice(Sdpa(), f"auto: {_why(obstacles)}; {able[0].name}: {str(error).splitlines()[0]}")
    return Choice(able[0], f"auto: {_why(obstacles)}")


def _why(obstacles: dict[str, str | None]) -> str:
    """The obstacles in words, those of the same kind together."""
    names: dict[str, list[str]] = {}
    for name, what in obstacles.items():
        if what is not None:
            names.setdefault(what, []).append(name)
    return "; ".join(f"{', '.join(those)}: {what}" for what, those in names.items())


def methods() -> list[Method]:
    """Every method, in the fixed order of preference."""
    return [Cudnn(), *reversed(installed()), Flash(), Flex(), Sdpa()]


def _asked(every: list[Method], obstacles: dict[str, str | None], wanted: str) -> Choice:
    """The best version of the method that the recipe asks for."""
    family = [one for one in every if one.name.partition("-")[0] == wanted]
    able = [one for one in family if obstacles[one.name] is None]
    if able:
        return Choice(able[0], "asked for")
    raise RecipeError(
        f"`attention: {wanted}` cannot run here: {obstacles[family[-1].name]}",
        hint=f"set `attention: auto`, or one of {', '.join(name for name, what in obstacles.items() if what is None)}",
        code="attention.obstacle",
    )


def measured(
    able: list[Method], q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, cap: float | None
) -> Choice:
    """The fastest of those that agree with the reference, forward and backward, on as many tokens as memory has room for.

    Memory that runs out says nothing about a method: all of them are measured again on half the tokens, or none is.
    """
    tokens = MEASURED
    while tokens >= SHORT:
        part = piece(documents, tokens, q.device)
        end = q.shape[0] if part is documents else sum(part.lengths or ())
        before = current()
        try:
            return _compared(able, q[:end], k[:end], v[:end], part, scale, window, cap)
        except RuntimeError as error:
            if not is_shortage(error):
                raise
        finally:
            activate(before)
        tokens = min(tokens, end) // 2
    return Choice(able[0], "auto: for now, since there is no memory to measure with", settled=False)


def piece(documents: Documents, tokens: int, device: torch.device) -> Documents:
    """The first documents, of `tokens` tokens at most, cut off there; whole ones where they are of one length. The documents
    themselves where that is all, or where the host does not know them."""
    if documents.lengths is None or sum(documents.lengths) <= tokens:
        return documents
    if documents.equal:
        length = min(documents.lengths[0], tokens)
        ends = [i * length for i in range(tokens // length + 1)]
    else:
        ends = [*dict.fromkeys(min(end, tokens) for end in documents.boundaries or ())]
    return Documents.of(torch.tensor(ends, dtype=torch.int32), device, ends[-1])


def _compared(
    able: list[Method], q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, cap: float | None
) -> Choice:
    """By the clock. Raises what says that memory ran out."""
    times: dict[str, float] = {}
    for one in able:
        try:
            if agrees(one, q, k, v, documents, scale, window, cap):
                times[one.name] = milliseconds(one, q, k, v, documents, scale, window, cap)
            else:
                log.warning("attention: %s is left out: it disagrees with the reference on this machine", one.name)
        except RuntimeError as error:
            if is_shortage(error):
                raise
            log.info("attention: %s is left out: %s", one.name, str(error).splitlines()[0])
    if not times:
        return Choice(Sdpa(), "auto: no other method ran")
    best = min(able, key=lambda one: times.get(one.name, float("inf")))
    others = "".join(f", {name} {ms:.2f} ms" for name, ms in times.items() if name != best.name)
    return Choice(best, f"auto: measured {times[best.name]:.2f} ms{others}")


def agrees(
    one: Method, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, cap: float | None
) -> bool:
    """Whether out, dq, dk and dv equal the reference's on the first tokens, as views of the same memory layout."""
    tokens = min(q.shape[0], 512)
    ends = (0, tokens // 2, 2 * (tokens // 2)) if documents.equal else (0, tokens // 5, tokens // 5 + 1, tokens)
    piece = Documents.of(torch.tensor(ends, dtype=torch.int32), q.device, tokens)
    q, k, v = (x[: ends[-1]] for x in (q, k, v))
    # A window longer than the piece's documents would go untested.
    window = None if window is None else min(window, tokens // 4)
    found, expected = (_everything(m, q, k, v, piece, scale, window, cap) for m in (one, Sdpa()))
    errors = [((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30)) for a, b in zip(found, expected, strict=True)]
    return bool(torch.stack(errors).max() <= TOLERANCE)


def milliseconds(
    one: Method, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, cap: float | None
) -> float:
    """Forward and backward on the device, the best of a few rounds after one that warms up."""
    times: list[float] = []
    for _ in range(ROUNDS + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        _everything(one, q, k, v, documents, scale, window, cap)
        stop.record()
        torch.cuda.synchronize(q.device)
        times.append(start.elapsed_time(stop))
    return min(times[1:])


def _everything(
    one: Method, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, cap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, dq, dk, dv; the gradient of out is out, so that nothing is drawn at random."""
    with torch.no_grad():
        out, residuals = one.forward(q, k, v, documents, scale, window, cap)
        return out, *one.backward(out, q, k, v, out, residuals, documents, scale, window, cap)


def _described(documents: Documents, window: int | None, cap: float | None) -> str:
    what = f"{documents.equal} equal documents" if documents.equal else "documents of several lengths"
    what += "" if window is None else f", window {window}"
    return what + ("" if cap is None else f", soft cap {cap:g}")
