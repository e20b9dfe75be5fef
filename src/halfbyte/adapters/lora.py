"""LoRA (Hu et al., arXiv 2106.09685): y = x Wᵀ + s · drop(x) Aᵀ Bᵀ, with W frozen in any format and only A and B learning.

One layer for all formats: `LoraLinear` keeps the module it wraps under `base_layer` and contributes weight, bias and adapter to
the same grouped product as everything else. A starts as in PEFT (kaiming uniform, a = sqrt 5), B at zero, so a fresh adapter
changes nothing. Cost: r · (K + N) fp32 weights a layer, and as much again for each of gradient and Adam's two moments.

Letters: N output features, K input features, r rank.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from halfbyte.adapters import targets
from halfbyte.adapters.config import AdapterConfig
from halfbyte.adapters.islands import trainable_in_fp32
from halfbyte.errors import ModelError
from halfbyte.kernels.lora_linear import Dropout, LowRank
from halfbyte.layers.linear import Operand, linear_group
from halfbyte.layers.operands import shape_of, supports_operand
from halfbyte.layers.swap import replace

log = logging.getLogger("halfbyte")
Role = Literal["lora_a", "lora_b", "dense", "no_decay"]
# One row for everybody until the run tells the row length.
_ONE_ROW = 1 << 30


class LoraLinear(nn.Module):
    """A frozen linear module and its low-rank adapter.

    lora_a: fp32 `[r, K]`. lora_b: fp32 `[N, r]`. scale: s. number: the layer's number in dropout masks.
    """

    def __init__(self, base_layer: nn.Module, lora_a: Tensor, lora_b: Tensor, scale: float, number: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_a = nn.Parameter(lora_a)
        self.lora_b = nn.Parameter(lora_b)
        self.scale = scale
        self.number = number
        self.active = True
        self.mask: Dropout | None = None
        self.out_features, self.in_features = shape_of(base_layer)

    @property
    def weight(self) -> Tensor:
        """The base's weight as the wrapped module gives it (decoded afresh if packed), for code that looks at dtype or device."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias = self.base_layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def operand(self) -> Operand:
        base = supports_operand(self.base_layer)
        assert base is not None, "the wrapped module cannot be run as an operand"
        below = base.operand()
        if not self.active:
            return below
        lora = LowRank(self.lora_a, self.lora_b, self.scale, self.number)
        return Operand(below.weight, below.bias, lora, self.mask if self.training else None)

    def forward(self, x: Tensor) -> Tensor:
        return linear_group(x, [self])[0]

    def extra_repr(self) -> str:
        return f"rank {self.lora_a.shape[0]}, scale {self.scale:g}"


@dataclass
class Adapter:
    """Everything that learns on a model: its LoRA layers, and parameters of the base that were declared trainable (in fp32).

    layers: LoRA layers by path. originals: value in the base of every trained parameter of the base, by name.
    """

    model: nn.Module
    config: AdapterConfig
    layers: dict[str, LoraLinear] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)

    def parameters(self) -> list[tuple[str, nn.Parameter, Role]]:
        """(path in the model, parameter, role) of everything that learns, in the model's order; all fp32.

        Roles: `lora_a`, `lora_b`, `dense` (a matrix of the base), `no_decay` (biases and norms).
        """
        return [(name, p, _role(name, p)) for name, p in self.model.named_parameters() if p.requires_grad]

    @contextmanager
    def enabled(self, on: bool) -> Iterator[None]:
        """Within it the adapter acts (True) or the base answers (False), trained parameters of the base included."""
        before = {path: layer.active for path, layer in self.layers.items()}
        learned: dict[str, Tensor] = {}
        for layer in self.layers.values():
            layer.active = on
        try:
            with torch.no_grad():
                if not on:
                    for name, original in self.originals.items():
                        parameter = self.model.get_parameter(name)
                        learned[name] = parameter.detach().clone()
                        parameter.copy_(original)
            yield
        finally:
            for path, layer in self.layers.items():
                layer.active = before[path]
            with torch.no_grad():
                for name, value in learned.items():
                    self.model.get_parameter(name).copy_(value)

    def set_dropout_state(self, seed: int, step: int, first_row: int, tokens: int | None = None) -> None:
        """Numbers the dropout masks of the next microbatch. tokens: row length (kept from call to call)."""
        if not self.config.dropout:
            return
        for mask in self._masks(tokens):
            mask.state.copy_(torch.tensor([seed, step, first_row]))

    def _masks(self, tokens: int | None) -> list[Dropout]:
        """One mask state a device; made, or remade for another row length, on demand."""
        masks: dict[torch.device, Dropout] = {}
        for layer in self.layers.values():
            device = layer.lora_a.device
            length = tokens or (layer.mask.tokens if layer.mask is not None else _ONE_ROW)
            if device not in masks:
                same = layer.mask is not None and layer.mask.tokens == length and layer.mask.state.device == device
                state = torch.zeros(3, dtype=torch.int64, device=device)
                masks[device] = layer.mask if same and layer.mask is not None else Dropout(self.config.dropout, state, length)
            layer.mask = masks[device]
        return list(masks.values())

    @property
    def trainable(self) -> int:
        """Parameters that learn."""
        return sum(p.numel() for _, p, _ in self.parameters())

    def summary(self) -> str:
        """One line for people: how much learns, as a share of base and adapter together."""
        added = sum(layer.lora_a.numel() + layer.lora_b.numel() for layer in self.layers.values())
        share = self.trainable / (_base_params(self.model) + added)
        return f"{self.trainable:,} trainable parameters ({share:.2%}) in {len(self.layers)} LoRA layers"

    def remove(self) -> None:
        """Takes the LoRA layers off the model and gives trained parameters of the base their old values back."""
        for path, layer in self.layers.items():
            replace(self.model, path, layer.base_layer)
        with torch.no_grad():
            for name, original in self.originals.items():
                self.model.get_parameter(name.replace(".base_layer.", ".")).copy_(original)
        self.layers, self.originals = {}, {}
        self.model.requires_grad_(False)


def _role(name: str, parameter: nn.Parameter) -> Role:
    leaf = name.rpartition(".")[2]
    if leaf == "lora_a":
        return "lora_a"
    if leaf == "lora_b":
        return "lora_b"
    return "dense" if parameter.ndim > 1 else "no_decay"


def _base_params(model: nn.Module) -> int:
    """Weights of the base: packed ones counted as weights, not as bytes; tied ones once."""
    from halfbyte.layers.linear import Linear4bit

    stored = {
        id(p) for m in model.modules() if isinstance(m, Linear4bit) for n, p in m.named_parameters(recurse=False) if n != "bias"
    }
    packed = sum(m.packed.numel for m in model.modules() if isinstance(m, Linear4bit))
    return packed + sum(p.numel() for n, p in model.named_parameters() if id(p) not in stored and ".lora_" not in n)


def attach(model: nn.Module, config: AdapterConfig, seed: int) -> Adapter:
    """Puts a fresh adapter on `model`, in place. Everything else is frozen.

    A is drawn from (seed, module path), so it depends neither on order nor on what else is adapted. Raises ModelError for
    targets that match nothing (`adapter.no-target`) and for a model that carries an adapter already.
    """
    assert config.kind == "lora", "full fine-tuning is adapters.full"
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise ModelError("the model already carries an adapter", hint="remove it first: adapter.remove()", code="adapter.twice")
    paths = targets.match(model, config)
    whole = targets.modules_named(model, config.modules_to_save)
    model.requires_grad_(False)
    adapter = Adapter(model, config)
    for number, path in enumerate(paths):
        adapter.layers[path] = _wrap(model, path, config, seed, number)
    names = [f"{path}.{name}" for path in whole for name, _ in model.get_submodule(path).named_parameters()]
    names += _biases(model, config)
    adapter.originals = trainable_in_fp32(model, sorted(set(names)))
    if config.dropout:
        adapter.set_dropout_state(seed, 0, 0)
    _warn_unused(config, paths)
    log.info("adapter: %s", adapter.summary())
    return adapter


def _wrap(model: nn.Module, path: str, config: AdapterConfig, seed: int, number: int) -> LoraLinear:
    base = model.get_submodule(path)
    rank = int(targets.patterned(config.rank_pattern, path, config.rank))
    alpha = targets.patterned(config.alpha_pattern, path, config.alpha)
    n, k = shape_of(base)
    device = next(base.parameters()).device
    lora_a = nn.init.kaiming_uniform_(torch.empty(rank, k), a=math.sqrt(5), generator=_generator(seed, path)).to(device)
    lora_b = torch.zeros(n, rank, device=device)
    layer = LoraLinear(base, lora_a, lora_b, alpha / (math.sqrt(rank) if config.rslora else rank), number)
    replace(model, path, layer)
    return layer


def _generator(seed: int, path: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _biases(model: nn.Module, config: AdapterConfig) -> list[str]:
    if config.bias == "none":
        return []
    suffix = "base_layer.bias" if config.bias == "lora_only" else "bias"
    return [name for name, _ in model.named_parameters() if name == suffix or name.endswith(f".{suffix}")]


def _warn_unused(config: AdapterConfig, paths: list[str]) -> None:
    for name, table in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in table:
            if not any(targets.patterned({key: 1}, path, 0) for path in paths):
                log.warning("adapter.%s: `%s` matches no adapted module", name, key)
