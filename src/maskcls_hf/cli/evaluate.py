"""`maskcls evaluate`: a model and annotated images in; scores out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..data import SegmentationDataset, open_dataset
from ..data.validation.occurrence import told_of_classes
from ..hub.scores import write_json
from ..inference import PAPER_SCALES, Predictor
from ..inference import evaluate as score_data
from ..inference.evaluation import model_classes
from ..inference.predictor import TASKS, check_predictor_options
from ..metrics import Evaluator, per_class_table
from ..utils.plain_text import PlainConsole, cell
from .console import (
    DeviceOption,
    MaskThresholdOption,
    ModelOption,
    OverlapThresholdOption,
    TileOption,
    TileOverlapOption,
    check_new_file,
    choose_device,
    complain,
    fail,
    finite,
    progress_bar,
    stop,
)

USUAL_TASKS: dict[str, tuple[str, ...]] = {
    "semantic": ("semantic",), "panoptic": ("panoptic", "semantic"), "instance": ("instance",),
}  # fmt: skip
PER_CLASS = "iou_"  # these are in the table of classes


def evaluate(
    model: ModelOption,
    data: Annotated[Path, typer.Option("--data", "-d", help="Folder of the data set.")],
    split: Annotated[str, typer.Option(help="Which part of the data; an empty text where it has no parts.")] = "val",
    layout: Annotated[
        str | None, typer.Option(help="Layout of the data: folder, ade20k, cityscapes, ... Default: found by looking.")
    ] = None,
    data_options: Annotated[
        list[str] | None,
        typer.Option("--data-option", metavar="KEY=VALUE", help="Of the layout's reader; may be repeated."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "-t",
            metavar="semantic|panoptic|instance",
            help="What is scored; may be repeated. Default: what the data is annotated for.",
        ),
    ] = None,
    boundary: Annotated[bool, typer.Option("--boundary", help="Boundary IoU too (semantic).")] = False,
    bootstrap: Annotated[
        int, typer.Option(min=0, help="Replicates for 95 % intervals over the images, such as 1000; 0: no intervals.")
    ] = 0,
    per_class: Annotated[bool, typer.Option("--per-class", help="Show the scores of each class.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write scores, scores of classes and settings to this file.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, callback=finite, help="Lowest class probability of a panoptic segment.")
    ] = 0.8,
    mask_threshold: MaskThresholdOption = 0.5,
    overlap_threshold: OverlapThresholdOption = 0.8,
    tile: TileOption = None,
    overlap: TileOverlapOption = 0.25,
    scale: Annotated[
        list[float] | None,
        typer.Option(
            "--scale",
            min=0,
            callback=finite,
            help="Average class scores over these scales; may be repeated (semantic).",
        ),
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Average them over mirror images (semantic).")] = False,
    multi_scale: Annotated[
        bool, typer.Option("--multi-scale", help="The paper's six scales, 0.5 to 1.75, and mirror images (semantic).")
    ] = False,
    crop: Annotated[
        int | None, typer.Option(min=1, help="Score crops of so many pixels, side by side, as images of their own.")
    ] = None,
    middle: Annotated[bool, typer.Option("--middle", help="With --crop: the middle crop of each image alone.")] = False,
    enlarge: Annotated[
        float | None,
        typer.Option(
            min=0, callback=finite, help="Network pixels an image pixel. Default: as the image processor resizes."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images, crops or tiles that the model sees at once.")] = 1,
    device: DeviceOption = "auto",
) -> None:
    """Score a model on annotated images, at their original size.

    - semantic: mean IoU, frequency-weighted IoU, pixel and mean accuracy, with --boundary boundary IoU.
    - panoptic: PQ, SQ and RQ of all classes, things and stuff.
    - instance: mask AP of things; F1, precision and recall at IoU 0.5 of the things in the panoptic map.

    Classes of model and data are matched by their names.

    Example: `maskcls evaluate --model runs/camvid --data camvid --split test --bootstrap 1000 --per-class`
    """
    try:
        check_options(json_file, crop, middle, scale, flip, multi_scale, task or ())
        ways: dict[str, Any] = dict(
            tile=tile,
            overlap=overlap,
            scales=PAPER_SCALES if multi_scale else scale,
            flip=flip or multi_scale,
            batch_size=batch_size,
            enlarge=enlarge,
        )
        check_predictor_options(**ways)
        place = choose_device(device)
        dataset = open_dataset(data, split or None, layout, **parsed(data_options or []))
        if told := told_of_classes(dataset, split):
            complain(told)
        if "instance" in (task or ()) and not dataset.has_instances:
            raise ValueError("--task instance: the data has maps of classes, which do not tell instances apart.")
        predictor = Predictor.from_pretrained(model, place, **ways)
        evaluator = Evaluator(
            predictor.image_processor,
            predictor.id2label,
            stuff_of_model(predictor, dataset),
            chosen_tasks(task, predictor, dataset),
            boundary=boundary,
            bootstrap=bootstrap,
            threshold=threshold,
            mask_threshold=mask_threshold,
            overlap_threshold=overlap_threshold,
        )
        images = min(limit or len(dataset), len(dataset))
        with progress_bar("Evaluating") as progress:
            bar = progress.add_task("", total=images)
            scores = score_data(
                predictor,
                dataset,
                evaluator,
                crop=crop,
                middle=middle,
                limit=limit,
                on_image=lambda: progress.advance(bar),
            )
    except KeyboardInterrupt as error:
        stop(error, "there are no scores of a part of the images")
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        fail(error)
    of_classes = evaluator.per_class()
    if json_file is not None:
        settings = dict(
            model=model, data=str(data), split=split, images=images, tasks=evaluator.tasks, threshold=threshold,
            mask_threshold=mask_threshold, overlap_threshold=overlap_threshold, tile=tile, overlap=overlap,
            scales=predictor.scales, flip=predictor.flip, crop=crop, middle=middle, enlarge=enlarge,
            bootstrap=bootstrap,
        )  # fmt: skip
        write_json(json_file, {"settings": settings, "scores": scores, "per_class": of_classes})
    show(scores, f"{images} images of {data.name}, {split}")
    if per_class:
        for metric in evaluator.metrics.values():
            PlainConsole().print(per_class_table(metric.per_class()))


def check_options(
    json_file: Path | None,
    crop: int | None,
    middle: bool,
    scale: Sequence[float] | None,
    flip: bool,
    multi_scale: bool,
    tasks: Sequence[str],
) -> None:
    """What can be said before data and model are read."""
    if unknown := set(tasks) - set(TASKS):
        raise ValueError(f"tasks must be some of {', '.join(TASKS)}, got {', '.join(sorted(unknown))}.")
    if (scale or flip or multi_scale) and set(tasks) - {"semantic"}:
        raise ValueError(
            "scales and flip average class scores: for semantic segmentation, not "
            f"{', '.join(sorted(set(tasks) - {'semantic'}))}."
        )
    if middle and crop is None:
        raise ValueError("--middle needs --crop: how large are the crops?")
    if multi_scale and (scale or flip):
        raise ValueError("--multi-scale stands for the paper's scales and --flip: leave out --scale and --flip.")
    if json_file is not None:
        check_new_file(json_file, "--json")


def parsed(options: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` with values as in JSON; what is no JSON is a text."""
    found: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"--data-option {option}: expected KEY=VALUE, such as background=class.")
        if key in found:
            raise ValueError(f"--data-option {key} is given twice.")
        try:
            found[key] = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            found[key] = value
    return found


def chosen_tasks(wanted: Sequence[str] | None, predictor: Predictor, data: SegmentationDataset) -> Sequence[str]:
    """What to score."""
    usual = USUAL_TASKS[data.kind]
    if not wanted:
        return usual if predictor.finds_segments else ("semantic",)
    return list(dict.fromkeys(wanted))


def stuff_of_model(predictor: Predictor, data: SegmentationDataset) -> list[int]:
    """The stuff classes of the data, as the model counts them."""
    return model_classes(predictor.id2label, data.id2label)[data.stuff_ids].tolist()


def show(scores: dict[str, float], title: str) -> None:
    """The scores in per cent, with their intervals if there are any."""
    names = [name for name in scores if not name.startswith(PER_CLASS) and not name.endswith(("_low", "_high"))]
    intervals = any(f"{name}_low" in scores for name in names)
    table = Table(title=cell(title), title_justify="left")
    for heading in ("score", "%", *(("95 % interval",) if intervals else ())):
        table.add_column(heading, justify="left" if heading == "score" else "right")
    for name in names:
        low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
        known = low is not None and high is not None and not math.isnan(low)
        interval = f"{percent(low)} to {percent(high)}" if known else ""
        table.add_row(cell(name), percent(scores[name]), *((interval,) if intervals else ()))
    PlainConsole().print(table)


def percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"
