"""Files that are whole or absent: written under a temporary name, then renamed; what cannot be written is said."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    from safetensors import SafetensorError
except ImportError:
    SafetensorError = OSError  # type: ignore[misc, assignment]

WRITING = ".writing"  # folder in a folder: what is not yet whole
WEIGHTS = re.compile(r"(model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?")
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


def without_nan(content: Any) -> Any:
    """NaN as null, for JSON, which knows no NaN."""
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    return None if isinstance(content, float) and math.isnan(content) else content


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
        with written(path.name, target.parent if path.is_symlink() else path.parent):
            yield temporary
            os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def saving_model(folder: str | Path) -> Iterator[Path]:
    """Folder to write a model to, whose files get into `folder` when all of them are on the disk. For one process.

    Weights of a model that was there before, in other files, are removed: they would be loaded too.

    Raises:
        CannotWrite: `folder` is as it was.
    """
    folder = Path(folder)
    temporary = folder / WRITING / "model"
    made = not folder.exists()
    try:
        with written("The model", folder, temporary):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            names = sorted(path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
            for name in names:
                sync(temporary / name)
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary / name, folder / name)
            weights = {name.as_posix() for name in names if WEIGHTS.fullmatch(name.as_posix())}
            for path in folder.iterdir() if weights else ():
                if WEIGHTS.fullmatch(path.name) and path.name not in weights:
                    path.unlink()
            sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for empty in (temporary.parent, *([folder] if made else [])):
            with suppress(OSError):
                empty.rmdir()


@contextmanager
def written(what: str, folder: str | Path, scratch: Path | None = None) -> Iterator[None]:
    """Inside, `what` is written to `folder`; other files may be read.

    Args:
        what: such as "The model", for messages.
        folder: that it is written to.
        scratch: temporary folder for that, whose files may be tried out to find the cause.

    Raises:
        CannotWrite: in place of the errors of Python, safetensors and torch about writing.
    """
    try:
        yield
    except CannotWrite:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _reason(error, Path(folder), scratch)
        if reason is None:
            raise
        raise CannotWrite(f"{what} could not be written to {folder}: {reason}.") from error


def _reason(error: Exception, folder: Path, scratch: Path | None) -> str | None:
    """Why it was not written; None for an error about something else, such as a file that is read."""
    if isinstance(error, OSError):
        if (
            isinstance(error.filename, (str, os.PathLike)) and error.errno not in DISK_ERRORS
        ):  # of a copy it is the source
            file, folder = Path(os.path.realpath(error.filename)), Path(os.path.realpath(folder))
            if not file.is_relative_to(folder) and not folder.is_relative_to(file):
                return None
        return None if error.errno is None else error.strerror
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


def sync(path: Path) -> None:
    """Let the disc have a file, or the names in a folder, before what follows."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no descriptors of folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
