"""Run a function in several processes that talk through gloo."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_processes(function: Callable[[int], Any], processes: int) -> list[Any]:
    """`function(rank)` of each process, in the order of the ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(run_rank, (function, processes, port, results), nprocs=processes)
    return [value for _, value in sorted((results.get() for _ in range(processes)), key=lambda pair: pair[0])]


def run_rank(rank: int, function: Callable[[int], Any], processes: int, port: int, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    results.put((rank, function(rank)))
    dist.destroy_process_group()
