"""Tiny things that tests share: random models of every family, a byte tokenizer with a chat template, chats on disk.

Why here: a test that downloads nothing and lasts milliseconds is run often. Every builder is seeded, so that two calls
give the same weights. Torch and transformers are imported on first use, for the tests that must not have them loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 272
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SMALL = {"vocab_size": VOCAB, "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 259}
_LLAMA = _SMALL | {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_WIDE = _SMALL | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_ONE_WINDOW = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 24},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 16},
    "gemma2": _LLAMA | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24},
    "gemma3": _LLAMA | _ONE_WINDOW | {"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16},
    "phi3": _LLAMA,
    "phi": _LLAMA | {"num_key_value_heads": 4},
    "gpt2": _SMALL | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "falcon": _WIDE | {"alibi": False},
    "falcon-new": _WIDE | {"model_type": "falcon", "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-sequential": _WIDE
    | {"model_type": "falcon", "alibi": False, "multi_query": False, "parallel_attn": False, "bias": True},
    "falcon-alibi": _WIDE | {"model_type": "falcon", "alibi": True, "multi_query": False, "parallel_attn": False},
    "gpt_neox": _WIDE | {"intermediate_size": 160},
    "olmo2": _LLAMA,
    "granite": _LLAMA
    | {"residual_multiplier": 0.22, "attention_multiplier": 0.1, "embedding_multiplier": 12.0, "logits_scaling": 8.0},
    "cohere": _LLAMA,
    "cohere-qk-norm": _LLAMA | {"model_type": "cohere", "use_qk_norm": True},
    "cohere2": _LLAMA | _ONE_WINDOW,
    "smollm3": _LLAMA | {"no_rope_layers": [1, 0]},
    "stablelm": _LLAMA,
    "starcoder2": _LLAMA,
    "glm4": _LLAMA | {"head_dim": 16},
    "gptj": _SMALL | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 8},
    "hunyuan": _LLAMA | {"model_type": "hunyuan_v1_dense", "head_dim": 16},
}
for _name in ("gpt2", "gptj"):
    FAMILIES[_name].pop("max_position_embeddings")
"""Settings of one tiny model a family; keys are transformers' `model_type`, or a name of ours and the type among the settings."""

QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
QWEN3_32B = QWEN3_8B | {
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
}
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
"""The shapes of real models, as their config.json says."""


def tiny_config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """The `config.json` of a tiny model, as a dict."""
    from transformers import AutoConfig

    return dict(AutoConfig.for_model(**{"model_type": family} | FAMILIES[family] | changes).to_dict())


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp32 causal language model in eval mode: two layers, 64 wide, 272 tokens; `changes` go to its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{"model_type": family} | FAMILIES[family] | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():  # norms and biases start at 1 and 0: move them, so that a test notices when one is lost
            for name, p in model.named_parameters():
                if p.ndim == 1 or "norm" in name:
                    p.add_(0.1 * torch.randn_like(p))
    model.eval()
    return model


def tiny_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte tokenizer: token i is byte-level BPE's i-th byte symbol, 256 `<|endoftext|>`, 257 `<|im_start|>`,
    258 `<|im_end|>` (eos), 259 `<|pad|>`; ChatML template unless told otherwise."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(SPECIALS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=SPECIALS[0], eos_token=SPECIALS[2], pad_token=SPECIALS[3], model_max_length=512
    )
    tokenizer.chat_template = template
    return tokenizer


def save_tiny(directory: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """Writes a tiny model and its tokenizer as transformers would (safetensors); returns the directory."""
    model = tiny_model(family, seed=seed, **changes)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def chats(count: int = 24) -> list[dict[str, Any]]:
    """Short two-turn chats of differing lengths, in the `messages` shape."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} plus {i % 7}?"},
                {"role": "assistant", "content": f"It is {i + i % 7}{'.' * (1 + i % 5)}"},
            ]
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes one JSON object a line; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def packed_base(family: str = "llama", *, kind: str = "nf4", seed: int = 0, **changes: Any) -> Any:
    """A tiny model as a loaded base in fp32 compute: its linear layers packed (kind `none`: left dense), no file behind it."""
    import hashlib
    from types import SimpleNamespace

    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from halfbyte.formats.config import FormatConfig
    from halfbyte.formats.packed import Format
    from halfbyte.formats.quantize import quantize
    from halfbyte.layers.linear import Linear4bit

    model = tiny_model(family, seed=seed, **changes).requires_grad_(False)
    fmt = FormatConfig.model_validate({"kind": kind})
    digest = hashlib.sha256(repr((family, kind, seed, sorted(changes.items()))).encode()).hexdigest()
    for path, module in list(model.named_modules()):
        if kind != "none" and isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings():
            weight = module.weight.T.contiguous() if isinstance(module, Conv1D) else module.weight
            layer = Linear4bit(quantize(weight, Format(kind, 64, nested=True)), module.bias)
            model.set_submodule(path, layer, strict=True)
    return SimpleNamespace(
        model=model,
        tokenizer=tiny_tokenizer(),
        name=f"tiny-{family}",
        revision=None,
        format=fmt,
        compute=torch.float32,
        digest=digest,
    )


def dense_twin(base: Any) -> PreTrainedModel:
    """A plain transformers model that carries the decoded weights of `base`."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    twin = AutoModelForCausalLM.from_config(copy.deepcopy(base.model.config), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            path, _, leaf = name.rpartition(".")
            module = base.model.get_submodule(path)
            own = getattr(module, leaf)
            turned = (
                leaf == "weight"
                and type(module) is not type(twin.get_submodule(path))
                and isinstance(twin.get_submodule(path), Conv1D)
            )
            parameter.copy_(own.T if turned else own)
    return twin


def environment(**changes: str) -> dict[str, str]:
    """The environment of a child process: ours, with the package importable."""
    source = str(Path(__file__).parents[1] / "src")
    return os.environ | {"PYTHONPATH": source, "NO_COLOR": "1"} | changes


def cli(*args: str, cwd: Path | None = None, stdin: str = "", timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `halfbyte ARGS` in a process of its own."""
    command = [sys.executable, "-m", "halfbyte.cli.main", *args]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, cwd=cwd, timeout=timeout, check=False, env=environment(**env)
    )


def trl_wheel(folders: pytest.TempPathFactory) -> Path:
    """TRL's wheel, unpacked (Apache-2.0; it stays outside the project); skips where no package index has it."""
    root = os.environ.get("HALFBYTE_CACHE")
    folder = Path(root) / "trl-1.16.0" if root else folders.mktemp("trl")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "trl").exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), "trl==1.16.0"]
        if subprocess.run(command, capture_output=True, timeout=120, check=False).returncode:
            pytest.skip("no package index has trl 1.16.0")
        with zipfile.ZipFile(next(folder.glob("trl-*.whl"))) as archive:
            archive.extractall(folder)
    return folder
