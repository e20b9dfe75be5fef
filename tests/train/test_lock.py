"""One run in one output directory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.errors import TrainingError
from halfbyte.train import lock

HOLD = """
import sys, time
from pathlib import Path
from halfbyte.train import lock
with lock.hold(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.cpu
def test_a_second_run_is_refused_and_a_killed_one_taken_over(tmp_path: Path) -> None:
    told: list[str] = []
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match=f"pid {child.pid}") as caught, lock.hold(tmp_path, told.append):
            pass
        assert caught.value.code == "train.locked"
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    with lock.hold(tmp_path, told.append):
        pass
    assert told == [f"took over the lock of pid {child.pid} on {socket.gethostname()}, which is gone"]


def test_a_run_that_ends_leaves_the_lock_free(tmp_path: Path) -> None:
    told: list[str] = []
    for _ in range(2):
        with lock.hold(tmp_path, told.append):
            assert json.loads((tmp_path / lock.NAME).read_text())["host"] == socket.gethostname()
    assert told == []


def test_a_run_that_fails_leaves_the_lock_free(tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(ZeroDivisionError), lock.hold(tmp_path, told.append):
        raise ZeroDivisionError
    with lock.hold(tmp_path, told.append):
        pass
