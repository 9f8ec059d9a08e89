"""Entry point of `maskcls`. The files of the commands import what takes seconds when they run."""

import io
import sys
import traceback
import warnings
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

import typer
from typer.main import get_command

from ..utils.plain_text import printable
from .console import guarded, show_logs_as_text
from .convert import convert
from .convert_data import convert_data
from .evaluate import evaluate
from .push import push
from .segment import segment
from .train import train
from .tune import tune
from .validate import validate


class App(typer.Typer):
    """Shows every text of a process as text, whatever the encoding of its output.

    There are no control characters in log lines, warnings and errors.
    """

    def __call__(self, *arguments: Any, **options: Any) -> NoReturn:
        """Run a command and end the process; arguments are those of click's commands."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        show_logs_as_text()
        as_usual = warnings.formatwarning
        warnings.formatwarning = lambda *a, **k: printable(as_usual(*a, **k), keep_lines=True)
        try:
            code = get_command(self)(*arguments, standalone_mode=False, **options)
        except OSError as error:  # help or version, to a full disk or to nobody
            if not isinstance(error, BrokenPipeError):
                print(printable(f"Error: {error}"), file=sys.stderr)
            sys.exit(1)
        except Exception as error:
            if not hasattr(error, "format_message"):  # no wrong call: a fault of ours
                print(printable(traceback.format_exc(), keep_lines=True), file=sys.stderr)
                sys.exit(1)
            _show_usage_error(error)
            sys.exit(getattr(error, "exit_code", 1))
        sys.exit(code if isinstance(code, int) else 0)


def _show_usage_error(error: Any) -> None:
    for name in ("message", "option_name"):
        if isinstance(getattr(error, name, None), str):
            setattr(error, name, printable(getattr(error, name), keep_lines=True))
    try:
        from typer.rich_utils import rich_format_error
    except ImportError:
        error.show()
    else:
        rich_format_error(error)


app = App(
    help="Image segmentation by mask classification (MaskFormer): an image becomes masks with one class each.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (segment, evaluate, tune, convert, convert_data, validate, train, push):
    app.command(no_args_is_help=True)(guarded(command))


def _print_version(wanted: bool) -> None:
    if wanted:
        packages = ("torch", "transformers")
        print(f"maskcls-hf {version('maskcls-hf')} ({', '.join(f'{name} {version(name)}' for name in packages)})")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass  # without a docstring: the help is that of `app`
