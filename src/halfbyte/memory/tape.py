"""The bytes of a fused decoder layer on a GPU over time: the allocations of `layers.fused`, told line by line.

Why as a script and not as a formula: which moment is the largest depends on what is kept, on the norms, on the ranks and on the
length of a row. `forward` and `backward` here follow the functions of those names there, in their order and with their names, so
that a change there has one place to be mended here; `tests/memory/test_tape.py` holds both against each other, tensor by tensor.
Cost: some 40 us for a choice of what is kept.

Letters: T tokens of a microbatch, c bytes of a number; groups as in `memory.fused`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from halfbyte.kernels.attention.heads import query_heads
from halfbyte.layers.fused.keep import Keep
from halfbyte.memory.fused import Group, Layer

FLOAT = 4
SCRATCH, LIBRARY = "decode scratch", "attention workspace"
"""Names of what exists within one product or one call of attention; everything else has the name of its tensor."""
FIELDS = {
    "x": ("x",),
    "normed": ("normed", "normed_mlp"),
    "qkv": ("qkv", "q", "k"),
    "attended": ("attended",),
    "mid": ("mid", "attended_raw"),
    "inputs": ("inputs", "mlp_raw"),
}
"""Tensors by the name that `Keep` has for them, as in `layers.fused.function.MOVABLE`."""


class Tape:
    """What is allocated, by name, in bytes; and the largest that it ever was."""

    def __init__(self) -> None:
        self.now: dict[str, int] = {}
        self.total = 0
        self.peak = 0
        self.at_peak: dict[str, int] = {}

    def new(self, name: str, size: int) -> None:
        """A tensor; one that is there under the name goes once the new one is made."""
        before = self.now.get(name, 0)
        self.now[name] = size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.now)
            if before:
                self.at_peak[name] += before
        self.total -= before

    def free(self, *names: str) -> None:
        """Those that are there."""
        for name in names:
            self.total -= self.now.pop(name, 0)

    def rename(self, name: str, other: str) -> None:
        """The same tensor under another name."""
        self.now[other] = self.now.pop(name)

    def passing(self, name: str, size: int) -> None:
        """Made and gone again."""
        if size:
            self.new(name, size)
            self.free(name)


@dataclass(frozen=True)
class Work:
    """A layer at work. held: its weights live decoded in their groups, so a product decodes nothing. flash: attention is a
    library's for GPUs, with a workspace that is in `_attention`."""

    layer: Layer
    tokens: int
    c: int
    held: bool = False
    flash: bool = True


@dataclass(frozen=True)
class Passage:
    """The peak of a forward or backward in bytes, the tensors at that moment, and those that are there when it is over."""

    peak: int
    at_peak: dict[str, int]
    after: dict[str, int] = field(default_factory=dict)


def kept(w: Work, keep: Keep) -> dict[str, int]:
    """Bytes by tensor that one layer keeps between forward and backward, on the device and in host memory, its input included."""
    one, t, c = w.layer, w.tokens, w.c
    found = {"x": t * c * one.hidden, **_small(w, keep)}
    if keep.normed:
        found |= {"normed": t * c * (one.qkv.k + one.qkv.r), "normed_mlp": t * c * (one.inputs.k + one.inputs.r)}
    if keep.qkv:
        found["qkv"] = t * c * (one.qkv.n + one.qkv.r)
        if one.qk_norm != "none":
            found |= {"q": t * c * one.query, "k": t * c * one.keys}
    if keep.attended:
        found["attended"] = t * c * one.query
    if keep.mid:
        found["mid"] = t * c * one.hidden
        if one.after_attention:
            found["attended_raw"] = t * c * one.hidden
    if keep.inputs:
        found["inputs"] = t * c * (one.inputs.n + one.inputs.r)
        if one.after_mlp:
            found["mlp_raw"] = t * c * one.hidden
    return {name: size for name, size in found.items() if size}


def _small(w: Work, keep: Keep) -> dict[str, int]:
    """XA of groups that are not computed again, unless it stands behind a kept input; fp32 numbers a row, two of a norm."""
    one, t, c = w.layer, w.tokens, w.c
    behind = keep.here("normed")
    found = {"xa_down": t * c * one.down.r, "xa_out": t * c * one.out.r if keep.mid else 0}
    if not behind:
        found |= {"xa_qkv": t * c * one.qkv.r if keep.qkv else 0, "xa_inputs": t * c * one.inputs.r if keep.inputs else 0}
    norms = 1 + one.after_attention + one.after_mlp + (not one.parallel or one.two_norms)
    rows = 2 * norms + (one.heads if keep.attended and w.flash else 0)
    rows += {"none": 0, "head": one.heads + one.kv_heads, "full": 2}[one.qk_norm]
    return found | {"rows": t * FLOAT * rows}


def away(w: Work, keep: Keep) -> list[int]:
    """Bytes of each tensor that one layer sends to host memory."""
    found = kept(w, keep)
    return [found[name] for group in keep.away for name in FIELDS[group] if name in found]


def forward(w: Work, keep: Keep) -> Passage:
    """From the layer's input, which is there, to its output."""
    tape, one = Tape(), w.layer
    tape.new("x", w.tokens * w.c * one.hidden)
    _fill(tape, w, keep, forget=True)
    if keep.tile:
        _normed_mlp(tape, w)
        tape.new("whole", w.tokens * w.c * one.hidden)
        part = replace(w, tokens=min(keep.tile, w.tokens))
        tape.new("xa of tiles", (w.tokens - part.tokens) * w.c * one.down.r)
        _mlp_inputs(tape, part)
        _down(tape, part)
        tape.free("out", "inputs", "mlp_raw")
        tape.rename("whole", "out")
        tape.new("xa_down", w.tokens * w.c * one.down.r)
        tape.free("xa of tiles")
    else:
        _down(tape, w)
    stays = kept(w, keep)
    for name in [n for n in tape.now if n not in stays and n != "out"]:
        tape.free(name)
    # XA that stands behind a dropped buffer is copied.
    if "xa_inputs" in stays:
        tape.new("xa_inputs", stays["xa_inputs"])
    return Passage(tape.peak, tape.at_peak, stays)


def backward(w: Work, keep: Keep, want_x: bool = True) -> Passage:
    """From what is kept and the gradient of the output, in a buffer with room behind it, to the gradient of the input."""
    tape, one, wide = Tape(), w.layer, w.tokens * w.c
    for name, size in kept(w, keep).items():
        tape.new(name, size)
    tape.new("grad", wide * (one.hidden + one.down.r))
    if one.plain and not one.after_mlp and one.before_attention:
        _rows(tape, w, "rows of grad", one.down, back=True)
    _fill(tape, w, keep)
    if keep.tile and not keep.normed and not one.parallel and "normed" in tape.now:
        tape.new("xa_qkv", wide * one.qkv.r)
        tape.free("normed")
    if keep.tile:
        _mlp_in_tiles(tape, w, keep)
    else:
        _mlp(tape, w, "d_source")
    if one.parallel:
        tape.new("d_out", wide * (one.hidden + one.out.r))
    else:
        if one.out.r == one.down.r:
            tape.rename("grad", "d_mid")
        else:
            tape.new("d_mid", wide * (one.hidden + one.out.r))
        if one.plain and one.two_norms:
            _rows(tape, w, "rows of d_mid", one.out, back=True)
        tape.free("mid", "normed_mlp", "d_source")
        if one.after_attention or one.scaled:
            tape.new("d_out", wide * (one.hidden + one.out.r))
            tape.free("attended_raw")
    _attention(tape, w, want_x)
    if one.parallel or one.after_attention or one.scaled:
        tape.free("d_out")
    if want_x:
        if one.parallel and one.two_norms:
            tape.new("between", wide * one.hidden)
        tape.new("dx", wide * (one.hidden + (0 if one.parallel else one.down.r)))
        if one.plain and not one.after_mlp and one.before_attention:
            _rows(tape, w, "rows of dx", one.down, back=True)
    return Passage(tape.peak, tape.at_peak)


def _mlp_in_tiles(tape: Tape, w: Work, keep: Keep) -> None:
    one, part = w.layer, replace(w, tokens=min(keep.tile, w.tokens))
    before = set(tape.now)
    tape.new("d_source", w.tokens * w.c * one.inputs.k)
    _mlp_inputs(tape, part)
    tape.new("grad tile", part.tokens * w.c * (one.hidden + one.down.r))
    tape.free("rows of grad")
    _mlp(tape, part, "d_source tile")
    tape.free(*(set(tape.now) - before - {"d_source"}))


def _product(tape: Tape, w: Work, group: Group, masked: int = 0, back: bool = False, ready: bool = False) -> None:
    """A group's weights, while it multiplies. masked: numbers a token of the dropped copies beside it. back: for the gradient of
    its input. ready: the other operand is there in e4m3, or is not wanted."""
    dropped = w.tokens * w.c * masked if w.layer.dropout and group.r else 0
    if not (w.layer.float8 and group.fits):
        # In fp8, what does not fit decodes at every call (`Float8`).
        held = w.held and not w.layer.float8
        tape.passing(SCRATCH, (0 if held else group.matrix(w.c)) + dropped)
        return
    size = 0 if w.held and group.straight else group.float8(back)
    tape.new(SCRATCH, size + w.c * group.r * (group.n if back else group.k))
    tape.passing("dense", group.dense)
    if dropped and not back:
        tape.passing("dropped", dropped)
    if not ready:
        tape.new("rows", group.rows(w.tokens, back))
    if dropped and back:
        tape.passing("dropped", dropped + FLOAT * group.r * (group.n + group.k) + w.c * group.r * group.k)
    tape.free(SCRATCH, "rows")


def _rows(tape: Tape, w: Work, name: str, group: Group, back: bool = False) -> None:
    """An operand in e4m3, which the kernel in front writes."""
    if w.layer.float8 and group.fits:
        tape.new(name, group.rows(w.tokens, back))


def _learn(tape: Tape, w: Work, group: Group, contiguous: bool) -> None:
    """dA and dB: with dropout, the input is masked again for every A."""
    if w.layer.dropout and group.r:
        tape.passing("masked", w.tokens * w.c * group.k * (2 if contiguous else 3))


def _fill(tape: Tape, w: Work, keep: Keep, forget: bool = False) -> None:
    """What is missing of everything that backward reads. forget: what is not kept goes as soon as it can."""
    one, wide, there = w.layer, w.tokens * w.c, tape.now
    if "qkv" not in there:
        if "normed" not in there and one.before_attention:
            _rows(tape, w, "rows of normed", one.qkv)
        _normed(tape, w)
        tape.new("qkv", wide * (one.qkv.n + one.qkv.r))
        _product(tape, w, one.qkv, 2 * one.qkv.k, ready="rows of normed" in there)
        if one.qk_norm != "none":
            tape.new("q", wide * one.query)
            tape.new("k", wide * one.keys)
        tape.free("rows of normed")
    if "attended" not in there:
        tape.new("attended", wide * one.query)
        tape.new("log sums", w.tokens * FLOAT * one.heads if w.flash else 0)
    if forget:
        if not keep.qkv:
            tape.free("qkv", "q", "k")
        elif not keep.here("normed"):
            tape.new("xa_qkv", wide * one.qkv.r)
        if not keep.normed and not one.parallel:
            tape.free("normed")
    if "mid" not in there:
        _mid(tape, w, keep)
    if forget and not keep.attended:
        tape.free("attended", "log sums")
    if "inputs" not in there and not keep.tile:
        _mlp_inputs(tape, w)


def _normed(tape: Tape, w: Work) -> None:
    if "normed" not in tape.now:
        tape.new("normed", w.tokens * w.c * (w.layer.qkv.k + w.layer.qkv.r))


def _mid(tape: Tape, w: Work, keep: Keep) -> None:
    one, wide = w.layer, w.tokens * w.c
    tape.new("delta", wide * one.hidden)
    tape.new("xa_out", wide * one.out.r)
    _product(tape, w, one.out, 2 * one.query)
    if one.after_attention:
        tape.rename("delta", "attended_raw")
        tape.new("delta", wide * one.hidden)
    if not one.parallel:
        if "normed_mlp" in tape.now and "inputs" in tape.now:
            tape.rename("normed_mlp", "behind xa_inputs")
        tape.new("normed_mlp", wide * (one.inputs.k + one.inputs.r))
        if "inputs" not in tape.now and one.two_norms and not keep.tile:
            _rows(tape, w, "rows of normed_mlp", one.inputs)
        if one.after_attention or one.scaled:
            tape.new("mid", wide * one.hidden)
            tape.free("delta")
            return
    tape.rename("delta", "mid")


def _normed_mlp(tape: Tape, w: Work) -> None:
    if "normed_mlp" in tape.now:
        return
    one = w.layer
    if one.parallel and not one.two_norms:
        _normed(tape, w)
    tape.new("normed_mlp", w.tokens * w.c * (one.inputs.k + one.inputs.r))


def _mlp_inputs(tape: Tape, w: Work) -> None:
    _normed_mlp(tape, w)
    one = w.layer
    tape.new("inputs", w.tokens * w.c * (one.inputs.n + one.inputs.r))
    _product(tape, w, one.inputs, 2 * one.inputs.k, ready="rows of normed_mlp" in tape.now)
    tape.free("rows of normed_mlp")


def _down(tape: Tape, w: Work) -> None:
    one, wide = w.layer, w.tokens * w.c
    tape.new("h", wide * (one.down.k + one.down.r))
    _rows(tape, w, "rows of h", one.down)
    tape.new("out", wide * one.hidden)
    _product(tape, w, one.down, 2 * one.down.k, ready=True)
    tape.new("xa_down", wide * one.down.r)
    if one.after_mlp:
        tape.rename("out", "mlp_raw")
        tape.new("out", wide * one.hidden)
    tape.free("h", "rows of h")


def _mlp(tape: Tape, w: Work, source: str) -> None:
    """From the gradient of the layer's output to that of the MLP's input, `source`."""
    one, wide = w.layer, w.tokens * w.c
    if one.after_mlp and "mlp_raw" not in tape.now:
        _down(tape, w)
        tape.free("out")
    if one.after_mlp or one.scaled:
        tape.new("d_down", wide * (one.hidden + one.down.r))
    tape.free("mlp_raw")
    tape.new("dh", wide * one.down.k)
    _product(tape, w, one.down, 2 * one.down.k, back=True, ready="rows of grad" in tape.now)
    _rows(tape, w, "rows of d_inputs", one.inputs, back=True)
    tape.free("rows of grad")
    _learn(tape, w, one.down, contiguous=True)
    tape.free("dh")
    tape.new(source, wide * one.inputs.k)
    _product(tape, w, one.inputs, 2 * one.inputs.k, back=True, ready=True)
    if one.inputs.r:
        _normed_mlp(tape, w)
        _learn(tape, w, one.inputs, contiguous=False)
    tape.free("d_down", "inputs", "xa_inputs", "behind xa_inputs", "rows of d_inputs")


def _library(w: Work) -> int:
    """Bytes a token of attention's backward besides its results: dq in fp32, dk and dv once for every query head of those that run
    together; and where these are a part of all, copies of what they read and write (`kernels.attention.heads`)."""
    one = w.layer
    heads = query_heads(w.tokens, one.heads, one.kv_heads)
    query, keys = heads * one.head_size, heads * one.kv_heads // one.heads * one.head_size
    expanded = 2 * w.c * query if one.heads != one.kv_heads else 0
    copies = w.c * (4 * query + 4 * keys) if heads < one.heads else 0
    return FLOAT * (query + heads) + expanded + copies


def _attention(tape: Tape, w: Work, want_x: bool) -> None:
    """To the gradient of the attention's input, `d_normed`."""
    one, wide = w.layer, w.tokens * w.c
    tape.new("d_attended", wide * one.query)
    _product(tape, w, one.out, 2 * one.query, back=True, ready="rows of d_mid" in tape.now)
    _learn(tape, w, one.out, contiguous=True)
    tape.new("dq", wide * one.query)
    tape.new("dk and dv", 2 * wide * one.keys)
    if w.flash:
        tape.passing(LIBRARY, w.tokens * _library(w))
    tape.free("attended", "log sums")
    if one.qk_norm != "none":
        tape.new("d_qkv", wide * (one.qkv.n + one.qkv.r))
    tape.free("q", "k", "dq", "dk and dv", "d_attended")
    if want_x:
        tape.new("d_normed", wide * one.qkv.k)
    _product(tape, w, one.qkv, 2 * one.qkv.k if want_x else 0, back=True, ready=not want_x)
    if one.qkv.r:
        _normed(tape, w)
        _learn(tape, w, one.qkv, contiguous=False)
    tape.free("qkv", "d_qkv")
