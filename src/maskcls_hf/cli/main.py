"""Entry point of `maskcls`."""

from importlib.metadata import version
from typing import Annotated

import typer

from ..hub.quiet import no_progress_bars
from .convert import convert
from .evaluate import evaluate
from .push import push
from .segment import segment
from .train import train
from .validate import validate

app = typer.Typer(
    help="Image segmentation by mask classification (MaskFormer): an image becomes masks with one class each.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(no_args_is_help=True)(segment)
app.command(no_args_is_help=True)(evaluate)
app.command(no_args_is_help=True)(convert)
app.command(no_args_is_help=True)(validate)
app.command(no_args_is_help=True)(train)
app.command(no_args_is_help=True)(push)


def print_version(wanted: bool) -> None:
    if wanted:
        packages = ("torch", "transformers")
        print(f"maskcls-hf {version('maskcls-hf')} ({', '.join(f'{name} {version(name)}' for name in packages)})")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    context.with_resource(no_progress_bars())  # of weights that are loaded and saved; commands have their own
