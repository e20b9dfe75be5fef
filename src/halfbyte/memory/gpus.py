"""Cards by name and their memory, so that `--gpu rtx4090` plans for a machine that is not here.

Sizes are what the maker calls them, in GiB; about 3 % of each is taken by the driver before a program starts.
"""

from __future__ import annotations

CARDS: dict[str, float] = {
    "rtx2060": 6,
    "rtx2070": 8,
    "rtx2080": 8,
    "rtx2080ti": 11,
    "rtx3050": 8,
    "rtx3060": 12,
    "rtx3060ti": 8,
    "rtx3070": 8,
    "rtx3080": 10,
    "rtx3080-12g": 12,
    "rtx3080ti": 12,
    "rtx3090": 24,
    "rtx3090ti": 24,
    "rtx4050": 6,
    "rtx4060": 8,
    "rtx4060ti": 8,
    "rtx4060ti-16g": 16,
    "rtx4070": 12,
    "rtx4070ti": 12,
    "rtx4070tisuper": 16,
    "rtx4080": 16,
    "rtx4090": 24,
    "rtx5060": 8,
    "rtx5060ti-16g": 16,
    "rtx5070": 12,
    "rtx5070ti": 16,
    "rtx5080": 16,
    "rtx5090": 32,
    "a2": 16,
    "a10": 24,
    "a10g": 24,
    "a30": 24,
    "a40": 48,
    "a6000": 48,
    "a100": 40,
    "a100-80g": 80,
    "b200": 180,
    "h100": 80,
    "h200": 141,
    "l4": 24,
    "l40s": 48,
    "p100": 16,
    "t4": 16,
    "v100": 16,
    "v100-32g": 32,
}
"""Name without blanks or hyphens before the number: GiB."""

NO_BF16 = ("rtx20", "p100", "t4", "v100")
"""How the names of cards begin that have no bf16 (before compute capability 8.0): runs there compute in fp16."""
FLOAT8 = ("rtx40", "rtx50", "b200", "h100", "h200", "l4")
"""How the names of cards begin that multiply in fp8 (compute capability 8.9 and newer)."""
DRIVER_SHARE = 0.03
"""Of a card's memory, what the driver and the display hold before a program starts."""
