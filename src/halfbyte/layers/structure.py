"""What a decoder layer is made of, as data: read from a module instance, never from its class name.

Why: dozens of transformers classes are the same layer with other norms, names and multipliers. The names of submodules say
which part plays which role; a part that is not understood is a reason to leave the layer alone. What names cannot say is observed
on a probe call (the attention's scale, window, cap) or tried there, one of `variants` after the other, until one is proven equal
(`layers/probe.py`).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from halfbyte.kernels.rotary import Rotation as Rotation
from halfbyte.layers.operands import shape_of

ROTATIONS: tuple[Rotation, ...] = ("half", "interleaved", "interleaved-halves", "none")
Layout = Literal["concatenated", "grouped"]
LAYOUTS: tuple[Layout, ...] = ("concatenated", "grouped")


@dataclass(frozen=True)
class Norms:
    """Names of the norms by place; None where the layer has none.

    parallel: attention and MLP both read the layer's input, the MLP through `before_mlp` or, where that is None, through the
    attention's norm.
    """

    before_attention: str | None = None
    after_attention: str | None = None
    before_mlp: str | None = None
    after_mlp: str | None = None
    parallel: bool = False


# By the names of the norms; where they leave open how the norms are used, every way, the usual one first.
_NORMS: dict[frozenset[str], tuple[Norms, ...]] = {
    frozenset(n for n in (first.before_attention, first.after_attention, first.before_mlp, first.after_mlp) if n): (first, *others)
    for first, *others in (
        (
            Norms("input_layernorm", None, "post_attention_layernorm"),
            Norms("input_layernorm", None, "post_attention_layernorm", parallel=True),
        ),
        (Norms("ln_1", None, "ln_2"),),
        (Norms("attention_layernorm", None, "feedforward_layernorm"),),
        (Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),),
        (Norms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),),
        (Norms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),),
        (Norms("input_layernorm", parallel=True),),
        (Norms("ln_attn", None, "ln_mlp", parallel=True),),
    )
}

# (q/k/v or one fused projection, output projection)
_ATTENTION: tuple[tuple[tuple[str, ...], str], ...] = (
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "dense"),
    (("q_proj", "k_proj", "v_proj"), "out_proj"),
    (("qkv_proj",), "o_proj"),
    (("c_attn",), "c_proj"),
    (("query_key_value",), "dense"),
)
# (input projections: gate and up, both fused, or one plain; output projection; gated)
_MLP: tuple[tuple[tuple[str, ...], str, bool], ...] = (
    (("gate_proj", "up_proj"), "down_proj", True),
    (("gate_up_proj",), "down_proj", True),
    (("up_proj",), "down_proj", False),
    (("fc1",), "fc2", False),
    (("c_fc",), "c_proj", False),
    (("dense_h_to_4h",), "dense_4h_to_h", False),
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act")
# Dropout modules whose place is known; any other must have p = 0.
_AFTER_ATTENTION = ("resid_dropout", "resid_attn_dropout", "post_attention_dropout")
_AFTER_MLP = ("dropout", "resid_mlp_dropout", "post_mlp_dropout")


@dataclass(frozen=True)
class Structure:
    """One decoder layer as data. Names are of direct children of the layer, its attention, or its MLP.

    layout: how one fused projection lies: all queries, then keys, then values; or grouped, each key head and its value head
    behind the query heads that read them.
    """

    arguments: tuple[str, ...]
    norms: Norms
    attention: str
    qkv: tuple[str, ...]
    out: str
    heads: int
    kv_heads: int
    head_size: int
    qk_norm: Literal["none", "head", "full"]
    mlp: str
    inputs: tuple[str, ...]
    down: str
    gated: bool
    activation: str
    attention_dropout: float
    dropout_after_attention: tuple[str, ...]
    dropout_after_mlp: tuple[str, ...]
    residual_multiplier: float
    # Observed on the probe call:
    scaling: float | None = None
    window: int | None = None
    cap: float | None = None
    rotation: Rotation = "half"
    layout: Layout = "concatenated"
    returns_tuple: bool = False


class NotUnderstood(Exception):
    """The layer has a part that the generic layer does not know; the message is the reason shown to the user."""


def read(layer: nn.Module) -> Structure:
    """The structure of a decoder layer. Raises NotUnderstood with the reason."""
    arguments = tuple(inspect.signature(type(layer).forward).parameters)[2:]
    if "attention_mask" not in arguments:
        raise NotUnderstood("its forward takes no attention_mask")
    children = dict(layer.named_children())
    attention, kind = _one_of(children, [{*names, out} for names, out in _ATTENTION], "attention")
    qkv, out = _ATTENTION[kind]
    mlp, kind = _one_of(children, [{*names, out} for names, out, _ in _MLP], "MLP", without=attention)
    inputs, down, gated = _MLP[kind]
    norms = _norms(children, {attention, mlp})
    attention_module, mlp_module = children[attention], children[mlp]
    if getattr(attention_module, "is_causal", True) is False:
        raise NotUnderstood("its attention looks ahead (is_causal is false)")
    known = {*qkv, out, "q_norm", "k_norm"}
    _all_known(attention_module, known, "attention")
    activation = next((name for name in _ACTIVATIONS if callable(getattr(mlp_module, name, None))), None)
    if activation is None:
        raise NotUnderstood("its MLP's activation was not found")
    _all_known(mlp_module, {*inputs, down, activation}, "MLP")
    head_size = getattr(attention_module, "head_dim", getattr(attention_module, "head_size", None))
    if not isinstance(head_size, int):
        raise NotUnderstood("its attention does not tell the head size (head_dim)")
    _no_plain_dropout(layer, attention_module, mlp_module)
    heads, kv_heads = _heads(attention_module, qkv, out, head_size)
    return Structure(
        arguments=arguments,
        norms=norms,
        attention=attention,
        qkv=qkv,
        out=out,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        qk_norm=_qk_norm(attention_module, head_size),
        mlp=mlp,
        inputs=inputs,
        down=down,
        gated=gated,
        activation=activation,
        attention_dropout=_attention_dropout(attention_module),
        dropout_after_attention=_dropouts(layer, attention, _AFTER_ATTENTION),
        dropout_after_mlp=_dropouts(layer, mlp, _AFTER_MLP),
        residual_multiplier=float(getattr(layer, "residual_multiplier", 1.0)),
    )


def _one_of(children: dict[str, nn.Module], kinds: list[set[str]], what: str, without: str = "") -> tuple[str, int]:
    """The one child that holds all parts of one of `kinds`, and which kind (the first that fits)."""
    found = []
    for name, child in children.items():
        parts = {part for part, _ in child.named_children()}
        kind = next((i for i, wanted in enumerate(kinds) if wanted <= parts), None)
        if kind is not None and name != without:
            found.append((name, kind))
    if len(found) != 1:
        raise NotUnderstood(f"its {what} was not found among its submodules ({len(found)} candidates)")
    return found[0]


def _norms(children: dict[str, nn.Module], rest: set[str]) -> Norms:
    names = frozenset(name for name, child in children.items() if name not in rest and not isinstance(child, nn.Dropout))
    if names not in _NORMS:
        raise NotUnderstood(f"unknown set of submodules beside attention and MLP: {', '.join(sorted(names)) or 'none'}")
    return _NORMS[names][0]


def variants(s: Structure) -> Iterator[Structure]:
    """What the names leave open, the usual first: how the norms are used, how a fused projection lies, how positions turn.

    A structure whose rotation is "none" was seen to get no tables and keeps it.
    """
    places = (s.norms.before_attention, s.norms.after_attention, s.norms.before_mlp, s.norms.after_mlp)
    norms = _NORMS[frozenset(name for name in places if name)]
    layouts = LAYOUTS if len(s.qkv) == 1 and s.kv_heads > 1 else LAYOUTS[:1]
    rotations = ROTATIONS if s.rotation != "none" else ROTATIONS[-1:]
    for way, layout, rotation in itertools.product(norms, layouts, rotations):
        yield replace(s, norms=way, layout=layout, rotation=rotation)


def _all_known(module: nn.Module, known: set[str], what: str) -> None:
    strange = [n for n, child in module.named_children() if n not in known and not isinstance(child, nn.Dropout)]
    if strange:
        raise NotUnderstood(f"its {what} has an unknown submodule: {', '.join(strange)}")


def _heads(attention: nn.Module, qkv: tuple[str, ...], out: str, head_size: int) -> tuple[int, int]:
    heads = shape_of(attention.get_submodule(out))[1] // head_size
    if len(qkv) == 3:
        kv_heads = shape_of(attention.get_submodule(qkv[1]))[0] // head_size
    else:
        kv_heads = (shape_of(attention.get_submodule(qkv[0]))[0] // head_size - heads) // 2
    if kv_heads < 1 or heads % kv_heads:
        raise NotUnderstood(f"{heads} query heads do not fit {kv_heads} key heads")
    return heads, kv_heads


def _qk_norm(attention: nn.Module, head_size: int) -> Literal["none", "head", "full"]:
    parts = dict(attention.named_children())
    if "q_norm" not in parts:
        return "none"
    sizes = [p.shape[-1] for p in parts["q_norm"].parameters()]
    return "full" if sizes and sizes[0] != head_size else "head"


def _attention_dropout(attention: nn.Module) -> float:
    for name in ("attention_dropout", "attn_dropout"):
        p = getattr(attention, name, 0.0)
        p = p.p if isinstance(p, nn.Dropout) else p
        if isinstance(p, float) and p:
            return p
    return 0.0


def _no_plain_dropout(*modules: nn.Module) -> None:
    """Raises NotUnderstood for dropout that is a number of the layer and no module: where it acts cannot be seen."""
    for module in modules:
        for name, p in vars(module).items():
            if "dropout" in name and name not in ("attention_dropout", "attn_dropout") and isinstance(p, float) and p:
                raise NotUnderstood(f"dropout `{name}` is active and its place is unknown")


def _dropouts(layer: nn.Module, inside: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Paths of the active dropout modules after one half of the layer. Raises NotUnderstood for one whose place is unknown."""
    known = {*_AFTER_ATTENTION, *_AFTER_MLP, "attn_dropout", "attention_dropout"}
    found = []
    for path, module in layer.named_modules():
        name = path.rpartition(".")[2]
        if not isinstance(module, nn.Dropout) or not module.p:
            continue
        shared = path == "resid_dropout"  # Phi: the layer's own, applied to both halves, in an order that we do not keep
        if name not in known or shared:
            raise NotUnderstood(f"dropout `{path}` is active and its place is unknown")
        if name in names and (path == name or path == f"{inside}.{name}"):
            found.append(path)
    return tuple(found)
