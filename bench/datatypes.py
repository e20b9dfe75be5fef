"""The data-type table of the QLoRA paper, in small: perplexity of one model whose linear weights went through each format.

    python bench/datatypes.py MODEL TEXT [TEXT ...] [--tokens 16384] [--context 512] [--compute bf16|fp32] [--docs PAGE]

MODEL is a directory of a transformers model or a .gguf file; a TEXT is a .txt file or a .jsonl file with a `text` field a line.
Every linear weight but the output head is replaced by `dequantize(quantize(weight), bf16)`; the rest of the model and the
arithmetic are bf16 in every row (fp32 with --compute fp32), the loss fp32. Each document is cut into windows of `context`
tokens that see nothing before them. Cost: about 1.3 ms a token and row for a 135M model on a CPU core that has bf16.
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
WORST_TO_BEST = ("int4", "fp4", "nf4")
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
def perplexity(model: nn.Module, texts: list[Tensor]) -> float:
    """exp of the mean negative log-likelihood over all predicted tokens."""
    total, count = 0.0, 0
    for ids in texts:
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        total += nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


def load(path: Path) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """The model in fp32 and its tokenizer."""
    transformers.logging.set_verbosity_error()
    where, extra = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, **extra)
    return transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **extra).eval(), tokenizer


def measure(model_path: Path, text_paths: list[Path], context: int, tokens: int, compute: torch.dtype) -> dict[str, object]:
    """Everything that goes into the JSON file."""
    model, tokenizer = load(model_path)
    texts = {path.name: windows(path, tokenizer, context, tokens) for path in text_paths}
    head = model.get_output_embeddings()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    sources = {name: m.weight.detach().clone() for name, m in linears.items()}
    model.to(compute)
    rows = {}
    for label, fmt in ROWS.items():
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
        row = {"bits": 8 * stored / count, "error": math.sqrt(error / norm)}
        row["perplexity"] = {name: perplexity(model, text) for name, text in texts.items()}
        rows[label] = row
        print(
            f"{label:24} {row['bits']:6.3f} bits  error {row['error']:.4f}  {row['perplexity']}  {time.monotonic() - start:.0f} s",
            file=sys.stderr,
        )
    predicted = {name: sum(t.shape[1] - 1 for t in text) for name, text in texts.items()}
    return {
        "model": model_path.name,
        "context": context,
        "compute": str(compute)[6:],
        "predicted_tokens": predicted,
        "weights": count,
        "rows": rows,
        "torch": torch.__version__,
    }


def in_paper_order(rows: dict[str, dict[str, dict[str, float]]], text: str) -> bool:
    """int4 worse than fp4 worse than nf4, and nesting costs less than 1 %."""
    values = [rows[label]["perplexity"][text] for label in WORST_TO_BEST]
    nested = rows["nf4 + nested"]["perplexity"][text]
    return values == sorted(values, reverse=True) and nested < 1.01 * values[-1]


def table(result: dict[str, object]) -> str:
    """The result as a Markdown table."""
    names = list(result["predicted_tokens"])
    lines = ["| weights | bits a weight | relative error | " + " | ".join(f"perplexity, {Path(n).stem}" for n in names) + " |"]
    lines.append("| --- | ---: | ---: |" + " ---: |" * len(names))
    for label, row in result["rows"].items():
        cells = " | ".join(f"{row['perplexity'][name]:.2f}" for name in names)
        lines.append(f"| {label} | {row['bits']:.3f} | {row['error']:.4f} | {cells} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens to predict in each text")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--compute", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--docs", type=Path, help="write the table into this file, between its markers")
    options = parser.parse_args()
    compute = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.compute]
    result = measure(options.model, options.texts, options.context, options.tokens, compute)
    print(table(result))
    red = [name for name in result["predicted_tokens"] if not in_paper_order(result["rows"], name)]
    if red:
        print(f"not in the paper's order (int4 > fp4 > nf4, nested within 1 %): {', '.join(red)}; nothing written", file=sys.stderr)
        return 1
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.docs:
        write_table(options.docs, "datatypes", table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
