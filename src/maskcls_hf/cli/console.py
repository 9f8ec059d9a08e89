"""What the commands share: messages, and the choice of a device."""

from typing import NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape

console = Console(stderr=True)


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
