"""What the commands share: messages, how they end, a progress bar, options, and the choice of a device."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..utils.places import require_folder, require_model_place
from ..utils.plain_text import PlainConsole, printable

if TYPE_CHECKING:
    import torch

console = PlainConsole(stderr=True)


def complain(message: str) -> None:
    """A line on standard error, in red."""
    console.print(message, style="red", soft_wrap=True)


def fail(error: Exception) -> NoReturn:
    """End the command with a message and exit code 1."""
    complain(f"Error: {error}")
    raise typer.Exit(1) from error


class TextFormatter(logging.Formatter):
    """Lines of a log without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return printable(super().format(record), keep_lines=True)


def show_logs_as_text() -> None:
    """Of all loggers that there are now."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [handler for logger in loggers for handler in getattr(logger, "handlers", [])]
    for handler in (*handlers, logging.lastResort):
        if handler is not None and handler.formatter is None:
            handler.setFormatter(TextFormatter())


# -- options -----------------------------------------------------------------------------------------------------------


def finite(value: Any) -> Any:
    """Refuses an option that is NaN or infinite: NaN passes every comparison with its limits.

    Raises:
        BadParameter: names the number.
    """
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is no number.")
    return value


def _tile_size(pixels: int | None) -> int | None:
    """Of an option."""
    if pixels is not None and 0 < pixels < 16:
        raise typer.BadParameter(f"{pixels} is no size of tiles: at least 16 pixels, or 0 for none.")
    return pixels


def _place_of_model(name: str) -> str:
    """Of an option; said before the imports of seconds, as all that a callback says."""
    try:
        require_model_place(name)
    except ValueError as error:
        fail(error)
    return name


def _place_of_data(path: Path) -> Path:
    try:
        require_folder(path, "data set")
    except OSError as error:
        fail(error)
    return path


ModelOption = Annotated[
    str,
    typer.Option(
        "--model", "-m", callback=_place_of_model,
        help="Folder of a saved model and its image processor, or name on the Hub.",
    ),
]  # fmt: skip
DataOption = Annotated[Path, typer.Option("--data", "-d", callback=_place_of_data, help="Folder of the data set.")]
LayoutOption = Annotated[
    str | None, typer.Option(help="Layout of the data: folder, ade20k, cityscapes, ... Default: found by looking.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto: an accelerator if there is one.")]
# What is not given is as the model has it saved, see models/inference_defaults.py, or else as said in brackets.
MaskThresholdOption = Annotated[
    float | None,
    typer.Option(min=0, max=1, callback=finite, help="Probability from which a pixel is in a mask [the model's, 0.5]."),
]
OverlapThresholdOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        callback=finite,
        help="Part of its area that a panoptic segment must keep from the others [the model's, 0.8].",
    ),
]
TileOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        callback=_tile_size,
        help="Cut larger images into tiles of so many pixels; 0: never [the model's, 0].",
    ),
]
TileOverlapOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=0.5,
        callback=finite,
        help="Part of a tile that it shares with the next one, at least [the model's, 0.25].",
    ),
]
EnlargeOption = Annotated[
    float | None,
    typer.Option(
        min=0, callback=finite,
        help="Network pixels an image pixel; 0: as the image processor resizes [the model's, 0].",
    ),
]  # fmt: skip
ImportOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--import", metavar="FILE", help="Run this Python file first, which registers parts; may be repeated."
    ),
]


def check_new_file(path: Path, option: str) -> None:
    """Refuses a place where no file can be written.

    Args:
        path: of the file.
        option: that names it, for the message.

    Raises:
        ValueError: it is a folder, or its folder is not there, or cannot be written to.
    """
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{option} {path}: no file can be written there.")


def check_new_folder(path: Path) -> None:
    """Refuses a place where no folder can be made or written to.

    Raises:
        ValueError: says what stands in the way.
    """
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "cannot be written to" if there.is_dir() else "is a file"
        raise ValueError(f"{path} cannot hold the results: {there} {what}.")


def choose_device(name: str) -> torch.device:
    """The device of a name; `auto`: an accelerator if there is one.

    Raises:
        RuntimeError: no such device.

    Examples:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    import torch

    if name != "auto":
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def progress_bar(what: str, transient: bool = False) -> Progress:
    """A bar with counts and the time left; `transient`: it goes when it is done."""
    columns = (TextColumn(what, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=transient)


# -- how a command begins and ends -------------------------------------------------------------------------------------


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


def stop(error: KeyboardInterrupt, done: str = "") -> NoReturn:
    """End the command as Ctrl-C (130) and SIGTERM (143) do, with one line that says what is `done`."""
    by, code = ("SIGTERM", 143) if isinstance(error, Terminated) else ("Ctrl-C", 130)
    complain(f"Stopped by {by}{f': {done}' if done else ''}.")
    raise typer.Exit(code) from error


@contextmanager
def ends_in_a_line(undone: str = "", *errors: type[Exception]) -> Iterator[None]:
    """Around the work of a command: what stops it, or is wrong with what it was given, is said in one line.

    Args:
        undone: what is to be said where it is stopped.
        errors: that count as wrong input, beside OSError, TypeError and ValueError.
    """
    wrong: tuple[type[Exception], ...] = (OSError, TypeError, ValueError, *errors)
    try:
        yield
    except KeyboardInterrupt as error:
        stop(error, undone)
    except typer.Exit:  # a RuntimeError
        raise
    except wrong as error:
        fail(error)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A command that ends in one line where it is stopped or the system refuses a file.

    Before it runs, what takes seconds is imported and the parts of users are loaded, for which it gets the option
    `--import`.
    """

    @functools.wraps(command)
    def guard(imports: list[Path] | None = None, **options: Any) -> None:
        with terminable():
            try:
                with _prepared(imports or []):
                    command(**options)
            except KeyboardInterrupt as error:
                stop(error)
            except BrokenPipeError as error:  # nobody reads on
                raise typer.Exit(1) from error
            except OSError as error:
                fail(error)

    signature = inspect.signature(command, eval_str=True)
    own = inspect.Parameter("imports", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ImportOption)
    guard.__signature__ = signature.replace(parameters=[*signature.parameters.values(), own])  # type: ignore[attr-defined]
    return guard


@contextmanager
def _prepared(files: list[Path]) -> Iterator[None]:
    """Around the work of a command: classes and parts are known, and weights are loaded and saved without bars."""
    from ..hub import register
    from ..utils.quiet import no_progress_bars
    from .parts import load_parts

    register()
    show_logs_as_text()
    try:
        load_parts(files)
    except ValueError as error:
        fail(error)
    with no_progress_bars():
        yield


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
