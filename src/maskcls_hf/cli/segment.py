"""`maskcls segment`: images in; overlays, maps and one JSON out."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers.utils import logging

from ..image_reading import image_to_tensor, open_image
from .coco import CocoRecords, map_image
from .drawing import draw_overlay, segment_colours
from .segmenter import SegmentedImage, Segmenter, Task

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

console = Console(stderr=True)


class Item(NamedTuple):
    path: Path
    name: str  # of its files in the output folder, without suffix
    image: Tensor  # (3, H, W) on the 0..255 scale


def segment(
    sources: Annotated[
        list[Path], typer.Argument(metavar="IMAGE_OR_FOLDER...", help="Images, or folders whose images are taken.")
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Folder of a saved model and its image processor, or name on the Hub.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results; made if need be.")],
    task: Annotated[Task, typer.Option("--task", "-t", help="What to find.")] = "panoptic",
    batch_size: Annotated[int, typer.Option(min=1, help="Images that the model sees at once.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes an accelerator if there is one.")] = (
        "auto"
    ),
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Lowest score of a segment. [panoptic 0.8, instance 0.5]")
    ] = None,
    mask_threshold: Annotated[float, typer.Option(min=0, max=1, help="Where a mask begins.")] = 0.5,
    overlap_threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Part of its area that a panoptic segment must keep from the others.")
    ] = 0.8,
) -> None:
    """Segment images and write what was found.

    [bold]OUT/overlay/NAME.png[/]  the segments drawn over the image, with a legend
    [bold]OUT/map/NAME.png[/]  the map: class ids (semantic), or colours of segments as COCO has them, black for none
    [bold]OUT/TASK.json[/]  one file for all images: COCO panoptic annotations, COCO instances with RLE masks, or the areas of the classes

    A file that cannot be read is reported and left out; the exit code is then 1.

    Example:  maskcls segment photos/ --model model_cards/maskcls-nuclei-tiny --task instance --out found
    """
    logging.disable_progress_bar()
    options = {} if task == "semantic" else {"mask_threshold": mask_threshold}
    if task == "panoptic":
        options["overlap_mask_area_threshold"] = overlap_threshold
    if threshold is not None and task != "semantic":
        options["threshold"] = threshold
    try:
        paths = find_images(sources)
        segmenter = Segmenter(model, task, choose_device(device), **options)
        for folder in ("overlay", "map"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as error:
        fail(error)

    records = CocoRecords(task, segmenter.names, segmenter.classes_of_one_segment)
    bad = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("Segmenting", total=len(paths))
            for done in results(paths, segmenter, batch_size):
                if isinstance(done[1], Exception):
                    bad += 1
                    console.print(f"[red]{escape(str(done[0]))}: {escape(str(done[1]))}")
                else:
                    write(out, done[0], done[1], segmenter, records)
                progress.advance(bar)
    finally:  # what was found until an interruption counts
        records.write(out / f"{task}.json")
    console.print(f"{len(paths) - bad} of {len(paths)} images segmented into {escape(str(out))}.")
    if bad:
        raise typer.Exit(1)
