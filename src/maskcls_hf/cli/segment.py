"""`maskcls segment`: images in; overlays, maps and one JSON out."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.markup import escape
from torch import Tensor
from transformers.utils import logging

from ..image_reading import image_to_tensor, open_image
from ..inference.predictor import Task
from ..visual.drawing import draw_overlay, segment_colours
from .coco import CocoRecords, map_image
from .console import (
    DeviceOption,
    MaskThresholdOption,
    ModelOption,
    OverlapThresholdOption,
    TileOption,
    TileOverlapOption,
    choose_device,
    complain,
    console,
    fail,
    progress_bar,
)
from .segmenter import SegmentedImage, Segmenter

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def segment(
    sources: Annotated[
        list[Path], typer.Argument(metavar="IMAGE_OR_FOLDER", help="Images, or folders whose images are taken.")
    ],
    model: ModelOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results; made if need be.")],
    task: Annotated[Task, typer.Option("--task", "-t", help="What to find.")] = "panoptic",
    batch_size: Annotated[int, typer.Option(min=1, help="Images, or tiles, that the model sees at once.")] = 1,
    device: DeviceOption = "auto",
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Lowest score of a segment; panoptic 0.8, instance 0.5.")
    ] = None,
    mask_threshold: MaskThresholdOption = 0.5,
    overlap_threshold: OverlapThresholdOption = 0.8,
    tile: TileOption = None,
    overlap: TileOverlapOption = 0.25,
) -> None:
    """Segment images and write what was found.

    - `OUT/overlay/NAME.png`: the segments drawn over the image, with a legend.
    - `OUT/map/NAME.png`: the map. Semantic: class ids. Panoptic, instance: one colour a segment, whose R + 256 G +
      65536 B is its id, as in COCO; black for none.
    - `OUT/TASK.json`: one file for all images. COCO panoptic annotations, COCO instances with RLE masks, or the areas
      of the classes.

    A model finds at most N segments, its queries, in an image. With `--tile` it finds as many in each tile; segments of
    neighbouring tiles that overlap become one.

    A file that cannot be read is reported and left out, and the exit code is 1.

    Example: `maskcls segment photos/ --model model_cards/maskcls-nuclei-tiny --task instance --out found`
    """
    logging.disable_progress_bar()
    options = {"threshold": threshold, "mask_threshold": mask_threshold}
    if task == "panoptic":
        options["overlap_mask_area_threshold"] = overlap_threshold
    try:
        paths = find_images(sources)
        segmenter = Segmenter(
            model,
            task,
            choose_device(device),
            options={} if task == "semantic" else {k: v for k, v in options.items() if v is not None},
            tile=tile,
            overlap=overlap,
            batch_size=batch_size,
        )
        for folder in ("overlay", "map"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as error:
        fail(error)
    bad = segment_files(paths, segmenter, batch_size, out)
    console.print(f"{len(paths) - bad} of {len(paths)} images segmented into {escape(str(out))}.", soft_wrap=True)
    if bad:
        raise typer.Exit(1)


class Outcome(NamedTuple):
    """What became of a file: an `image` (3, H, W) on the 0..255 scale and its `result`, or an `error`."""

    path: Path
    image: Tensor | None = None
    result: SegmentedImage | None = None
    error: Exception | None = None


def segment_files(paths: Sequence[Path], segmenter: Segmenter, batch_size: int, out: Path) -> int:
    """Write the results of all files; the number of those that failed."""
    records = CocoRecords(segmenter.task, segmenter.names, segmenter.classes_of_one_segment)
    names = dict(zip(paths, output_names(paths), strict=True))
    bad = 0
    try:
        with progress_bar("Segmenting") as progress:
            bar = progress.add_task("", total=len(paths))
            for start in range(0, len(paths), batch_size):
                for outcome in outcomes(paths[start : start + batch_size], segmenter):
                    if outcome.error is None:
                        write(outcome, out, names[outcome.path], segmenter, records)
                    else:
                        bad += 1
                        complain(f"{outcome.path}: {outcome.error}")
                    progress.advance(bar)
    finally:  # also what was found until an interruption
        records.write(out / f"{segmenter.task}.json")
    return bad


def outcomes(paths: Sequence[Path], segmenter: Segmenter) -> Iterator[Outcome]:
    images = {}
    for path in paths:
        try:
            images[path] = image_to_tensor(open_image(path))
        except Exception as error:  # broken files raise errors of many kinds
            yield Outcome(path, error=error)
    if images:
        yield from segmented(images, segmenter)


def segmented(images: dict[Path, Tensor], segmenter: Segmenter) -> Iterator[Outcome]:
    """Where a batch fails, its images go one by one."""
    try:
        results = segmenter(list(images.values()))
    except (ValueError, RuntimeError) as error:
        for path, image in images.items():
            if len(images) == 1:
                yield Outcome(path, error=error)
            else:
                yield from segmented({path: image}, segmenter)
    else:
        for (path, image), result in zip(images.items(), results, strict=True):
            yield Outcome(path, image, result)


def write(outcome: Outcome, out: Path, name: str, segmenter: Segmenter, records: CocoRecords) -> None:
    image, result = outcome.image, outcome.result
    assert image is not None and result is not None
    colours = segment_colours(result.segments, len(segmenter.names), segmenter.classes_of_one_segment)
    pixels = image.clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
    draw_overlay(pixels, result.ids, result.segments, colours, segmenter.names).save(out / "overlay" / f"{name}.png")
    map_image(result, segmenter.task, colours, len(segmenter.names)).save(out / "map" / f"{name}.png")
    records.add(outcome.path.name, f"{name}.png", result, colours)


def find_images(sources: Sequence[Path]) -> list[Path]:
    """Files as they are given; of a folder its images, in the order of their names."""
    paths: list[Path] = []
    for source in sources:
        if source.is_dir():
            found = sorted(path for path in source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise ValueError(f"{source} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
            paths += found
        else:
            paths.append(source)
    return list(dict.fromkeys(paths))


def output_names(paths: Sequence[Path]) -> list[str]:
    """The stem of each path, numbered from its second occurrence on."""
    names: dict[str, None] = {}
    for path in paths:
        name, number = path.stem, 2
        while name in names:
            name, number = f"{path.stem}_{number}", number + 1
        names[name] = None
    return list(names)
