"""Checkpoints that are whole or absent: written under a temporary name, renamed, verified before use.

A run's folder holds `checkpoint-STEP` folders. Each has a `manifest.json` with the size and SHA-256 of its files; it
is written last, then the folder gets its name. What a killed process leaves behind lies in `.writing`.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader, Sampler
from transformers.utils import logging

from ..models.checkpoint_manifest import MANIFEST, sha256, verify
from ..utils.writing import WRITING, CannotWrite, sync, written
from .unpickling import NoGoodCheckpoint, tensors_only

logger = logging.get_logger(__name__)

REPLACED, REMOVED = "replaced-", "removed-"


# -- writing -----------------------------------------------------------------------------------------------------


@contextmanager
def saving(final: Path, accelerator: Accelerator | None = None) -> Iterator[Path]:
    """Folder to write a checkpoint to, which is `final` only when all of it is on the disc.

    All processes enter; each writes its files below the folder that it gets. After the last one has, the main process
    adds the manifest and renames the folder. An older folder `final` is replaced. A process that is killed at any
    moment leaves either no `final` or a whole one.

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
        NoGoodCheckpoint: there are checkpoints, and none is whole.
    """
    problems = []
    for path in reversed(list_checkpoints(Path(output))):
        problem = verify(path)
        if problem is None:
            return path
        problems.append(f"{path}: {problem}")
        logger.warning(f"Checkpoint {path} is not used: {problem}.")
    if problems:
        raise NoGoodCheckpoint("No checkpoint is whole, so the training must start anew. " + "; ".join(problems))
    return None


def last_good_message(output: str | Path | None) -> str:
    """A sentence for errors that end a training."""
    try:
        last = None if output is None else last_good_checkpoint(Path(output))
    except NoGoodCheckpoint:
        last = None
    return "There is no good checkpoint to return to." if last is None else f"The last good checkpoint is {last}."


def checkpoint_to_resume(output: Path, accelerator: Accelerator | None = None) -> Path | None:
    """[`last_good_checkpoint`], the same in all processes, which all call this; leftovers are removed first."""
    answer: list[Any] = [None, None]
    if accelerator is None or accelerator.is_main_process:
        remove_leftovers(Path(output))
        try:
            answer[0] = last_good_checkpoint(Path(output))
        except NoGoodCheckpoint as error:
            answer[1] = str(error)
    if accelerator is not None and accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if answer[1] is not None:
        raise NoGoodCheckpoint(answer[1])
    return answer[0]


# -- a loop with Accelerate --------------------------------------------------------------------------------------


def save_state(accelerator: Accelerator, output: Path, step: int, limit: int | None = None) -> Path:
    """Write OUTPUT/checkpoint-STEP: models, optimisers, random numbers and all that is registered with
    `accelerator.register_for_checkpointing`; keep `limit` checkpoints. All processes call it."""
    final = Path(output) / f"checkpoint-{step}"
    with saving(final, accelerator) as folder:
        accelerator.save_state(str(folder))
    if accelerator.is_main_process:
        rotate(Path(output), limit, final)
    return final


def load_state(accelerator: Accelerator, folder: Path) -> None:
    """Restore what [`save_state`] wrote. All processes call it.

    Raises:
        NoGoodCheckpoint: the random numbers of this process are missing, for instance because the checkpoint was
            written by fewer processes. (`Accelerator.load_state` only logs that.) Or a file holds more than tensors
            and numbers, and could run code.
    """
    file = Path(folder) / f"random_states_{accelerator.process_index}.pkl"
    if not file.is_file():
        raise NoGoodCheckpoint(
            f"{file} is missing: {folder} was written by another number of processes than {accelerator.num_processes}."
        )
    with tensors_only(folder):
        accelerator.load_state(str(folder))
        states = torch.load(file, weights_only=True)
        random.setstate(states["random_state"])
        np.random.set_state(states["numpy_random_seed"])
        torch.set_rng_state(states["torch_manual_seed"])


def epoch_batches(loader: DataLoader, sampler: Sampler, epoch: int, done: int = 0) -> DataLoader:
    """The prepared loader of one epoch, after its first `done` batches (of this process).

    `sampler` is the one inside `loader`; it has `set_epoch`. Accelerate does not reach it through the wrappers of a
    skipped loader in several processes.
    """
    loader.set_epoch(epoch)  # type: ignore[attr-defined]
    if done:
        loader = skip_first_batches(loader, done)
    sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return loader


def rng_free(loader: DataLoader, seed: int = 0) -> DataLoader:
    """Let a loader draw the seeds of its workers from a generator of its own.

    From the global one it draws at each start, and with persistent workers only at the first: the random numbers of
    the model after a resume would differ from those of an uninterrupted run.
    """
    inner = getattr(loader, "base_dataloader", loader)
    inner.generator = torch.Generator().manual_seed(seed)
    return loader


__all__: Sequence[str] = [
    "MANIFEST",
    "WRITING",
    "NoGoodCheckpoint",
    "checkpoint_to_resume",
    "epoch_batches",
    "last_good_checkpoint",
    "last_good_message",
    "list_checkpoints",
    "load_state",
    "remove_leftovers",
    "rng_free",
    "rotate",
    "save_state",
    "saving",
    "verify",
]
