"""How the proofs in `checks*.py` are run: by pytest here, in a process with a twin forced, and as the gate of a benchmark on a GPU.

Why another process: Triton decides when it is imported whether its kernels are interpreted, and other tests import it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

TESTS = Path(__file__).parents[1]
PATHS = os.pathsep.join((str(TESTS.parent / "src"), str(TESTS)))
Checks = Mapping[str, Callable[[str], None]]


def named(namespace: Mapping[str, Any]) -> dict[str, Callable[[str], None]]:
    """The functions `check_NAME` of a module, by NAME."""
    return {name[6:]: f for name, f in list(namespace.items()) if name.startswith("check_")}


def outcomes(checks: Checks, device: str, names: Sequence[str] = ()) -> dict[str, str]:
    """Checks on `device`, all by default: name to "" or what went wrong."""
    found = {}
    for name in names or checks:
        try:
            checks[name](device)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc(limit=-4)
    return found


def main(checks: Checks) -> int:
    """`FILE DEVICE [NAME ...]`: what was found as one JSON object; the exit code says whether all is green."""
    found = outcomes(checks, sys.argv[1], sys.argv[2:])
    print(json.dumps(found))
    return 1 if any(found.values()) else 0


def prove_forced(module: ModuleType, twin: str, names: Sequence[str] = ()) -> None:
    """Runs a module's checks where `twin` is forced, Triton's kernels interpreted; asserts that all are green."""
    environment = os.environ | {"HALFBYTE_KERNELS": twin, "TRITON_INTERPRET": "1", "PYTHONPATH": PATHS}
    done = subprocess.run(
        [sys.executable, str(module.__file__), "cpu", *names],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    assert list(found) == list(names or module.CHECKS)
    assert not any(found.values()), "\n".join(f"{name}: {said}" for name, said in found.items() if said)


SHARED = {70: 98_304, 75: 65_536, 80: 101_376, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory that a program may have, by compute capability; for 80 those of 86 and 89, which run the same code."""
FITTING = """
import sys
import triton

SHARED = {shared}[int(sys.argv[1])]
compiled_by_triton = triton.compile

def compile_fitting(source, **rest):
    made = compiled_by_triton(source, **rest)
    assert made.metadata.shared <= SHARED, f"{{source.name}}: {{made.metadata.shared}} bytes of shared memory, there are {{SHARED}}"
    return made

triton.compile = compile_fitting
"""
"""Goes before a program of `compile_for`: a kernel that compiles may still not start."""


def compile_for(capability: int, program: str, folder: Path) -> None:
    """Runs `program`, which compiles kernels for a GPU that need not be there and prints `compiled` at its end; each fits the
    shared memory of that GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": PATHS}
    file = folder / "build.py"
    file.write_text(FITTING.format(shared=SHARED) + program)
    command = [sys.executable, str(file), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout.strip() == "compiled", done.stderr
