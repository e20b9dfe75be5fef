"""Recipe section `memory`: what the plan may use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from halfbyte.config_base import Section


class MemoryConfig(Section):
    """What the plan may use, and what it may trade for it."""

    gpu: str = "auto"
    """Memory budget: auto (what the device has free), a size such as 24GiB, or a card such as rtx4090. A run takes no more than
    that, and no more than is free on its own device; `halfbyte plan` takes it for another machine."""
    recompute: Literal["auto", "on", "off"] = "auto"
    """Compute activations again in backward instead of keeping them: on (gate and up of every layer at least), off (nothing but
    norms), or auto: of each layer what the fastest plan that fits does not keep."""
    offload: Literal["auto", "on", "off"] = "auto"
    """Kept activations wait in pinned host memory between forward and backward (fused layers on a GPU): on (every layer's input at
    least), off, or auto: what makes the fastest plan that fits, where host memory has room."""
    host: str = "auto"
    """Host memory that may be pinned for all that waits there: auto (half of what is free; 24 GiB of another machine), or a size
    such as 12GiB."""
    embedding: Literal["auto", "gpu", "host"] = "auto"
    """Where the input embedding is: gpu, host (pinned host memory, which the GPU reads row by row over the bus), or auto: host
    where that makes the fastest plan that fits. One that is the output head too (tied), or learns, is always on the GPU."""
    microbatch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows a forward pass sees at once: a divisor of `train.batch`, or auto: the most that fits."""
