"""Faults: what was tried, what the user saw, what was lost: the table of docs/concepts/faults.md. Fails if anything was lost.

    python bench/faults.py [--kills 20] [--only NAME ...] [--docs docs/concepts/faults.md]

Every trial runs the real `halfbyte.train` on a tiny random model (two layers, 64 wide) in a child process, and compares with a
run that nothing disturbed: trained tensors and Adam's state bit for bit, metrics line by line (times left out). Children are
forked after the imports, so a restart costs no import. Some minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch

from halfbyte.checkpoints import huggingface, peft, resume
from halfbyte.checkpoints.config import ModelConfig
from halfbyte.config import Recipe
from halfbyte.errors import HalfbyteError
from halfbyte.formats.config import FormatConfig
from halfbyte.layers import forward
from halfbyte.recipe import recipe_from
from halfbyte.train import metrics
from halfbyte.train.run import train
from support import chats, save_tiny, write_jsonl

STEPS = 60
NAN_TOKEN = ord("~")
Event = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """A row of the table. lost: `nothing`, or what."""

    tried: str
    saw: str
    lost: str


class Bench:
    """A scratch directory with a model, data, and a run that nothing disturbed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = save_tiny(root / "model")
        self.data = write_jsonl(root / "chats.jsonl", chats(160))
        os.environ["HALFBYTE_CACHE"] = str(root / "cache")
        self.seconds = 0.0
        self.start = 0.0

    def recipe(self, output: str, *overrides: str) -> Recipe:
        data = {
            "model": str(self.model),
            "compute": "fp32",
            "adapter": {"dropout": 0.1, "rank": 8},
            "data": {"train": [str(self.data)], "tokens": 96},
            "train": {"batch": 4, "epochs": 100, "max_steps": STEPS, "lr": 5e-3, "save_every": 1, "eval_every": 20},
            "memory": {"microbatch": 2},
            "output": str(self.root / output),
        }
        return recipe_from(data, list(overrides))

    def undisturbed(self) -> None:
        """The run to compare with; measures how long start and training take."""
        train(self.recipe("warm", "train.max_steps=1"))  # fills the caches
        began = time.monotonic()
        first: list[float] = []
        train(self.recipe("whole"), on_event=lambda event: first.append(time.monotonic()) if event["kind"] == "train" else None)
        self.start = first[0] - began
        self.seconds = time.monotonic() - first[0]

    def lost(self, output: str) -> str:
        """What a disturbed run lacks of the undisturbed one."""
        whole, other = (resume.newest(self.root / name / "checkpoints", print) for name in ("whole", output))
        if other is None:
            return "everything"
        assert whole is not None
        for stem, tensors in whole.tensors.items():
            for name, tensor in tensors.items():
                if not torch.equal(tensor, other.tensors[stem][name]):
                    return f"{stem}: {name} differs"
        return "nothing" if self.lines("whole") == self.lines(output) else "metrics differ"

    def lines(self, output: str) -> list[Event]:
        text = (self.root / output / metrics.METRICS).read_text()
        found = [json.loads(line) for line in text.splitlines()]
        return [{k: v for k, v in e.items() if k not in metrics.TIMES} for e in found if e["kind"] in ("train", "eval")]


def child(work: Callable[[], object], log: Path, kill_after: float | None = None, sign: int = signal.SIGKILL) -> int:
    """Run `work` in a forked process, its words into `log`; the exit code (an error's own), or minus the signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        with log.open("a") as file:
            os.dup2(file.fileno(), 2)
            try:
                work()
                code = 0
            except HalfbyteError as error:
                os.write(2, f"error [{error.code}]: {error}\n".encode())
                code = error.exit_code
        os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, sign)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def first_error(log: Path) -> str:
    """The last error in a log, one line, without the scratch directory."""
    lines = [line for line in log.read_text().splitlines() if line.startswith(("error", "  hint", "WARNING"))]
    return " ".join(" ".join(lines[-2:]).split())


def message(work: Callable[[], object]) -> str:
    """What a user sees of an error."""
    try:
        work()
    except HalfbyteError as error:
        return f"error{f' [{error.code}]' if error.code else ''}: {error}"
    raise SystemExit("no error was raised")


def kills(bench: Bench, count: int = 20) -> Trial:
    """kill -9 at random moments; the same command again, each time."""
    output, log = "kills", bench.root / "kills.log"
    generator = random.Random(0)
    done = during_save = training = 0
    while done < count:
        moment = generator.uniform(0.5 * bench.start, bench.start + 3 * bench.seconds / count)
        seen = len(log.read_text()) if log.exists() else 0
        code = child(lambda: train(bench.recipe(output)), log, moment)
        done += code == -signal.SIGKILL
        training += code == -signal.SIGKILL and "tok/s" in log.read_text()[seen:]
        during_save += any(".tmp-" in p.name for p in (bench.root / output / "checkpoints").glob(".step-*"))
        if code == 0:
            shutil.rmtree(bench.root / output)  # finished before its time: once more from the start
        elif code != -signal.SIGKILL:
            raise SystemExit(f"the run failed by itself: {first_error(log)}")
    code = child(lambda: train(bench.recipe(output)), log)
    saw = (
        f"{done} kills: {done - training} before a restarted run's first step, {training} in training; {during_save} of them while "
    )
    saw += f"a checkpoint was being written; then exit {code}"
    return Trial(
        "`kill -9` at random moments of a run that saves after every step, the same command again", saw, bench.lost(output)
    )


def terminated(bench: Bench) -> Trial:
    """SIGTERM in the middle; the same command again."""
    output, log = "term", bench.root / "term.log"
    code = 0
    for share in (0.5, 0.3, 0.1, 0.0):  # on a machine that got faster meanwhile, the run may be over before its middle
        shutil.rmtree(bench.root / output, ignore_errors=True)
        code = child(lambda: train(bench.recipe(output)), log, bench.start + share * bench.seconds, signal.SIGTERM)
        if code != 0:
            break
    saw = f"exit {code}: {first_error(log)}"
    again = child(lambda: train(bench.recipe(output)), log)
    assert (code, again) == (75, 0), (code, again)
    return Trial("SIGTERM in the middle of a run, the same command again", saw, bench.lost(output))


def small_files(limit: int) -> None:
    """From here on no file grows beyond `limit` bytes: writes fail in the middle, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def disk_fills_for_a_while(bench: Bench) -> Trial:
    """Writes fail from step 3 to step 4; the run goes on and loses nothing."""
    output, log = "full", bench.root / "full.log"

    def event(found: Event) -> None:
        if found["kind"] == "train" and found["step"] in (3, 5):
            small_files(20_000 if found["step"] == 3 else resource.RLIM_INFINITY)

    code = child(lambda: train(bench.recipe(output), on_event=event), log)
    warned = [line for line in log.read_text().splitlines() if line.startswith("WARNING")]
    assert code == 0, code
    assert len(warned) == 2, warned
    return Trial("the disk is full for two saves, then has room again", f"{warned[0]} (exit {code})", bench.lost(output))


def disk_stays_full(bench: Bench) -> Trial:
    """Writes fail from step 30 on; the run ends after three tries; with room again the same command resumes."""
    output, log = "fuller", bench.root / "fuller.log"

    def event(found: Event) -> None:
        if found["kind"] == "train" and found["step"] == 30:
            small_files(20_000)

    code = child(lambda: train(bench.recipe(output), on_event=event), log)
    saw = f"exit {code}: {first_error(log)}"
    again = child(lambda: train(bench.recipe(output)), log)
    assert (code, again) == (1, 0), (code, again)
    return Trial("the disk stays full; later it has room and the same command is run again", saw, bench.lost(output))


def flipped_bytes(bench: Bench) -> Trial:
    """100 random bytes of the newest checkpoint, one at a time; then one stays flipped and the run resumes from the one before."""
    output = "flipped"
    shutil.copytree(bench.root / "whole", bench.root / output)
    path = max((bench.root / output / "checkpoints").glob("step-*"))
    generator = random.Random(0)
    found = 0
    files = sorted(path.iterdir())
    for _ in range(100):
        file = generator.choices(files, [f.stat().st_size for f in files])[0]
        data = bytearray(file.read_bytes())
        at = generator.randrange(len(data))
        old = data[at]
        data[at] = old ^ generator.randrange(1, 256)
        file.write_bytes(data)
        try:
            resume.load(path)
        except resume.Damaged:
            found += 1
        data[at] = old
        file.write_bytes(data)
    data[at] ^= 1
    file.write_bytes(data)
    log = bench.root / "flipped.log"
    code = child(lambda: train(bench.recipe(output)), log)
    assert code == 0, first_error(log)
    lost = bench.lost(output) if found == 100 else f"{100 - found} flipped bytes were not seen"
    return Trial(
        "100 flipped bytes in a checkpoint, one at a time; then a run that finds one",
        f"{found} of 100 seen. {first_error(log)}",
        lost,
    )


def truncated_shard(bench: Bench) -> Trial:
    """The base's weights end too early."""
    model = bench.root / "cut"
    shutil.copytree(bench.model, model)
    shard = model / "model.safetensors"
    os.truncate(shard, shard.stat().st_size * 2 // 3)
    saw = message(lambda: huggingface.load(ModelConfig(name=str(model)), FormatConfig(), torch.float32))
    return Trial("a base whose weight file was cut off after two thirds", saw, "nothing")


def nan_example(bench: Bench) -> Trial:
    """An example whose forward pass gives NaN: its steps are skipped, the others learn; then three such steps in a row."""
    rows = chats(160)
    rows[11]["messages"][0]["content"] += "~"
    data = write_jsonl(bench.root / "nan.jsonl", rows)
    whole, log = forward.hidden_states, bench.root / "nan.log"

    def poisoned(model: Any, ids: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        hidden = whole(model, ids, *rest)
        return hidden * float("nan") if model.training and (ids == ids_of_nan).any() else hidden

    from support import tiny_tokenizer

    ids_of_nan = tiny_tokenizer()("~", add_special_tokens=False)["input_ids"][0]
    forward.hidden_states = poisoned
    try:
        recipe = bench.recipe("nan", f"data.train.0.path={data}", "train.max_steps=40")
        code = child(lambda: train(recipe), log)
        anomalies = [json.loads(line) for line in (bench.root / "nan" / "anomalies.jsonl").read_text().splitlines()]
        assert code == 0, first_error(log)
        assert anomalies
        assert all(11 in a["examples"] for a in anomalies), anomalies
        for row in rows:
            row["messages"][0]["content"] += "~"
        data = write_jsonl(bench.root / "nans.jsonl", rows)
        code = child(lambda: train(bench.recipe("nans", f"data.train.0.path={data}")), log)
    finally:
        forward.hidden_states = whole
    assert code == 1, code
    last = resume.newest(bench.root / "nan" / "checkpoints", print)
    assert last is not None
    sound = all(bool(t.isfinite().all()) for group in last.tensors.values() for t in group.values())
    skipped = f"{len(anomalies)} of 40 steps skipped, each with the example's number in anomalies.jsonl"
    saw = f"one example: {skipped}; all examples: {first_error(log)}"
    return Trial(
        "an example whose forward pass gives NaN; then a data set full of them", saw, "nothing" if sound else "the weights"
    )


def misspelt_key(bench: Bench) -> Trial:
    return Trial("a misspelt key", message(lambda: bench.recipe("typo", "adapter.rnak=8")), "nothing")


def no_target(bench: Bench) -> Trial:
    recipe = bench.recipe("target", "adapter.targets=[q_prj]")
    return Trial("a target that matches nothing", message(lambda: train(recipe)), "nothing")


def corrupt_line(bench: Bench) -> Trial:
    data = bench.root / "corrupt.jsonl"
    lines = bench.data.read_text().splitlines()
    lines[11] = lines[11][:-9]
    data.write_text("\n".join(lines) + "\n")
    recipe = bench.recipe("corrupt", f"data.train.0.path={data}")
    return Trial("a corrupt line in a JSONL file", message(lambda: train(recipe)), "nothing")


def other_base(bench: Bench) -> Trial:
    model = save_tiny(bench.root / "other", seed=1)
    base = huggingface.load(ModelConfig(name=str(model)), FormatConfig(), torch.float32)
    saw = message(lambda: peft.load(bench.root / "whole" / "adapter", base))
    return Trial("an adapter of another base", saw, "nothing")


def other_recipe(bench: Bench) -> Trial:
    recipe = bench.recipe("whole", "train.lr=1e-3", "adapter.rank=4")
    return Trial("the same output with another recipe", message(lambda: train(recipe)), bench.lost("whole"))


def two_runs(bench: Bench) -> Trial:
    from halfbyte.train import lock

    log = bench.root / "two.log"
    with lock.hold(bench.root / "whole", print):
        code = child(lambda: train(bench.recipe("whole")), log)
    assert code == 1, code
    return Trial("two runs in one output directory", first_error(log), bench.lost("whole"))


TRIALS: dict[str, Callable[[Bench], Trial]] = {
    "kills": kills,
    "terminated": terminated,
    "disk": disk_fills_for_a_while,
    "disk-stays-full": disk_stays_full,
    "flipped-bytes": flipped_bytes,
    "truncated-shard": truncated_shard,
    "nan": nan_example,
    "misspelt-key": misspelt_key,
    "no-target": no_target,
    "corrupt-line": corrupt_line,
    "other-base": other_base,
    "other-recipe": other_recipe,
    "two-runs": two_runs,
}


def table(trials: list[Trial], root: Path) -> str:
    """Markdown, without the scratch directory."""

    def cell(text: str) -> str:
        return " ".join(text.replace(str(root) + "/", "").replace("|", "\\|").split())

    rows = [f"| {cell(t.tried)} | {cell(t.saw)} | {cell(t.lost)} |" for t in trials]
    return "\n".join(["| tried | the user saw | lost |", "| --- | --- | --- |", *rows])


def write_table(path: Path, text: str) -> None:
    """Puts `text` between the markers `<!-- faults -->` and `<!-- /faults -->`."""
    before, _, rest = path.read_text().partition("<!-- faults -->\n")
    _, found, after = rest.partition("<!-- /faults -->")
    assert found, f"{path} has no markers"
    path.write_text(f"{before}<!-- faults -->\n{text}\n<!-- /faults -->{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=sorted(TRIALS), default=list(TRIALS))
    parser.add_argument("--docs", type=Path, help="write the table into this file, between its markers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch))
        bench.undisturbed()
        trials = []
        for name in options.only:
            trials.append(kills(bench, options.kills) if name == "kills" else TRIALS[name](bench))
            print(f"{name}: lost {trials[-1].lost}", file=sys.stderr, flush=True)
        text = table(trials, Path(scratch))
    print(text)
    if options.docs:
        write_table(options.docs, text)
    return int(any(t.lost != "nothing" for t in trials))


if __name__ == "__main__":
    sys.exit(main())
