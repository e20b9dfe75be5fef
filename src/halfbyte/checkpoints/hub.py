"""From a model's name to files on this machine: bundled name, GGUF file, directory, or Hub id.

Why exact files and not a whole snapshot: a repository often holds the same weights three times (pickles, `original/`, other
frameworks). Only safetensors, JSON and tokenizer files of its top folder are fetched; pickles never are. What a branch or tag
resolved to is recorded as a commit hash. Environment, as everywhere on the Hub: HF_TOKEN, HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # the HTTP client's own, whichever it is
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from halfbyte.checkpoints import bundled, shards
from halfbyte.checkpoints.base import Source
from halfbyte.checkpoints.config import ModelConfig
from halfbyte.errors import CheckpointError, HalfbyteError

log = logging.getLogger(__name__)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TEXTS = ["*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
WEIGHTS = ["*.safetensors"]
NOT_OURS = ["*/*", "adapter_*", "consolidated*", "optimizer*"]
ADAPTER = "adapter_config.json"
ADAPTER_FILES = [ADAPTER, "adapter_model.safetensors", "halfbyte.json", "recipe.yaml", "chat_template.jinja"]


def locate(model: ModelConfig, *, weights: bool = True) -> Source:
    """Where the model lies; downloads it if it is a Hub id. weights=False fetches config and tokenizer only.

    Raises CheckpointError (not found, gated, no network) or UnsafeFileError (pickles only).
    """
    path = Path(os.path.expanduser(model.name))  # os.path: Path raises for an unknown user, or a name that no file can have
    if model.name in bundled.BUNDLES:
        return Source(bundled.fetch(model.name), model.name, None)
    if path.suffix == ".gguf":
        if os.path.isfile(path):
            return Source(path.resolve(), model.name, None)
        raise CheckpointError(f"there is no file {path}", hint="a .gguf name is a path on this machine; download the file first")
    refuse(path)
    if os.path.isdir(path):
        return Source(path.resolve(), model.name, None)
    if not HUB_ID.fullmatch(model.name):
        raise CheckpointError(f"there is no directory {path}, and it is not a Hub id (`owner/model`)", hint=_names())
    return _snapshot(model, weights)


def refuse(path: Path) -> None:
    """Raises CheckpointError where what lies at `path` is no model, run or adapter, and its name alone tells what it is."""
    if os.path.isfile(path):
        hint = f"give the directory that it is in ({path.parent})" if path.suffix == ".safetensors" else _names()
        raise CheckpointError(f"{path} is a file, not a model, run or adapter", hint=hint)
    if os.path.isdir(path / "checkpoints") and not any((path / left).exists() for left in ("adapter", "model", "config.json")):
        hint = "run its `halfbyte train` command again: it goes on where it stopped"
        raise CheckpointError(f"{path} is a run that has not finished", hint=hint)


def adapter(name: str, revision: str | None = None) -> Path | None:
    """The files of an adapter on the Hub; None if `name` is no Hub id, or of a model. Raises CheckpointError as `locate` does."""
    if name in bundled.BUNDLES or name.endswith(".gguf") or os.path.exists(os.path.expanduser(name)) or not HUB_ID.fullmatch(name):
        return None
    model = ModelConfig(name=name, revision=revision)
    listed, why = _listed(model)
    if listed is not None and ADAPTER not in listed:
        return None
    if listed is not None:
        return _fetched(model, ADAPTER_FILES, [])
    try:
        folder = _cached(model, ADAPTER_FILES, why, []).path
    except CheckpointError:
        return None  # not here as an adapter; what it is then, and why it cannot be had, `locate` says
    return folder if (folder / ADAPTER).is_file() else None


def _names() -> str:
    return f"a model is a Hub id, a directory, a .gguf file or a bundled name ({', '.join(bundled.BUNDLES)})"


def _path(name: str) -> str:
    """What to say first of a Hub id that may have been meant as a path; it is none, or nobody would have asked the Hub."""
    return (
        "there is no such directory here, if a path was meant; " if Path(name).parent.is_dir() or name.startswith("runs/") else ""
    )


def _snapshot(model: ModelConfig, weights: bool) -> Source:
    wanted = [*TEXTS, *WEIGHTS] if weights else TEXTS
    listed, why = _listed(model)
    if listed is None:
        return _cached(model, wanted, why, NOT_OURS)
    if not list(filter_repo_objects(listed, allow_patterns=WEIGHTS, ignore_patterns=NOT_OURS)):
        _refuse(model.name, listed)
    path = _fetched(model, wanted, NOT_OURS)
    return Source(path, model.name, path.name)


def _listed(model: ModelConfig) -> tuple[list[str] | None, str]:
    """Names of the repository's files; or None, and why the Hub cannot be asked. Raises its refusals in plain words."""
    try:
        info = HfApi().model_info(model.name, revision=model.revision)
    except OfflineModeIsEnabled:
        return None, "HF_HUB_OFFLINE is set"
    except HfHubHTTPError as error:
        raise explain(error, model) from error
    except (TransportError, OSError) as error:
        return None, f"the Hub cannot be reached ({error.__class__.__name__})"
    except HFValidationError as error:
        raise CheckpointError(f"{model.name} is not a Hub id", hint=_names()) from error
    return [s.rfilename for s in info.siblings or []], ""


def _fetched(model: ModelConfig, wanted: list[str], left_out: list[str]) -> Path:
    """The folder of the snapshot, downloaded as far as it is not here."""
    try:
        return _download(model, wanted, left_out)
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise explain(error, model) from error
    except (TransportError, LocalEntryNotFoundError) as error:
        raise CheckpointError(f"the download of {model.name} broke off: {error}", hint="run it again; it continues") from error


def _download(model: ModelConfig, wanted: list[str], left_out: list[str], *, offline: bool = False) -> Path:
    """The folder of the snapshot, whose name is its commit hash."""
    found = snapshot_download(
        model.name, revision=model.revision, allow_patterns=wanted, ignore_patterns=left_out, local_files_only=offline
    )
    return Path(found)


def _refuse(name: str, listed: list[str]) -> None:
    ggufs = [f for f in listed if f.endswith(".gguf")]
    if ggufs:
        raise CheckpointError(f"{name} holds GGUF files: {', '.join(ggufs[:5])}", hint="download one and give its path as `model`")
    if ADAPTER in listed:
        hint = "`chat`, `eval` and `merge` take it; as `model` give the base that it was trained on"
        raise CheckpointError(f"{name} is an adapter, not a base", hint=hint, code="hub.adapter")
    shards.refuse_pickles(listed, name)
    raise CheckpointError(f"{name} holds no safetensors weights", hint="is it a model? data sets are not bases")


def _cached(model: ModelConfig, wanted: list[str], why: str, left_out: list[str]) -> Source:
    """The snapshot that an earlier run left in the Hub's cache."""
    try:
        path = _download(model, wanted, left_out, offline=True)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        hint = f"{_path(model.name)}download it once with a network (`hf download {model.name}`), or give a directory"
        raise CheckpointError(f"{model.name} is not on this machine, and {why}", hint=hint, code="hub.offline") from error
    log.warning("%s: using the snapshot %s of the local cache: %s", model.name, path.name[:12], why)
    return Source(path, model.name, path.name)


def explain(error: HfHubHTTPError, model: ModelConfig) -> HalfbyteError:
    """The Hub's refusal in plain words."""
    page = f"https://huggingface.co/{model.name}"
    if isinstance(error, GatedRepoError):
        hint = f"ask for access on {page}, then set HF_TOKEN to a token that has it (`hf auth login` also works)"
        return CheckpointError(f"{model.name} is gated: its owner asks you to accept terms first", hint=hint, code="hub.gated")
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(
            f"{model.name} has no revision {model.revision}", hint=f"{page}/commits/main lists them", code="hub.revision"
        )
    if isinstance(error, RepositoryNotFoundError):
        hint = f"{_path(model.name)}check the spelling; if it is private, set HF_TOKEN; {_names()}"
        return CheckpointError(f"the Hub has no model {model.name} (or hides it from you)", hint=hint, code="hub.not-found")
    status = error.response.status_code
    if status in (401, 403):
        hint = "HF_TOKEN is missing, expired or has no read access (`hf auth whoami` tells)"
        return CheckpointError(f"the Hub refused access to {model.name} (HTTP {status})", hint=hint, code="hub.refused")
    return CheckpointError(f"the Hub answered HTTP {status} for {model.name}", hint="try again later", code="hub.http")
