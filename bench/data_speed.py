"""How fast chats become rows, and in how much memory: halfbyte's `prepare` beside TRL's `SFTTrainer._prepare_dataset`.

    python bench/data_speed.py --data FOLDER [--examples 100000] [--turns 2] [--theirs "mask" "mask, 2 processes"] [--out FILE]

FOLDER holds `alpaca_en_demo.json` and `alpaca_zh_demo.json`, or one of them (docs/guides/data.md says where they are from). Chats
are made from them, each with a question and an answer that are not a pair elsewhere and a number of its own, and written to one
JSONL file; the tokenizer (`--tokenizer FOLDER`, or the bundled one) and the chat template are SmolLM2's, with `{% generation %}`
around the answer, which TRL needs for a mask. `trl` must be importable where anything is compared.

Each side is a process of its own and does all that stands between the file and rows of 2,048 tokens: read, render, tokenise,
mask, pack. Sides take turns. Time runs from the first line read to the last row packed, without imports and without loading the
tokenizer; memory is the sum of the proportional set sizes of the process and its children, sampled ten times a second. `again`
is a second start of halfbyte, from its cache. `theirs` is TRL as it comes (`default`: everything is learned), learning answers only
(`mask`), or that in so many processes (`mask, 16 processes`). Gate: on 2,000 chats both sides give the same tokens and the same
mask, or nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

TOKENS = 2048
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant"
    " named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THEIRS = re.compile(r"(default|mask)(?:, (\d+) processes)?")


def options(side: str) -> dict[str, Any]:
    """TRL's settings for a side, such as `mask, 2 processes`."""
    found = THEIRS.fullmatch(side)
    if found is None:
        raise SystemExit(f"`{side}` is no side: default | mask | default, N processes | mask, N processes")
    mask = {"assistant_only_loss": True} if found[1] == "mask" else {}
    return {**mask, **({"dataset_num_proc": int(found[2])} if found[2] else {})}


def write_chats(folder: Path, count: int, file: Path) -> None:
    """A JSONL file of `count` chats."""
    sets = [found for name in ("en", "zh") if (found := folder / f"alpaca_{name}_demo.json").is_file()]
    records = [record for found in sets for record in json.loads(found.read_text(encoding="utf-8"))]
    with file.open("x", encoding="utf-8") as stream:
        for i in range(count):
            asked, answered = records[i % len(records)], records[(i * 7 + i // len(records)) % len(records)]
            question = f"{i}. {asked['instruction']}\n{asked['input']}".strip()
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answered["output"]}]
            stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def tokenizer(folder: str | None) -> Any:
    from transformers import AutoTokenizer

    if folder is None:
        from halfbyte.checkpoints import bundled

        file = Path(bundled.fetch())
        loaded = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    else:
        loaded = AutoTokenizer.from_pretrained(folder)
    loaded.chat_template = TEMPLATE
    return loaded


class Clock:
    """Seconds since it was made, of the wall and of the processors: this process's and those of its ended children."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), sum(os.times()[:4])

    def __call__(self) -> dict[str, float]:
        return {"seconds": round(time.perf_counter() - self.wall, 2), "cpu_seconds": round(sum(os.times()[:4]) - self.cpu, 2)}


def ours(data: Path, work: Path, tok: Any, workers: int | None) -> dict[str, Any]:
    """Prepares `data` with halfbyte. Returns seconds, rows, and the efficiency of the packing."""
    from halfbyte.data.config import DataConfig
    from halfbyte.data.prepare import prepare

    config = DataConfig(train=[{"path": str(data)}], eval=0, tokens=TOKENS, workers=workers)
    clock = Clock()
    prepared = prepare(config, tok, 0, work / "cache")
    spent = clock()
    return {**spent, "tokens": prepared.train.tokens(), "rows": prepared.report.rows, "efficiency": prepared.report.efficiency}


def theirs(data: Path, work: Path, tok: Any, side: str, packing: bool = True) -> dict[str, Any]:
    """Prepares `data` with TRL. Returns seconds, rows, and the dataset."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), **shape))
    place = {"output_dir": str(work / "out"), "report_to": [], "use_cpu": True, "bf16": False}
    config = SFTConfig(max_length=TOKENS, packing=packing, **place, **options(side))
    clock = Clock()
    rows = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=str(work / "datasets"))
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tok)
    return {**clock(), "rows": len(trainer.train_dataset), "dataset": trainer.train_dataset}


def gate(folder: Path, work: Path, tok: Any) -> None:
    """Exits where the two sides do not give the same tokens and the same mask."""
    import numpy as np

    from halfbyte.data.config import DataConfig
    from halfbyte.data.prepare import prepare
    from halfbyte.data.workers import crew

    data = work / "gate.jsonl"
    write_chats(folder, 2000, data)
    assert crew(None, data.stat().st_size).quick  # as in what is timed
    mine = prepare(DataConfig(train=[{"path": str(data)}], eval=0), tok, 0, work / "gate").train.sources[0]
    other = theirs(data, work, tok, "mask", packing=False)["dataset"]
    assert len(other) == len(mine) == 2000
    for i, row in enumerate(other):
        span = slice(mine.offsets[i], mine.offsets[i + 1])
        if row["input_ids"] != mine.ids[span].tolist() or not np.array_equal(np.asarray(row["labels"]) != -100, mine.trained[span]):
            raise SystemExit(f"the gate is red: chat {i} differs; nothing was timed")
    print("gate: 2,000 chats have the same tokens and the same mask on both sides", flush=True)


def resident(root: int) -> int:
    """Bytes of memory of a process and its children, shared pages counted in parts."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(stat.read_text().rsplit(")", 1)[1].split()[1]), []).append(int(stat.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    found, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        waiting += parents.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        found += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return found


def measured(side: str, data: Path, work: Path, more: list[str]) -> dict[str, Any]:
    """One side in a process of its own: what it says, and the peak of memory of it and its children."""
    result = work / "result.json"
    command = [sys.executable, __file__, "--side", side, "--data", str(data), "--out", str(result), "--work", str(work), *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{side} failed: {' '.join(command)}")
    return {"side": side, **json.loads(result.read_text()), "peak_MiB": round(peak / 2**20)}


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # absent, or a bare folder on the path
        return None


def run(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder, out.open("w", encoding="utf-8") as stream:
        work = Path(folder)
        if arguments.theirs:
            gate(Path(arguments.data), work, tokenizer(arguments.tokenizer))
        data = work / "chats.jsonl"
        write_chats(Path(arguments.data), arguments.examples, data)

        def report(**fields: Any) -> None:
            stream.write(json.dumps(fields) + "\n")
            stream.flush()
            print(json.dumps(fields), flush=True)

        versions = {name: installed(name) for name in ("trl", "transformers", "tokenizers", "fastokens", "datasets")}
        cores = len(os.sched_getaffinity(0))
        report(
            what="setting", examples=arguments.examples, bytes=data.stat().st_size, cores=cores, load=os.getloadavg(), **versions
        )
        more = [f"--{name}={value}" for name in ("tokenizer", "workers") if (value := getattr(arguments, name)) is not None]
        spent: dict[str, dict[str, list[float]]] = {"seconds": {}, "cpu_seconds": {}}
        for turn in range(arguments.turns):
            for side in ("ours", "again", *arguments.theirs):
                if side != "again":
                    shutil.rmtree(work / "cache", ignore_errors=True) if side == "ours" else None
                    shutil.rmtree(work / "datasets", ignore_errors=True)
                found = measured(side, data, work, more)
                for kind, by_side in spent.items():
                    by_side.setdefault(side, []).append(found[kind])
                report(
                    what="turn", turn=turn, per_second=round(arguments.examples / found["seconds"]), load=os.getloadavg(), **found
                )
        for kind, by_side in spent.items():
            middle = {side: median(values) for side, values in by_side.items()}
            report(what=f"medians of {kind}", **{side: round(value, 2) for side, value in middle.items()})
            ratios = {side: round(middle[side] / middle["ours"], 2) for side in arguments.theirs}
            report(what=f"TRL's {kind} over ours", **ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with the public demo sets")
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--theirs", nargs="*", default=["default", "mask", "mask, 2 processes"], help="none: only ours is timed")
    parser.add_argument("--tokenizer", default=None, help="folder with SmolLM2's tokenizer; without it, the bundled model's")
    parser.add_argument("--workers", type=int, default=None, help="`data.workers` on our side")
    parser.add_argument("--work", default=None, help="folder for temporary files")
    parser.add_argument("--out", default="bench/results/data_speed.jsonl")
    parser.add_argument("--side", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for side in arguments.theirs:
        options(side)
    if arguments.side is None:
        run(arguments)
        return
    data, work, tok = Path(arguments.data), Path(arguments.work), tokenizer(arguments.tokenizer)
    mine = arguments.side in ("ours", "again")
    found = ours(data, work, tok, arguments.workers) if mine else theirs(data, work, tok, arguments.side)
    found.pop("dataset", None)
    Path(arguments.out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
