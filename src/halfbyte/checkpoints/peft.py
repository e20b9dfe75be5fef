"""Adapter directories: PEFT's layout, tensor for tensor, and side files of our own beside it.

    adapter_config.json         PEFT's; what is needed to rebuild the adapter
    adapter_model.safetensors   PEFT's; see adapters/state.py for the names
    halfbyte.json               the base it was trained on (name, revision, digest), format, compute, version, SHA-256, and the
                                tokens that ended the answers it learned
    recipe.yaml                 the resolved recipe (when trained here)
    chat_template.jinja         the chat template it was trained with

Why side files and never other tensor names: `peft.PeftModel.from_pretrained`, vLLM and others must load the directory
without this package. They ignore what they do not know; `chat`, `eval` and `merge` read it, so that an adapter is never run
on another base or with another template by accident. What PEFT wrote loads here when the mathematics is built (peft_config.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import halfbyte
from halfbyte.adapters import lora, state
from halfbyte.checkpoints import atomic, peft_config, shards
from halfbyte.errors import CheckpointError, UnsafeFileError

if TYPE_CHECKING:
    from halfbyte.adapters.lora import Adapter
    from halfbyte.checkpoints.base import Base

log = logging.getLogger("halfbyte")
CONFIG, TENSORS, RECORD = "adapter_config.json", "adapter_model.safetensors", "halfbyte.json"
RECIPE, TEMPLATE = "recipe.yaml", "chat_template.jinja"
COMPUTES = ("float32", "bfloat16", "float16")
_PICKLED = ("adapter_model.bin", "adapter_model.pt")


@dataclass(frozen=True)
class Record:
    """`halfbyte.json`. base: name as the user gave it. format: the recipe section. sha256: of adapter_model.safetensors.
    end_ids: tokens that stop an answer, as training learned them."""

    base: str
    revision: str | None
    digest: str
    format: dict[str, Any]
    compute: str
    version: str
    sha256: str
    end_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter directory says, its tensors aside. record, recipe and template are None in a directory of PEFT's."""

    directory: Path
    config: dict[str, Any]
    record: Record | None
    recipe: str | None
    template: str | None

    @property
    def base_name(self) -> str | None:
        """The base it was trained on, as far as the directory says."""
        return self.record.base if self.record else self.config.get("base_model_name_or_path")

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that stop an answer, as far as the directory says."""
        return self.record.end_ids if self.record else ()


def save(
    adapter: Adapter, directory: str | Path, base: Base, extras: Mapping[str, str] | None = None, end_ids: Sequence[int] = ()
) -> Path:
    """Writes the adapter, whole or not at all; replaces a former adapter in `directory`.

    extras: more text files by name, such as `recipe.yaml` and `chat_template.jinja`. end_ids: tokens that ended the
    answers that were learned. Raises CheckpointError when `directory` holds files that are not an adapter's, or the disk is full.
    """
    target = Path(directory)
    extras = dict(extras or {})
    _refuse_strangers(target, extras)
    with atomic.directory(target, replace=True) as temporary:
        shards.write(temporary / TENSORS, state.state_dict(adapter).items(), {"format": "pt"})
        record = Record(
            base=base.name,
            revision=base.revision,
            digest=base.digest,
            format=base.format.model_dump(),
            compute=_dtype_name(base.compute),
            version=halfbyte.__version__,
            sha256=_sha256(temporary / TENSORS),
            end_ids=tuple(end_ids),
        )
        _write_json(temporary / CONFIG, peft_config.to_peft(adapter, base))
        _write_json(temporary / RECORD, asdict(record))
        for name, text in extras.items():
            (temporary / name).write_text(text, encoding="utf-8", newline="")
    return target


def read(directory: str | Path) -> AdapterFiles:
    """Reads everything but the tensors. Raises CheckpointError, or UnsafeFileError for a pickled adapter."""
    folder = Path(directory)
    atomic.recover(folder.absolute())
    if not folder.is_dir():
        raise CheckpointError(f"no adapter directory at {folder}", hint="give the directory that holds adapter_config.json")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is not an adapter: it has no {CONFIG}", hint="give the directory that holds it")
    if not (folder / TENSORS).is_file():
        for name in _PICKLED:
            if (folder / name).is_file():
                raise UnsafeFileError(
                    f"{folder / name} is a pickle, which can run code when it is loaded",
                    hint="where you trust it: load it with PEFT and save it again, which writes safetensors",
                    code="adapter.pickle",
                )
        raise CheckpointError(f"{folder} has no {TENSORS}", hint="copy the directory again, whole")
    config = _read_json(folder / CONFIG)
    record = _read_record(folder / RECORD) if (folder / RECORD).is_file() else None
    return AdapterFiles(folder, config, record, _text(folder / RECIPE), _text(folder / TEMPLATE))


def load(directory: str | Path, base: Base, *, seed: int = 0, other_base: bool = False) -> Adapter:
    """Attaches the adapter in `directory` to `base.model` and fills it.

    other_base: allow a base whose digest differs from the one the adapter was trained on.
    Raises CheckpointError: another base, a setting that is not built, tensors that do not fit (all of them listed), damage.
    """
    files = read(directory)
    check_base(files, base, other_base=other_base)
    config = peft_config.from_peft(files.config, base.model, str(files.directory / CONFIG))
    tensors = read_tensors(files)
    adapter = lora.attach(base.model, config, seed)
    state.load_state_dict(adapter, tensors, source=str(files.directory / TENSORS))
    return adapter


def read_tensors(files: AdapterFiles) -> dict[str, Tensor]:
    """The tensors of the directory, verified against the SHA-256 that was saved with them."""
    path = files.directory / TENSORS
    if files.record and _sha256(path) != files.record.sha256:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not the one in {RECORD}",
            hint=f"copy the directory again; if the tensors were changed on purpose, remove {RECORD}",
            code="adapter.damaged",
        )
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}", hint="copy the directory again", code="adapter.damaged") from error
    return tensors


def check_base(files: AdapterFiles, base: Base, *, other_base: bool = False) -> None:
    """Raises CheckpointError when the adapter says that it was trained on other weights than `base` holds.

    The digest decides. It covers what is kept in the compute dtype as well, so for another compute dtype name, revision and
    format decide instead.
    """
    record = files.record
    if record is None or other_base or record.digest == base.digest:
        return
    same = (record.base, record.revision, record.format) == (base.name, base.revision, base.format.model_dump())
    if same and record.compute != _dtype_name(base.compute):
        log.info("%s: trained in %s, run in %s: base checked by name", files.directory, record.compute, _dtype_name(base.compute))
        return
    was = f"{record.base} (format {_kind(record.format)}, digest {record.digest[:12]})"
    now = f"{base.name} (format {_kind(base.format.model_dump())}, digest {base.digest[:12]})"
    raise CheckpointError(
        f"{files.directory} was trained on another base: {was}; this one is {now}",
        hint="load that base; or allow another base explicitly (--other-base, other_base=True)",
        code="adapter.other-base",
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(fmt: Mapping[str, Any]) -> str:
    nested = fmt.get("nested") and fmt.get("kind") in ("nf4", "fp4")
    return f"{fmt.get('kind')}{' nested' if nested else ''}"


def _refuse_strangers(target: Path, extras: Mapping[str, str]) -> None:
    bad = [name for name in extras if Path(name).name != name or name in (CONFIG, TENSORS, RECORD)]
    assert not bad, f"not file names for extras: {bad}"
    ours = {CONFIG, TENSORS, RECORD, RECIPE, TEMPLATE, "README.md", *extras}
    if target.is_dir():
        strangers = sorted(p.name for p in target.iterdir() if p.name not in ours)
        if strangers:
            raise CheckpointError(
                f"{target} holds files that are not an adapter's: {', '.join(strangers[:5])}",
                hint="save the adapter into a directory of its own",
                code="adapter.not-an-adapter-directory",
            )


def _read_record(path: Path) -> Record:
    raw = _read_json(path)
    wanted = [field.name for field in fields(Record) if field.default is MISSING]
    if missing := [name for name in wanted if name not in raw]:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}", hint="copy the directory again")
    kinds = {"revision": str | None, "format": dict}
    wrong = [name for name in wanted if not isinstance(raw[name], kinds.get(name, str))]
    wrong += ["compute"] if raw["compute"] not in COMPUTES else []
    ends = raw.get("end_ids", [])
    wrong += ["end_ids"] if not isinstance(ends, list) or not all(isinstance(token, int) for token in ends) else []
    if wrong:
        told = ", ".join(f"{name} = {raw[name]!r}" for name in dict.fromkeys(wrong))
        raise CheckpointError(
            f"{path} is not a record of halfbyte's: {told}", hint="copy the directory again", code="adapter.record"
        )
    return Record(**{name: raw[name] for name in wanted}, end_ids=tuple(ends))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", hint="copy the directory again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return raw


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _text(path: Path) -> str | None:
    return path.read_bytes().decode("utf-8") if path.is_file() else None  # as it is: line ends too


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
