"""A decoder layer as the count of its memory sees it: groups, heads and norms, read off a model without weights.

Letters: T tokens, N outputs, K inputs and R ranks (padded) of a group, c bytes of a number. A buffer of a group is K + R or
N + R wide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from halfbyte.adapters import targets
from halfbyte.adapters.config import AdapterConfig
from halfbyte.formats.packed import Format
from halfbyte.kernels.augmented import LEAST, PADDED_TO
from halfbyte.kernels.fp8.parts import ALIGNED, COLUMNS, LINE
from halfbyte.layers import structure
from halfbyte.layers.operands import shape_of
from halfbyte.layers.structure import NotUnderstood, Structure


@dataclass(frozen=True)
class Group:
    """Linear layers that share an input: n outputs, k inputs, their ranks in all, and what these are padded to a multiple of.

    held: the weights are in 16 bits and live inside the matrix that products read (`layers.fused.holding`). In fp8: fits: whether
    their shapes can be multiplied so; straight: whether they decode to e4m3 without being 16-bit numbers first; dense: bytes of the
    largest member in bf16, where that is on the way.
    """

    n: int
    k: int
    ranks: int
    held: bool = False
    fits: bool = True
    straight: bool = False
    dense: int = 0
    padded_to: int = PADDED_TO

    @property
    def r(self) -> int:
        return -(-self.ranks // self.padded_to) * self.padded_to

    def matrix(self, c: int) -> int:
        """Bytes of the weights decoded, with the adapters beside them, while they are multiplied."""
        return 0 if self.held else c * (self.n + self.r) * (self.k + self.r)

    def beside(self, c: int) -> int:
        """Bytes that a held matrix has beyond the weights'."""
        return c * self.r * (self.n + self.k + self.r) if self.held else 0

    def float8(self, back: bool, held: bool = False) -> int:
        """Bytes of the weights in e4m3 for one direction, adapters and scales beside them (`kernels.fp8.parts.Weight`). held: with
        what a weight needs that stays."""
        outputs, inner = (self.k, self.n) if back else (self.n, self.k)
        return outputs * (_lines(inner + COLUMNS * self.r) + 4 * (3 if held else 2))

    def rows(self, tokens: int, back: bool) -> int:
        """Bytes of the other operand in e4m3, a scale a token (`kernels.fp8.parts.Rows`)."""
        return tokens * (_lines((self.n if back else self.k) + COLUMNS * self.r) + 4)


@dataclass(frozen=True)
class Layer:
    """A decoder layer. after_attention, after_mlp: a norm stands there. parallel: both branches read the layer's input, through
    one norm or, with `two_norms`, through one each. scaled: the residual has a multiplier. dropout: adapters' inputs are masked.
    before_attention: a norm stands there. float8: products are made in e4m3."""

    qkv: Group
    out: Group
    inputs: Group
    down: Group
    heads: int
    kv_heads: int
    head_size: int
    qk_norm: Literal["none", "head", "full"]
    after_attention: bool
    after_mlp: bool
    parallel: bool
    two_norms: bool
    scaled: bool
    dropout: bool
    before_attention: bool = True
    float8: bool = False

    @property
    def groups(self) -> tuple[Group, Group, Group, Group]:
        return self.qkv, self.out, self.inputs, self.down

    @property
    def plain(self) -> bool:
        """Nothing stands between the attention's branch and the sum."""
        return not (self.parallel or self.after_attention or self.scaled)

    def in_float8(self) -> Layer:
        """The same layer with products in e4m3, which hold no 16-bit weights."""
        qkv, out, inputs, down = (replace(group, held=False, padded_to=LEAST) for group in self.groups)
        return replace(self, qkv=qkv, out=out, inputs=inputs, down=down, float8=True)

    def in_16_bits(self) -> Layer:
        """The same layer while it is scored: fp8's groups, decoded at every product."""
        return replace(self, float8=False)

    @property
    def hidden(self) -> int:
        return self.qkv.k

    @property
    def query(self) -> int:
        """Numbers of a token's queries."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Numbers of a token's keys, and as many of its values."""
        return self.kv_heads * self.head_size

    def decoded(self, c: int) -> int:
        """Bytes of the matrices that are not held yet, if they were: weights in a format, decoded. In fp8, of both directions."""
        if self.float8:
            return sum(g.float8(back, held=True) for g in self.groups for back in (False, True) if g.fits and g.straight)
        return sum(group.matrix(c) for group in self.groups)

    def beside(self, c: int) -> int:
        """Bytes of adapters in the compute dtype beside held weights; in fp8, of what is known about the weights' sizes."""
        if self.float8:
            return sum(4 * (g.n + g.k) for g in self.groups if g.fits)
        return sum(group.beside(c) for group in self.groups)


def _lines(columns: int) -> int:
    """Bytes of a row of e4m3 numbers, which takes whole cache lines."""
    return -(-columns // LINE) * LINE


def read(net: PreTrainedModel, adapter: AdapterConfig, ranks: dict[str, int], packed: dict[str, Format | None]) -> Layer | str:
    """The widest decoder layer of a model without weights; or why its layers do not run fused, as far as that can be told here.

    ranks: of the adapter, by path. packed: the modules whose weight is in a format, and which.
    """
    if adapter.kind == "none":
        return "full fine-tuning"
    layers = {path: m for path, m in net.named_modules() if isinstance(m, GradientCheckpointingLayer)}
    whole = targets.modules_named(net, adapter.modules_to_save)
    found = []
    for path, layer in layers.items():
        try:
            s = structure.read(layer)
        except NotUnderstood as reason:
            return str(reason)
        if s.attention_dropout or s.dropout_after_attention or s.dropout_after_mlp:
            return "dropout of the base is active"
        if s.layout == "grouped":
            return "queries, keys and values are interleaved in one projection"
        if any(name.startswith(f"{path}.") for name in whole):
            return "modules of a layer learn beside the adapter"
        if adapter.bias != "none" and any(name.endswith("bias") for name, _ in layer.named_parameters()):
            return "biases learn beside the adapter"
        found.append(_layer(path, layer, s, ranks, adapter.dropout > 0, packed))
    return max(found, key=lambda one: one.inputs.n, default="no decoder layers were found")


def _layer(
    path: str,
    layer: GradientCheckpointingLayer,
    s: Structure,
    ranks: dict[str, int],
    dropout: bool,
    packed: dict[str, Format | None],
) -> Layer:
    def group(parent: str, names: tuple[str, ...]) -> Group:
        paths = [f"{parent}.{name}" for name in names]
        sizes = [shape_of(layer.get_submodule(p)) for p in paths]
        own = sum(ranks.get(f"{path}.{p}", 0) for p in paths)
        held = not any(f"{path}.{p}" in packed for p in paths) and (own > 0 or len(paths) == 1)
        fits = all(side % ALIGNED == 0 for size in sizes for side in size)
        k = sizes[0][1]
        formats = [packed.get(f"{path}.{p}") for p in paths]
        straight = [f is not None and f.kind in ("nf4", "fp4") and k % f.block == 0 and f == formats[0] for f in formats]
        decoded = [2 * n * k for (n, k), f, s in zip(sizes, formats, straight, strict=True) if f is not None and not s]
        return Group(sum(n for n, _ in sizes), k, own, held, fits, all(straight), max(decoded, default=0))

    return Layer(
        group(s.attention, s.qkv),
        group(s.attention, (s.out,)),
        group(s.mlp, s.inputs),
        group(s.mlp, (s.down,)),
        s.heads,
        s.kv_heads,
        s.head_size,
        s.qk_norm,
        s.norms.after_attention is not None,
        s.norms.after_mlp is not None,
        s.norms.parallel,
        s.norms.before_mlp is not None,
        s.residual_multiplier != 1.0,
        dropout,
        s.norms.before_attention is not None,
    )
