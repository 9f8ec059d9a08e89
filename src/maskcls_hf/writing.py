"""Files that are whole or absent: written under a temporary name, then renamed; what cannot be written is said."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# What torch.save says of a file that it cannot open or write; the cause is lost.
TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container|iostream|basic_ios|cannot be opened|Parent directory")
# Nothing but writing ends in these.
DISK_ERRORS = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS") if hasattr(errno, name)}

_numbers = itertools.count()


class CannotWrite(OSError):
    """Names what could not be written, where, and why: a full disk, no permission."""


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8. A process that is killed at any moment leaves the old content or the new one.

    Raises:
        CannotWrite: names file, folder and cause; the old content is kept.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        with suppress(OSError):  # pipes and devices have no disk to wait for
            os.fsync(file.fileno())


def write_json(path: str | Path, content: Any, **options: Any) -> None:
    """[`write_text`] of JSON with `options` of `json.dumps`, and a newline."""
    write_text(path, json.dumps(content, **options) + "\n")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Path to write a file to, with the suffix of `path`, which it becomes when the block ends without an error.

    Raises:
        CannotWrite: as [`write_text`].
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    if path.absolute().is_relative_to("/dev") or (path.exists() and not path.is_file()):  # a pipe: not to be replaced
        with written(path.name, path.parent):
            yield path
        return
    temporary = target.with_name(f".writing-{os.getpid()}-{next(_numbers)}{target.suffix}")
    try:
        with written(path.name, path.parent):
            yield temporary
            os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def written(what: str, folder: str | Path, scratch: Path | None = None) -> Iterator[None]:
    """Inside, `what` is written to `folder`.

    Args:
        scratch: temporary folder for that, whose files may be tried out to find the cause.

    Raises:
        CannotWrite: in place of the errors of Python, safetensors and torch about writing.
    """
    try:
        yield
    except CannotWrite:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _reason(error, scratch)
        if reason is None:
            raise
        raise CannotWrite(f"{what} could not be written to {folder}: {reason}.") from error


def _reason(error: Exception, scratch: Path | None) -> str | None:
    """Why it was not written; None for an error about something else."""
    if isinstance(error, OSError):
        return error.strerror or str(error).rstrip(".")
    if isinstance(error, SafetensorError):
        number = re.search(r"\(os error (\d+)\)", str(error))
        return os.strerror(int(number[1])) if number and os.name != "nt" else str(error).rstrip(".")
    if not TORCH_WRITER.search(str(error)):
        return None
    return _reason_of_folder(scratch) or str(error).splitlines()[0].rstrip(".")


def _reason_of_folder(scratch: Path | None) -> str | None:
    """Why no more can be written to the file that was written last; None: it can."""
    try:
        files = [] if scratch is None else [path for path in scratch.rglob("*") if path.is_file()]
        if scratch is not None:
            last = max(files, key=lambda path: path.stat().st_mtime_ns, default=scratch / "probe")
            with last.open("ab") as file:
                file.write(bytes(1 << 20))
    except OSError as error:
        return error.strerror
    return None
