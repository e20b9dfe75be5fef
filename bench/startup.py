"""How long commands take to answer: `halfbyte --help` beside a bare interpreter, medians of several runs.

    python bench/startup.py [--runs 15]

Refuses to report when `--help` loads torch, transformers, pydantic or datasets. Target: 0.3 s on a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

HEAVY = ("torch", "transformers", "pydantic", "datasets")
CHECK = f"""
import sys
from halfbyte.cli.main import main
try:
    main(["--help"])
except SystemExit:
    pass
sys.exit(any(m in sys.modules for m in {HEAVY!r}))
"""
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import halfbyte": ["-c", "import halfbyte"],
    "halfbyte --help": ["-m", "halfbyte.cli.main", "--help"],
    "halfbyte train --help": ["-m", "halfbyte.cli.main", "train", "--help"],
    "halfbyte schema": ["-m", "halfbyte.cli.main", "schema"],
}


def seconds(command: list[str]) -> float:
    """Wall clock of one process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> int:
    """Prints a table; 1 when the gate is red."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    if subprocess.run([sys.executable, "-c", CHECK], stdout=subprocess.DEVNULL, check=False).returncode:
        print("halfbyte --help loads a heavy library: no figures", file=sys.stderr)
        return 1
    print("| command | median | fastest |\n| --- | --- | --- |")
    for name, command in COMMANDS.items():
        seconds(command)
        found = [seconds(command) for _ in range(runs)]
        print(f"| `{name}` | {statistics.median(found):.3f} s | {min(found):.3f} s |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
