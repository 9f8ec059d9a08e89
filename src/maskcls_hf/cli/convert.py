"""`maskcls convert`: checkpoints of other implementations and per-pixel models to ours, and back."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..utils.plain_text import printable
from ..utils.writing import saving_model
from .console import check_new_folder, console, ends_in_a_line


def convert(
    source: Annotated[
        str,
        typer.Argument(help="A .pkl, .pth, .bin or .ckpt file of the papers' code, a folder, or a name on the Hub."),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to_transformers: Annotated[
        bool,
        typer.Option("--to-transformers", help="From this package to transformers' MaskFormer, Mask2Former or EoMT."),
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a LoRA training: its adapter merged into the weights of its model.")
    ] = False,
    labels: Annotated[
        Path | None,
        typer.Option(help='Names of the classes, as JSON {"0": "name", ...}; for files of the paper\'s code.'),
    ] = None,
    num_queries: Annotated[
        int | None, typer.Option(help="Queries of a converted per-pixel model; one a class if not given.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Pretrained ViT of an EoMT whose weights are differences to it: a folder or Hub name."),
    ] = None,
    matching: Annotated[
        str | None,
        typer.Option(help="Matching of a converted per-pixel model: fixed with one query a class, else bipartite."),
    ] = None,
) -> None:
    """Convert a checkpoint to this package, or from it to transformers; or merge the adapter of a LoRA training.

    It reads the papers' code, transformers' MaskFormer, Mask2Former, EoMT and per-pixel models. What the other side
    cannot represent is said; what would change the outputs is refused. A per-pixel model (SegFormer, UPerNet, DPT,
    BEiT, Data2Vec, MobileViT, MobileNetV2, PerPixelBaseline) becomes a mask classifier that starts with the same
    semantic map, to be fine-tuned.

    Example: `maskcls convert model_final.pkl maskformer-swin-tiny-ade --labels ade20k.json`
    """
    with ends_in_a_line("nothing was written"):
        check_new_folder(out)
        if merge:
            _merge_only(to_transformers, labels, num_queries, matching, base)
        else:
            _check_source(source, to_transformers, labels, num_queries, matching, base)
        names = {} if labels is None else class_names(labels)
        with saving_model(out) as folder:
            if merge:
                from ..training.lora import merge_adapter

                merge_adapter(source, folder)
            else:
                write(source, folder, to_transformers, names, num_queries, matching, base)
    console.print(f"Written to {printable(out)}.", soft_wrap=True)


def _merge_only(*others: Any) -> None:
    if any(others):
        raise ValueError("--merge stands alone: convert the model that it writes.")


def _check_source(
    source: str,
    to_transformers: bool,
    labels: Path | None,
    num_queries: int | None,
    matching: str | None,
    base: str | None,
) -> None:
    """What can be said before the weights are read."""
    if _is_original(source) and not Path(source).is_file():
        raise FileNotFoundError(f"There is no file {source}.")
    if base is not None and (to_transformers or _is_per_pixel(source)):
        raise ValueError("--base is for EoMTs whose weights are differences to those of a pretrained ViT.")
    if not _is_per_pixel(source) and (num_queries is not None or matching is not None):
        raise ValueError("--num-queries and --matching are for per-pixel models; other checkpoints have their own.")
    if labels is not None and (to_transformers or not _is_original(source)):
        raise ValueError("--labels is for files of the paper's code; other checkpoints know their classes.")


def write(
    source: str,
    folder: Path,
    to_transformers: bool,
    names: dict[str, Any],
    num_queries: int | None,
    matching: str | None,
    base: str | None,
) -> None:
    """Write the converted model and its image processor.

    Args:
        source: file of the papers' code, folder, or name on the Hub.
        folder: is filled.
        to_transformers: from this package to transformers.
        names: fields of the configuration, see [`class_names`].
        num_queries: of a converted per-pixel model; None: one a class.
        matching: of a converted per-pixel model; None: fixed with one query a class, else bipartite.
        base: pretrained ViT of an EoMT whose weights are differences to it.
    """
    from ..convert import save_as_transformers, save_from_original, save_from_per_pixel
    from ..inference.loading import load_image_processor, load_model

    if to_transformers:
        save_as_transformers(source, folder)
    elif _is_original(source):
        save_from_original(source, folder, base, **names)
    elif _is_per_pixel(source):
        save_from_per_pixel(source, folder, num_queries, matching)
    else:
        options = {} if base is None else {"base": base}
        model, image_processor = load_model(source, **options), load_image_processor(source)
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)


def _is_per_pixel(source: str) -> bool:
    """Neither of the paper's code nor what loads as a mask classifier."""
    from ..inference.loading import saved_config
    from ..models.kinds import KINDS

    return (
        not _is_original(source) and saved_config(source)["model_type"] not in KINDS["mask_classification"].model_types
    )


def _is_original(source: str) -> bool:
    return Path(source).suffix in (".pkl", ".pth", ".bin", ".ckpt")


def class_names(path: Path) -> dict[str, Any]:
    """Fields of a configuration, from the file `path`.

    Raises:
        OSError: no such file.
        ValueError: it does not hold names of classes.
    """
    try:
        names = {int(label): str(name) for label, name in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f'--labels {path}: expected JSON such as {{"0": "name", ...}} ({error}).') from error
    return {"id2label": names, "label2id": {name: label for label, name in names.items()}}
