"""States of a training are read without running code from their files, whoever has written them."""

from __future__ import annotations

import os
import pickle
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch.serialization import add_safe_globals, get_safe_globals, safe_globals

FORCE, FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# numpy's arrays and numbers: its random numbers, and scores that are logged.
_MAKERS = {"_reconstruct": np.empty(0).__reduce_ex__(2)[0], "scalar": np.float64(0).__reduce__()[0]}
NUMPY: list[Any] = [
    # `numpy.core` before numpy 2, `numpy._core` since
    *((maker, f"numpy.{core}.multiarray.{name}") for name, maker in _MAKERS.items() for core in ("core", "_core")),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("uint32", "int64", "int32", "float32", "float64", "bool")},
]
METADATA = ".metadata"  # of sharded checkpoints: a plain pickle
METADATA_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}
METADATA_CLASSES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
# Broken files, and states of other sizes or kinds.
BROKEN = (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, SafetensorError, TypeError, ValueError)
# Of torch's messages: how to let files run code, and what concerns its authors.
ADVICE = re.compile(r"^.*WeightsUnpickler error: |(In PyTorch 2\.6|Check the documentation|This is an internal).*")

_one_thread = threading.RLock()  # the environment is of all threads


class NoGoodCheckpoint(RuntimeError):
    """A training was to go on, but no checkpoint of it is whole."""


@contextmanager
def tensors_only(folder: str | Path) -> Iterator[None]:
    """Inside, `torch.load` reads tensors, numbers and plain containers, even where its caller asks for more: Accelerate
    does for states of one's own, torch for those of sharded checkpoints.

    Raises:
        NoGoodCheckpoint: a file of the checkpoint `folder` holds more, or is broken.
    """
    try:
        with _forced():
            for path in sorted(Path(folder).rglob(METADATA)):
                _check_metadata(path)
            yield
    except NoGoodCheckpoint:
        raise
    except pickle.UnpicklingError as error:
        raise NoGoodCheckpoint(_message(folder, error)) from error
    except BROKEN as error:
        raise NoGoodCheckpoint(f"{folder} cannot be loaded: {_in_short(error)}") from error
    except OSError as error:
        if error.filename is not None:
            raise
        raise NoGoodCheckpoint(f"{folder} cannot be loaded: {_in_short(error)}") from error  # a place past its end
    except BaseException as error:
        if type(error).__name__ != "CheckpointException":  # of torch.distributed.checkpoint; no Exception
            raise
        raise NoGoodCheckpoint(_message(folder, error)) from error


@contextmanager
def _forced() -> Iterator[None]:
    with _one_thread:
        allowed, set_before = get_safe_globals(), {name: os.environ.pop(name, None) for name in (FORCE, FORCE_NOT)}
        os.environ[FORCE] = "1"
        try:
            with safe_globals(NUMPY):
                yield
        finally:
            add_safe_globals([item for item in allowed if item not in get_safe_globals()])
            del os.environ[FORCE]
            os.environ.update({name: value for name, value in set_before.items() if value is not None})


def _message(folder: str | Path, error: BaseException) -> str:
    named = re.search(r"(?:GLOBAL|global|function|class) ([\w.]+\.\w+)", str(error))
    if named is None:
        return f"{folder} cannot be loaded: {_in_short(error)}"
    return (
        f"{folder} is not loaded: a file in it asks for {named[1]}, which could run code. States of a training are "
        "tensors and numbers alone."
    )


def _in_short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return ADVICE.sub("", text).strip()[:300] or type(error).__name__


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in METADATA_NAMES:
            return super().find_class(module, name)
        if module in METADATA_CLASSES:
            found: Any = getattr(import_module(module), name, None)
            own = isinstance(found, type) and found.__module__ == module
            if own and (is_dataclass(found) or issubclass(found, Enum)):
                return found
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")


def _check_metadata(path: Path) -> None:
    """torch unpickles this file whatever it names."""
    try:
        with path.open("rb") as file:
            _MetadataUnpickler(file).load()
    except (pickle.UnpicklingError, OSError):
        raise
    except Exception as error:  # bytes that are no pickle end in any of them
        raise pickle.UnpicklingError(f"{path.name} is broken: {error}") from error
