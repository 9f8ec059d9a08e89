"""Checkpoints that are whole or absent: written under a temporary name, renamed, verified before use.

A run's folder holds `checkpoint-STEP` folders. Each has a `manifest.json` with the size and SHA-256 of its files; it
is written last, then the folder gets its name. What a killed process leaves behind lies in `.writing`.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import is_dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch.serialization import add_safe_globals, get_safe_globals, safe_globals
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..models.checkpoint_manifest import MANIFEST, sha256, verify
from ..utils.writing import WRITING, CannotWrite, sync, written

logger = logging.get_logger(__name__)

REPLACED, REMOVED = "replaced-", "removed-"


class CheckpointNotFound(FileNotFoundError):
    """A training was to go on, but has no checkpoint."""


class CorruptCheckpoint(RuntimeError):
    """A checkpoint is damaged, holds states of another kind, or more than tensors and numbers."""


# -- writing -----------------------------------------------------------------------------------------------------


@contextmanager
def saving(final: Path, accelerator: Accelerator | None = None) -> Iterator[Path]:
    """Folder to write a checkpoint to, which is `final` only when all of it is on the disk.

    All processes enter; each writes its files below the folder that it gets. After the last one has, the main process
    adds the manifest and renames the folder. An older folder `final` is replaced. A process that is killed at any
    moment leaves either no `final` or a whole one.

    Args:
        final: the folder of the checkpoint.
        accelerator: of the processes; None: there is one.

    Raises:
        CannotWrite: in all processes, if one could not write.
    """
    temporary = final.parent / WRITING / final.name
    replaced = temporary.with_name(REPLACED + final.name)
    what = f"The checkpoint {final.name}"
    is_main = accelerator is None or accelerator.is_main_process
    try:
        with _together(accelerator), written(what, final.parent):
            if is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        with _together(accelerator), written(what, final.parent, temporary):
            yield temporary
        with _together(accelerator), written(what, final.parent, temporary):
            if is_main:
                _write_manifest(temporary)
                shutil.rmtree(replaced, ignore_errors=True)
                if final.exists():
                    final.rename(replaced)
                temporary.rename(final)
                sync(final.parent)
    except BaseException:
        if is_main and replaced.exists() and not final.exists():
            replaced.rename(final)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if is_main:
        shutil.rmtree(temporary.parent, ignore_errors=True)
    _wait(accelerator)


def remove_leftovers(output: Path) -> None:
    """Remove what processes killed while they wrote a checkpoint have left in a run's folder."""
    for replaced in output.glob(f"{WRITING}/{REPLACED}*"):
        final = output / replaced.name.removeprefix(REPLACED)
        if not final.exists():  # killed between the two renames of a replacement
            replaced.rename(final)
    shutil.rmtree(output / WRITING, ignore_errors=True)


def rotate(output: Path, limit: int | None, newest: Path, best: str | Path | None = None) -> None:
    """Delete checkpoints until `limit` are left; never `newest`, which has just been written, nor `best`.

    Those go first that are incomplete, then those of later steps, which the training that wrote `newest` has not
    made, then the oldest.

    Args:
        output: the run's folder.
        limit: how many are kept; None or below 1: all.
        newest: a checkpoint.
        best: a checkpoint; None: none is the best.
    """
    if not limit or limit < 1:
        return
    kept = {newest.resolve()} | ({Path(best).resolve()} if best else set())
    checkpoints = list_checkpoints(output)
    step = {path: index for index, path in enumerate(checkpoints)}
    spare = [path for path in checkpoints if path.resolve() not in kept]
    spare.sort(key=lambda path: (verify(path, contents=False) is None, step[path] < step.get(newest, 0), step[path]))
    for path in spare[: max(0, len(checkpoints) - limit)]:
        removed = output / WRITING / (REMOVED + path.name)
        with suppress(OSError):  # gone at once, or what is left of it when we are killed would pass for a checkpoint
            removed.parent.mkdir(exist_ok=True)
            path = path.rename(removed)
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        (output / WRITING).rmdir()


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=1))
    sync(manifest)
    sync(folder)


def _wait(accelerator: Accelerator | None) -> None:
    if accelerator is not None:
        accelerator.wait_for_everyone()


@contextmanager
def _together(accelerator: Accelerator | None) -> Iterator[None]:
    """All processes leave the block, and what one of them could not write is raised in all."""
    mine: CannotWrite | None = None
    try:
        yield
    except CannotWrite as error:
        mine = error
    all_errors: list[Any] = [mine]
    if accelerator is not None and accelerator.num_processes > 1:
        all_errors = gather_object([mine])
    raised = mine or next((error for error in all_errors if error is not None), None)
    if raised is not None:
        raise raised


# -- finding -----------------------------------------------------------------------------------------------------


def list_checkpoints(output: Path) -> list[Path]:
    """Folders `checkpoint-STEP` of a run, by step; good or not."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output.glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match and path.is_dir())]


def last_good_checkpoint(output: Path) -> Path | None:
    """The latest whole checkpoint of a run's folder; a warning names each later one that is not. None: there are none.

    Raises:
        CorruptCheckpoint: there are checkpoints, and none is whole.
    """
    problems = []
    for path in reversed(list_checkpoints(Path(output))):
        problem = verify(path)
        if problem is None:
            return path
        problems.append(f"{path}: {problem}")
        logger.warning(f"Checkpoint {path} is not used: {problem}.")
    if problems:
        raise CorruptCheckpoint("No checkpoint is whole, so the training must start anew. " + "; ".join(problems))
    return None


def require_whole_checkpoint(checkpoint: str | Path) -> None:
    """Refuses a checkpoint that is not whole.

    Raises:
        CorruptCheckpoint: a file is missing, or is not the one that the manifest names.
    """
    problem = verify(Path(checkpoint))
    if problem is not None:
        raise CorruptCheckpoint(f"{checkpoint} is not a whole checkpoint: {problem}.")


def last_good_message(output: str | Path | None) -> str:
    """A sentence for errors that end a training."""
    try:
        last = None if output is None else last_good_checkpoint(Path(output))
    except CorruptCheckpoint:
        last = None
    return "There is no good checkpoint to return to." if last is None else f"The last good checkpoint is {last}."


def checkpoint_to_resume(output: Path, accelerator: Accelerator | None = None) -> Path:
    """[`last_good_checkpoint`], the same in all processes, which all call this; leftovers are removed first.

    Args:
        output: the run's folder.
        accelerator: of the processes; None: there is one.

    Raises:
        CheckpointNotFound: in all processes: there is none.
        CorruptCheckpoint: in all processes: none is whole.
    """
    answer: list[Any] = [None]
    if accelerator is None or accelerator.is_main_process:
        remove_leftovers(Path(output))
        try:
            answer[0] = last_good_checkpoint(Path(output))
        except CorruptCheckpoint as error:
            answer[0] = error
    if accelerator is not None and accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if answer[0] is None:
        raise CheckpointNotFound(f"There is no checkpoint in {output} to resume from.")
    if isinstance(answer[0], CorruptCheckpoint):
        raise answer[0]
    checkpoint: Path = answer[0]
    return checkpoint


# -- loading, without running code from the files, whoever has written them -------------------------------------

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
_METADATA_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}
_METADATA_CLASSES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
# Broken files, and states of other sizes or kinds.
_BROKEN = (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, SafetensorError, TypeError, ValueError)
# Of torch's messages: how to let files run code, and what concerns its authors.
_ADVICE = re.compile(r"^.*WeightsUnpickler error: |(In PyTorch 2\.6|Check the documentation|This is an internal).*")

_one_thread = threading.RLock()  # the environment is of all threads


class CheckpointLoads:
    """Inside `with`, between [`begin`] and [`end`], `torch.load` reads tensors, numbers and plain containers alone.

    Even where its caller asks for more: Accelerate does for states of one's own, torch for those of sharded
    checkpoints.

    Args:
        folder: of the checkpoint; None: there is none, until [`begin`] names one.

    Raises:
        CorruptCheckpoint: a file of the checkpoint `folder` holds more, or is broken.
    """

    def __init__(self, folder: str | Path | None):
        self.folder = folder
        self._forced: ExitStack | None = None

    def begin(self, folder: str | Path | None = None) -> None:
        """From here on `folder` is loaded (default: the last one, if there is any)."""
        self.end()
        self.folder = folder or self.folder
        if self.folder is not None:
            self._forced = ExitStack()
            self._forced.enter_context(_forced())
            for path in sorted(Path(self.folder).rglob(METADATA)):
                _check_metadata(path)

    def end(self) -> None:
        """From here on `torch.load` does as its caller says."""
        if self._forced is not None:
            self._forced.close()
            self._forced = None

    def __enter__(self) -> CheckpointLoads:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        is_loading = self._forced is not None
        self.end()
        if is_loading and error is not None:
            _raise_as_corrupt(cast(str, self.folder), error)


@contextmanager
def tensors_only(folder: str | Path) -> Iterator[None]:
    """[`CheckpointLoads`] of one block."""
    with CheckpointLoads(folder) as loads:
        loads.begin()
        yield


def _raise_as_corrupt(folder: str | Path, error: BaseException) -> None:
    if isinstance(error, CorruptCheckpoint):
        return
    # The second: of torch.distributed.checkpoint; no Exception
    if isinstance(error, pickle.UnpicklingError) or type(error).__name__ == "CheckpointException":
        raise CorruptCheckpoint(_message(folder, error)) from error
    past_its_end = isinstance(error, OSError) and error.filename is None
    if isinstance(error, _BROKEN) or past_its_end:
        raise CorruptCheckpoint(f"{folder} cannot be loaded: {_in_short(error)}") from error


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
    return _ADVICE.sub("", text).strip()[:300] or type(error).__name__


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _METADATA_NAMES:
            return super().find_class(module, name)
        if module in _METADATA_CLASSES:
            found: Any = getattr(import_module(module), name, None)
            own = isinstance(found, type) and found.__module__ == module
            if own and (is_dataclass(found) or issubclass(found, Enum)):
                return found
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")


def _check_metadata(path: Path) -> None:
    """Look before torch does, which unpickles this file whatever it names."""
    try:
        with path.open("rb") as file:
            _MetadataUnpickler(file).load()
    except (pickle.UnpicklingError, OSError):
        raise
    except Exception as error:  # bytes that are no pickle end in any of them
        raise pickle.UnpicklingError(f"{path.name} is broken: {error}") from error


# -- a loop with Accelerate --------------------------------------------------------------------------------------


def save_state(accelerator: Accelerator, output: Path, step: int, limit: int | None = None) -> Path:
    """Write OUTPUT/checkpoint-STEP, and keep `limit` checkpoints. All processes call it.

    It has models, optimizers, random numbers and all that is registered with `accelerator.register_for_checkpointing`.

    Args:
        accelerator: that has prepared them.
        output: the run's folder.
        step: number of steps that are done.
        limit: how many checkpoints are kept; None: all.

    Returns:
        The folder of the checkpoint.

    Raises:
        CannotWrite: names what could not be written, the folder and the cause.
    """
    final = Path(output) / f"checkpoint-{step}"
    with saving(final, accelerator) as folder:
        accelerator.save_state(str(folder))
    if accelerator.is_main_process:
        rotate(Path(output), limit, final)
    return final


def load_state(accelerator: Accelerator, folder: Path) -> None:
    """Restore what [`save_state`] wrote. All processes call it.

    Args:
        accelerator: that has prepared models and optimizers.
        folder: of the checkpoint.

    Raises:
        CorruptCheckpoint: the random numbers of this process are missing, for instance because the checkpoint was
            written by fewer processes. (`Accelerator.load_state` only logs that.) Or a file holds more than tensors
            and numbers, and could run code.
    """
    file = Path(folder) / f"random_states_{accelerator.process_index}.pkl"
    if not file.is_file():
        raise CorruptCheckpoint(
            f"{file} is missing: {folder} was written by another number of processes than {accelerator.num_processes}."
        )
    with tensors_only(folder):
        accelerator.load_state(str(folder))
        states = torch.load(file, weights_only=True)
        random.setstate(states["random_state"])
        np.random.set_state(states["numpy_random_seed"])
        torch.set_rng_state(states["torch_manual_seed"])


def rng_free(loader: DataLoader[Any], seed: int = 0) -> DataLoader[Any]:
    """Let a loader draw the seeds of its workers from a generator of its own.

    From the global one it draws at each start, and with persistent workers only at the first: the random numbers of
    the model after a resume would differ from those of an uninterrupted run.
    """
    inner = getattr(loader, "base_dataloader", loader)
    inner.generator = torch.Generator().manual_seed(seed)
    return loader
