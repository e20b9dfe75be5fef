"""Hub datasets through `datasets`: by id, configuration, split and revision.

Why here: it is the one place of `data/` that may touch the network. A gated, missing or unreachable dataset ends in one clear
word. Cost: the download, once; `datasets` keeps its own cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.data.problems import Where
from halfbyte.errors import DataError


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset.

    `digest` names its content: id, split, revision, and the cache files' names, which carry the commit.
    """

    label: str
    rows: Any
    digest: str

    def records(self) -> Iterator[tuple[Where, dict[str, Any]]]:
        """Every row as a dictionary, with its place."""
        for number, row in enumerate(self.rows, 1):
            yield Where(self.label, number, "row"), row


def kept(path: str) -> bool:
    """Whether `datasets` has something of this data set in its cache."""
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / path.replace("/", "___").lower()).is_dir()


def load(path: str, config: str | None, split: str, revision: str | None) -> HubDataset:
    """Downloads (or finds in the cache) one split. Raises `DataError` for what is missing, gated or out of reach."""
    import datasets
    from huggingface_hub.errors import GatedRepoError

    try:
        rows = datasets.load_dataset(path, config, split=split, revision=revision)
    except GatedRepoError as error:
        hint = f"accept its terms at https://huggingface.co/datasets/{path} and set HF_TOKEN"
        raise DataError(f"the Hub dataset `{path}` is gated", hint=hint, code="data.gated") from error
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        hint = "check the spelling; a local file needs its ending (.jsonl, .json, .csv, .parquet, .txt); private ones need HF_TOKEN"
        message = f"`{path}` is neither a local file nor a dataset on the Hub"
        raise DataError(message, hint=hint, code="data.not-found") from error
    except (ConnectionError, OSError) as error:
        hint = (
            "check the connection, or unset HF_HUB_OFFLINE / HF_DATASETS_OFFLINE"
            if _offline()
            else "check the connection, or use a local file"
        )
        raise DataError(
            f"the Hub dataset `{path}` cannot be reached: {_first(error)}", hint=hint, code="data.unreachable"
        ) from error
    except (ValueError, RuntimeError) as error:
        hint = "see `data.train[].config`, `split` and `revision`; datasets that need code to load are not run"
        raise DataError(f"the Hub dataset `{path}` was refused: {_first(error)}", hint=hint, code="data.refused") from error
    files = sorted(str(f.get("filename", "")) for f in rows.cache_files)
    identity = [path, config, split, revision, rows.num_rows, sorted(rows.column_names), files]
    return HubDataset(f"{path}[{split}]", rows, hashlib.sha256(json.dumps(identity).encode()).hexdigest())


def _offline() -> bool:
    return any(os.environ.get(name, "") not in ("", "0") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
