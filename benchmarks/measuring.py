"""Times and memory of contenders that do the same, in one process; neighbors that keep the machine busy meanwhile."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

Contenders = dict[str, Callable[[], Any]]
HERE = Path(__file__).parent
MEGABYTE = 1e6
SHORTEST = 0.2  # seconds that the rounds take together at least, up to MOST_ROUNDS: short calls are timed more often
MOST_ROUNDS = 50
NEIGHBOR = """
import os, sys, threading, time
def until_the_benchmark_ends():
    os.read(0, 1)
    os._exit(0)
threading.Thread(target=until_the_benchmark_ends, daemon=True).start()
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    sum(range(10_000))
os._exit(0)
"""


def medians(contenders: Contenders, rounds: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Seconds of each: every round calls each once, in turn; a call before the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    finish()
    began = time.perf_counter()
    done = 0
    while done < rounds or (done < MOST_ROUNDS and time.perf_counter() - began < SHORTEST):
        for name, call in contenders.items():
            start = clock()
            call()
            finish()
            times[name].append(clock() - start)
        done += 1
    return {name: statistics.median(values) for name, values in times.items()}


def finish() -> None:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(call: Callable[[], Any], device: str = "cpu") -> int | None:
    """Bytes that the call needs at its peak beyond what was held before, its result included: on "cuda" of the GPU's
    memory that torch hands out, else of the resident memory of this process (Linux only; None elsewhere)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what malloc keeps for later
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return None
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return peak - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise LookupError(field)


@contextlib.contextmanager
def neighbors(number: int, limit: float = 600.0) -> Iterator[list[subprocess.Popen]]:
    """Inside, so many other processes keep a core busy each. They end with the block, with this process however it
    ends, and after `limit` seconds."""
    command = [sys.executable, "-c", NEIGHBOR, str(limit)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(number)]
    try:
        if processes:
            time.sleep(0.2)  # until they run
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def argument_parser(description: str | None, rounds: int, name: str) -> argparse.ArgumentParser:
    """What benchmarks have in common that write `name`.json and .png."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: as many as torch takes by itself)")
    parser.add_argument("--out", type=Path, default=HERE, help=f"folder of {name}.json (default: benchmarks)")
    return parser


def read_arguments(parser: argparse.ArgumentParser, parts: Iterable[str]) -> argparse.Namespace:
    """The command line, with `--only` some of the parts; torch then uses the threads that it says."""
    parser.add_argument("--only", nargs="+", choices=[*parts], default=[*parts], help="(default: all)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments


def write_record(path: Path, title: str, rounds: int, results: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": title, "command": shlex.join(["python", *sys.argv]), "rounds": rounds, "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n")


def machine() -> str:
    """Processor or GPU, threads, versions, date."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{processor_name()}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return f"{name}; {versions}; {datetime.date.today()}"


def processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
