"""Recipe section `loss`: what is added to the cross-entropy, and how a GPU computes it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from halfbyte.config_base import Section


class LossConfig(Section):
    """The loss of a trained token: cross-entropy, and what is added to it. Evaluation never adds anything."""

    label_smoothing: float = Field(default=0, ge=0, lt=1)
    """Share of the target's probability that is spread over the whole vocabulary."""
    z_loss: float = Field(default=0, ge=0)
    """Factor of the squared log of the softmax's denominator, which keeps logits from drifting (1e-4 is usual)."""
    method: Literal["auto", "chunked", "tiled", "exact"] = "auto"
    """GPU only: vendor GEMMs (chunked), a Triton GEMM with its sums (tiled), fp32 logits (exact), or auto: measured."""
