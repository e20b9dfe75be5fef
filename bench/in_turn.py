"""`throughput.py all`: proofs first and side by side, then every case in turn, each in a process of its own, within a time limit.

One file of JSON lines, each written when it is known, and one short line a case on the terminal. A group whose gradients are not
proven gets no figures. Missing checkpoints are made; before that, those that no case to come needs are removed. A case that would
probably not end within the limit is not started, and the last line names those left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, TextIO

from cases import checkpoints, proof
from engines import Case
from random_model import exists, remove

ALLOWED, COMPILES = 90.0, 120.0
"""Seconds that a process may take, and how many more where it compiles everything: Unsloth's first run, an empty cache."""
EXPECTED = {"gate": 30.0, "make": 30.0, "launches": 40.0, "run": 30.0}
"""Seconds that a first process of a kind is thought to take; later ones as long as the longest so far."""

SHOWN = (
    *(
        "group",
        "impl",
        "size",
        "layers",
        "rows",
        "tokens",
        "recompute",
        "offload",
        "held",
        "graphs",
        "deterministic",
        "compute",
        "optimizer",
        "cache",
        "gate",
    ),
    *("tokens_per_s", "trained_tokens_per_s", "step_s", "host_s", "peak_GiB", "reserved_GiB", "driver_GiB", "share", "hot_tflops"),
    *("sm_mhz", "launches", "kernels_a_layer", "first_step_s", "load_s", "of_bound", "made", "seconds", "failed", "left_out"),
)

Spawn = Callable[[str, Sequence[str], Mapping[str, str], float], dict[str, Any]]
"""Command, its words, additions to the environment, seconds allowed -> the JSON line of the process, or {"failed": why}."""


def spawn(command: str, words: Sequence[str], more: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """`throughput.py COMMAND WORDS` in a process."""
    call = [sys.executable, str(Path(__file__).with_name("throughput.py")), command, *words]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=seconds, env={**os.environ, **more})
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {seconds:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"failed": done.stderr[-1500:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


@dataclass
class Turns:
    """The runs of one call. `file` takes the lines; `clock` says seconds; `limit`: when nothing more is started."""

    root: str
    tokenizer: str | None
    data: str | None
    limit: float
    file: TextIO
    spawn: Spawn = spawn
    clock: Callable[[], float] = time.monotonic
    left_out: list[str] = field(default_factory=list)
    longest: dict[tuple[str, str], float] = field(default_factory=dict)
    compiled: bool = False
    one_line: Any = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self.begun = self.clock()

    def everything(self, groups: Mapping[str, Sequence[Case]]) -> None:
        """The cases of every group, in their order."""
        runs = [(name, case) for name, cases in groups.items() for case in cases]
        proofs = list(dict.fromkeys(proof(case) for _, case in runs if case.impl == "halfbyte"))
        self._make(proofs, runs)
        first = [] if not runs else [c for c in checkpoints(*runs[0]) if not exists(c.directory(self.root))]
        with ThreadPoolExecutor(8) as pool:  # nothing is timed yet: the first checkpoint is made meanwhile
            making = pool.submit(self._make, first, runs)
            outcomes = list(pool.map(lambda case: self._one("gate", "gate", case), proofs))
            making.result()
        proven = {case for case, found in zip(proofs, outcomes, strict=True) if found.get("gate") == "green"}
        for name, cases in groups.items():
            red = [case for case in cases if case.impl == "halfbyte" and proof(case) not in proven]
            for at, case in enumerate(cases):
                runs.pop(0)
                if red:
                    self._write({"group": name, "impl": case.impl, "failed": "no figures: our gradients here are not proven"})
                else:
                    self._case(name, at, case, [(name, case), *runs])
        if self.left_out:
            self._write({"group": "left out", "left_out": ", ".join(self.left_out)})

    def _case(self, name: str, at: int, case: Case, to_come: Sequence[tuple[str, Case]]) -> None:
        """One run of a group (`cold`: two), after the checkpoint that it needs."""
        command = "launches" if name == "launches" else "run"
        if self.limit - (self.clock() - self.begun) < self._expected(command, case):
            self.left_out.append(f"{name}[{at}] {case.impl}")
            return
        if not self._make(checkpoints(name, case), to_come):
            self._write({"group": name, "impl": case.impl, "failed": "no checkpoint"})
        elif name == "cold":
            with tempfile.TemporaryDirectory() as folder:
                caches = {f"{n}_CACHE_DIR": f"{folder}/{n}" for n in ("TRITON", "TORCHINDUCTOR")}
                for cache in ("empty", "warm"):
                    self._one(name, command, case, ["--first"], caches, {"cache": cache})
        else:
            self._one(name, command, case)

    def _make(self, wanted: Sequence[Case], to_come: Sequence[tuple[str, Case]]) -> bool:
        """Makes the checkpoints that are missing; those of former cases go first, so that the disk never holds all of them."""
        missing = {folder: case for case in wanted if not exists(folder := case.directory(self.root))}
        if missing:
            kept = [c for name, case in to_come for c in checkpoints(name, case)]
            kept += [*wanted, *(proof(case) for _, case in to_come)]
            for name in remove(Path(self.root), {case.directory(self.root) for case in kept}):
                print(f"removed {name}", flush=True)
        lines = [self._one("make", "make", case) for case in missing.values()]
        return not any("failed" in line for line in lines)

    def _one(
        self,
        group: str,
        command: str,
        case: Case,
        extra: Sequence[str] = (),
        more: Mapping[str, str] | None = None,
        note: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """One process and its line."""
        words = [*case.arguments(), *extra, "--dir", self.root]
        words += ["--tokenizer", self.tokenizer] if command == "make" and self.tokenizer else []
        words += ["--data", self.data] if self.data else []
        compiles = self._compiles(command, case) or (note or {}).get("cache") == "empty"
        start = self.clock()
        found = self.spawn(command, words, more or {}, ALLOWED + COMPILES * compiles)
        took = self.clock() - start
        key = (command, case.impl)
        if not compiles:
            self.longest[key] = max(took, self.longest.get(key, 0.0))
        self.compiled = self.compiled or (case.impl == "unsloth" and "failed" not in found)
        known = {"impl": case.impl, "size": case.size, "took_s": round(took, 1)} if command != "make" else {}
        line = {"group": group, **known, **found, **(note or {})}
        self._write(line)
        return line

    def _expected(self, command: str, case: Case) -> float:
        usual = self.longest.get((command, case.impl), EXPECTED[command])
        return COMPILES if self._compiles(command, case) else usual

    def _compiles(self, command: str, case: Case) -> bool:
        return case.impl == "unsloth" and not self.compiled

    def _write(self, line: dict[str, Any]) -> None:
        with self.one_line:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            print(*(f"{k}={str(line[k])[-300:]}" for k in SHOWN if line.get(k) not in (None, False, "", 0)), flush=True)
