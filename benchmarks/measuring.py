"""Times and memory of contenders that do the same, in one process."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

Contenders = dict[str, Callable[[], Any]]
HERE = Path(__file__).parent
MEGABYTE = 1e6


def medians(contenders: Contenders, rounds: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Seconds of each: every round calls each once, in turn; a call before the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(rounds):
        for name, call in contenders.items():
            start = clock()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(call: Callable[[], Any]) -> int | None:
    """Bytes that the call needs at its peak beyond what the process held before, its result included: on a GPU of the
    GPU's memory, else of the resident memory (Linux only; None elsewhere)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
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


def read_arguments(description: str | None, parts: Iterable[str], rounds: int, name: str) -> argparse.Namespace:
    """The command line of a benchmark that writes `name`.json and .png; torch then uses the threads that it says."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*parts], default=[*parts], help="(default: all)")
    parser.add_argument("--rounds", type=int, default=rounds, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: all)")
    parser.add_argument("--out", type=Path, default=HERE, help=f"folder of {name}.json (default: benchmarks)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def write_record(path: Path, title: str, rounds: int, results: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": title, "rounds": rounds, "results": results}, indent=1) + "\n")


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
