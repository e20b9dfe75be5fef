"""What each format loses and what it costs: relative Frobenius error and bits a weight, on N(0, 1) and on a real model.

    python bench/format_error.py [MODEL] [--docs docs/concepts/formats.md]

MODEL is a .gguf or a .safetensors file; all of its matrices but embeddings and output head are measured, as one long vector.
error = ||dequantize(quantize(W)) - W|| / ||W||, decoded to fp32. The normal part is seeded and takes some seconds;
tests/formats/test_error_table.py repeats it and compares with the docs.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.formats.packed import BLOCKS, Format
from halfbyte.formats.quantize import dequantize, quantize

NORMAL_SHAPE = (1024, 4096)


def formats() -> dict[str, Format]:
    """Every row of the table."""
    rows: dict[str, Format] = {}
    for block in BLOCKS:
        rows[f"nf4, block {block}"] = Format("nf4", block)
        rows[f"nf4, block {block}, nested"] = Format("nf4", block, nested=True)
        rows[f"fp4, block {block}"] = Format("fp4", block)
        rows[f"int4, groups of {block}, symmetric"] = Format("int4", block)
        rows[f"int4, groups of {block}, int zero"] = Format("int4", block, zero="int")
        rows[f"int4, groups of {block}, float zero"] = Format("int4", block, zero="float")
        rows[f"int4, groups of {block}, min"] = Format("int4", block, zero="min")
    rows["int8, a scale a row"] = Format("int8")
    order = sorted(rows, key=lambda label: (rows[label].kind, rows[label].zero, rows[label].nested, rows[label].block))
    return {label: rows[label] for label in order}


def measure(fmt: Format, weights: Iterable[Tensor]) -> tuple[float, float]:
    """Bits a weight and relative Frobenius error over all weights together."""
    stored = count = 0
    error = norm = 0.0
    for weight in weights:
        packed = quantize(weight, fmt)
        stored += packed.nbytes
        count += weight.numel()
        error += (dequantize(packed, torch.float32) - weight).double().square().sum().item()
        norm += weight.double().square().sum().item()
    return 8 * stored / count, math.sqrt(error / norm)


def normal() -> list[Tensor]:
    """The synthetic weight: N(0, 1), seeded."""
    return [torch.randn(NORMAL_SHAPE, generator=torch.Generator().manual_seed(0))]


def matrices(path: Path) -> Iterator[Tensor]:
    """The matrices of a model file, fp32, one at a time; embeddings and output head left out."""
    if path.suffix == ".gguf":
        import gguf

        for tensor in gguf.GGUFReader(path).tensors:
            if len(tensor.shape) == 2 and not tensor.name.startswith(("token_embd", "output")):
                yield torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    else:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(name)
                if tensor.dim() == 2 and not any(word in name for word in ("embed", "wte", "wpe", "lm_head")):
                    yield tensor.float()


def table(model: Path | None) -> str:
    """The Markdown table; its last column only when a model is given."""
    lines = ["| format | bits a weight | error, N(0, 1) |" + (" error, model |" if model else "")]
    lines.append("| --- | ---: | ---: |" + (" ---: |" if model else ""))
    # Kept whole, since every format needs all of them (0.5 GB in fp32 for a 135M model).
    weights = list(matrices(model)) if model else []
    for label, fmt in formats().items():
        bits, error = measure(fmt, normal())
        real = f" {measure(fmt, weights)[1]:.4f} |" if model else ""
        lines.append(f"| {label} | {bits:.3f} | {error:.4f} |{real}")
    return "\n".join(lines)


def write_table(path: Path, marker: str, text: str) -> None:
    """Puts `text` between `<!-- marker -->` and `<!-- /marker -->`."""
    page = path.read_text(encoding="utf-8")
    before, _, rest = page.partition(f"<!-- {marker} -->\n")
    _, found, after = rest.partition(f"<!-- /{marker} -->")
    if not found:
        raise SystemExit(f"{path} has no markers `<!-- {marker} -->` and `<!-- /{marker} -->`")
    path.write_text(f"{before}<!-- {marker} -->\n{text}\n<!-- /{marker} -->{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--docs", type=Path, help="write the table into this file, between its markers")
    options = parser.parse_args()
    text = table(options.model)
    print(text)
    if options.docs:
        write_table(options.docs, "format-error", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
