"""What a fused layer keeps between forward and backward, and where; the rest is computed again.

Bytes a token (8B Llama 3, bf16): normed 16 KB, qkv 12 KB, attended 8 KB, mid 8 KB, inputs 56 KB; the layer's input, 8 KB, always.
The output of `down` is needed by nobody and never computed twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

NAMES = ("normed", "qkv", "attended", "mid", "inputs")
"""What may be kept or not. The layer's input, `x`, is always kept, here or in host memory."""
USUAL = {"x": 8, "normed": 16, "qkv": 12, "attended": 8, "mid": 8, "inputs": 56}
"""KB a token, as above."""


@dataclass(frozen=True)
class Keep:
    """normed: inputs of q/k/v and of gate/up. qkv: after rotation. attended: attention's output. mid: the residual between
    attention and MLP. inputs: outputs of gate and up. away: of what is kept, and `x`, what waits in host memory.

    tile: tokens that the MLP sees at a time, in forward and backward, 0 for all; gate and up are then never kept.
    """

    normed: bool = True
    qkv: bool = True
    attended: bool = True
    mid: bool = True
    inputs: bool = True
    away: tuple[str, ...] = ()
    tile: int = 0

    def __post_init__(self) -> None:
        wrong = [name for name in self.away if name != "x" and not (name in NAMES and getattr(self, name))]
        assert not wrong, f"what waits in host memory is kept: {wrong}"
        assert not (self.tile and self.inputs), "an MLP in tiles keeps no gate and up"

    def kept(self) -> list[str]:
        """What is kept, by name, here or in host memory."""
        return [name for name in NAMES if getattr(self, name)]

    @property
    def offload(self) -> bool:
        """Whether anything waits in host memory."""
        return bool(self.away)

    def sent(self) -> int:
        """About how much waits in host memory, to tell which of two is more: KB a token in the shape of an 8B."""
        return sum(USUAL[name] for name in self.away)

    def here(self, name: str) -> bool:
        """Whether it stays on the device."""
        return name not in self.away and (name == "x" or getattr(self, name))

    def spec(self) -> str:
        """In words that `from_spec` reads: `x> qkv> mid`; `>` marks what waits in host memory, `x` is left out where it stays."""
        words = [f"{name}>" if name in self.away else name for name in (["x"] if "x" in self.away else []) + self.kept()]
        return " ".join(words + ([f"tile={self.tile}"] if self.tile else [])) or "nothing"

    @classmethod
    def from_spec(cls, text: str) -> Keep:
        """The mirror of `spec`."""
        words = [] if text == "nothing" else text.split()
        tile = next((int(word.removeprefix("tile=")) for word in words if word.startswith("tile=")), 0)
        names = [word for word in words if not word.startswith("tile=")]
        return keeping(
            [name.rstrip(">") for name in names if name != "x>"], [name.rstrip(">") for name in names if name.endswith(">")], tile
        )


def keeping(names: Iterable[str], away: Iterable[str] = (), tile: int = 0) -> Keep:
    """The `Keep` of what is kept by name, wherever; away: of those and `x`, what waits in host memory."""
    kept = set(names)
    assert kept <= set(NAMES), kept
    gone = set(away)
    return Keep(**{name: name in kept for name in NAMES}, away=tuple(n for n in ("x", *NAMES) if n in gone), tile=tile)


EVERYTHING = Keep()
INPUTS = keeping(())
OFFLOADED = keeping(("qkv", "attended", "mid"), away=("x", "qkv", "attended", "mid"))
"""Gate, up and the norms are computed again, the rest crosses the bus: on the GPU a layer keeps nothing."""
