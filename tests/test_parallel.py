"""Functions on threads of our own: results in order, the caller's modes, one OpenMP thread each, no deadlock."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from maskcls_hf.models import parallel
from maskcls_hf.models.parallel import one_thread, parallel_map


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2  # nothing of the user's changes
    torch.set_num_threads(before)


needs_libgomp = pytest.mark.skipif(not parallel._setters(), reason="another OpenMP than GNU's")


def meet(barrier: threading.Barrier) -> str:
    """The name of the thread, when as many threads as the barrier waits for are here."""
    barrier.wait(timeout=20)
    return threading.current_thread().name


def test_results_are_in_the_order_of_the_items():
    def late(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    assert parallel_map(late, range(20)) == [item * item for item in range(20)]
    assert parallel_map(late, []) == []
    assert parallel_map(late, iter([3])) == [9]


@needs_libgomp
def test_items_run_side_by_side_the_caller_among_the_threads():
    barrier = threading.Barrier(2)
    names = parallel_map(lambda _: meet(barrier), range(2))
    assert len(set(names)) == 2 and threading.current_thread().name in names


@needs_libgomp
def test_each_thread_has_one_openmp_thread_and_the_caller_gets_its_own_back():
    barrier = threading.Barrier(2)
    assert parallel_map(lambda _: (meet(barrier), torch.get_num_threads())[1], range(2)) == [1, 1]
    with pytest.raises(ZeroDivisionError):
        parallel_map(lambda item: 1 // item, [0, 0])
    assert torch.get_num_threads() == 2
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


@needs_libgomp
@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of the process in /proc")
def test_no_operation_starts_threads():
    script = """
import os, torch
from maskcls_hf.models.parallel import parallel_map
torch.set_num_threads(4)
def work(_):
    logits = torch.randn(8, 400, 400)
    return (logits.sigmoid() @ logits).flatten(1).sum().item()
before = len(os.listdir("/proc/self/task"))
parallel_map(work, range(40))
assert len(os.listdir("/proc/self/task")) <= before + 3, os.listdir("/proc/self/task")
assert torch.get_num_threads() == 4
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("autocast", [True, False])
def test_modes_of_the_caller(mode, autocast):
    barrier = threading.Barrier(2 if parallel._setters() else 1)

    def modes(_):
        meet(barrier)
        result = torch.ones(2, 2) @ torch.ones(2, 2)
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), result.dtype

    with mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_autocast_dtype("cpu")
        assert parallel_map(modes, range(2)) == [(*expected[:2], expected[2] if autocast else torch.float32)] * 2


def test_gradients_pass_through():
    weight = torch.ones(3, requires_grad=True)
    sum(parallel_map(lambda item: (weight * item).sum(), [1.0, 2.0, 3.0])).backward()
    assert weight.grad.tolist() == [6.0] * 3


@pytest.mark.parametrize("bad", [0, 7, 19])
def test_an_exception_is_raised_in_the_caller_and_nothing_is_begun_after_it(bad):
    begun = []

    def fails(item: int) -> None:
        begun.append(item)
        time.sleep(0.002)
        if item == bad:
            raise LookupError(f"item {item}")

    with pytest.raises(LookupError, match=f"item {bad}"):
        parallel_map(fails, range(20))
    count = len(begun)
    time.sleep(0.02)
    assert len(begun) == count <= bad + 3
    assert parallel_map(str, range(3)) == ["0", "1", "2"]  # the threads live on


def test_an_index_error_is_no_end_of_the_items():
    with pytest.raises(IndexError):
        parallel_map(lambda item: [][item], range(4))


def test_calls_within_calls():
    assert parallel_map(lambda a: parallel_map(lambda b: a * b, range(4)), range(6)) == [
        [a * b for b in range(4)] for a in range(6)
    ]


def test_calls_of_many_threads_at_once():
    results: dict[int, list[int]] = {}

    def call(number: int) -> None:
        results[number] = parallel_map(lambda item: item + number, range(50))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results == {number: [item + number for item in range(50)] for number in range(12)}


def squares_in_child(connection) -> None:
    torch.set_num_threads(2)
    names = parallel_map(lambda item: (item * item, time.sleep(0.01), threading.current_thread().name), range(8))
    connection.send(([square for square, *_ in names], len({name for *_, name in names})))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_makes_threads_of_its_own():
    parallel_map(lambda _: time.sleep(0.01), range(4))  # there are some before the fork
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=squares_in_child, args=(there,))
    process.start()
    assert here.poll(60), "the child hangs"
    squares, threads = here.recv()
    process.join(60)
    assert process.exitcode == 0 and squares == [item * item for item in range(8)]
    assert threads == (2 if parallel._setters() else 1)


def test_the_interpreter_exits_and_works_until_then():
    script = """
import atexit, torch
from maskcls_hf.models.parallel import parallel_map
torch.set_num_threads(2)
atexit.register(lambda: print(parallel_map(abs, [-1, -2])))
print(parallel_map(abs, [-3, -4]))
"""
    result = subprocess.run([sys.executable, "-c", script], check=True, timeout=120, capture_output=True, text=True)
    assert result.stdout.split("\n")[:2] == ["[3, 4]", "[1, 2]"]


def test_one_thread_or_another_openmp_is_a_plain_loop(monkeypatch):
    torch.set_num_threads(1)
    assert set(parallel_map(lambda _: threading.current_thread().name, range(4))) == {threading.current_thread().name}
    torch.set_num_threads(2)
    monkeypatch.setattr(parallel, "_setters", lambda: ())
    assert set(parallel_map(lambda _: threading.current_thread().name, range(4))) == {threading.current_thread().name}
    with one_thread():
        assert torch.get_num_threads() == 2


def test_what_watches_operations_sees_all_of_them():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        parallel_map(lambda _: torch.ones(2, 3) @ torch.ones(3, 4), range(10))
    assert counter.get_total_flops() == 10 * 2 * 2 * 3 * 4


@needs_libgomp
def test_where_a_thread_cannot_be_started_those_that_were_are_waited_for(monkeypatch):
    class FullExecutor(ThreadPoolExecutor):
        """Queues what it is given, and then cannot start a second thread, as where processes are limited."""

        def submit(self, *args, **kwargs):
            super().submit(*args, **kwargs)
            if not first.is_set():
                first.set()
                return
            raise RuntimeError("can't start new thread")

    first, begun = threading.Event(), threading.Event()
    caller = threading.current_thread()

    def slow_elsewhere(item: int) -> int:
        if threading.current_thread() is caller:
            begun.wait(timeout=20)
        else:
            begun.set()
            time.sleep(0.2)
        return item

    with FullExecutor(1) as executor:
        monkeypatch.setattr(parallel, "_executor", executor)
        torch.set_num_threads(3)
        assert parallel_map(slow_elsewhere, range(6)) == list(range(6))
        torch.set_num_threads(2)
