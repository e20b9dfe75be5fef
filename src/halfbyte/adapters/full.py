"""Full fine-tuning: every floating weight learns, in fp32. The adapter section's `kind: none`."""

from __future__ import annotations

import logging

from torch import nn

from halfbyte.adapters.config import AdapterConfig
from halfbyte.adapters.lora import Adapter
from halfbyte.errors import ModelError

log = logging.getLogger("halfbyte")


def attach(model: nn.Module, config: AdapterConfig | None = None) -> Adapter:
    """Makes every weight of `model` trainable in fp32, in place; compute in 16 bits is autocast's job.

    Raises ModelError (`adapter.packed`) if the base is packed. There is no base left to answer: `enabled(False)` changes nothing.
    """
    packed = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    if packed:
        raise ModelError(
            f"full fine-tuning needs a 16-bit base; `{packed[0].rpartition('.')[0]}` is packed",
            hint="set `format: none`, or train an adapter",
            code="adapter.packed",
        )
    model.float()
    model.requires_grad_(True)
    adapter = Adapter(model, config or AdapterConfig(kind="none"))
    log.info("adapter: none (full fine-tuning of %s parameters)", f"{adapter.trainable:,}")
    return adapter
