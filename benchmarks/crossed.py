"""How much code one image and one batch cross:  python benchmarks/crossed.py

An image goes from `maskcls segment` to the written map, a batch from the files of a data set to its loss. Counted are
the files of the package whose functions run on the way, and the lines of these functions, without their docstrings,
comments and blank lines; then the files that travel with a checkpoint, and all lines of code of the package.
"""

from __future__ import annotations

import ast
import io
import sys
import tempfile
import threading
import tokenize
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

import maskcls_hf

PACKAGE = Path(maskcls_hf.__file__).parent
ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "model_cards/maskcls-nuclei-tiny"
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_lines(path: Path) -> set[int]:
    """Numbers of the lines of a file that hold code."""
    text = path.read_text()
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def functions_run(call: Callable[[], Any]) -> dict[Path, set[int]]:
    """Files of the package, and the first lines of those of their functions that `call` runs, in all threads."""
    seen: set[tuple[str, int]] = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and code.co_name != "<module>":
            seen.add((code.co_filename, code.co_firstlineno))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    found: dict[Path, set[int]] = {}
    for name, line in seen:
        found.setdefault(Path(name), set()).add(line)
    return found


def lines_of(path: Path, first_lines: set[int]) -> int:
    """Lines of code of the functions that begin in these lines, each line once."""
    inside: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first in first_lines or node.lineno in first_lines:
                inside |= set(range(first, (node.end_lineno or first) + 1))
    return len(inside & code_lines(path))


def segment_an_image(folder: Path) -> None:
    from typer.testing import CliRunner

    from maskcls_hf.cli.main import app

    image = next((ROOT / "examples").rglob("*.png"), None) or next(CHECKPOINT.rglob("*.png"))
    arguments = ["segment", str(image), "--model", str(CHECKPOINT), "--out", str(folder / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


def batch_to_its_loss(folder: Path) -> Callable[[], None]:
    """A model is ready, as before a step; labels are maps of classes beside their images."""
    from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
    from maskcls_hf.data import MaskClsCollator, TrainTransform, open_dataset
    from maskcls_hf.data.augmented import AugmentedDataset

    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / "train" / kind).mkdir(parents=True)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(folder / f"train/images/{name}.png")
        Image.fromarray((np.indices((96, 96))[0] // 48).astype(np.uint8)).save(folder / f"train/labels/{name}.png")
    (folder / "labels.json").write_text('{"0": "sky", "1": "road"}')
    model = MaskClsForUniversalSegmentation.from_pretrained(CHECKPOINT)
    processor = MaskClsImageProcessor(do_resize=False)

    def call() -> None:
        data = AugmentedDataset(
            open_dataset(folder, split="train"), TrainTransform(resize="crop_first", crop_size=64), seed=0
        )
        batch = MaskClsCollator(processor)([data[0], data[1]])
        model(**batch).loss.backward()

    return call


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = {
            "an image, from the command to its map": lambda: segment_an_image(folder),
            "a batch, from its files to its loss": batch_to_its_loss(folder / "data"),
        }
        with redirect_stdout(io.StringIO()):
            found = {what: functions_run(call) for what, call in paths.items()}
    for what, files in found.items():
        print(f"{what}: {len(files)} files, {sum(lines_of(path, lines) for path, lines in files.items())} lines")
        for path, lines in sorted(files.items()):
            print(f"    {lines_of(path, lines):4d}  {path.relative_to(PACKAGE)}")
    places = [file for file in (PACKAGE / "models", PACKAGE) if (file / "modeling_maskcls.py").exists()]
    saved = [places[0] / f"{part}_maskcls.py" for part in ("configuration", "modeling", "image_processing")]
    traveling = {Path(file) for path in saved for file in [path, *get_relative_import_files(path)]}
    print(f"files that travel: {len(traveling)}, {sum(len(code_lines(path)) for path in traveling)} lines of code")
    files = list(PACKAGE.rglob("*.py"))
    print(f"the package: {len(files)} files, {sum(len(code_lines(path)) for path in files)} lines of code")


if __name__ == "__main__":
    main()
