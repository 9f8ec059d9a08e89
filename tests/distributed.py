"""Run a function in several processes that talk through gloo."""

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_processes(function: Callable[[int], Any], processes: int) -> list[Any]:
    """`function(rank)` of each process, in the order of the ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:  # a queue that nobody reads holds 64 KiB, then its writer waits
        mp.spawn(run_rank, (function, processes, port, Path(folder)), nprocs=processes)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(processes)]


def run_rank(rank: int, function: Callable[[int], Any], processes: int, port: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    (folder / str(rank)).write_bytes(pickle.dumps(function(rank)))
    dist.destroy_process_group()
