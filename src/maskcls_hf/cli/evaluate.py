"""`maskcls evaluate`: a model and annotated images in; scores out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..utils.plain_text import PlainConsole, cell, percent
from ..utils.tasks import TASKS
from ..utils.writing import without_nan, write_json
from .console import (
    DataOption,
    DeviceOption,
    EnlargeOption,
    LayoutOption,
    MaskThresholdOption,
    ModelOption,
    OverlapThresholdOption,
    TileOption,
    TileOverlapOption,
    check_new_file,
    choose_device,
    complain,
    console,
    ends_in_a_line,
    finite,
    progress_bar,
)

if TYPE_CHECKING:
    from ..data import SegmentationDataset
    from ..inference import Predictor
    from ..metrics import Evaluator

_USUAL_TASKS: dict[str, tuple[str, ...]] = {
    "semantic": ("semantic",), "panoptic": ("panoptic", "semantic"), "instance": ("instance",),
}  # fmt: skip
_PER_CLASS = "iou_"  # these are in the table of classes

SplitOption = Annotated[str, typer.Option(help="Which part of the data; an empty text where it has no parts.")]
DataOptionsOption = Annotated[
    list[str] | None,
    typer.Option("--data-option", metavar="KEY=VALUE", help="Of the layout's reader; may be repeated."),
]
TasksOption = Annotated[
    list[str] | None,
    typer.Option(
        "--task", "-t", metavar="|".join(TASKS),
        help="What is scored; may be repeated. Default: what the data is annotated for.",
    ),
]  # fmt: skip
MetricOption = Annotated[
    list[str] | None, typer.Option("--metric", help="Name of a further registered metric; may be repeated.")
]
BoundaryOption = Annotated[bool, typer.Option("--boundary", help="Boundary IoU too (semantic).")]
BootstrapOption = Annotated[
    int, typer.Option(min=0, help="Replicates for 95 % intervals over the images, such as 1000; 0: no intervals.")
]
PerClassOption = Annotated[bool, typer.Option("--per-class", help="Show the scores of each class.")]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write scores, scores of classes and settings to this file.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")]
ThresholdOption = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, callback=finite, help="Lowest class probability of a panoptic segment [the model's, 0.5]."
    ),
]
ScalesOption = Annotated[
    list[float] | None,
    typer.Option(
        "--scale", min=0, callback=finite,
        help="Average class scores over these scales; may be repeated (semantic).",
    ),
]  # fmt: skip
FlipOption = Annotated[bool, typer.Option("--flip", help="Average them over mirror images (semantic).")]
MultiScaleOption = Annotated[
    bool, typer.Option("--multi-scale", help="The paper's six scales, 0.5 to 1.75, and mirror images (semantic).")
]
CropOption = Annotated[
    int | None, typer.Option(min=1, help="Score crops of so many pixels, side by side, as images of their own.")
]
MiddleOption = Annotated[bool, typer.Option("--middle", help="With --crop: the middle crop of each image alone.")]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Images, crops or tiles that the model sees at once.")]


def evaluate(
    model: ModelOption,
    data: DataOption,
    split: SplitOption = "val",
    layout: LayoutOption = None,
    data_options: DataOptionsOption = None,
    task: TasksOption = None,
    metric: MetricOption = None,
    boundary: BoundaryOption = False,
    bootstrap: BootstrapOption = 0,
    per_class: PerClassOption = False,
    json_file: JsonOption = None,
    limit: LimitOption = None,
    threshold: ThresholdOption = None,
    mask_threshold: MaskThresholdOption = None,
    overlap_threshold: OverlapThresholdOption = None,
    tile: TileOption = None,
    overlap: TileOverlapOption = None,
    scale: ScalesOption = None,
    flip: FlipOption = False,
    multi_scale: MultiScaleOption = False,
    crop: CropOption = None,
    middle: MiddleOption = False,
    enlarge: EnlargeOption = None,
    batch_size: BatchSizeOption = 1,
    device: DeviceOption = "auto",
) -> None:
    """Score a model on annotated images, at their original size.

    - semantic: mean IoU, frequency-weighted IoU, pixel and mean accuracy, with --boundary boundary IoU.
    - panoptic: PQ, SQ and RQ of all classes, things and stuff.
    - instance: mask AP of things; F1, precision and recall at IoU 0.5 of the things in the panoptic map.

    Classes of model and data are matched by their names. What is not given is as the model has it saved
    (`inference_defaults` of its `preprocessor_config.json`); the settings are printed.

    Example: `maskcls evaluate --model runs/camvid --data camvid --split test --bootstrap 1000 --per-class`
    """
    with ends_in_a_line("there are no scores of a part of the images", RuntimeError):
        _check_options(json_file, crop, middle, scale, flip, multi_scale, task or ())
        ways: dict[str, Any] = dict(tile=tile, overlap=overlap, batch_size=batch_size, enlarge=enlarge)
        ways |= dict(scales=_paper_scales(), flip=True) if multi_scale else dict(scales=scale, flip=flip)
        predictor, dataset = opened(model, device, ways, data, split, layout, data_options or [], task or ())
        thresholds = dict(threshold=threshold, mask_threshold=mask_threshold, overlap_threshold=overlap_threshold)
        options: dict[str, Any] = dict(metrics=metric or (), boundary=boundary, bootstrap=bootstrap, **thresholds)
        evaluator = _new_evaluator(predictor, dataset, task, **options)
        images = min(limit or len(dataset), len(dataset))
        scores = _scored(predictor, dataset, evaluator, images, crop=crop, middle=middle, limit=limit)
    used = evaluator.settings | {name: getattr(predictor, name) for name in ("tile", "overlap", "enlarge")}
    if json_file is not None:
        ways = dict(scales=predictor.scales, flip=predictor.flip, crop=crop, middle=middle, bootstrap=bootstrap)
        of_data = dict(model=model, data=str(data), split=split, images=images, tasks=evaluator.tasks)
        content = dict(settings=of_data | used | ways | dict(options=evaluator.options), scores=scores)
        write_json(json_file, without_nan(content | dict(per_class=evaluator.per_class())), indent=2)
    show(scores, f"{images} images of {data.name}, {split}")
    console.print(f"Settings: {_in_words(used)}.", soft_wrap=True)
    if per_class:
        _show_classes(evaluator)


def _in_words(settings: dict[str, Any]) -> str:
    """Names and values; without an overlap where there are no tiles, and other values that mean nothing."""
    shown = {name: value for name, value in settings.items() if value is not None}
    if "tile" not in shown:
        del shown["overlap"]
    return ", ".join(f"{name} {value:g}" for name, value in shown.items()) or "none"


def _paper_scales() -> Sequence[float]:
    from ..inference import PAPER_SCALES

    return PAPER_SCALES


def opened(
    model: str,
    device: str,
    ways: dict[str, Any],
    data: Path,
    split: str,
    layout: str | None,
    data_options: Sequence[str],
    tasks: Sequence[str],
) -> tuple[Predictor, SegmentationDataset]:
    """Model and data, of which all is checked that can be before the weights are read.

    Args:
        model: folder, or name on the Hub.
        device: see [`choose_device`].
        ways: arguments of `Predictor`.
        data: folder of the data set.
        split: its part; "": it has none.
        layout: of the data; None: found by looking.
        data_options: `KEY=VALUE` of the layout's reader.
        tasks: that are asked for.

    Raises:
        OSError: there is no such model or data.
        RuntimeError: there is no such device.
        ValueError: an option out of its range, data without instances for the task instance, or what cannot be read.
    """
    from ..data.held_out import open_evaluated
    from ..data.validation.occurrence import told_of_classes
    from ..inference import Predictor
    from ..inference.predictor import check_predictor_options

    check_predictor_options(**ways)
    place = choose_device(device)
    dataset = open_evaluated(data, split or None, layout, model, **_parsed(data_options))
    if told := told_of_classes(dataset, split):
        complain(told)
    if "instance" in tasks and not dataset.has_instances:
        raise ValueError("--task instance: the data has maps of classes, which do not tell instances apart.")
    return Predictor.from_pretrained(model, place, **ways), dataset


def _new_evaluator(
    predictor: Predictor, data: SegmentationDataset, tasks: Sequence[str] | None, **options: Any
) -> Evaluator:
    """For `tasks`, or else for what the data is annotated for and the model can do; stuff classes are the data's."""
    from ..inference.evaluation import model_classes
    from ..metrics import Evaluator

    stuff = model_classes(predictor.id2label, data.id2label)[data.stuff_ids].tolist()
    usual = _USUAL_TASKS[data.kind] if predictor.finds_segments else ("semantic",)
    wanted = list(dict.fromkeys(tasks)) if tasks else usual
    return Evaluator(predictor.image_processor, predictor.id2label, stuff, wanted, **options)


def _scored(
    predictor: Predictor, data: SegmentationDataset, evaluator: Evaluator, images: int, **options: Any
) -> dict[str, float]:
    from ..inference import evaluate as score_data

    with progress_bar("Evaluating") as progress:
        bar = progress.add_task("", total=images)
        return score_data(predictor, data, evaluator, on_image=lambda: progress.advance(bar), **options)


def _check_options(
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


def _parsed(options: Sequence[str]) -> dict[str, Any]:
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


def show(scores: dict[str, float], title: str) -> None:
    """The scores in per cent, with their intervals if there are any."""
    names = [name for name in scores if not name.startswith(_PER_CLASS) and not name.endswith(("_low", "_high"))]
    intervals = any(f"{name}_low" in scores for name in names)
    table = Table(title=cell(title), title_justify="left")
    for heading in ("score", "%", *(("95 % interval",) if intervals else ())):
        table.add_column(heading, justify="left" if heading == "score" else "right")
    for name in names:
        low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
        known = low is not None and high is not None and not math.isnan(low)
        interval = f"{percent(low, 2)} to {percent(high, 2)}" if known else ""
        table.add_row(cell(name), percent(scores[name], 2), *((interval,) if intervals else ()))
    PlainConsole().print(table)


def _show_classes(evaluator: Evaluator) -> None:
    from ..metrics import per_class_table

    for metric in evaluator.metrics.values():
        PlainConsole().print(per_class_table(metric.per_class()))
