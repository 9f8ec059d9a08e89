"""Work that runs ahead in threads, while what is done already is used."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ..models.parallel import one_thread

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int, waiting: int) -> Generator[Result]:
    """`map(function, items)` in `threads` threads, each with one OpenMP thread.

    At most `waiting` results are being made or wait to be taken; only the calling thread takes `items`. Closing the
    iterator waits for what has begun.

    Args:
        function: run in the threads.
        items: what it is called with.
        threads: how many.
        waiting: how many results at most.

    Returns:
        The results in the order of the items, as an iterator.

    Examples:
        >>> list(ahead(abs, [-1, 2, -3], threads=2, waiting=4))
        [1, 2, 3]
    """
    results: deque[Future[Result]] = deque()

    def work(item: Item) -> Result:
        with one_thread():
            return function(item)

    pool = ThreadPoolExecutor(threads, "ahead")
    try:
        for item in items:
            results.append(pool.submit(work, item))
            while results and (len(results) >= waiting or results[0].done()):
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_order(items: Iterable[Item], number_of: Callable[[Item], int]) -> Iterator[Item]:
    """Items numbered 0, 1, ... in the order of their numbers.

    Examples:
        >>> list(in_order([2, 0, 1], number_of=lambda item: item))
        [0, 1, 2]
    """
    early: dict[int, Item] = {}
    following = 0
    for item in items:
        early[number_of(item)] = item
        while following in early:
            yield early.pop(following)
            following += 1


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
