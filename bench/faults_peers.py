"""What other trainers do with the mistakes of `tests/data/planted.py`: their own preparation of data, run on the same files.

    python bench/faults_peers.py plant --data FOLDER --work WORK         (in halfbyte's environment: writes files, tokenizer, model)
    python bench/faults_peers.py run trl|axolotl|llamafactory --work WORK --out bench/results/faults_peers.jsonl     (in theirs)

Each mistake is a process of its own, which does what the trainer's command does between reading its settings and the first step,
on a CPU: TRL `load_dataset` and `SFTTrainer` (`DPOTrainer`, `KTOTrainer`) with batches of its collator; axolotl `load_cfg` and
`load_datasets` (`load_preference_datasets`); LLaMA-Factory `get_dataset`. Settings are the tools' defaults but for the place and
the columns of the file, the row length (2,048 tokens) and, with axolotl, packing, as in its QLoRA examples. The tokenizer is the
one that the tests use, byte-level with ChatML, so that all sides read the same. Kept are rows and learned tokens, the texts of an
exception and of its causes, and lines of the log that the run on sound data does not print; `faults_table.py` says what they mean.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results/faults_peers.jsonl"
PEERS = ("axolotl", "llamafactory", "trl")
TELLING = re.compile(r"WARNING|UserWarning|Skipping|Dropp|Invalid (role|message)|trainable|[Tt]runcat|[Rr]emoved|exceeds")
NOISE = re.compile(
    r"it/s|s/it|examples/s|deprecat|torch_dtype|pin_memory|was not specified|special_tokens=|random hash|[Tt]elemetry|gemm_4bit"
)
LOCATED = re.compile(r"\b(line|row|index) [1-9]|(File|find|path).*not/there|Messages is null|Last turn|vision-related")
ENDLESS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}<|im_end|>\n{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)


def plant(data: Path, work: Path) -> None:
    """Writes every mistake's files and `faults.jsonl`, a tokenizer and a tiny model."""
    sys.path.insert(0, str(ROOT / "tests"))
    from data import planted
    from data.tiny import byte_level

    shutil.rmtree(work, ignore_errors=True)
    records = planted.dialogues(data)
    base = records[: planted.BASE]
    tokenizer = byte_level(eos_token="<|im_end|>")
    tokenizer.save_pretrained(work / "model")
    _tiny_model(len(tokenizer), work / "model")
    (work / "files").mkdir()
    held = [*map(planted.near, planted.longest(base)), base[0]]
    long = [
        {"messages": [{**r["messages"][0], "content": "word " * 3000}, r["messages"][1]]} if i < 5 else r
        for i, r in enumerate(base)
    ]
    tools = json.loads((data / "glaive_toolcall_en_demo.json").read_text(encoding="utf-8"))[:40]
    clean = planted.Fault("nothing", "", lambda rs: None)
    lines = [_entry(work, clean, planted.content(clean, base), base)]
    for fault in planted.FAULTS:
        content = planted.content(fault, base)
        lines.append(_entry(work, fault, content, base))
    for name, content, more in (
        ("examples without a learned token", long, {"split": True}),
        ("the mask stops before the end of turn", base, {"template": ENDLESS, "masked": True}),
        ("pad = end of turn, masked by its id", base, {"pad": "<|im_end|>"}),
        ("held-out examples that are learned", base[1:], {"held": _held(work, "held", [*planted.longest(base), base[0]])}),
        ("held-out examples that are nearly learned", base[1:], {"held": _held(work, "near", held)}),
        ("tools that the template does not show", tools, {"list": "conversations", "tokens": 4096, "needs": _described(tools)}),
    ):
        fault = planted.Fault(name, "", lambda rs: None)
        lines.append(_entry(work, fault, "\n".join(map(json.dumps, content)).encode(), content) | more)
    (work / "faults.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"{len(lines) - 1} mistakes in {work}")


def _described(records: list[Any]) -> list[str]:
    """What the first tool of every record that has one is described as."""
    given = (json.loads(r["tools"]) for r in records)
    return [tools[0]["description"] for tools in given if tools]


def _held(work: Path, name: str, records: list[Any]) -> str:
    path = work / "files" / f"{name}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def _entry(work: Path, fault: Any, content: bytes, base: list[Any]) -> dict[str, Any]:
    folder = work / "files" / re.sub(r"\W+", "-", fault.name)
    folder.mkdir(parents=True)
    (folder / fault.file).write_bytes(content)
    try:
        found = [json.loads(line) for line in content.splitlines()] if fault.file.endswith("l") else []
    except ValueError:
        found = []
    table = fault.file.endswith("csv")
    columns = sorted(found[0]) if found and isinstance(found[0], dict) else ["prompt", "completion"] if table else []
    rows = len(found) or (content.count(b"\n") - 1 if table else len(base))
    template = fault.options.get("template", "").replace("</s>", "<|im_end|>")
    return {"name": fault.name, "file": str(folder / fault.file), "rows": rows, "columns": columns,
            "tokens": fault.options.get("tokens", 2048), "template": template,
            "path": (fault.options.get("train") or [""])[0]}  # fmt: skip


def _tiny_model(vocabulary: int, folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, pad_token_id=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


# --- the peers, each in its own environment: (fault) -> rows of (input ids, labels); -100 is not learned

Rows = list[tuple[list[int], list[int]]]


def tokenizer_of(fault: dict[str, Any], folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    if fault.get("pad"):
        tokenizer.pad_token = fault["pad"]
    if fault["template"]:
        tokenizer.chat_template = fault["template"]
    return tokenizer


def _collated(rows: Any, collate: Callable[[list[Any]], Any]) -> Rows:
    """Rows as the model would get them, one at a time."""
    found = []
    for row in rows:
        batch = collate([row])
        found.append((batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    return found


def trl(fault: dict[str, Any], work: Path) -> Rows:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM

    kind = "csv" if fault["file"].endswith("csv") else "json"
    data = load_dataset(kind, data_files=fault["path"] or fault["file"], split="train")
    tokenizer, model = tokenizer_of(fault, work), AutoModelForCausalLM.from_pretrained(work / "model")
    common = {"output_dir": str(work / "out"), "report_to": "none", "use_cpu": True, "bf16": False, "max_length": fault["tokens"]}
    if "chosen" in fault["columns"]:
        from trl import DPOConfig, DPOTrainer

        trainer = DPOTrainer(model, args=DPOConfig(**common), train_dataset=data, processing_class=tokenizer)
        return [(row["prompt_ids"] + row["chosen_ids"], row["chosen_ids"]) for row in trainer.train_dataset]
    if "label" in fault["columns"]:
        from trl import KTOConfig, KTOTrainer

        data = data.map(lambda r: {"prompt": r["messages"][:-1], "completion": r["messages"][-1:]}, remove_columns=["messages"])
        args = KTOConfig(**common, per_device_train_batch_size=2)
        trainer = KTOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
        return [(list(range(9)), [1])] * len(trainer.train_dataset)
    from trl import SFTConfig, SFTTrainer

    if fault.get("split"):
        data = data.map(lambda r: {"prompt": r["messages"][:-1], "completion": r["messages"][-1:]}, remove_columns=["messages"])
    held = load_dataset("json", data_files=fault["held"], split="train") if fault.get("held") else None
    args = SFTConfig(**common, assistant_only_loss=bool(fault.get("masked")))
    trainer = SFTTrainer(model, args=args, train_dataset=data, eval_dataset=held, processing_class=tokenizer)
    return _collated(trainer.train_dataset, trainer.data_collator)


def _as_text(file: Path, work: Path) -> Path:
    """Labelled dialogues as prompt, completion and label, which axolotl's own kinds of KTO data are made of."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [[turn["content"] for turn in record["messages"]] for record in records]
    rows = [{"prompt": t[0], "completion": t[1], "label": r["label"]} for t, r in zip(texts, records, strict=True)]
    path = work / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def axolotl(fault: dict[str, Any], work: Path) -> Rows:
    import yaml
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets, load_preference_datasets
    from axolotl.utils.collators import DataCollatorForSeq2Seq
    from axolotl.utils.dict import DictDefault
    from datasets import Dataset

    # Its cache, written by worker processes, which a forked process does not get started.
    Dataset.save_to_disk = lambda *given, **options: None  # type: ignore[method-assign]

    model = work / "model"
    if fault["template"]:
        (work / "chat.jinja").write_text(fault["template"])
    columns = fault["columns"]
    source: dict[str, Any] = {
        "path": fault["path"] or fault["file"],
        "type": "chat_template",
        "field_messages": fault.get("list", "messages"),
    }
    if not fault["path"]:
        source["ds_type"] = "csv" if fault["file"].endswith("csv") else "json"
    settings: dict[str, Any] = {"val_set_size": 0.0}
    if fault.get("list"):
        source["message_property_mappings"] = {"role": "from", "content": "value"}
    elif "instruction" in columns:
        source["type"] = "alpaca"
    elif "chosen" in columns:
        source |= {"type": {"field_prompt": "prompt"}, "split": "train"}
        settings["rl"] = "dpo"
    elif "label" in columns:
        source |= {"type": {"field_prompt": "prompt"}, "split": "train"}
        settings |= {"rl": "kto", "remove_unused_columns": False}  # the latter it demands
        source["path"] = str(_as_text(Path(fault["file"]), work))
    elif "completion" in columns:
        source["type"] = {"field_instruction": "prompt", "field_output": "completion", "format": "{instruction}"}
    if fault.get("held"):
        settings["test_datasets"] = [{**source, "path": fault["held"], "split": "train"}]
        settings.pop("val_set_size")
    settings |= {
        "base_model": str(model), "datasets": [source], "sequence_len": fault["tokens"], "micro_batch_size": 1, "num_epochs": 1,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "optimizer": "adamw_torch", "adapter": "lora", "lora_r": 4,
        "sample_packing": "rl" not in settings, "eval_sample_packing": False,
        "lora_alpha": 8, "lora_target_linear": True, "output_dir": str(work / "out"),
        "dataset_prepared_path": str(work / "prepared"),
        "chat_template": "jinja" if fault["template"] else "tokenizer_default", "bf16": False, "dataset_num_proc": 1,
        **({"chat_template_jinja": str(work / "chat.jinja")} if fault["template"] else {}),
        **({"special_tokens": {"pad_token": fault["pad"]}} if fault.get("pad") else {}),
    }  # fmt: skip
    (work / "axolotl.yaml").write_text(yaml.safe_dump(settings))
    cfg = load_cfg(str(work / "axolotl.yaml"))
    if "rl" in settings:
        found = load_preference_datasets(cfg=DictDefault(cfg)).train_dataset
        return [(list(range(9)), [1])] * len(found)
    found = load_datasets(cfg=DictDefault(cfg)).train_dataset
    return _collated(found, DataCollatorForSeq2Seq(tokenizer_of(fault, work)))


def llamafactory(fault: dict[str, Any], work: Path) -> Rows:
    from llamafactory.data import MultiModalDataCollatorForSeq2Seq, get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args

    columns = fault["columns"]
    entry: dict[str, Any] = {"file_name": fault["path"] or fault["file"]}
    stage, names = "sft", {"messages": fault.get("list", "messages")}
    if fault.get("list"):
        entry |= {"formatting": "sharegpt", "columns": names | {"tools": "tools"}}
    elif "chosen" in columns:
        entry |= {"ranking": True, "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}}
        stage = "dpo"
    elif "completion" in columns:
        entry["columns"] = {"prompt": "prompt", "response": "completion"}
    elif "instruction" in columns:
        entry["columns"] = {"prompt": "instruction", "response": "output"}
    else:
        tags = {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        }
        entry |= {"formatting": "openai", "columns": names, "tags": tags}
        if "label" in columns:
            entry["columns"] = {**names, "kto_tag": "label"}
            stage = "kto"
    info = {"mine": entry}
    arguments: dict[str, Any] = {
        "model_name_or_path": str(work / "model"), "stage": stage, "do_train": True, "finetuning_type": "lora", "dataset": "mine",
        "dataset_dir": str(work), "cutoff_len": fault["tokens"], "output_dir": str(work / "out"), "report_to": "none",
        "use_cpu": True, "overwrite_cache": True,
    }  # fmt: skip
    if not fault["template"]:
        arguments["template"] = "chatml"
    if fault.get("held"):
        info["held"] = {**entry, "file_name": fault["held"]}
        arguments["eval_dataset"] = "held"
    (work / "dataset_info.json").write_text(json.dumps(info))
    model_args, data_args, training_args, _, _ = get_train_args(arguments)
    tokenizer = tokenizer_of(fault, work)
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    stage = {"dpo": "rm"}.get(stage, stage)
    found = get_dataset(template, model_args, data_args, training_args, stage=stage, tokenizer=tokenizer)["train_dataset"]
    if stage != "sft":
        return [(list(range(9)), [1])] * len(found)
    return _collated(found, MultiModalDataCollatorForSeq2Seq(template=template, tokenizer=tokenizer, label_pad_token_id=-100))


# --- what came out


def unseen(fault: dict[str, Any], rows: Rows, work: Path) -> int:
    """How many of the words that a mistake is about stand in no row."""
    decode = tokenizer_of(fault, work).decode
    text = "\n".join(decode(ids) for ids, _ in rows)
    return sum(word not in text for word in fault["needs"])


def run_one(peer: str, fault: dict[str, Any], work: Path) -> dict[str, Any]:
    """One mistake in this process: rows, learned tokens, or the texts of an exception and its causes."""
    try:
        rows = {"trl": trl, "axolotl": axolotl, "llamafactory": llamafactory}[peer](fault, work)
    except (Exception, SystemExit) as error:
        texts: list[str] = []
        link: BaseException | None = error
        while link is not None:
            if type(link).__name__ != "RemoteTraceback":
                texts.append(f"{type(link).__name__}: {str(link)[:300]}")
            link = link.__cause__ or link.__context__
        traceback.print_exc()
        return {"error": texts}
    end = 4  # <|im_end|>
    return {
        "rows": len(rows),
        "learned": sum(label != -100 for _, labels in rows for label in labels),
        "zero": sum(all(label == -100 for label in labels) for _, labels in rows),
        "cut": sum(len(ids) == fault["tokens"] for ids, _ in rows),
        "twice": sum(ids[:2] == [0, 0] for ids, _ in rows),
        "unending": sum(end not in labels for _, labels in rows),
        **({"unseen": unseen(fault, rows, work)} if "needs" in fault else {}),
    }


NEEDED = {
    "trl": ("trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "trl.trainer.kto_trainer"),
    "axolotl": ("axolotl.cli.config", "axolotl.common.datasets", "axolotl.utils.collators"),
    "llamafactory": ("llamafactory.data", "llamafactory.hparams"),
}


def run(peer: str, work: Path, out: Path, only: str) -> None:
    """Every mistake whose name has `only` in it, and none, each in a forked process whose output is kept."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "DISABLE_VERSION_CHECK": "1"}
    for name in ("transformers.utils", "datasets", *NEEDED[peer]):  # before the processes part
        if name.startswith("llamafactory"):
            sys.modules.setdefault("torchaudio", ModuleType("torchaudio"))  # no text needs it
        importlib.import_module(name)
    faults = [json.loads(line) for line in (work / "faults.jsonl").read_text(encoding="utf-8").splitlines()]
    logs = work / peer
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    usual: set[str] = set()
    lines = []
    for number, fault in enumerate(f for f in faults if only in f["name"] or f is faults[0]):
        log, kept = logs / f"{number}.log", logs / f"{number}.json"
        child = os.fork()
        if not child:
            with log.open("wb") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            os.environ["HF_DATASETS_CACHE"] = str(logs / f"cache-{number}")
            kept.write_text(json.dumps(run_one(peer, fault, work)), encoding="utf-8")
            os._exit(0)
        os.waitpid(child, 0)
        found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {"error": ["Killed"]}
        said = _said(log)
        usual = usual or {shape for shape, _ in said} | {"-"}
        found["said"] = [text for shape, text in said if shape not in usual][:8]
        line = json.dumps({"peer": peer, "fault": fault["name"], "given": fault["rows"], **found})
        lines.append(json.loads(line.replace(str(work), "WORK").replace(str(Path.cwd()), ".")))
        print(fault["name"], json.dumps(found)[:200], flush=True)
    lines[0]["versions"] = {name: version(name) for name in ("transformers", "datasets", *(peer,) * (peer != "llamafactory"))}
    if peer == "llamafactory":  # run from its source
        lines[0]["versions"][peer] = importlib.import_module("llamafactory.extras.env").VERSION
    old = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    kept_lines = {(line["peer"], line["fault"]): line for line in [*old, *lines]}  # in the old order, new values
    out.write_text("".join(json.dumps(line) + "\n" for line in kept_lines.values()), encoding="utf-8")


def _said(log: Path) -> list[tuple[str, str]]:
    """Lines of a log that tell of something, each with its shape: without what differs from run to run."""
    found = {}
    for line in re.split(r"[\r\n]+|(?=\[WARNING\|)|(?=\[20\d\d-)", log.read_text(encoding="utf-8", errors="replace")):
        if TELLING.search(line) and not NOISE.search(line):
            found.setdefault(re.sub(r"\d+|/\S+", "#", line), line.strip()[-240:])
    return list(found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plant", "run"))
    parser.add_argument("peer", nargs="?", choices=PEERS)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("faults-work"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="mistakes with this in their name")
    arguments = parser.parse_args()
    if arguments.what == "plant":
        plant(arguments.data, arguments.work.resolve())
    else:
        run(arguments.peer, arguments.work.resolve(), arguments.out, arguments.only)


if __name__ == "__main__":
    main()
