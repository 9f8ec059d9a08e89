"""What the benchmarks measure with: neighbors that end, memory at its peak."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
measuring = pytest.importorskip("measuring")
HOLDER = f"""
import sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
from measuring import neighbors
with neighbors(2) as processes:
    print(*(process.pid for process in processes), flush=True)
    time.sleep(60)
"""


def is_running(pid: int) -> bool:
    """A process that has ended and waits for its parent to ask does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends_within(seconds: float, pids: list[int]) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(map(is_running, pids)):
        time.sleep(0.05)
    return not any(map(is_running, pids))


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@needs_proc
class TestNeighborsEnd:
    def test_with_the_block_and_by_an_error_in_it(self):
        with pytest.raises(ZeroDivisionError), measuring.neighbors(2) as processes:
            pids = [process.pid for process in processes]
            assert len(pids) == 2 and all(map(is_running, pids))
            raise ZeroDivisionError
        assert not any(map(is_running, pids))

    def test_after_their_limit(self):
        with measuring.neighbors(1, limit=0.1) as processes:
            assert processes[0].wait(20) == 0

    def test_when_the_benchmark_is_killed(self):
        holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
        pids = [int(pid) for pid in holder.stdout.readline().split()]
        assert len(pids) == 2 and all(map(is_running, pids))
        holder.kill()
        holder.communicate()
        assert ends_within(20, pids)


def test_rounds_are_counted_and_short_calls_are_timed_more_often(monkeypatch):
    calls = []
    measuring.medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls.count("a") == calls.count("b") > 3
    calls.clear()
    monkeypatch.setattr(measuring, "SHORTEST", 0.0)
    measuring.medians({"a": lambda: calls.append("a")}, rounds=2)
    assert len(calls) == 3  # with the first, which is not counted


@needs_proc
def test_memory_at_the_peak_counts_what_was_freed_again():
    peak = measuring.peak_memory(lambda: np.ones(50_000_000, dtype=np.uint8).sum())
    assert 45e6 < peak < 70e6
