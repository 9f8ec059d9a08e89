"""What the commands share: messages, a progress bar, options, and the choice of a device."""

from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Folder of a saved model and its image processor, or name on the Hub.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto: an accelerator if there is one.")]
MaskThresholdOption = Annotated[float, typer.Option(min=0, max=1, help="Probability from which a pixel is in a mask.")]
OverlapThresholdOption = Annotated[
    float, typer.Option(min=0, max=1, help="Part of its area that a panoptic segment must keep from the others.")
]
TileOption = Annotated[
    int | None, typer.Option(min=16, help="Cut larger images into tiles of so many pixels. Default: never.")
]
TileOverlapOption = Annotated[
    float, typer.Option(min=0, max=0.5, help="Part of a tile that it shares with the next one, at least.")
]


def progress_bar(what: str, transient: bool = False) -> Progress:
    """A bar with counts and the time left; `transient`: it goes when it is done."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=transient)


def complain(message: str) -> None:
    console.print(f"[red]{escape(message)}[/]", soft_wrap=True, highlight=False)


def fail(error: Exception) -> NoReturn:
    """End the command with a message and exit code 1."""
    complain(f"Error: {error}")
    raise typer.Exit(1) from error


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
