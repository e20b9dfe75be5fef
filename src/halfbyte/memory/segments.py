"""Segments of a GPU's memory that grow, so that freed blocks leave no holes: what is reserved stays near what is handed out.

Without them a plan that uses a card whole runs out: of 15.3 GiB under a cap, 2.0 were free in pieces too small for the next tensor
(docs/LOG.md).
"""

from __future__ import annotations

import os

import torch

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
GROWING = "expandable_segments:True"


def grow() -> None:
    """From the next allocation on; what the user has set in `PYTORCH_ALLOC_CONF`, or under its older name, stays all there is.

    Torch reads the variables when it is imported, so setting them here would come too late for a program that has imported it.
    """
    if torch.cuda.is_available() and not any(name in os.environ for name in NAMES):
        torch._C._accelerator_setAllocatorSettings(GROWING)
