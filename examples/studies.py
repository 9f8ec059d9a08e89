"""What the studies share (compare.py, ablate.py, convert_per_pixel.py): trainings that go on where they were stopped,
measurements of every image, scores with 95 % intervals, tables and plots.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from maskcls_hf.data import SegmentationDataset, open_dataset
from maskcls_hf.hub.speed import describe_device
from maskcls_hf.inference import Predictor
from maskcls_hf.metrics import Bootstrap, MeanIoU, PanopticQuality, Segments
from maskcls_hf.training import Recipe, build_model, load_recipe

SCORES = {"mean_iou": "mIoU", "pq": "PQ_st"}  # what the metrics call them, and the paper
REPLICATES = 2000

Measurements = dict[str, NDArray[np.float64]]  # of each metric, one an image (images, ...)
Scores = dict[str, NDArray[np.float64]]  # of each metric, in per cent: of all images, then of each resample


@dataclass(frozen=True)
class Method:
    """A name and what it changes in the recipe, as `section.key=value`."""

    name: str
    folder: str
    changes: tuple[str, ...] = ()

    def changed(self, *more: str) -> Method:
        return replace(self, changes=(*self.changes, *more))


@dataclass(frozen=True)
class Study:
    """The command line, the recipe that all methods share, the split that is scored, the methods that are wanted."""

    arguments: argparse.Namespace
    recipe: Recipe
    data: SegmentationDataset
    methods: list[Method]

    def load_recipe(self, *changes: str) -> Recipe:
        return load_recipe(self.arguments.recipe, joined(*self.arguments.set, *changes))

    @property
    def title(self) -> str:
        return f"{self.recipe.name}, {self.data.split}: {len(self.data)} images, {self.recipe.schedule.max_steps} steps"


# -- the command line --------------------------------------------------------------------------------------------


def study_parser(description: str | None, methods: Iterable[Method]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="of a semantic data set; what all methods share")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, table and plot")
    parser.add_argument("--test-split", default="val", help="scored at the end (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="changes for all methods"
    )
    names = [method.folder for method in methods]
    parser.add_argument("--only", nargs="+", choices=names, metavar="METHOD", help=f"some of {', '.join(names)}")
    return parser


def add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, which share the cores (1)")


def begin(parser: argparse.ArgumentParser, methods: Iterable[Method], argv: list[str] | None) -> Study:
    """Read the command line. What is wrong with data, recipe or a method is said here, before the first training."""
    arguments = parser.parse_args(argv)
    wanted = [method for method in methods if not arguments.only or method.folder in arguments.only]
    try:
        recipe = load_recipe(arguments.recipe, arguments.set)
        section = recipe.data
        data = open_dataset(arguments.data, arguments.test_split, layout=section.layout, **section.options)
        study = Study(arguments, recipe, data, wanted)
        for method in wanted:
            check_method(study, method)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    return study


def check_method(study: Study, method: Method) -> None:
    try:
        with torch.device("meta"):
            build_model(study.load_recipe(*method.changes), study.data.id2label, pretrained=False)
    except ValueError as error:
        raise ValueError(f"{error} (method {method.folder}; --only leaves it out)") from error


def facts_of_run(script: str, argv: list[str] | None, study: Study) -> dict[str, str]:
    """Command (the data by the name of its folder), date and machine, for the record."""
    data = study.arguments.data
    words = [data.name if word == str(data) else word for word in (sys.argv[1:] if argv is None else argv)]
    return {
        "command": shlex.join(["python", f"examples/{script}", *words]),
        "date": str(date.today()),
        "machine": f"{describe_device(torch.device('cpu'))}, torch {torch.__version__}",
    }


def joined(*changes: str) -> list[str]:
    """Changes of a recipe, the last one of each key: those of a method count more than those for all."""
    return list({change.partition("=")[0].strip(): change for change in changes}.values())


# -- training ----------------------------------------------------------------------------------------------------


def train(method: Method, folder: Path, arguments: argparse.Namespace) -> None:
    """Train in a process of its own, or go on with it."""
    if (folder / "eval_results.json").is_file():
        return
    command = [sys.executable, "-m", "maskcls_hf.cli", "train", "--recipe", arguments.recipe]
    command += ["--data", str(arguments.data), "--out", str(folder)]
    for change in joined(*arguments.set, *method.changes):
        command += ["--set", change]
    if any(folder.glob("checkpoint-*")):
        command.append("--resume")
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    folder.mkdir(parents=True, exist_ok=True)
    log_file = folder / "train.log"
    print(f"{method.name}: training, see {log_file}", flush=True)
    with log_file.open("a") as log:
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        try:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=True)
        except subprocess.CalledProcessError:
            sys.exit(f"{method.name}: the training failed, see {log_file}")


def train_all(runs: Mapping[Path, Method], arguments: argparse.Namespace) -> Iterator[Path]:
    """Train the method of each folder, `--jobs` at a time; gives the folders in their order, each once it is ready."""
    with ThreadPoolExecutor(arguments.jobs) as pool:
        trainings = {folder: pool.submit(train, method, folder, arguments) for folder, method in runs.items()}
        for folder, training in trainings.items():
            training.result()
            yield folder


# -- scores ------------------------------------------------------------------------------------------------------


def new_metrics(data: SegmentationDataset) -> dict[str, Any]:
    """mIoU, and PQ with every class as stuff (PQ_st, paper Section 4.1), which counts segments of all sizes alike."""
    return {
        "mean_iou": MeanIoU(data.id2label, void_id=data.void_id),
        "pq": PanopticQuality(data.id2label, list(data.id2label)),
    }


def class_map_of(folder: Path) -> Callable[[Tensor], Tensor]:
    """Semantic inference (paper Section 3.4) with a saved model, loaded when the first image comes."""
    load = cache(lambda: Predictor.from_pretrained(folder))
    return lambda image: load()(image, task="semantic")["segmentation"]


def measure(file: Path, data: SegmentationDataset, class_map: Callable[[Tensor], Tensor]) -> Measurements:
    """Measurements of each image of the test split, kept in `file`.

    Args:
        class_map: image (3, H, W) -> class ids (H, W) int64; the void id of the data where it predicts none.
    """
    if file.is_file():
        return dict(np.load(file))
    metrics = new_metrics(data)
    rows: dict[str, list[Tensor]] = {name: [] for name in metrics}
    for index in track(range(len(data)), f"Scoring {file.parent.name}"):
        sample = data[index]
        truth = sample["segments"]
        found = class_map(sample["image"].as_subclass(Tensor))
        segments = Segments.from_class_map(found, data.void_id)
        for name, metric in metrics.items():
            rows[name].append(metric.measure(segments, truth))
    measurements = {name: torch.stack(values).double().numpy() for name, values in rows.items()}
    partial = file.with_suffix(".part.npz")
    np.savez_compressed(partial, **measurements)
    partial.replace(file)  # never half a file
    return measurements


def scores_of(measurements: Sequence[Measurements], data: SegmentationDataset, count: int = REPLICATES) -> Scores:
    """Scores (1 + count,) of a method, averaged over its seeds: of all images, then of `count` resamples.

    The resamples are the same for all methods, so that their differences are paired.
    """
    scores = {}
    for name, metric in new_metrics(data).items():
        of_seeds = []
        for rows in measurements:
            images, bootstrap = torch.from_numpy(rows[name]), Bootstrap(metric, count)
            bootstrap.add(images)
            of_seeds.append([metric.scores(images.sum(0))[name].item(), *bootstrap.scores()[name]])
        scores[name] = 100 * np.mean(of_seeds, axis=0)
    return scores


# -- tables and plots --------------------------------------------------------------------------------------------


def with_interval(values: NDArray[np.float64], signed: bool = False) -> str:
    low, high = np.percentile(values[1:], [2.5, 97.5])
    sign = "+" if signed else ""
    return f"{values[0]:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def score_table(results: Mapping[str, Scores], columns: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Markdown, a line a method.

    Args:
        results: scores by the name of the method.
        columns: further ones before the scores: their heading, and a text for each method.
    """
    yield f"| model | {' | '.join([*columns, *SCORES.values()])} |"
    yield "|---|" + "---:|" * len(columns) + "---|" * len(SCORES)
    for index, (name, scores) in enumerate(results.items()):
        cells = [column[index] for column in columns.values()] + [with_interval(scores[score]) for score in SCORES]
        yield f"| {name} | {' | '.join(cells)} |"


def difference_table(results: Mapping[str, Scores], pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Markdown, a line for each pair (before, after) of methods, with paired intervals."""
    yield f"| difference | {' | '.join(SCORES.values())} |"
    yield "|---|" + "---|" * len(SCORES)
    for before, after in pairs:
        changes = (with_interval(results[after][name] - results[before][name], signed=True) for name in SCORES)
        yield f"| {after} over {before} | {' | '.join(changes)} |"


def plot_scores(groups: Mapping[str, Mapping[str, Scores]], title: str, path: Path) -> None:
    """Every score with its interval, a row a method, the groups under headings of their own ("": none)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: list[tuple[str, Scores | None]] = []
    for heading, results in groups.items():
        lines += [(heading, None)] if heading else []
        lines += list(results.items())
    figure, axes = pyplot.subplots(
        1, len(SCORES), figsize=(10, 0.55 * len(lines) + 1.2), sharey=True, layout="constrained"
    )
    rows = np.array([row for row, (_, scores) in enumerate(lines) if scores is not None])
    for axis, (name, label) in zip(axes, SCORES.items(), strict=True):
        values = np.stack([scores[name] for _, scores in lines if scores is not None])
        low, high = np.percentile(values[:, 1:], [2.5, 97.5], axis=1)
        axis.errorbar(values[:, 0], rows, xerr=[values[:, 0] - low, high - values[:, 0]], fmt="o", capsize=4)
        for row, value in zip(rows, values[:, 0], strict=True):
            axis.annotate(f"{value:.1f}", (value, row), xytext=(0, 7), textcoords="offset points", ha="center")
        axis.set_xlabel(f"{label} (%), 95 % interval over images")
        axis.set_ylim(len(lines) - 0.4, -0.7)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(lines)), [name for name, _ in lines])
    for text, (_, scores) in zip(axes[0].get_yticklabels(), lines, strict=True):
        text.set_fontweight("bold" if scores is None else "normal")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def report(stem: Path, lines: Iterable[str], groups: Mapping[str, Mapping[str, Scores]], title: str) -> None:
    """Print the table; write it as `stem`.md and the plot as `stem`.png."""
    text = "\n".join(lines)
    print(text)
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(text + "\n")
    plot_scores(groups, title, stem.with_suffix(".png"))


def without_intervals(scores: Scores) -> dict[str, float]:
    return {name: float(values[0]) for name, values in scores.items()}
