"""What a packed output head costs in loss: one model with its head in 16 bits, int8 and nf4, on the same hidden states.

    python bench/head_parity.py MODEL DATA [DATA ...] [--rows 200] [--tokens 1024] [--base none|nf4] [--out FILE]

MODEL as a recipe names it (a directory, a .gguf file, `smollm2-135m`), DATA a file that `data.train` takes. SmolLM2 ties its head
to its embedding, which stays in 16 bits: the figure is of a copy of the head, as a model with a head of its own has it. Only the
head differs: the hidden states are computed once. Differences are per token, with their standard error over rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from halfbyte.checkpoints import huggingface
from halfbyte.data.config import DataConfig, SourceConfig
from halfbyte.data.loader import Loader
from halfbyte.data.prepare import prepare
from halfbyte.formats.config import FormatConfig
from halfbyte.formats.packed import Format
from halfbyte.formats.quantize import quantize
from halfbyte.kernels.cross_entropy import Head
from halfbyte.layers import head
from halfbyte.layers.forward import hidden_states
from halfbyte.objectives import sft


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that goes into the JSON file."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = huggingface.load(args.model, FormatConfig(kind=args.base), torch.bfloat16, device)
    own = head.find(base.model)
    assert isinstance(own.weight, torch.Tensor)
    formats = {"16bit": None} | {name: Format.of_head(FormatConfig(head=name)) for name in ("int8", "nf4")}
    heads: dict[str, Head] = {}
    stored: dict[str, float] = {}
    for name, fmt in formats.items():
        weight = own.weight if fmt is None else quantize(own.weight, fmt, name="head")
        heads[name] = Head(weight, own.bias, own.scale, own.cap)
        stored[name] = 8 * weight.nbytes / own.weight.numel()
    with TemporaryDirectory() as cache:
        sources = [SourceConfig(path=str(path)) for path in args.data]
        data = DataConfig(train=sources, eval=0, tokens=args.tokens)
        prepared = prepare(data, base.tokenizer, 0, Path(cache))
    loader = Loader(prepared.train, args.tokens, 1, 0)
    sums: dict[str, list[list[float]]] = {name: [] for name in heads}
    tokens: list[int] = []
    for batch in loader.sweep():
        for part in batch.microbatches(1):
            hidden = hidden_states(base.model, part.input_ids.to(device), part.position_ids.to(device), part.cu_seqlens)
            for name, this in heads.items():
                sums[name].append([float(value) for value in sft.sums(hidden, part.labels, this)])
            tokens.append(int((part.labels != -100).sum()))
        if len(tokens) >= args.rows:
            break
    return {
        "model": Path(str(args.model)).name,
        "base": args.base,
        "data": [Path(path).name for path in args.data],
        "tied": own.weight is base.model.get_input_embeddings().weight,
        "rows": len(tokens),
        "row_tokens": args.tokens,
        "tokens": sum(tokens),
        "heads": {name: row(sums[name], sums["16bit"], tokens) | {"bits": round(stored[name], 3)} for name in heads},
        "device": device,
        "torch": torch.__version__,
    }


def row(sums: list[list[float]], plain: list[list[float]], tokens: list[int]) -> dict[str, float]:
    """Loss and accuracy a token, and the difference of the loss from `plain` with its standard error over rows."""
    total, n = sum(tokens), len(tokens)
    losses = torch.tensor([s[0] for s in sums], dtype=torch.float64)
    differences = losses - torch.tensor([s[0] for s in plain], dtype=torch.float64)
    mean = float(differences.sum()) / total
    residual = differences - mean * torch.tensor(tokens, dtype=torch.float64)
    error = float((residual.square().sum() * n / max(n - 1, 1)).sqrt()) / total
    loss = float(losses.sum()) / total
    return {
        "loss": round(loss, 5),
        "accuracy": round(sum(s[1] for s in sums) / total, 5),
        "difference": round(mean, 5),
        "standard_error": round(error, 5),
        "percent": round(100 * mean / (loss - mean), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--base", choices=("none", "nf4"), default="none")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = json.dumps(measure(args), indent=1)
    print(found)
    if args.out:
        args.out.write_text(found + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
