"""Memory that was freed goes back to the system."""

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

GROWTH = 128 << 20  # bytes
STATM = Path("/proc/self/statm")


def _trim_of_glibc() -> Callable[[int], Any] | None:
    """None where the C library is another one."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" and STATM.exists() else None


_trim = _trim_of_glibc()
_resident = 0  # bytes; the least since the last trim


def give_back_memory() -> None:
    """Where the process has grown by more than `GROWTH` since the last time, hand freed memory back to the system.

    glibc keeps what lies between blocks in use: with images of many sizes that is more and more. No setting of it is
    changed, and most calls only read a number.
    """
    global _resident
    if _trim is None:
        return
    resident = _resident_bytes()
    if resident > _resident + GROWTH:
        _trim(0)
        _resident = _resident_bytes()
    else:
        _resident = min(_resident, resident)


def _resident_bytes() -> int:
    return int(STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
