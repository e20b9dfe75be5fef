"""Recipe section `optim`: the optimizer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from halfbyte.config_base import Section

ELSEWHERE = {"paged_adamw": 32, "paged_adamw_32bit": 32, "paged_adamw_8bit": 8}
"""Names that other tools have for AdamW whose moments leave the GPU while memory is short, and the bits of a moment."""


class OptimConfig(Section):
    """The optimizer. Learning rate and schedule stand in `train`."""

    kind: Literal["adamw"] = "adamw"
    """AdamW with decoupled weight decay (arXiv 1711.05101). `paged_adamw_32bit` and `paged_adamw_8bit`, as other tools say, are
    understood."""
    bits: Literal[32, 8] = 32
    """Bits of each of the two moments: 8 (blocks of 256 with a scale each, arXiv 2110.02861) take a quarter of the memory."""
    paged: Literal["auto", "always", "never"] = "auto"
    """Moments wait in pinned host memory and pass through the GPU in every step; auto: where nothing else makes the run fit."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the square root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of matrices (never of norms and biases)."""
    lora_plus: float = Field(default=1.0, ge=1)
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354); 16 is the paper's choice, 1 is off."""
    _named: str = PrivateAttr(default="")

    @model_validator(mode="wrap")
    @classmethod
    def _of_other_tools(cls, data: Any, handler: ModelWrapValidatorHandler[OptimConfig]) -> OptimConfig:
        name = data.get("kind") if isinstance(data, dict) else None
        if not isinstance(name, str) or name not in ELSEWHERE:
            return handler(data)
        bits = ELSEWHERE[name]
        if data.get("bits", bits) != bits:
            raise ValueError(f"{name} has moments of {bits} bits, and `optim.bits` is {data['bits']}")
        found = handler({**data, "kind": "adamw", "bits": bits})
        found._named = name
        return found

    def understood(self) -> str:
        """One line where the optimizer was named as other tools name it, else ""."""
        return f"optim: {self._named} is adamw with bits: {self.bits} and paged: {self.paged} here" if self._named else ""
