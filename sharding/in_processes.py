"""The same work on many files, in several processes, with the results in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

_function: Callable[[Any], Any] | None = None  # of a working process: sent once, not with every job


def num_workers(asked: int, jobs: int, size_bytes: int) -> int:
    """Return how many processes to use: as asked; 0: one per core, but one for what is done before others start."""
    if asked:
        return min(asked, jobs)
    return 1 if size_bytes < 256 << 20 else min(len(os.sched_getaffinity(0)), jobs)


def map_in_processes(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int
) -> Iterator[Result]:
    """Yield the result of every job, in the jobs' order.

    Args:
        function: picklable, as are jobs and results.
        jobs: taken as they are needed.
        workers: processes; 1 or fewer works in this one.

    Raises:
        OSError: a process was killed.
    """
    if workers <= 1:
        yield from map(function, jobs)
        return
    # Spawned, not forked: a fork copies locks that library threads may hold.
    context, waiting = multiprocessing.get_context("spawn"), deque[Future[Result]]()
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(function,)) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(_work, job))
                if len(waiting) >= 3 * workers:  # enough to keep all busy, few enough for memory
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise OSError(
                "a reading process was killed (out of memory?); --workers 1 needs the least"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(function: Callable[[Any], Any]) -> None:
    """Start a process: Ctrl-C is for the one who started the work, and one that was killed takes it along."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work(job: Any) -> Any:
    assert _function is not None, "a process gets its function when it starts"
    return _function(job)
