"""`maskcls tune`: a model and annotated images in; its best thresholds, saved with it, out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from ..utils.plain_text import PlainConsole, cell, percent, printable
from ..utils.writing import saving_model, without_nan, write_json
from .console import (
    DataOption,
    DeviceOption,
    LayoutOption,
    ModelOption,
    check_new_folder,
    complain,
    console,
    ends_in_a_line,
    progress_bar,
)
from .evaluate import DataOptionsOption, LimitOption, SplitOption, opened

if TYPE_CHECKING:
    from ..inference import Tuning

TunedTaskOption = Annotated[
    Literal["panoptic", "instance"], typer.Option("--task", "-t", help="The segments whose thresholds are tuned.")
]
TunedMetricOption = Annotated[
    Literal["pq", "f1"] | None,
    typer.Option("--metric", help="What is maximized: PQ, or F1 of things at IoU 0.5. Default: pq; f1 for instances."),
]
TunedOutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder for a copy of the model with them. Default: saved in place.")
]


def tune(
    model: ModelOption,
    data: DataOption,
    split: SplitOption = "val",
    layout: LayoutOption = None,
    data_options: DataOptionsOption = None,
    task: TunedTaskOption = "panoptic",
    metric: TunedMetricOption = None,
    out: TunedOutOption = None,
    limit: LimitOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Find the thresholds with which a model does best on annotated images, and save them with it.

    The model sees each image once; then the settings are tried that differ from the best one so far in one threshold,
    until none is better. They become `inference_defaults` of the model's image processor, which all commands,
    `Predictor` and pipelines use where nothing else is said.

    Written beside them: `tuning_TASK.json`, all that was tried, and `reliability_TASK.png`, the score of a segment
    against the share of such segments that match a true one (IoU > 0.5), with the expected calibration error.

    Example: `maskcls tune --model runs/mine --data my_data`
    """
    with ends_in_a_line("nothing is saved", RuntimeError):
        check_target(model, out)
        if "test" in split.lower():
            complain(f"Warning: {split} seems to be the test set: scores on it, tuned on it, are too high.")
        predictor, dataset = opened(model, device, {"batch_size": 1}, data, split, layout, data_options or [], ())
        from ..inference import tune as tune_model

        with _passes() as on_pass:
            found = tune_model(predictor, dataset, task, metric, limit=limit, on_pass=on_pass)
        settings = dict(model=model, data=str(data), split=split)
        folder = saved(found, predictor.image_processor, Path(model), out or Path(model), settings)
    show(found)
    error = found.calibration.error
    of_scores = "" if error is None else f" Expected calibration error {error:.3f}."
    console.print(f"Saved in {printable(folder)}, with tuning_{task}.json.{of_scores}", soft_wrap=True)


def check_target(model: str, out: Path | None) -> None:
    """Refuses a place where the thresholds could not be saved.

    Args:
        model: folder of the model.
        out: folder for a copy; None: they are saved in place.

    Raises:
        ValueError: a model on the Hub, of transformers, or a checkpoint of a training; a folder that holds something.
    """
    from ..inference.loading import saved_config
    from ..models.checkpoint_manifest import MANIFEST
    from ..models.kinds import KIND_OF_TYPE

    model_type = saved_config(model)["model_type"]
    kind = KIND_OF_TYPE.get(model_type)
    if kind is not None and model_type != kind.config_class.model_type:  # read, but not ours
        raise ValueError(f"{model} is a model of transformers, which keeps no thresholds: maskcls convert it first.")
    if not Path(model).is_dir():
        raise ValueError(f"{model} is no folder: download the model first.")
    if out is None:
        if Path(model, MANIFEST).exists():
            raise ValueError(f"{model} is a checkpoint of a training, which stays as it is: give --out.")
        check_new_folder(Path(model))
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not an empty folder.")
    else:
        check_new_folder(out)


@contextmanager
def _passes() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """`on_pass` of `maskcls_hf.inference.tune`: a bar that begins anew for each."""
    with progress_bar("{task.description}", transient=True) as progress:
        bar = progress.add_task("")

        def begin(what: str, images: int) -> Callable[[], None]:
            progress.reset(bar, total=images, description=what)
            return lambda: progress.advance(bar)

        yield begin


def saved(found: Tuning, image_processor: Any, model: Path, folder: Path, settings: dict[str, Any]) -> Path:
    """Write image processor, JSON and picture, all or none of them; in another folder with the model.

    Args:
        found: the thresholds.
        image_processor: gets them.
        model: its folder.
        folder: where they are saved, which can be that of the model.
        settings: of the command, for the JSON.

    Returns:
        The folder.
    """
    from ..models.checkpoint_manifest import MANIFEST
    from ..models.inference_defaults import defaults_of, merged_defaults

    image_processor.inference_defaults = merged_defaults(defaults_of(image_processor), {found.task: found.options})
    content = {"settings": settings} | found.as_dict()
    content["tried"] = [{**entry, "scores": without_nan(entry["scores"])} for entry in content["tried"]]
    content |= {name: without_nan(content[name]) for name in ("scores", "scores_before")}
    with saving_model(folder) as temporary:
        if folder != model:
            shutil.copytree(model, temporary, ignore=shutil.ignore_patterns(MANIFEST, ".*"), dirs_exist_ok=True)
        image_processor.save_pretrained(temporary)
        write_json(temporary / f"tuning_{found.task}.json", content, indent=2)
        found.calibration.draw(temporary / f"reliability_{found.task}.png", f"{found.images} images, {found.task}")
    return folder


def show(found: Tuning) -> None:
    """A line for each setting that was tried, the best one marked."""
    names = list(found.options)
    scores = list(found.tried[0]["scores"])[:3]
    table = Table(box=None, title=f"{len(found.tried)} settings on {found.images} images", title_justify="left")
    for heading in (*names, *(f"{score}, %" for score in scores), ""):
        table.add_column(cell(heading), justify="right")
    for entry in found.tried:
        marks = ["best"] * (entry["options"] == found.options) + ["before"] * (entry["options"] == found.before)
        values = [f"{entry['options'][name]:g}" for name in names]
        table.add_row(*values, *(percent(entry["scores"][score], 2) for score in scores), ", ".join(marks))
    PlainConsole().print(table)
