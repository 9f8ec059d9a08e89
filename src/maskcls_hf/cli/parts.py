"""Parts of users, which register themselves when their code is run.

They are in files that the command line names, and in packages that say so in the entry points `maskcls_hf.parts`.
Configurations and recipes never load code.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

ENTRY_POINTS = "maskcls_hf.parts"


def load_parts(files: Sequence[Path]) -> None:
    """Import the entry points, then `files`, each once.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file or package that cannot be imported; says where and why, in one line.
    """
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist else "a package"
            raise ValueError(f"The parts of {package} ({ENTRY_POINTS}: {entry.value}): {_reason(error)}") from error
    for file in files:
        _import_file(file)


def _import_file(file: Path) -> None:
    """Run a Python file as the module of its name, which worker processes and saved models find it by.

    Errors as of [`load_parts`].
    """
    path = file.resolve()
    name = path.stem
    if not path.is_file():
        raise FileNotFoundError(f"--import {file}: there is no such file.")
    if path.suffix != ".py" or not name.isidentifier():
        raise ValueError(
            f"--import {file}: expected a Python file whose name is that of a module, such as my_parts.py."
        )
    found = importlib.util.find_spec(name)
    if found is not None and os.path.realpath(found.origin or "") != str(path):
        raise ValueError(f"--import {file}: there is another module {name}. Give the file a name of its own.")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        importlib.import_module(name)
    except Exception as error:
        raise ValueError(f"--import {_place(error, path) or file}: {_reason(error)}") from error


def _place(error: Exception, path: Path) -> str | None:
    """File and line of a file's own code that an error comes from."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}, line {lines[-1]}" if lines else None


def _reason(error: Exception) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"
