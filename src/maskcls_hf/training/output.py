"""The folder of a training: one training at a time writes to it, and what it cannot write is said."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from ..utils.writing import DISK_ERRORS, WRITING, CannotWrite, write_json, written
from .checkpoints import last_good_message

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

LOCK = ".training"
_NO_LOCKS = {getattr(errno, name) for name in ("ENOLCK", "ENOTSUP", "ENOSYS", "EINVAL") if hasattr(errno, name)}

_occupied: set[str] = set()  # by this process, which locks of files do not keep out
_guard = threading.Lock()


class FolderInUse(ValueError):
    """Another training writes to the folder."""


@contextmanager
def training_in(out: Path) -> Iterator[None]:
    """Around a training that writes to `out`, in all of its processes.

    The folder is its own, and errors in writing say what is left.

    Args:
        out: made, where it is not there.

    Raises:
        FolderInUse: another training is at it.
        ValueError: `out` is a file.
        CannotWrite: names file, folder, cause and the last good checkpoint.
    """
    state = PartialState()
    with ExitStack() as stack:
        refusal: list[Any] = [None]
        if state.is_main_process:
            try:
                stack.enter_context(occupied(out))
            except (OSError, ValueError) as error:
                refusal[0] = error
        if state.num_processes > 1:
            broadcast_object_list(refusal)
        if refusal[0] is not None:
            raise refusal[0]
        stack.enter_context(_quiet_threads())
        try:
            yield
        except OSError as error:
            if not isinstance(error, CannotWrite) and error.errno not in DISK_ERRORS:
                raise
            message = f"{error.filename or f'A file in {out}'} could not be written: {error.strerror}."
            message = str(error) if isinstance(error, CannotWrite) else message
            raise CannotWrite(f"{message} {last_good_message(out)}") from error


@contextmanager
def occupied(out: Path) -> Iterator[None]:
    """Inside, `out` is there and locked. The lock dies with the process, however it ends.

    Raises:
        FolderInUse: another training is at it.
        ValueError: `out` is a file.
        CannotWrite: the folder, or its lock.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; the results need a folder.")
    made = not out.exists()
    with written(f"The folder {out.name}", out.parent):
        out.mkdir(parents=True, exist_ok=True)
    name = os.path.realpath(out)
    with _guard:
        if name in _occupied:
            raise FolderInUse(_in_use(out, "in this process"))
        _occupied.add(name)
    try:
        with written("The lock of the training", out):
            descriptor = _lock(out)
        try:
            with suppress(OSError):  # for people; the disk may be full
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            with suppress(OSError):
                (out / LOCK).unlink()  # while it is locked: see _lock
            os.close(descriptor)
            for folder in (out / WRITING, *([out] if made else [])):
                with suppress(OSError):
                    folder.rmdir()  # if it is empty
    finally:
        _occupied.discard(name)


def _lock(out: Path) -> int:
    """Descriptor of the locked file."""
    path = out / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock_descriptor(descriptor)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                    raise
                with suppress(OSError):
                    raise FolderInUse(_in_use(out, path.read_text(errors="replace")[:100])) from None
                raise FolderInUse(_in_use(out, "")) from None
            logger.warning(f"{out} is on a disk without locks ({error.strerror}): let no other training write to it.")
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # the training before has removed the file in between


def _lock_descriptor(descriptor: int) -> None:
    if fcntl is not None:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: workers that outlive us would keep it
        return
    import msvcrt

    os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # what is locked cannot be read
    msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    os.lseek(descriptor, 0, os.SEEK_SET)


def _in_use(out: Path, whose: str) -> str:
    whose = f" ({whose.strip()})" if whose.strip() else ""
    return f"Another training{whose} writes to {out}: wait for its end, or choose another folder."


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """TensorBoard's thread prints a traceback of a full disk, and tells it to the main thread too."""
    before = threading.excepthook

    def hook(caught: Any) -> None:
        if not (isinstance(caught.exc_value, OSError) and caught.exc_value.errno in DISK_ERRORS):
            before(caught)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def save_results(scores: dict[str, float], out: Path) -> None:
    """Write OUT/eval_results.json."""
    write_json(out / "eval_results.json", scores, indent=2, sort_keys=True)
