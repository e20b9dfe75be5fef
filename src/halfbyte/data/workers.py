"""Processes that tokenise: bare interpreters that are sent records and answer with blocks of tokens, in order.

Why not `multiprocessing`: a forked process inherits locks and an open device, and a spawned one runs the user's script again.
These run `python -m halfbyte.data.worker`, know nothing but their job, and hold no torch. Memory is bounded: each process has
one piece of work, and as many answers wait as there are processes. Whatever their number, the answers are the same, in the
same order. Cost: two seconds to start, about 150 MB a process.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from queue import SimpleQueue
from typing import Any, NamedTuple

from halfbyte.data.convert import Converter, Job, Result
from halfbyte.data.sources import Raw
from halfbyte.errors import DataError

CHUNK = 256  # records in one piece of work
AHEAD = 2  # pieces of work under way for each process
WORTH = 8 << 20  # bytes of a source below which starting processes takes longer than tokenising
MOST = 16


class Failed(NamedTuple):
    """An error of ours, on its way from one process to another."""

    message: str
    hint: str
    code: str


def count(wanted: int | None, size: int) -> int:
    """How many processes tokenise a source of `size` bytes: as many as wanted, else one for each core where it is worth it."""
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if size < WORTH or cores < 2 or not sys.executable else min(cores, MOST)


def convert(raws: Iterable[Raw], job: Job, converter: Converter, workers: int, limit: int | None) -> Iterator[Result]:
    """Results in the order of the records, from `workers` processes, or from this one where there are none.

    limit: of examples; what follows them is not even told of. Raises `DataError` when a process ends unasked.
    """
    stream = iter(raws)
    chunks = iter(lambda: list(islice(stream, CHUNK)), [])
    left = limit
    if workers < 1:
        for chunk in chunks:
            result = converter(chunk, left)
            yield result
            left = None if left is None else left - result.examples
            if left == 0:
                return
        return
    pool = _Pool(job, workers)
    try:
        waiting: deque[tuple[list[Raw], Future[Result]]] = deque()
        for chunk in chunks:
            waiting.append((chunk, pool.submit(chunk)))
            if len(waiting) < AHEAD * workers:
                continue
            yield (result := _next(waiting, converter, left))
            left = None if left is None else left - result.examples
            if left == 0:
                return
        while waiting and left != 0:
            yield (result := _next(waiting, converter, left))
            left = None if left is None else left - result.examples
    finally:
        pool.close()


def _next(waiting: deque[tuple[list[Raw], Future[Result]]], converter: Converter, left: int | None) -> Result:
    chunk, future = waiting.popleft()
    result = future.result()
    return result if left is None or result.examples <= left else converter(chunk, left)


class _Pool:
    """Processes, each with a thread that sends it work and waits for the answer."""

    def __init__(self, job: Job, workers: int) -> None:
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error",
        }  # fmt: skip
        command = [sys.executable, "-m", "halfbyte.data.worker"]
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
        sent = pickle.dumps(job)
        for _ in range(workers):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            self._processes.append(process)
            self._threads.submit(self._begin, process, sent)

    def _begin(self, process: subprocess.Popen[bytes], job: bytes) -> None:
        _send(process, job)
        self._idle.put(process)

    def submit(self, chunk: list[Raw]) -> Future[Result]:
        return self._threads.submit(self._ask, chunk)

    def _ask(self, chunk: list[Raw]) -> Result:
        process = self._idle.get()
        try:
            _send(process, pickle.dumps([(*where, data) for where, data in chunk], protocol=5))
            assert process.stdout is not None
            size = process.stdout.read(8)
            answer = process.stdout.read(int.from_bytes(size, "little")) if len(size) == 8 else b""
        finally:
            self._idle.put(process)
        if not answer or len(answer) != int.from_bytes(size, "little"):
            hint = "it may have run out of memory; try `data.workers: 0`, which tokenises in one process"
            raise DataError("a process that tokenises ended unexpectedly", hint=hint, code="data.worker")
        found: Any = pickle.loads(answer)  # from our own process, through a pipe that nobody else holds
        if isinstance(found, Failed):
            raise DataError(found.message, hint=found.hint, code=found.code)
        assert isinstance(found, Result)
        return found

    def close(self) -> None:
        """Ends the processes at once: what they have not answered yet is not wanted."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                with suppress(BrokenPipeError):  # bytes that the ended process never took
                    stream.close()


def _send(process: subprocess.Popen[bytes], sent: bytes) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended; whoever waits for its answer says so
        process.stdin.write(len(sent).to_bytes(8, "little") + sent)
        process.stdin.flush()
