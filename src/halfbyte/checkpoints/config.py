"""Recipe section `model`: which base."""

from __future__ import annotations

from halfbyte.config_base import Section


class ModelConfig(Section):
    """Which base, and which version of it."""

    name: str
    """A Hub id, a directory, a .gguf file, or a bundled name (smollm2-135m)."""
    revision: str | None = None
    """Commit, tag or branch of a Hub id; what it resolved to is recorded."""
