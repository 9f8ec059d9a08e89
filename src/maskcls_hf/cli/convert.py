"""`maskcls convert`: checkpoints of other implementations to ours, and back."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from transformers.utils import logging

from ..convert import save_as_transformers, save_from_original
from ..image_processing_maskcls import MaskClsImageProcessor
from ..modeling_maskcls import MaskClsForUniversalSegmentation
from .console import console, fail


def convert(
    source: Annotated[
        str, typer.Argument(help="A .pkl or .pth file of the paper's code, a folder, or a name on the Hub.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to_transformers: Annotated[
        bool, typer.Option("--to-transformers", help="From this package to transformers' MaskFormer.")
    ] = False,
    labels: Annotated[
        Path | None,
        typer.Option(help='Names of the classes, as JSON {"0": "name", ...}; for files of the paper\'s code.'),
    ] = None,
) -> None:
    """Convert a checkpoint: the paper's code or transformers' MaskFormer to this package, or this to MaskFormer.

    What the other side cannot represent is said; what would change the outputs is refused.

    Example: `maskcls convert model_final.pkl maskformer-swin-tiny-ade --labels ade20k.json`
    """
    logging.disable_progress_bar()
    try:
        if labels is not None and (to_transformers or not is_original(source)):
            raise ValueError("--labels is for files of the paper's code; other checkpoints know their classes.")
        if to_transformers:
            save_as_transformers(source, out)
        elif is_original(source):
            save_from_original(source, out, **({} if labels is None else class_names(labels)))
        else:
            MaskClsForUniversalSegmentation.from_pretrained(source).save_pretrained(out)
            MaskClsImageProcessor.from_pretrained(source).save_pretrained(out)
    except (OSError, ValueError) as error:
        fail(error)
    console.print(f"Written to {escape(str(out))}.", soft_wrap=True)


def is_original(source: str) -> bool:
    return Path(source).suffix in (".pkl", ".pth")


def class_names(path: Path) -> dict[str, Any]:
    """Fields of a configuration, from the file `path`."""
    names = {int(label): str(name) for label, name in json.loads(path.read_text()).items()}
    return {"id2label": names, "label2id": {name: label for label, name in names.items()}}
