"""The bytes of fused decoder layers on a GPU: what one keeps for backward, what waits on the host, what comes and goes at the peak.

Counted from the list of `layers.fused.forward.Activations` and the buffers that `layers.fused.backward` makes, stage by stage, so
that a change there has one place to be mended here. Libraries' workspaces are counted where they grow with the tokens.

Letters: T tokens of a microbatch, N outputs, K inputs and R ranks (padded to 16) of a group, c bytes of a number. A buffer of a
group is K + R or N + R wide.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from halfbyte.adapters import targets
from halfbyte.adapters.config import AdapterConfig
from halfbyte.kernels.augmented import PADDED_TO
from halfbyte.layers import structure
from halfbyte.layers.fused.keep import EVERYTHING, Keep
from halfbyte.layers.operands import shape_of
from halfbyte.layers.structure import NotUnderstood, Structure

FLOAT = 4


@dataclass(frozen=True)
class Group:
    """Linear layers that share an input: n outputs, k inputs, r ranks, padded."""

    n: int
    k: int
    r: int

    def matrix(self, c: int) -> int:
        """Bytes of the weights decoded, with the adapters beside them."""
        return c * (self.n + self.r) * (self.k + self.r)


@dataclass(frozen=True)
class Layer:
    """A decoder layer. raw: norms behind attention and MLP, whose inputs are kept. dropout: the adapters' inputs are masked."""

    qkv: Group
    out: Group
    inputs: Group
    down: Group
    heads: int
    kv_heads: int
    head_size: int
    qk_norm: bool
    raw: int
    dropout: bool

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


def read(net: PreTrainedModel, adapter: AdapterConfig, ranks: dict[str, int]) -> Layer | str:
    """The widest decoder layer of a model without weights; or why its layers do not run fused, as far as that can be told here.

    ranks: of the adapter, by path.
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
        found.append(_layer(path, layer, s, ranks, adapter.dropout > 0))
    return max(found, key=lambda one: one.inputs.n, default="no decoder layers were found")


def _layer(path: str, layer: GradientCheckpointingLayer, s: Structure, ranks: dict[str, int], dropout: bool) -> Layer:
    def group(parent: str, names: tuple[str, ...]) -> Group:
        paths = [f"{parent}.{name}" for name in names]
        sizes = [shape_of(layer.get_submodule(p)) for p in paths]
        rank = sum(ranks.get(f"{path}.{p}", 0) for p in paths)
        return Group(sum(n for n, _ in sizes), sizes[0][1], -(-rank // PADDED_TO) * PADDED_TO)

    return Layer(
        group(s.attention, s.qkv),
        group(s.attention, (s.out,)),
        group(s.mlp, s.inputs),
        group(s.mlp, (s.down,)),
        s.heads,
        s.kv_heads,
        s.head_size,
        s.qk_norm != "none",
        (s.norms.after_attention is not None) + (s.norms.after_mlp is not None),
        dropout,
    )


def wide(one: Layer, keep: Keep) -> list[int]:
    """Numbers a token of each tensor that a layer keeps and that has the tokens' size."""
    found = [one.hidden]
    if keep.normed:
        found += [one.qkv.k + one.qkv.r, one.inputs.k + one.inputs.r]
    if keep.qkv:
        found += [one.qkv.n + one.qkv.r, *([one.query, one.keys] if one.qk_norm else [])]
    if keep.attended:
        found.append(one.query)
    if keep.mid:
        found += [one.hidden] * (1 + (one.raw > 0))
    if keep.inputs:
        found += [one.inputs.n + one.inputs.r, *([one.hidden] if one.raw > 1 else [])]
    return found


def small(one: Layer, keep: Keep, c: int) -> int:
    """Bytes a token that a layer keeps besides: XA of groups that are not computed again, unless it stands behind a kept input, and
    fp32 numbers a row."""
    ranks = one.down.r + (one.out.r if keep.mid else 0)
    if not keep.normed or keep.offload:
        ranks += (one.qkv.r if keep.qkv else 0) + (one.inputs.r if keep.inputs else 0)
    rows = 2 + one.raw + (one.heads if keep.attended else 0) + (one.heads + one.kv_heads if one.qk_norm else 0)
    return c * ranks + FLOAT * rows


def kept(one: Layer, keep: Keep, c: int) -> int:
    """Bytes a token that a layer keeps for backward, wherever."""
    return c * sum(wide(one, keep)) + small(one, keep, c)


def waiting(one: Layer, keep: Keep, tokens: int, c: int) -> int:
    """Bytes of host memory that one layer's tensors take under `keep.offload`: torch pins powers of two."""
    return sum(1 << (tokens * n * c - 1).bit_length() for n in wide(one, keep)) if keep.offload else 0


def resident(one: Layer, layers: int, keep: Keep, tokens: int, c: int) -> int:
    """Bytes on the GPU that the layers keep; what waits on the host is there of two layers."""
    if keep.offload:
        return tokens * (layers * small(one, keep, c) + 2 * c * sum(wide(one, keep)))
    return tokens * layers * kept(one, keep, c)


def backward(one: Layer, keep: Keep, tokens: int, c: int) -> int:
    """Bytes at the peak of one layer's backward, beyond what it keeps: what is computed again, and gradients stage by stage."""
    again = max(0, kept(one, EVERYTHING, c) - kept(one, keep, c))
    grad = c * (2 * one.hidden + one.down.r)
    masked = c * one.down.k * 2 if one.dropout else 0
    stages = [
        tokens * (c * one.hidden + again) + (one.inputs.matrix(c) if again else 0),
        tokens * (grad + c * one.down.k + masked + again) + one.down.matrix(c),
        tokens * (2 * c * one.hidden + again + (2 * c * one.inputs.k if one.dropout else 0)) + one.inputs.matrix(c),
        tokens * (_attention(one, c) + again),
    ]
    return max(stages)


def _attention(one: Layer, c: int) -> int:
    """Bytes a token in the attention's backward, when gate, up and the residual between are gone already.

    Two gradients of the residual stream, the output's and those of q, k, v; in the library: dq in fp32, dk and dv of every query
    head where heads share them.
    """
    done = c * (one.inputs.n + one.inputs.r + one.inputs.k + one.inputs.r + one.hidden)
    library = FLOAT * one.query + (2 * c * one.query if one.heads != one.kv_heads else 0)
    return c * (2 * one.hidden + one.out.r + 2 * one.query + 2 * one.keys) + library - done


def forward(one: Layer, keep: Keep, tokens: int, c: int) -> int:
    """Bytes at the peak of one layer's forward, beyond what it keeps: what is dropped after it, and the MLP's inner activation."""
    again = max(0, kept(one, EVERYTHING, c) - kept(one, keep, c))
    return tokens * (again + c * (one.down.k + one.down.r + one.hidden)) + one.down.matrix(c)
