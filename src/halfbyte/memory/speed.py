"""How long a step takes, from shapes and four rates: products, memory, bus, host. What a plan compares its choices by.

Products at the rate of a hot chip, everything that reads and writes memory once at the rate of a large copy, attention at a share
of the products' rate, copies to host memory beside all of it. A step is never faster than the host can launch it.
Source of the counts: the operations of `layers.fused`, forward and backward; the shares were fitted on an H200 (docs/LOG.md).

Letters: T tokens of a microbatch, N outputs, K inputs of a group, L tokens of a document.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.layers.fused.keep import NAMES, Keep
from halfbyte.memory.fused import Group, Layer

ATTENTION_SHARE, SMALL_HEADS, HALF_ATTENTION = 0.8, 0.66, 900
"""Of the products' rate, what attention reaches in long documents with heads of 128 and more numbers, and with smaller ones; and
the length at which it reaches half of that."""
GATHER = 0.9
"""Of the bus's rate, what a gather of single rows reaches from 2,048 tokens on (measured on an H200; 0.73 at 512)."""
FEW_CHUNKS, MANY_CHUNKS = 0.92, 1.1
"""Seconds of the output head's products in chunks of the loss that are larger (measured on an H200), and smaller than usual."""
HALF_RATE = 160 * 4096
"""Tokens times hidden size at which a product runs at half the rate of a large one: a wider matrix fills a GPU with fewer."""
DECODED, FLOAT8_DECODED = 2.0 + 0.52, 1.0 + 0.52
"""Bytes written and read for one decoded weight: a 16-bit number, or one in e4m3."""
FLOAT8 = 1.9
"""The rate of products in e4m3 over that of 16-bit ones."""
BESIDE, APART = 2.0, 1.15
"""Times of a copy that a byte takes where operands in e4m3 are written: beside 16-bit numbers, by a kernel that first looks for the
row's largest; and by a pass of their own, what it reads included."""
FORWARD, BACKWARD, AGAIN, SENT, TILE, ENDS = 26, 46, 4, 1, 3, 30
"""Kernels that the host launches: of a layer forward, backward, for each tensor that is computed again, for each that crosses the
bus one way, for each tile of an MLP one way, and of what is outside the layers."""
FLOAT8_LAUNCHES = 1.6
"""Times as many with products in e4m3."""


@dataclass(frozen=True)
class Rates:
    """gemm: FLOP/s of large products. copy: bytes read and written a second. bus: bytes a second to or from host memory. launch:
    seconds of host time a kernel. source: where they are from; "" where they stand for no card in particular."""

    gemm: float
    copy: float
    bus: float
    launch: float = 20e-6
    source: str = ""


@dataclass(frozen=True)
class Cost:
    """Seconds of the GPU for a layer: forward, backward, and of what would be computed again, by name."""

    forward: float
    backward: float
    again: dict[str, float]

    def recompute(self, keep: Keep) -> float:
        """Seconds of what `keep` does not keep."""
        return sum(self.again[name] for name in NAMES if not getattr(keep, name))


def layer_cost(one: Layer, tokens: int, document: float, c: int, rates: Rates, decoded: bool = False) -> Cost:
    """document: L, how long the document of a usual token is (sum of squares over sum). decoded: weights are held decoded."""
    wide = tokens * c / rates.copy

    def product(group: Group) -> float:
        flops = 2.0 * group.n * group.k * (tokens + HALF_RATE / one.hidden)
        if one.float8 and group.fits:
            decode = 0.0 if decoded and group.straight else FLOAT8_DECODED * group.n * group.k / rates.copy
            return flops / (FLOAT8 * rates.gemm) + decode
        held = group.held or (decoded and not one.float8)
        return flops / rates.gemm + (0.0 if held else DECODED * group.n * group.k / rates.copy)

    def ranks(group: Group, reads: int) -> float:
        return wide * reads if group.r else 0.0

    qkv, out, inputs, down = one.qkv, one.out, one.inputs, one.down
    share = ATTENTION_SHARE if one.head_size >= 128 else SMALL_HEADS
    attention = 2.0 * one.query * tokens * (min(document, tokens) + HALF_ATTENTION) / (share * rates.gemm)
    norm, heads, glu = 4 * one.hidden * wide, 2 * (one.query + one.keys) * wide, 3 * down.k * wide
    norms = 2 + one.after_attention + one.after_mlp
    mlp = product(down) if one.after_mlp else 0.0
    again = {
        "normed": norm,
        "qkv": product(qkv) + heads + ranks(qkv, qkv.k),
        "attended": attention,
        "mid": product(out) + norm + ranks(out, out.k),
        "inputs": product(inputs) + ranks(inputs, inputs.k) + mlp,
    }
    groups = one.groups
    products = sum(product(g) for g in groups)
    forward = products + attention + norms * norm + heads + glu + sum(ranks(g, g.k) for g in groups)
    backward = products + 2.5 * attention + norms * norm + heads + 2 * glu + sum(ranks(g, 2 * g.n + g.k) for g in groups)
    forward += _quantising(one, tokens, c, rates, back=False)
    backward += _quantising(one, tokens, c, rates, back=True)
    return Cost(forward, backward, again)


def host_seconds(one: Layer, keep: Keep, tokens: int, rates: Rates) -> tuple[float, float]:
    """Of the host, to launch a layer forward and backward: GPUs wait for it where layers are small and rows short."""
    launch = rates.launch * (FLOAT8_LAUNCHES if one.float8 else 1.0)
    both = SENT * len(keep.away) + (TILE * tokens / keep.tile if keep.tile else 0.0)
    again = AGAIN * sum(not getattr(keep, name) for name in NAMES)
    return launch * (FORWARD + both), launch * (BACKWARD + again + both)


def _quantising(one: Layer, tokens: int, c: int, rates: Rates, back: bool) -> float:
    """Seconds in which a layer writes the operands of its products in e4m3: beside the 16-bit ones in the kernel in front, or (the
    attention's output, and the gradient of q, k and v) by a pass of their own."""
    if not one.float8:
        return 0.0
    apart = one.qkv if back else one.out
    passes = [(g.n if back else g.k) * (APART * (1 + c) if g is apart else BESIDE) for g in one.groups if g.fits]
    return tokens * sum(passes) / rates.copy


def ends_cost(tokens: int, hidden: int, vocabulary: int, c: int, rates: Rates, chunks: float = 1) -> float:
    """Embedding, head and loss: two products over all tokens, and four passes over the logits."""
    products = 4.0 * hidden * vocabulary * tokens / rates.gemm
    products *= 1.0 if chunks == 1 else FEW_CHUNKS if chunks < 1 else MANY_CHUNKS
    return max(products + 4.0 * tokens * vocabulary * c / rates.copy, ENDS * rates.launch)


def embedding_cost(tokens: int, hidden: int, c: int, rates: Rates) -> float:
    """Of a microbatch, what rows of the embedding take to come out of host memory: the GPU reads them itself, nothing hides it."""
    return tokens * hidden * c / (GATHER * rates.bus)


def optimizer_cost(numbers: int, bits: int, paged: bool, rates: Rates) -> float:
    """Of one step: 28 bytes a number, and its moments over the bus, both ways at once, where they are in host memory."""
    moments = numbers * (8 if bits == 32 else 2)
    return (12 * numbers + 2 * moments) / rates.copy + (moments / rates.bus if paged else 0.0) + 5 * rates.launch


# FLOP/s of large products in 16 bits with sums in fp32, bytes a second of memory, bytes a second of a PCIe x16 link one way: what
# is reached, about three quarters of what makers print.
_CARDS: dict[str, tuple[float, float, float]] = {
    "t4": (35e12, 0.26e12, 11e9),
    "v100": (90e12, 0.78e12, 12e9),
    "rtx2080ti": (45e12, 0.53e12, 12e9),
    "rtx3060": (25e12, 0.31e12, 25e9),
    "rtx3070": (36e12, 0.38e12, 25e9),
    "rtx3080": (52e12, 0.65e12, 25e9),
    "rtx3090": (60e12, 0.80e12, 25e9),
    "rtx4060": (28e12, 0.23e12, 12.5e9),
    "rtx4060ti": (38e12, 0.25e12, 12.5e9),
    "rtx4070": (54e12, 0.43e12, 25e9),
    "rtx4080": (84e12, 0.61e12, 25e9),
    "rtx4090": (140e12, 0.86e12, 25e9),
    "rtx5070": (56e12, 0.57e12, 50e9),
    "rtx5080": (96e12, 0.82e12, 50e9),
    "rtx5090": (180e12, 1.5e12, 50e9),
    "a10": (90e12, 0.50e12, 25e9),
    "a100": (250e12, 1.7e12, 25e9),
    "a40": (110e12, 0.60e12, 25e9),
    "a6000": (110e12, 0.66e12, 25e9),
    "h100": (600e12, 2.8e12, 50e9),
    "h200": (660e12, 4.0e12, 55e9),
    "b200": (1500e12, 6.8e12, 55e9),
    "l4": (50e12, 0.26e12, 22e9),
    "l40s": (200e12, 0.72e12, 25e9),
}
TYPICAL = Rates(140e12, 0.86e12, 25e9)
"""For a size of memory without a card: the ratios of a fast consumer card."""


def tabulated(card: str) -> Rates:
    """Of a card by name, or of the most similar one in the table; `TYPICAL`, without a source, where there is none."""
    names = [name for name in _CARDS if card.startswith(name)]
    if not names:
        return TYPICAL
    found = max(names, key=len)
    return Rates(*_CARDS[found], source=f"tabulated for {found}")
