"""Recipe section `format`: how the frozen base is stored."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from halfbyte.config_base import Section

Kind = Literal["nf4", "fp4", "int4", "int8", "none"]
Block = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]


class FormatConfig(Section):
    """How the linear weights of the frozen base are stored."""

    kind: Kind = "nf4"
    """nf4 | fp4 | int4 | int8 | none (16-bit base: plain LoRA or full fine-tuning)."""
    block: Block = 64
    """Weights that share a scale: along the flat tensor (nf4, fp4) or the input dimension (int4); int8: one a channel."""
    nested: bool = True
    """Keep nf4 and fp4 scales in 8 bits as well (the paper's double quantisation): 4.127 bits a weight, not 4.5."""
    symmetric: bool = True
    """int4 only: codes -7..7 around zero; false gives each group a zero point."""
    zero: Literal["int", "float", "min"] = "int"
    """int4, asymmetric only: an integer zero point, a float one, or the group's minimum (q * scale + min)."""
    head: Literal["16bit", "int8", "nf4"] = "16bit"
    """The output head: 16bit, int8 (one scale a token) or nf4 (block 64, nested); a head tied to the embedding stays 16bit."""
    skip: list[str] = Field(default_factory=list)
    """Modules to keep in 16 bits besides the output head and tied weights: name patterns with `*`."""
