"""A function over many items on a few threads, each with one OpenMP thread: for many small operations on a CPU.

Each torch operation opens a parallel region, and GNU OpenMP's threads spin at the end of it: on a machine with
neighbors a spinning thread holds the core that the one it waits for needs, and small operations take up to 40 times as
long. Here each thread does whole items alone and waits for nobody. The setting holds for one thread
(`torch.set_num_threads` is for the process); nothing of the user's changes.
"""

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers.utils import logging

Item = TypeVar("Item")
Result = TypeVar("Result")
SetThreads = Callable[[int], int]  # for the calling thread; returns the number of before

logger = logging.get_logger(__name__)
_executor: ThreadPoolExecutor | None = None
_lock = Lock()


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`[function(item) for item in items]` on `torch.get_num_threads()` threads, the calling one among them.

    Each thread takes the next item when it has done its last. Grad mode, inference mode and autocast on the CPU are
    those of the caller. After an exception no item is begun, and it is raised here when all threads are done. Within
    `function`, and where OpenMP threads can't be set for one thread, this is a plain loop in the calling thread.

    Examples:
        >>> parallel_map(lambda number: number**2, [1, 2, 3])
        [1, 4, 9]
    """
    items = list(items)
    threads = min(torch.get_num_threads(), len(items))
    # What watches or traces the operations of this thread does not see those of others.
    if threads < 2 or not _setters() or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return [function(item) for item in items]
    remaining = deque(enumerate(items))
    results: list[Any] = [None] * len(items)

    def work() -> None:
        while remaining:
            try:
                index, item = remaining.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                results[index] = function(item)
            except BaseException:
                remaining.clear()
                raise

    others = _submit(_in_modes_of_this_thread(work), threads - 1)
    try:
        with one_thread():
            work()
    finally:
        remaining.clear()
        started = [future for future in others if not future.cancel()]
        wait(started)
    for future in started:
        future.result()
    return results


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, operations of the calling thread use no other thread (where that can be set for one thread)."""
    before = [(setter, setter(1)) for setter in _setters()]
    try:
        yield
    finally:
        for setter, number in before:
            setter(number)


def _in_modes_of_this_thread(work: Callable[[], None]) -> Callable[[], None]:
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    caches = torch.is_autocast_cache_enabled()

    def in_modes() -> None:
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(inference))
            modes.enter_context(torch.set_grad_enabled(grad))
            if autocast:
                modes.enter_context(torch.autocast("cpu", dtype, cache_enabled=caches))
            work()

    return in_modes


def _submit(work: Callable[[], None], times: int) -> list[Future[None]]:
    global _executor
    futures: list[Future[None]] = []
    with _lock:
        if _executor is None:
            cores = os.cpu_count() or 1
            _executor = ThreadPoolExecutor(cores, "maskcls", initializer=_keep_to_one_thread)
        try:
            for _ in range(times):
                futures.append(Future())
                _executor.submit(_run, futures[-1], work)
        except RuntimeError:  # the interpreter is about to exit, or there can be no more threads
            pass  # it may be in the queue all the same: a future of our own says whether it has begun
        return futures


def _run(future: Future[None], work: Callable[[], None]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)


def _keep_to_one_thread() -> None:
    torch.get_num_threads()  # the first operation of a thread would set all of them
    for setter in _setters():
        setter(1)


def _forget_threads() -> None:
    """In a forked process, which has none of them."""
    global _executor, _lock
    _executor, _lock = None, Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


@cache
def _setters() -> tuple[SetThreads, ...]:
    """What sets the threads of the calling thread's operations; empty where torch's OpenMP is not GNU's."""
    openmp = _loaded_library("libgomp")
    if openmp is None or not hasattr(openmp, "omp_set_num_threads"):
        logger.debug("GNU OpenMP is not loaded: small operations run in the calling thread, with all its threads.")
        return ()

    def set_openmp(number: int) -> int:
        before = torch.get_num_threads()
        openmp.omp_set_num_threads(number)
        return before

    before = set_openmp(1)
    is_of_torch = torch.get_num_threads() == 1
    set_openmp(before)
    if not is_of_torch:
        logger.debug("torch does not use the GNU OpenMP that is loaded: small operations run in the calling thread.")
        return ()
    # After torch.set_num_threads products no longer follow OpenMP's number, but MKL's own.
    products = _loaded_library("libtorch_cpu")
    set_products = getattr(products, "MKL_Set_Num_Threads_Local", None)
    return (set_openmp,) if set_products is None else (set_openmp, set_products)


def _loaded_library(name: str) -> ctypes.CDLL | None:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux
        return None
    paths = [line.split(maxsplit=5)[-1] for line in lines]
    path = next((path for path in paths if Path(path).name.startswith(name)), None)
    try:
        return None if path is None else ctypes.CDLL(path)
    except OSError:
        return None
