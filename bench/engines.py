"""The implementations that `throughput.py` compares: each as a step function over the same rows of tokens.

Ours trains on packed rows of documents with fp32 AdamW states and clips. The peers run bitsandbytes' 8-bit AdamW, or torch's fused
AdamW where `--optimizer ours-fused` asks for it, and do not clip. On packed data Unsloth gets our rows the way its own padding-free
collator hands them over: one row of all documents, position ids that restart, `packed_seq_lengths`, no mask, no label at a start.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
KNOWN_TOKENS = 49_000
"""Random tokens are drawn below this: every tokenizer in question has them."""
BATCHES = 8
STANDING = ExitStack()
"""What an engine has entered and leaves open: a context manager that nobody keeps is left at once."""


@dataclass(frozen=True)
class Case:
    """What is run. layers: 0 means all. recompute: none or full; offload: layer inputs go to the host. packed: real examples.

    held: decoded weights stay, where memory is no matter. graphs: our layers run as CUDA graphs.
    deterministic: as `train.deterministic` has it, ours alone.
    """

    impl: str
    size: str = "8b"
    layers: int = 0
    rows: int = 4
    tokens: int = 2048
    recompute: str = "none"
    offload: bool = False
    compute: str = "bf16"
    optimizer: str = "theirs"
    packed: bool = False
    held: bool = False
    graphs: bool = False
    deterministic: bool = False

    @property
    def dense(self) -> bool:
        """Whether the base is kept in 16 bits."""
        return "bf16" in self.impl

    def directory(self, root: str) -> Path:
        from shapes import SIZES

        layers = self.layers or SIZES[self.size].layers
        return Path(root) / f"{self.size}-{layers}{'-dense' if self.dense else ''}"

    def arguments(self) -> list[str]:
        """The command line that means this case."""
        words: list[str] = []
        for name, value in asdict(self).items():
            if value is True:
                words += [f"--{name}"]
            elif value is not False:
                words += [f"--{name}", str(value)]
        return words


@dataclass
class Rows:
    """One microbatch. ids, positions: int64 [1, S] on the device. labels (shifted) int64 [1, S], bounds int32 [D+1]: on the CPU."""

    ids: Any
    labels: Any
    positions: Any
    bounds: Any

    @property
    def trained(self) -> int:
        return int((self.labels != -100).sum())

    @property
    def documents(self) -> list[int]:
        """Lengths of the documents, none empty."""
        return [n for n in self.bounds.diff().tolist() if n]


@dataclass
class Engine:
    """A model that trains. `forward_backward(i)`: the loss of batch i, gradients left behind; `step(i)`: an optimizer step more."""

    model: Any
    forward_backward: Callable[[int], Any]
    step: Callable[[int], Any]
    trainable: int
    batches: list[Rows]


def feed(case: Case, where: Path, data: str | None, device: str) -> list[Rows]:
    """Batches of rows: random tokens, one document a row; or the examples of `data` packed by us, in the real lengths."""
    import torch

    if case.packed:
        return _packed(case, where, data, device)
    torch.manual_seed(0)
    total = case.rows * case.tokens
    batches = []
    for _ in range(BATCHES):
        ids = torch.randint(0, KNOWN_TOKENS, (1, total), device=device)
        labels = ids.cpu().roll(-1)
        labels[0, case.tokens - 1 :: case.tokens] = -100
        positions = torch.arange(case.tokens, device=device).repeat(case.rows)[None]
        bounds = torch.arange(0, total + 1, case.tokens, dtype=torch.int32)
        batches.append(Rows(ids, labels, positions, bounds))
    return batches


def _packed(case: Case, where: Path, data: str | None, device: str) -> list[Rows]:
    from transformers import AutoTokenizer

    from halfbyte.data.config import DataConfig
    from halfbyte.data.loader import Loader
    from halfbyte.data.prepare import prepare

    assert data, "packed rows need --data"
    config = DataConfig.model_validate({"train": [{"path": data}], "eval": 0, "tokens": case.tokens})
    prepared = prepare(config, AutoTokenizer.from_pretrained(where), 0, where / "tokens")
    loader = Loader(prepared.train, case.tokens, case.rows, 0)
    batches = []
    for i in range(BATCHES):
        part = next(loader.at(i).microbatches(case.rows))
        batches.append(Rows(part.input_ids.to(device), part.labels, part.position_ids.to(device), part.cu_seqlens))
    return batches


def ours(case: Case, where: Path, batches: list[Rows], device: str, products: Any = None) -> Engine:
    """This package, through the functions that `halfbyte train` is made of. products: how groups multiply, if given."""
    import torch

    from halfbyte.adapters import lora
    from halfbyte.adapters.config import AdapterConfig
    from halfbyte.checkpoints import huggingface
    from halfbyte.formats.config import FormatConfig
    from halfbyte.layers import head
    from halfbyte.memory.rungs import LARGE
    from halfbyte.objectives import sft
    from halfbyte.optim import flat as flat_buffers
    from halfbyte.optim.adamw import AdamW
    from halfbyte.optim.config import OptimConfig
    from halfbyte.train.determinism import deterministic

    if case.deterministic:
        STANDING.enter_context(deterministic(True))
    kind = "none" if case.dense else "nf4"
    base = huggingface.load(str(where), FormatConfig(kind=kind), torch.bfloat16, device)  # type: ignore[arg-type]
    adapter = lora.attach(base.model, AdapterConfig(rank=RANK, alpha=RANK, targets="all-linear"), seed=0)
    flat = flat_buffers.flatten(adapter.parameters())
    _fuse(base.model, case, products or products_of(case))
    base.model.train()
    optimizer, one = AdamW(flat, OptimConfig()), torch.ones((), device=device)
    output = head.find(base.model)
    trained = [b.trained for b in batches]
    rows = _rows(base.model, case, device)
    # As the plan has it where there is room to keep everything.
    chunks = LARGE if case.recompute == "none" else 1.0

    def forward_backward(i: int) -> Any:
        batch = batches[i % len(batches)]
        hidden = rows(batch.ids, batch.positions, batch.bounds)
        loss = sft.loss(hidden, batch.labels, output, trained[i % len(batches)], chunks=chunks)
        loss.backward()
        return loss.detach()

    def step(i: int) -> Any:
        loss = forward_backward(i)
        optimizer.clip(loss, one, 1.0)
        optimizer.step(1e-4)
        return loss

    return Engine(base.model, forward_backward, step, flat.numel, batches)


def products_of(case: Case) -> Any:
    """How the groups of our layers multiply."""
    from halfbyte.kernels.products import Augmented, Float8

    return Float8() if case.compute == "fp8" else Augmented()


def _rows(model: Any, case: Case, device: str) -> Any:
    """The layers as launches, or as graphs."""
    import torch

    from halfbyte.train import graphs

    made = graphs.of("on" if case.graphs else "off", model, torch.device(device), "auto", 0, print)
    made.on = case.graphs
    return made


def _fuse(model: Any, case: Case, products: Any) -> None:
    """The layers as `case` wants them: what they keep for backward, and how they multiply."""
    from halfbyte.layers.fused.keep import EVERYTHING, INPUTS, OFFLOADED
    from halfbyte.layers.fused.prepare import prepare

    keep = OFFLOADED if case.offload else INPUTS if case.recompute == "full" else EVERYTHING
    done = prepare(model, keep, products, in_place=True, decoded=case.held)
    assert not done.left, done.summary()


def unsloth(case: Case, where: Path, longest: int) -> Any:
    """Unsloth's model with its LoRA attached, in training mode."""
    os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", UNSLOTH_STABLE_DOWNLOADS="1")
    import torch
    import unsloth  # noqa: F401  (must come before torch)
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(where), max_seq_length=longest, dtype=torch.bfloat16, load_in_4bit=not case.dense, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0,
        target_modules=TARGETS,
        bias="none",
        use_gradient_checkpointing="unsloth" if case.recompute == "full" else False,
    )
    FastLanguageModel.for_training(model, use_gradient_checkpointing=case.recompute == "full")
    if case.packed:
        from unsloth.utils.packing import mark_allow_overlength

        mark_allow_overlength(model)
    return model


def peft(case: Case, where: Path, device: str, dtype: Any = None) -> Any:
    """transformers + PEFT (+ bitsandbytes) (+ Liger), in training mode. dtype: of what is not packed, bf16 unless given."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = dtype or torch.bfloat16
    if case.impl.endswith("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    quantized = {}
    if "bnb" in case.impl:
        quantized["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    place = {"": 0 if device == "cuda" else device}
    model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, device_map=place, attn_implementation="sdpa", **quantized)
    model.config.use_cache = False
    if case.recompute == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM"))
    return model.train()


def theirs(case: Case, where: Path, batches: list[Rows], device: str) -> Engine:
    """A peer; its inputs are made before it is timed."""
    if case.packed and case.impl != "unsloth":
        raise NotImplementedError("packed rows are compared with Unsloth's only")
    model = unsloth(case, where, case.tokens) if case.impl == "unsloth" else peft(case, where, device)
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    if case.optimizer == "ours-fused":
        optimizer: Any = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0, fused=True)
    else:
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(trainable, lr=1e-4)
    inputs = [_inputs(case, rows) for rows in batches]

    def forward_backward(i: int) -> Any:
        with torch.autocast(device, torch.bfloat16):
            loss = model(**inputs[i % len(inputs)]).loss
        loss.backward()
        return loss.detach()

    def step(i: int) -> Any:
        loss = forward_backward(i)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return Engine(model, forward_backward, step, sum(p.numel() for p in trainable), batches)


def _inputs(case: Case, rows: Rows) -> dict[str, Any]:
    """What a peer's forward takes: labels at their own tokens, shifted inside."""
    import torch

    if not case.packed:
        ids = rows.ids.view(case.rows, case.tokens)
        return {"input_ids": ids, "labels": ids}
    labels = rows.labels.roll(1)
    starts = rows.bounds[:-1].long()
    labels[0, starts[starts < labels.shape[1]]] = -100
    lengths = torch.tensor(rows.documents, dtype=torch.int32)
    return {
        "input_ids": rows.ids,
        "labels": labels.to(rows.ids.device),
        "position_ids": rows.positions,
        "packed_seq_lengths": lengths,
    }


def engine(case: Case, where: Path, data: str | None, device: str) -> Engine:
    """The implementation that `case` names, loaded. Unsloth wants to be imported before everything else."""
    if case.impl == "unsloth":
        os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", UNSLOTH_STABLE_DOWNLOADS="1")
        import unsloth  # noqa: F401
    batches = feed(case, where, data, device)
    build = ours if case.impl.startswith("halfbyte") else theirs
    return build(case, where, batches, device)
