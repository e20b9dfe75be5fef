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


def formats() -> dict[str, dict[int, Format]]:
    """Every row of the tables, by block size; int8 has one scale a row, whatever the block."""
    rows: dict[str, dict[int, Format]] = {
        "nf4": {block: Format("nf4", block) for block in BLOCKS},
        "nf4, nested": {block: Format("nf4", block, nested=True) for block in BLOCKS},
        "fp4": {block: Format("fp4", block) for block in BLOCKS},
        "fp4, nested": {block: Format("fp4", block, nested=True) for block in BLOCKS},
        "int4, symmetric": {block: Format("int4", block) for block in BLOCKS},
    }
    for zero in ("int", "float", "min"):
        rows[f"int4, {zero}"] = {block: Format("int4", block, zero=zero) for block in BLOCKS}
    return rows | {"int8, a scale a row": {BLOCKS[0]: Format("int8")}}


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


def table(cells: dict[str, dict[int, str]]) -> str:
    """A Markdown table: a line a format, a column a block size."""
    lines = ["| block | " + " | ".join(map(str, BLOCKS)) + " |", "| --- |" + " ---: |" * len(BLOCKS)]
    for label, row in cells.items():
        lines.append(f"| {label} | " + " | ".join(row.get(block, "") for block in BLOCKS) + " |")
    return "\n".join(lines)


def tables(weights: list[Tensor]) -> tuple[str, str]:
    """Bits a weight and error, over these weights."""
    found = {label: {block: measure(fmt, weights) for block, fmt in row.items()} for label, row in formats().items()}
    bits = {label: {block: f"{value[0]:.3f}" for block, value in row.items()} for label, row in found.items()}
    errors = {label: {block: f"{value[1]:.4f}" for block, value in row.items()} for label, row in found.items()}
    return table(bits), table(errors)


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
    parts = dict(zip(("format-bits", "format-error-normal"), tables(normal()), strict=True))
    if options.model:
        # Kept whole, since every format needs all of them (0.5 GB in fp32 for a 135M model).
        parts["format-error-model"] = tables(list(matrices(options.model)))[1]
    for marker, text in parts.items():
        print(f"{marker}\n\n{text}\n")
        if options.docs:
            write_table(options.docs, marker, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
