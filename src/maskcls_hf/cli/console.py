"""What the commands share: messages, how they end, a progress bar, options, and the choice of a device."""

import functools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..utils.plain_text import PlainConsole

console = PlainConsole(stderr=True)


def finite(value: Any) -> Any:
    """Of an option: NaN passes every comparison with its limits."""
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is no number.")
    return value


ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Folder of a saved model and its image processor, or name on the Hub.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto: an accelerator if there is one.")]
MaskThresholdOption = Annotated[
    float, typer.Option(min=0, max=1, callback=finite, help="Probability from which a pixel is in a mask.")
]
OverlapThresholdOption = Annotated[
    float,
    typer.Option(
        min=0, max=1, callback=finite, help="Part of its area that a panoptic segment must keep from the others."
    ),
]
TileOption = Annotated[
    int | None, typer.Option(min=16, help="Cut larger images into tiles of so many pixels. Default: never.")
]
TileOverlapOption = Annotated[
    float,
    typer.Option(min=0, max=0.5, callback=finite, help="Part of a tile that it shares with the next one, at least."),
]


def progress_bar(what: str, transient: bool = False) -> Progress:
    """A bar with counts and the time left; `transient`: it goes when it is done."""
    columns = (TextColumn(what, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=transient)


def complain(message: str) -> None:
    console.print(message, style="red", soft_wrap=True)


def fail(error: Exception) -> NoReturn:
    """End the command with a message and exit code 1."""
    complain(f"Error: {error}")
    raise typer.Exit(1) from error


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


def stop(error: KeyboardInterrupt, done: str = "") -> NoReturn:
    """End the command as Ctrl-C (130) and SIGTERM (143) do, with one line that says what is `done`."""
    by, code = ("SIGTERM", 143) if isinstance(error, Terminated) else ("Ctrl-C", 130)
    complain(f"Stopped by {by}{f': {done}' if done else ''}.")
    raise typer.Exit(code) from error


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A command that ends in one line where it is stopped or the system refuses a file."""

    @functools.wraps(command)
    def guard(*arguments: Any, **options: Any) -> None:
        with terminable():
            try:
                command(*arguments, **options)
            except KeyboardInterrupt as error:
                stop(error)
            except BrokenPipeError as error:  # nobody reads on
                raise typer.Exit(1) from error
            except OSError as error:
                fail(error)

    return guard


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises [`Terminated`], so that what is open is closed and what is done is kept."""

    def terminate(number: int, frame: Any) -> NoReturn:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_new_file(path: Path, option: str) -> None:
    """Raise ValueError where no file can be written."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{option} {path}: no file can be written there.")


def check_new_folder(path: Path) -> None:
    """Raise ValueError where no folder can be made or written to."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "cannot be written to" if there.is_dir() else "is a file"
        raise ValueError(f"{path} cannot hold the results: {there} {what}.")


def choose_device(name: str) -> torch.device:
    """`auto`: an accelerator if there is one.

    Raises:
        `RuntimeError`: no such device.
    """
    if name != "auto":
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
