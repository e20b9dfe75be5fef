"""What became of every parameter of a model: packed or kept, and why. The data behind `halfbyte inspect`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from halfbyte.formats.packed import Format

RowKind = Literal["linear", "conv1d", "embedding", "head", "norm", "experts", "bias", "other"]


@dataclass(frozen=True)
class Row:
    """One parameter: path, kind, whether it is (to be) stored packed and why not, how many weights, bytes as stored.

    shape: of the parameter in the checkpoint; a packed `conv1d` is stored transposed, `[N, K]`. format: that a packed row is in.
    """

    path: str
    kind: RowKind
    packed: bool
    reason: str
    params: int
    bytes: int
    shape: tuple[int, ...]
    format: Format | None = None

    @property
    def module(self) -> str:
        """Path of the module that owns the parameter."""
        return self.path.rpartition(".")[0]


@dataclass(frozen=True)
class LayerRow:
    """One decoder layer: path, class, whether the generic layer took its place, and why not."""

    path: str
    layer: str
    adopted: bool
    reason: str


@dataclass(frozen=True)
class SwapReport:
    """All rows; tied parameters appear once, under their first name."""

    rows: list[Row] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)
    attention: str = ""

    @property
    def packed(self) -> list[Row]:
        """The rows stored packed."""
        return [row for row in self.rows if row.packed]

    @property
    def kept(self) -> list[Row]:
        """The rows stored as they are."""
        return [row for row in self.rows if not row.packed]

    @property
    def params(self) -> int:
        """Parameters of the base, tied ones once."""
        return sum(row.params for row in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes of all parameters as stored."""
        return sum(row.bytes for row in self.rows)

    def summary(self) -> str:
        """One line for people."""
        weights = sum(row.params for row in self.packed)
        layers = f"; {self.adoption()}" if self.layers else ""
        return (
            f"{len(self.packed)} of {len(self.rows)} tensors packed ({weights:,} of {self.params:,} weights), "
            f"{self.bytes:,} bytes{layers}"
        )

    def adoption(self) -> str:
        """How many decoder layers run as the generic one, and why the others are run linear by linear."""
        reasons = sorted({row.reason for row in self.layers if not row.adopted})
        adopted = sum(row.adopted for row in self.layers)
        left = f" (left, linear by linear: {'; '.join(reasons)})" if reasons else ""
        return f"{adopted} of {len(self.layers)} decoder layers adopted{left}"
