"""The data-type table of the QLoRA paper, in small: perplexity of one model whose linear weights went through each format.

    python bench/datatypes.py MODEL TEXT [TEXT ...] [--tokens 16384] [--context 512] [--compute bf16|fp32] [--docs PAGE]

MODEL is a directory of a transformers model or a .gguf file; a TEXT is a .txt file or a .jsonl file with a `text` field a line.
Every linear weight but the output head is replaced by `dequantize(quantize(weight), bf16)`; the rest of the model and the
arithmetic are bf16 in every row (fp32 with --compute fp32), the loss fp32. Each document is cut into windows of `context`
tokens that see nothing before them. Cost: about 1.6 ms a token and row for a 135M model on a CPU core that has bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import transformers
from format_error import write_table
from torch import Tensor, nn

from halfbyte.formats.packed import Format
from halfbyte.formats.quantize import dequantize, quantize

ROWS: dict[str, Format | None] = {
    "bf16": None,
    "int8": Format("int8"),
    "int4": Format("int4", 64),
    "fp4": Format("fp4", 64),
    "nf4": Format("nf4", 64),
    "nf4 + nested": Format("nf4", 64, nested=True),
    "int4, groups of 32, min": Format("int4", 32, zero="min"),
}
PAPER_ORDER = (("int4", "fp4"), ("fp4", "nf4"), ("int4", "nf4"), ("nf4 + nested", "nf4"), ("int8", "bf16"))
"""Worse first. The paper's table 2 has int4, fp4, nf4 in this order; nesting and int8 it finds to cost next to nothing."""
RESULTS = Path(__file__).parent / "results" / "datatypes.json"


def documents(path: Path) -> list[str]:
    """The texts of a file."""
    if path.suffix == ".jsonl":
        return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    return path.read_text(encoding="utf-8").splitlines()


def windows(path: Path, tokenizer: transformers.PreTrainedTokenizerBase, context: int, tokens: int) -> list[Tensor]:
    """Token windows `[1, <= context]` of the file's documents in order, until they predict `tokens` tokens."""
    found, left = [], tokens
    for text in documents(path):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        for window in ids.split(context, dim=1):
            if window.shape[1] >= 32 and left > 0:
                found.append(window[:, : left + 1])
                left -= found[-1].shape[1] - 1
        if left <= 0:
            break
    return found


@torch.inference_mode()
def losses(model: nn.Module, texts: list[Tensor]) -> list[float]:
    """The summed negative log-likelihood of each window's predicted tokens."""
    found = []
    for ids in texts:
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        found.append(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item())
    return found


def paired(a: list[float], b: list[float], texts: list[Tensor]) -> tuple[float, float]:
    """Mean loss of `a` minus that of `b`, a token, and its standard error over windows."""
    tokens = sum(ids.shape[1] - 1 for ids in texts)
    differences = torch.tensor([x - y for x, y in zip(a, b, strict=True)], dtype=torch.float64)
    per_token = differences.sum().item() / tokens
    lengths = torch.tensor([ids.shape[1] - 1 for ids in texts], dtype=torch.float64)
    residual = differences - per_token * lengths
    n = len(differences)
    return per_token, math.sqrt(residual.square().sum().item() * n / max(n - 1, 1)) / tokens


def load(path: Path) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """The model in fp32 and its tokenizer."""
    transformers.logging.set_verbosity_error()
    where, extra = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, **extra)
    return transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **extra).eval(), tokenizer


def measure(
    model_path: Path, text_paths: list[Path], context: int, tokens: int, compute: torch.dtype, labels: list[str]
) -> dict[str, object]:
    """Everything that goes into the JSON file."""
    model, tokenizer = load(model_path)
    texts = {path.name: windows(path, tokenizer, context, tokens) for path in text_paths}
    head = model.get_output_embeddings()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    sources = {name: m.weight.detach().clone() for name, m in linears.items()}
    model.to(compute)
    rows = {}
    for label in labels:
        fmt = ROWS[label]
        start, stored, error, norm = time.monotonic(), 0, 0.0, 0.0
        for name, linear in linears.items():
            source = sources[name]
            packed = quantize(source, fmt, name=name) if fmt else None
            decoded = dequantize(packed, torch.bfloat16) if packed else source.to(torch.bfloat16)
            stored += packed.nbytes if packed else 2 * source.numel()
            error += (decoded.float() - source).double().square().sum().item()
            norm += source.double().square().sum().item()
            linear.weight.data.copy_(decoded)
        count = sum(w.numel() for w in sources.values())
        per_window = {name: losses(model, text) for name, text in texts.items()}
        row = {"bits": 8 * stored / count, "error": math.sqrt(error / norm), "losses": per_window}
        row["perplexity"] = {name: math.exp(sum(per_window[name]) / tokens_of(text)) for name, text in texts.items()}
        rows[label] = row
        seconds = time.monotonic() - start
        print(
            f"{label:24} {row['bits']:6.3f} bits, error {row['error']:.4f}, {row['perplexity']}, {seconds:.0f} s", file=sys.stderr
        )
    order = {}
    for worse, better in PAPER_ORDER:
        if not {worse, better} <= rows.keys():
            continue
        pairs = {name: paired(rows[worse]["losses"][name], rows[better]["losses"][name], text) for name, text in texts.items()}
        order[f"{worse} - {better}"] = pairs
    for row in rows.values():
        del row["losses"]
    return {
        "model": model_path.name,
        "context": context,
        "compute": str(compute)[6:],
        "predicted_tokens": {name: tokens_of(text) for name, text in texts.items()},
        "weights": count,
        "rows": rows,
        "loss_differences_and_standard_errors": order,
        "torch": torch.__version__,
    }


def tokens_of(texts: list[Tensor]) -> int:
    """Predicted tokens: all but each window's first."""
    return sum(ids.shape[1] - 1 for ids in texts)


def table(result: dict[str, object]) -> str:
    """The result as two Markdown tables: perplexities, and the differences that the paper's order rests on."""
    names = list(result["predicted_tokens"])
    titles = " | ".join(f"{Path(name).stem} ({result['predicted_tokens'][name]:,} tokens)" for name in names)
    lines = [f"| weights | bits a weight | relative error | {titles} |", "| --- | ---: | ---: |" + " ---: |" * len(names)]
    for label, row in result["rows"].items():
        cells = " | ".join(f"{row['perplexity'][name]:.2f}" for name in names)
        lines.append(f"| {label} | {row['bits']:.3f} | {row['error']:.4f} | {cells} |")
    lines += ["", f"| loss, worse - better in the paper | {titles} |", "| --- |" + " ---: |" * len(names)]
    for label, pairs in result["loss_differences_and_standard_errors"].items():
        cells = " | ".join(f"{pairs[name][0]:+.4f} ± {pairs[name][1]:.4f}" for name in names)
        lines.append(f"| {label} | {cells} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens to predict in each text")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--compute", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="some rows only: prints, writes nothing")
    parser.add_argument("--docs", type=Path, help="write the table into this file, between its markers")
    options = parser.parse_args()
    compute = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.compute]
    result = measure(options.model, options.texts, options.context, options.tokens, compute, options.rows)
    print(table(result))
    if options.rows != list(ROWS):
        return 0
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.docs:
        write_table(options.docs, "datatypes", table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
