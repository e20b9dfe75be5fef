"""What the token engine is measured as: an 8B model with its weights in one form or another, and numbers of the library set aside.

Baselines run in the same engine: bf16 weights through cuBLAS, and bitsandbytes' 4-bit product, both without an adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

import torch  # noqa: E402
from gemv_gpu import random_packed  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from halfbyte.adapters import lora  # noqa: E402
from halfbyte.adapters.config import AdapterConfig  # noqa: E402
from halfbyte.formats.packed import Packed  # noqa: E402
from halfbyte.generate import step  # noqa: E402
from halfbyte.generate.engine import Engine  # noqa: E402
from halfbyte.generate.step import links  # noqa: E402
from halfbyte.kernels.decode_step import fused  # noqa: E402
from halfbyte.kernels.glu import glu  # noqa: E402
from halfbyte.kernels.lora_linear.members import Member  # noqa: E402
from halfbyte.kernels.packed_gemv import Product, launch  # noqa: E402
from halfbyte.layers import swap  # noqa: E402

PLACES = 2048
SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
         "max_position_embeddings": 8192}  # fmt: skip
VOCABULARY = 128256


@dataclass(frozen=True)
class Setup:
    """weights: bf16 (cuBLAS), nf4, nf4+adapter or bitsandbytes. programs, warps, read: how attention is cut; None as it is.

    many: warps, programs a multiprocessor and registers of a product with more than 8 rows.
    """

    weights: str
    rows: int = 1
    early: bool = True
    programs: int | None = None
    warps: int | None = None
    read: int | None = None
    many: tuple[int, int, int | None] | None = None

    @property
    def cut(self) -> str:
        """What is cut otherwise, in words."""
        return ", ".join(f"{n} {v}" for n in ("programs", "warps", "read", "many") if (v := getattr(self, n)) is not None)


@contextmanager
def set_up(setup: Setup) -> Iterator[None]:
    """While inside, the library's own numbers are those of `setup`."""
    before = step.PROGRAMS, fused.WARPS, fused.READ, launch.MANY
    users = [m for name, m in list(sys.modules.items()) if name.startswith("halfbyte.") and "hopper" in vars(m)]
    asked = {m: m.hopper for m in users}
    asked_for = (setup.programs, setup.warps, setup.read, setup.many)
    step.PROGRAMS, fused.WARPS, fused.READ, launch.MANY = (
        old if new is None else new for old, new in zip(before, asked_for, strict=True)
    )
    try:
        for m in users if not setup.early else ():
            m.hopper = lambda device: False
        yield
    finally:
        step.PROGRAMS, fused.WARPS, fused.READ, launch.MANY = before
        for m, old in asked.items():
            m.hopper = old


def model_of(layers: int, **sizes: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", num_hidden_layers=layers, **sizes, rope_theta=500000.0, rms_norm_eps=1e-5, tie_word_embeddings=False
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.requires_grad_(False)
    return model


def pack(model: Any, make: Callable[[nn.Linear], Packed]) -> None:
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not path.endswith("lm_head"):
            swap.pack_module(model, path, make(module))


def adapt(model: Any) -> None:
    adapter = lora.attach(model, AdapterConfig(rank=16), 0)
    with torch.no_grad():
        for _, parameter, role in adapter.parameters():
            if role == "lora_b":
                parameter.normal_(0, 0.02)


class Bench:
    """One model through the setups, in their order: bf16 first, since what is packed stays packed."""

    def __init__(self, layers: int, vocabulary: int = VOCABULARY) -> None:
        self.model = model_of(layers, vocab_size=vocabulary, **SIZES)
        assert all(row.adopted for row in swap.adopt(self.model).layers), "not adopted"
        self.packed = self.adapted = False

    def engine(self, setup: Setup) -> Engine:
        """Captured. Call it, and the engine, within `set_up`."""
        if setup.weights != "bf16" and not self.packed:
            pack(self.model, lambda module: random_packed(*module.weight.shape))
            self.packed = True
            torch.cuda.empty_cache()
        if setup.weights == "nf4+adapter" and not self.adapted:
            adapt(self.model)
            self.adapted = True
        engine = Engine(self.model, setup.rows, PLACES, 300)
        if setup.weights == "bf16":
            as_cublas(engine)
        if setup.weights == "bitsandbytes":
            as_bitsandbytes(engine)
        engine.capture()
        return engine


def as_cublas(engine: Engine) -> None:
    """The engine's products as plain matrices multiplied by cuBLAS: q/k/v stacked, gate/up stacked, no kernels of ours in them."""

    def stacked(product: Product) -> Product:
        weight = torch.cat([m.weight for m in product.members])  # type: ignore[misc]
        return Product((Member(weight, None, None),), None, product.width, weight.shape[0], None, "cuBLAS")

    made = [
        replace(p, qkv=stacked(p.qkv), out=stacked(p.out), inputs=stacked(p.inputs), down=stacked(p.down)) for p in engine.products
    ]
    rows = len(engine.b.token)
    engine.products, engine.head = made, stacked(engine.head)
    engine.links = links(engine.reading, made, rows)
    engine.b = replace(engine.b, wide=torch.empty(rows, made[0].inputs.rows, dtype=engine.dtype, device="cuda"))


THEIRS: dict[int, list[tuple[Tensor, Any]]] = {}
OURS = step.multiply


def as_bitsandbytes(engine: Engine) -> None:
    """The layers' products by bitsandbytes, member by member as its linear layers call it; the head by cuBLAS."""
    import bitsandbytes as bnb

    def quantised(product: Product) -> Product:
        made = replace(product, launch=None, why_not="bitsandbytes")
        THEIRS[id(made)] = [
            bnb.functional.quantize_4bit(
                torch.randn(m.weight.shape, device="cuda", dtype=torch.bfloat16) * 0.02, quant_type="nf4", compress_statistics=True
            )
            for m in product.members
        ]
        return made

    def multiply(product: Product, x: Tensor, out: Tensor, add: Tensor | None = None, *others: Any, **more: Any) -> None:
        weights = THEIRS.get(id(product))
        if weights is None:
            OURS(product, x, out, add, *others, **more)
            return
        found = [bnb.matmul_4bit(x, codes.t(), state) for codes, state in weights]
        if product.activation is not None:
            glu(found[0], found[1], product.activation, out)
        elif add is not None:
            torch.add(add, found[0], out=out)
        else:
            torch.cat(found, 1, out=out)

    THEIRS.clear()
    engine.products = [
        replace(p, qkv=quantised(p.qkv), out=quantised(p.out), inputs=quantised(p.inputs), down=quantised(p.down))
        for p in engine.products
    ]
    engine.links = links(engine.reading, engine.products, len(engine.b.token))
    engine.head = replace(engine.head, launch=None, why_not="cuBLAS")
    step.multiply = multiply  # type: ignore[assignment]
