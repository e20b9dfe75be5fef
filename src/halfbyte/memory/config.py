"""Recipe section `memory`: what the plan may use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from halfbyte.config_base import Section


class MemoryConfig(Section):
    """What the plan may use, and what it may trade for it."""

    gpu: str = "auto"
    """Memory budget: auto (what the device has free), a size such as 24GiB, or a card such as rtx4090."""
    recompute: Literal["auto", "on", "off"] = "auto"
    """Recompute each layer in backward instead of keeping its activations: less memory, about a third more arithmetic."""
    offload: Literal["auto", "on", "off"] = "auto"
    """What a fused layer keeps for backward, gate and up excepted, waits in pinned host memory (on a GPU); auto: with recompute,
    where host memory has room."""
    microbatch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows a forward pass sees at once: a divisor of `train.batch`, or auto: the most that fits."""
