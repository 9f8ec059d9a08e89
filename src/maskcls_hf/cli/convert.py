"""`maskcls convert`: checkpoints of other implementations and per-pixel models to ours, and back."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..configuration_maskcls import MaskClsConfig
from ..convert import save_as_transformers, save_from_original, save_from_per_pixel
from ..image_processing_maskcls import MaskClsImageProcessor
from ..interchange_maskformer import MASKFORMER
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
    num_queries: Annotated[
        int | None, typer.Option(help="Queries of a converted per-pixel model; one a class if not given.")
    ] = None,
    matching: Annotated[
        str | None,
        typer.Option(help="Matching of a converted per-pixel model: fixed with one query a class, else bipartite."),
    ] = None,
) -> None:
    """Convert a checkpoint: the paper's code, transformers' MaskFormer or a per-pixel model to this package, or this to
    MaskFormer.

    What the other side cannot represent is said; what would change the outputs is refused. A per-pixel model
    (SegFormer, UPerNet, DPT, BEiT, Data2Vec, MobileViT, MobileNetV2, PerPixelBaseline) becomes a mask classifier that
    starts with the same semantic map, to be fine-tuned.

    Example: `maskcls convert model_final.pkl maskformer-swin-tiny-ade --labels ade20k.json`
    """
    logging.disable_progress_bar()
    try:
        per_pixel = not is_original(source) and model_type(source) not in (MaskClsConfig.model_type, MASKFORMER)
        if not per_pixel and (num_queries is not None or matching is not None):
            raise ValueError("--num-queries and --matching are for per-pixel models; other checkpoints have their own.")
        if labels is not None and (to_transformers or not is_original(source)):
            raise ValueError("--labels is for files of the paper's code; other checkpoints know their classes.")
        if to_transformers:
            save_as_transformers(source, out)
        elif is_original(source):
            save_from_original(source, out, **({} if labels is None else class_names(labels)))
        elif per_pixel:
            save_from_per_pixel(source, out, num_queries, matching)
        else:
            MaskClsForUniversalSegmentation.from_pretrained(source).save_pretrained(out)
            MaskClsImageProcessor.from_pretrained(source).save_pretrained(out)
    except (OSError, ValueError) as error:
        fail(error)
    console.print(f"Written to {escape(str(out))}.", soft_wrap=True)


def is_original(source: str) -> bool:
    return Path(source).suffix in (".pkl", ".pth")


def model_type(source: str) -> str | None:
    return PreTrainedConfig.get_config_dict(source)[0].get("model_type")


def class_names(path: Path) -> dict[str, Any]:
    """Fields of a configuration, from the file `path`."""
    names = {int(label): str(name) for label, name in json.loads(path.read_text()).items()}
    return {"id2label": names, "label2id": {name: label for label, name in names.items()}}
