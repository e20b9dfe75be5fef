"""Processes that tokenise: bare interpreters that are sent records and answer with blocks of tokens, in order.

Why not `multiprocessing`: a forked process inherits locks and an open device, and a spawned one runs the user's script again.
These run `python -m halfbyte.data.worker`, know nothing but their job, and hold no torch. Memory is bounded: each process has
one piece of work, and as many answers wait as there are processes. This process tokenises too while they start, and on a machine
of few cores throughout. Whatever their number, the answers are the same, in the same order. Cost: two seconds to start, about
250 MB a process.
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
from threading import Lock
from typing import Any, NamedTuple

from halfbyte.data.convert import Converter, Job, Result
from halfbyte.data.sources import Raw
from halfbyte.errors import DataError

CHUNK = 256  # records in one piece of work
AHEAD = 2  # pieces of work under way for each process
MANY = 64  # answers that may wait for an earlier one
QUICK = 1 << 20  # bytes of a source below which fastokens takes longer to start than the tokenizer to tokenise
WORTH = 16 << 20  # bytes below which processes take longer to start than this one to tokenise
MOST = 16
FEW = 2  # processes beside which this one goes on tokenising; more keep it busy with their answers


class Failed(NamedTuple):
    """An error of ours, on its way from one process to another."""

    message: str
    hint: str
    code: str


class Crew(NamedTuple):
    """Who tokenises a source: so many processes, and this one where `helps` (alone where there are none). quick: see `Engine`."""

    processes: int
    helps: bool
    quick: bool


def crew(wanted: int | None, size: int) -> Crew:
    """Who tokenises a source of `size` bytes: as many processes as wanted, else one for each core where that is worth it."""
    quick = size >= QUICK
    if wanted is not None:
        return Crew(wanted, not wanted, quick)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Crew(0 if size < WORTH or cores < 2 or not sys.executable else min(cores - 1, MOST), True, quick)


def convert(raws: Iterable[Raw], job: Job, converter: Converter, crew: Crew, limit: int | None) -> Iterator[Result]:
    """Results in the order of the records.

    limit: of examples; what follows them is not even told of. Raises `DataError` when a process ends unasked.
    """
    stream = iter(raws)
    left = limit
    for chunk, result in _each(iter(lambda: list(islice(stream, CHUNK)), []), job, converter, crew):
        if left is not None and result.examples > left:
            result = converter(chunk, left)
        yield result
        left = None if left is None else left - result.examples
        if left == 0:
            return


def _each(chunks: Iterator[list[Raw]], job: Job, converter: Converter, crew: Crew) -> Iterator[tuple[list[Raw], Result]]:
    """Each chunk with what became of it."""
    if not crew.processes:
        yield from ((chunk, converter(chunk)) for chunk in chunks)
        return
    pool = _Pool(job, crew.processes)
    try:
        waiting: deque[tuple[list[Raw], Future[Result]]] = deque()
        for chunk in chunks:
            while len(waiting) >= (MANY if crew.helps else AHEAD * crew.processes):
                yield _next(waiting)
            if not crew.helps or pool.under_way < AHEAD * pool.started:
                waiting.append((chunk, pool.submit(chunk)))
            elif pool.started and crew.processes > FEW:
                yield _next(waiting)
                waiting.append((chunk, pool.submit(chunk)))
            else:
                mine: Future[Result] = Future()
                mine.set_result(converter(chunk))
                waiting.append((chunk, mine))
            while waiting and waiting[0][1].done():
                yield _next(waiting)
        while waiting:
            yield _next(waiting)
    finally:
        pool.close()


def _next(waiting: deque[tuple[list[Raw], Future[Result]]]) -> tuple[list[Raw], Result]:
    chunk, future = waiting.popleft()
    return chunk, future.result()


class _Pool:
    """Processes, each with a thread that sends it work and waits for the answer."""

    def __init__(self, job: Job, workers: int) -> None:
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TOKENIZERS_PARALLELISM": "false",
            "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error",
        }  # fmt: skip
        command = [sys.executable, "-m", "halfbyte.data.worker"]
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
        self.started = 0  # processes that are ready for work
        self.under_way = 0  # pieces of work
        self._count = Lock()
        sent = pickle.dumps(job)
        for _ in range(workers):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            self._processes.append(process)
            self._threads.submit(self._begin, process, sent)

    def _begin(self, process: subprocess.Popen[bytes], job: bytes) -> None:
        _send(process, job)
        _receive(process)  # an empty answer: it is ready
        self._idle.put(process)
        self._add(1, 0)

    def _add(self, started: int, under_way: int) -> None:
        with self._count:
            self.started += started
            self.under_way += under_way

    def submit(self, chunk: list[Raw]) -> Future[Result]:
        self._add(0, 1)
        future = self._threads.submit(self._ask, chunk)
        future.add_done_callback(lambda _: self._add(0, -1))
        return future

    def _ask(self, chunk: list[Raw]) -> Result:
        process = self._idle.get()
        try:
            _send(process, pickle.dumps([(*where, data) for where, data in chunk], protocol=5))
            answer = _receive(process)
        finally:
            self._idle.put(process)
        if not answer:
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


def _receive(process: subprocess.Popen[bytes]) -> bytes:
    """An answer; empty where the process has ended before it was whole."""
    assert process.stdout is not None
    size = process.stdout.read(8)
    answer = process.stdout.read(int.from_bytes(size, "little")) if len(size) == 8 else b""
    return answer if len(answer) == int.from_bytes(size, "little") else b""
