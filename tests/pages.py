"""Pages of documentation as tests: what they show is done in its order, in a folder that holds what they speak of.

- A block with `title="FILE"` is written to that file.
- ```python is run, all of a page in one namespace.
- ```bash is parsed: commands, options, names of recipes and their values, scripts. It is run, too, where the test says
  so, or the page shows what it prints.
- ```text right below one of these is what that prints, or the error with which it ends; `...` stands for anything.
"""

import argparse
import doctest
import importlib.util
import re
import shlex
import sys
import textwrap
import traceback
from collections.abc import Collection, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from typer.main import get_command
from typer.testing import CliRunner

from maskcls_hf.cli.main import app
from maskcls_hf.training import load_recipe

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)
AS_SHOWN = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    language: str
    text: str
    file: str | None  # that it is to be written to
    shown: str | None  # what it prints
    line: int


def blocks(page: str) -> Iterator[Block]:
    """The code of a page, in its order."""
    found = list(BLOCK.finditer(page))
    for place, match in enumerate(found):
        below = found[place + 1] if place + 1 < len(found) else None
        follows = below is not None and below[2] == "text" and not page[match.end() : below.start()].strip()
        shown = textwrap.dedent(below[4]) if below is not None and follows else None
        title = re.search(r'title="([^"]*)"', match[3])
        line = page.count("\n", 0, match.start(4)) + 1
        yield Block(match[2], textwrap.dedent(match[4]), title and title[1], shown, line)


def snippets(page: str) -> list[str]:
    return [block.text for block in blocks(page) if block.language == "python" and block.file is None]


def run_page(path: Path, run: Collection[str] = ()) -> dict[str, Any]:
    """Does all that a page shows, in the working directory; the names that its Python code leaves.

    Args:
        run: beginnings of the commands that are run though the page does not show what they print.
    """
    names: dict[str, Any] = {"__name__": "page"}
    begun = set()
    for block in blocks(path.read_text()):
        where = f"{path.name}, line {block.line}"
        if block.file is not None:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.text)
        elif block.language == "python":
            compare(run_python(block, where, names), block.shown, where)
        elif block.language == "bash":
            printed = ""
            for command in commands(block.text):
                beginning = next((words for words in run if command.startswith(words)), None)
                begun.add(beginning)
                words = check_command(command, where)
                if beginning is not None or block.shown is not None:
                    assert words[0] == "maskcls", f"{where}: only maskcls is run here, not {command}"
                    printed += run_command(words, where, fails="\nError: " in f"\n{block.shown}")
            compare(printed, block.shown, where)
    assert begun >= set(run), f"{path.name} has no commands {set(run) - begun}"
    return names


def run_python(block: Block, where: str, names: dict[str, Any]) -> str:
    """What it prints; an error that the page shows is printed too."""
    code = "\n" * (block.line - 1) + block.text
    out = StringIO()
    try:
        with redirect_stdout(out):
            exec(compile(code, where, "exec"), names)
    except Exception as error:
        if block.shown is None:
            raise
        out.write("".join(traceback.format_exception_only(error)).rpartition("transformers_modules.")[2])
    return out.getvalue()


def run_command(words: list[str], where: str, fails: bool = False) -> str:
    err = StringIO()
    with redirect_stderr(err):
        result = CliRunner().invoke(app, words[1:])
    assert fails == (result.exit_code != 0) or result.exit_code == 1, f"{where}: {result.output}"
    return result.output + err.getvalue()


def compare(printed: str, shown: str | None, where: str) -> None:
    if shown is not None:
        is_same = doctest.OutputChecker().check_output(shown, printed, AS_SHOWN)
        assert is_same, f"{where} shows\n{shown}\nbut this is printed:\n{printed}"


# -- commands ----------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """Of a block of shell commands, without comments and lines that go on."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def check_command(command: str, where: str) -> list[str]:
    """Its words, without variables that are set before it. AssertionError: it could not run."""
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    try:
        {
            "maskcls": lambda: parse_maskcls(words[1:]),
            "pip": lambda: check_install(words[1:]),
            "accelerate": lambda: parse_accelerate(words[1:]),
            "torchrun": lambda: parse_torchrun(words[1:]),
            "python": lambda: check_script(words[1], words[2:]),
            "hf": lambda: {"download": words[2]}[words[1]],
        }[words[0]]()
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{where}: {command}: {type(error).__name__}: {error}") from error
    return words


def parse_maskcls(words: list[str]) -> None:
    """With the values of options, but whether files and models are there."""
    command = get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    for parameter in command.params:
        parameter.callback = None
    if words[1:] == ["--list"]:
        return
    command.make_context(words[0], words[1:])
    if words[0] == "train":
        check_recipe(words)


def check_recipe(words: list[str]) -> None:
    """That it takes the values, and is given the weights that it starts from."""
    changes = [value for option, value in zip(words, words[1:], strict=False) if option == "--set"]
    model = load_recipe(words[words.index("--recipe") + 1], changes).model
    assert model.from_scratch or model.backbone_checkpoint or "--model" in words, "starts from no weights"


def check_install(words: list[str]) -> None:
    """That the extras are ours."""
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", section, flags=re.MULTILINE)
    assert words[0] == "install"
    named = [name for word in words[1:] for name in "".join(re.findall(r"\[(.*)\]", word)).split(",") if name]
    assert set(named) <= set(extras), f"no extra of {named}"


def parse_accelerate(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    if words == ["config"]:
        return
    assert words[0] == "launch"
    found = launch_command_parser().parse_args(words[1:])
    check_launched(found)


def parse_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    check_launched(get_args_parser().parse_args(words))


def check_launched(found: argparse.Namespace) -> None:
    if found.module:
        assert found.training_script == "maskcls_command"
        parse_maskcls(found.training_script_args)
    else:
        check_script(found.training_script, found.training_script_args)


def check_script(script: str, words: list[str]) -> None:
    """That it is there, in the repository or the folder of the page, and takes the arguments of our trainings."""
    file = next((folder / script for folder in (Path(), ROOT) if (folder / script).is_file()), None)
    assert file is not None, f"there is no {script}"
    if file.parent == ROOT / "examples" and file.name.startswith("train_"):
        spec = importlib.util.spec_from_file_location("train_trainer", ROOT / "examples" / "train_trainer.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.parse_arguments(words)
        check_recipe(words)


def links(page: str) -> list[str]:
    """Places below the documentation that a page links to."""
    return [place for place in re.findall(r"\]\(([^)#]*)[^)]*\)", page) if place and "://" not in place]


def forget_modules(folder: Path) -> None:
    """Modules that were imported from a folder."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and folder in Path(file).parents:
            del sys.modules[name]
