"""`maskcls segment`: images in; overlays, maps and one JSON out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..utils.plain_text import PlainConsole, printable
from ..utils.tasks import Task
from .console import (
    DeviceOption,
    EnlargeOption,
    MaskThresholdOption,
    ModelOption,
    OverlapThresholdOption,
    TileOption,
    TileOverlapOption,
    check_new_folder,
    choose_device,
    complain,
    console,
    ends_in_a_line,
    fail,
    finite,
    progress_bar,
    stop,
)
from .counts import counts_table
from .results import Results, source_of

if TYPE_CHECKING:
    from .segmenter import Segmenter

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

SourcesArgument = Annotated[
    list[Path], typer.Argument(metavar="IMAGE_OR_FOLDER", help="Images, or folders whose images are taken.")
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results; made if need be.")]
TaskOption = Annotated[
    Task | None, typer.Option("--task", "-t", help="What to find [the model's; panoptic, or semantic].")
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(min=1, help="Images, or tiles, that the model sees at once. Default: 8 on a GPU, else 1."),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(min=0, max=1, callback=finite, help="Lowest score of a segment [the model's, 0.5]."),
]
CsvOption = Annotated[
    bool, typer.Option("--csv", help="Write OUT/TASK.csv too: a row a segment, of all results in OUT.")
]
FormatOption = Annotated[
    list[str] | None,
    typer.Option("--format", help="Write OUT/FORMAT too, for annotation tools: coco, yolo, labelme; may be repeated."),
]
NoOverlayOption = Annotated[bool, typer.Option("--no-overlay", help="Draw no overlays.")]
SkipExistingOption = Annotated[
    bool,
    typer.Option(
        "--skip-existing",
        help="Leave images alone whose results are in OUT, whole and of the same file, model and options.",
    ),
]


def segment(
    sources: SourcesArgument,
    model: ModelOption,
    out: OutOption,
    task: TaskOption = None,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = "auto",
    threshold: ThresholdOption = None,
    mask_threshold: MaskThresholdOption = None,
    overlap_threshold: OverlapThresholdOption = None,
    tile: TileOption = None,
    overlap: TileOverlapOption = None,
    enlarge: EnlargeOption = None,
    csv: CsvOption = False,
    formats: FormatOption = None,
    no_overlay: NoOverlayOption = False,
    skip_existing: SkipExistingOption = False,
) -> None:
    """Segment images, write what was found, and show the number and area of the segments of each class.

    - `OUT/overlay/NAME.png`: the segments drawn over the image, with a legend; dark images as the model sees them.
    - `OUT/map/NAME.png`: the map. Semantic: class ids. Panoptic, instance: one color a segment, whose R + 256 G +
      65536 B is its id, as in COCO; black for none.
    - `OUT/TASK.json`: one file for all images. COCO panoptic annotations, COCO instances with RLE masks, or the areas
      of the classes.
    - `OUT/TASK.csv`: path of the image, id, class, area, box (left, top, width, height), centroid, score. In pixels, x
      to the right and y down from the corner of the first pixel, whose center is (0.5, 0.5).

    - `OUT/coco_instances`, `OUT/yolo`, `OUT/labelme` with `--format`: all results in OUT, for annotation tools. Masks
      are exact; YOLO has outlines along the edges of the pixels.

    What is not given is as the model has it saved (`inference_defaults` of its `preprocessor_config.json`).

    A model finds at most N segments, its queries, in an image; with `--tile` in each tile.

    A file that cannot be read is reported and left out, and the exit code is 1. Results in OUT of other images stay;
    those of a run that is stopped or killed are kept.

    Example: `maskcls segment photos/ --model model_cards/maskcls-nuclei-tiny --out found`
    """
    from .segmenter import Segmenter, saved_task

    done: dict[str, bool] = {}
    with ends_in_a_line("", RuntimeError):
        layouts = _layouts_of(formats or ())
        found = find_images(sources)
        check_new_folder(out)
        place = choose_device(device)
        task = task or saved_task(model)
        results = Results(out, task, csv)
        paths = [path for path in found if is_file(path)]
        options = thresholds(task, threshold, mask_threshold, overlap_threshold)
        ways: dict[str, Any] = dict(
            tile=tile, overlap=overlap, enlarge=enlarge, batch_size=batch_size, overlay=not no_overlay
        )
        segmenter = Segmenter(model, task, place, options=options, **ways) if paths else None
    if segmenter is None:
        raise typer.Exit(1)
    kept = len({*results.records} - {source_of(path) for path in paths})
    try:
        _segment_each(paths, segmenter, results, done, skip_existing)
        for layout in layouts:
            from ..data.conversion import write_results

            write_results(out, layout, task, results.content())
    except KeyboardInterrupt as error:
        stop(error, f"{sum(done.values())} of {len(found)} images segmented into {out}")
    except (OSError, ValueError) as error:
        fail(error)
    report(results, done, len(found), kept)
    if len(done) < len(found):
        raise typer.Exit(1)


def thresholds(
    task: Task, threshold: float | None, mask_threshold: float | None, overlap_threshold: float | None
) -> dict[str, float]:
    """Arguments of the task's post-processing: those that are given.

    Args:
        task: semantic maps have none.
        threshold: lowest score of a segment, 0 to 1.
        mask_threshold: probability from which a pixel is in a mask, 0 to 1.
        overlap_threshold: of panoptic maps: the part of its area that a segment must keep, 0 to 1.

    Examples:
        >>> thresholds("panoptic", 0.7, None, 0.9)
        {'threshold': 0.7, 'overlap_mask_area_threshold': 0.9}
    """
    if task == "semantic":
        return {}
    options = {"threshold": threshold, "mask_threshold": mask_threshold}
    if task == "panoptic":
        options["overlap_mask_area_threshold"] = overlap_threshold
    return {name: value for name, value in options.items() if value is not None}


def report(results: Results, done: dict[str, bool], images: int, kept: int) -> None:
    """Says what was found.

    Args:
        results: of the run, and of runs before.
        done: path of each image that has results -> whether they are new.
        images: that were asked for.
        kept: number of other images in the folder.
    """
    table = counts_table(results.content(), {source_of(Path(path)) for path in done}, results.task == "semantic")
    if table.row_count:
        PlainConsole().print(table)
    new = sum(done.values())
    said = [f"{new} of {images} images segmented into {printable(results.out)}."]
    if new < len(done):
        said.append(f"{len(done) - new} have these results already and are left alone.")
    if kept:
        said.append(f"Earlier results of {kept} other images are kept.")
    console.print(" ".join(said), soft_wrap=True)


def _layouts_of(formats: Sequence[str]) -> list[str]:
    layouts = []
    for name in formats:
        from ..data.conversion import WRITERS, layout_named  # takes a while, and few ask for it

        layouts.append(layout_named(name))
        if layouts[-1] not in WRITERS:
            raise ValueError(f"--format {layouts[-1]}: the formats are coco, yolo and labelme.")
    return layouts


def _segment_each(
    paths: list[Path], segmenter: Segmenter, results: Results, done: dict[str, bool], skip_existing: bool
) -> None:
    """Add each image to `done`, and whether it is new, when its results are written; say what is wrong with others."""
    from .segmenter import segment_files

    found = segment_files(paths, segmenter, results, skip_existing)
    with progress_bar("Segmenting") as progress, closing(found) as segmented:
        bar = progress.add_task("", total=len(paths))
        for path, state in segmented:
            if isinstance(state, Exception):
                complain(f"{printable(path)}: {state}")
            else:
                done[str(path)] = state
            progress.advance(bar)


def is_file(path: Path) -> bool:
    """Whether it can be opened; if not, that is said."""
    if path.is_file():
        return True
    complain(f"{printable(path)}: {'no file' if os.path.lexists(path) else 'no such file'}.")
    return False


def find_images(sources: Sequence[Path]) -> list[Path]:
    """Files as they are given; of a folder its images, in the order of their names. Each once, however it is named.

    Raises:
        ValueError: a folder without images.
    """
    paths: list[Path] = []
    for source in sources:
        if source.is_dir():
            inside = (path for path in source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
            found = sorted(path for path in inside if not path.is_dir())
            if not found:
                raise ValueError(f"{source} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
            paths += found
        else:
            paths.append(source)
    once: dict[str, Path] = {}
    for path in paths:
        once.setdefault(source_of(path), path)
    return list(once.values())
