"""Work in threads: on a CPU, several batches at a time on one thread each beat one batch on all threads."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Generator[Result]:
    """Apply a function to each item and yield the results in order; torch's threads are divided among the items.

    Torch releases the interpreter while it computes, and with a thread per item nothing waits at the end of each
    operation. Close it when leaving early (`contextlib.closing`). The global random generator is shared, so functions
    that draw from it are not reproducible here.
    """
    num_threads = torch.get_num_threads()
    num_workers = min(num_threads, len(items))
    if num_workers <= 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(num_threads // num_workers,))
    rest = iter(items)
    running = deque(pool.submit(function, item) for item in itertools.islice(rest, 2 * num_workers))
    try:
        while running:  # no further ahead than this, however slow the taker is
            yield running.popleft().result()
            running.extend(pool.submit(function, item) for item in itertools.islice(rest, 1))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)
