"""What a model directory says about its model: config, tokenizer with chat template, generation settings. No weights, no code.

Why not `AutoConfig.from_pretrained`: keys of a config.json can name Python files or kernel repositories to import (`auto_map`,
`_attn_implementation_internal`, `custom_pipelines`). They are refused where transformers has no class of its own for the model, and
dropped, with a word in the log, where it has.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers import __version__ as transformers_version

from halfbyte.checkpoints import atomic, gguf
from halfbyte.checkpoints.cache import cache_root
from halfbyte.errors import CheckpointError, ModelError, UnsafeFileError

log = logging.getLogger(__name__)
LOADS_CODE = ("auto_map", "custom_pipelines", "custom_generate", "model_file", "kernel_config")
PICKS_ATTENTION = ("_attn_implementation", "_attn_implementation_internal", "attn_implementation", "_experts_implementation")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


@dataclass(frozen=True)
class Description:
    """quantization: the config's `quantization_config`, taken out of the config itself; empty if there is none."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig | None
    quantization: dict[str, Any]

    def save(self, directory: Path) -> None:
        """Writes config, tokenizer and generation settings as transformers lays them out."""
        self.config.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        if self.generation is not None:
            self.generation.save_pretrained(directory)


def read(path: Path) -> Description:
    """The description of a model directory or a .gguf file. Raises CheckpointError, ModelError or UnsafeFileError."""
    if path.suffix == ".gguf":
        path = _unfolded(path)
    config, quantization = read_config(path)
    generation = None
    if (path / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(path, local_files_only=True)
    return Description(config, _tokenizer(path), generation, quantization)


def config_of(path: Path) -> PretrainedConfig:
    """The config alone, of a model directory or a .gguf file; instant where the file was seen before."""
    return read_config(_unfolded(path) if path.suffix == ".gguf" else path)[0]


def _unfolded(file: Path) -> Path:
    """A folder of the cache with the config and tokenizer of a .gguf file, which take seconds to build from its metadata."""
    seen = file.stat()
    what = json.dumps([str(file.absolute()), seen.st_size, seen.st_mtime_ns, transformers_version])
    directory = cache_root() / "described" / hashlib.sha256(what.encode()).hexdigest()[:32]
    if not (directory / "config.json").is_file():
        config = gguf.load_config(file)
        _check_kind(config, file)
        described = Description(config, gguf.load_tokenizer(file), None, {})
        with atomic.directory(directory, replace=True) as folder:
            described.save(folder)
    return directory


def read_config(directory: Path) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The model's config and its `quantization_config` (empty if none)."""
    file = directory / "config.json"
    raw = _json(file)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        _refuse_code(file, raw)
        hint = "upgrade transformers if the model is newer than it"
        raise ModelError(f"{file}: transformers {transformers_version} does not know the model type {kind}", hint=hint)
    _drop_code(file, raw, f"transformers' own {kind}")
    quantization = raw.pop("quantization_config", None) or {}
    config = CONFIG_MAPPING[kind].from_dict(raw)
    _check_kind(config, file)
    return config, quantization


def _json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file.parent} has no {file.name}", hint="a model directory has config.json beside its weights"
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return raw


def _refuse_code(file: Path, raw: dict[str, Any]) -> None:
    asked = [key for key in LOADS_CODE if raw.get(key)]
    if asked:
        hint = "halfbyte never runs code that comes with a model; use one that transformers supports itself"
        raise UnsafeFileError(f"{file} wants Python code from the model's author to be run ({', '.join(asked)})", hint=hint)


def _drop_code(file: Path, raw: dict[str, Any], instead: str) -> None:
    """Takes out every key that names code; an attention implementation from a kernel repository is refused."""
    for key in LOADS_CODE:
        if raw.pop(key, None):
            log.info("%s: `%s` names code of the model's author, which is not run; %s is used", file, key, instead)
    for key in PICKS_ATTENTION:
        value = raw.pop(key, None)
        if isinstance(value, str) and "/" in value:
            hint = f"remove `{key}` from the file if you trust the rest of it"
            raise UnsafeFileError(f"{file}: `{key}` names a kernel repository, {value}, whose code would be run", hint=hint)


def _check_kind(config: PretrainedConfig, file: Path) -> None:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{file}: {config.model_type} is not a causal language model in transformers", hint="a decoder-only model is needed"
        )


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{directory} has no tokenizer", hint=f"copy the model's {TOKENIZER_FILES[0]} and tokenizer_config.json beside it"
        )
    file = directory / "tokenizer_config.json"
    code = file.is_file() and bool(_json(file).get("auto_map"))
    if code and not (directory / "tokenizer.json").is_file():
        _refuse_code(file, _json(file))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except (ValueError, OSError, KeyError, TypeError) as error:
        if code:
            _refuse_code(file, _json(file))
        raise CheckpointError(f"the tokenizer in {directory} does not load: {error}") from error
    return tokenizer
