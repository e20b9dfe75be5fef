"""`python -m halfbyte.data.worker`: reads a job and then records from its input, and answers with blocks of tokens (`workers.py`).

Messages are pickles, each after its length in 8 bytes. What libraries print goes to the error stream.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
from typing import IO, Any

from halfbyte.data.convert import Converter
from halfbyte.data.problems import Where
from halfbyte.data.sources import Raw
from halfbyte.data.workers import Failed
from halfbyte.errors import DataError


def _receive(stream: IO[bytes]) -> Any:
    size = stream.read(8)
    return pickle.loads(stream.read(int.from_bytes(size, "little"))) if len(size) == 8 else None


def main() -> None:
    """Answers until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    stream = sys.stdin.buffer
    converter = Converter(_receive(stream))
    # Nothing here makes cycles, and what was loaded stays: looking for garbage cost a tenth of the time.
    gc.freeze()
    gc.set_threshold(100_000)
    _answer(answers, b"")
    while (records := _receive(stream)) is not None:
        answer: Any
        try:
            answer = converter([Raw(Where(file, line, unit), data) for file, line, unit, data in records])
        except DataError as error:
            answer = Failed(error.message, error.hint, error.code)
        _answer(answers, pickle.dumps(answer, protocol=5))


def _answer(stream: IO[bytes], answer: bytes) -> None:
    stream.write(len(answer).to_bytes(8, "little"))
    stream.write(answer)
    stream.flush()


if __name__ == "__main__":
    main()
