"""The paper's comparison on your data: per-pixel against mask classification, same backbone, data and budget.

Trains five models with one recipe, scores each on the test split and writes a table with 95 % intervals, a plot and
all numbers, and beside each model its own scores. Stopped at any point it goes on where it was.

    python examples/compare.py --recipe camvid --data camvid --test-split test --out runs/compare-camvid --jobs 2
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from maskcls_hf.data import SegmentationDataset, open_dataset
from maskcls_hf.hub.saved_model import SavedModel
from maskcls_hf.hub.scores import write_json
from maskcls_hf.hub.speed import describe_device
from maskcls_hf.inference import Predictor
from maskcls_hf.metrics import Bootstrap, GroundTruth, MeanIoU, PanopticQuality
from maskcls_hf.training import load_recipe


@dataclass(frozen=True)
class Method:
    """A name and what it changes in the recipe, as `section.key=value`."""

    name: str
    folder: str
    changes: tuple[str, ...]


# In the order of the paper's argument: each differs from the one before it in one thing.
METHODS = (
    Method("PerPixelBaseline", "per_pixel", ("model.kind=per_pixel", "model.transformer_module=false")),
    Method("PerPixelBaseline+", "per_pixel_plus", ("model.kind=per_pixel", "model.transformer_module=true")),
    Method("MaskFormer, fixed matching, N = K", "fixed", ("model.matching=fixed", "model.num_queries=num_labels")),
    Method("MaskFormer, bipartite matching, N = K", "bipartite_k", ("model.num_queries=num_labels",)),
    Method("MaskFormer, bipartite matching, N = 100", "bipartite_100", ("model.num_queries=100",)),
)
SCORES = {"mean_iou": "mIoU", "pq": "PQ_st"}  # what the metrics call them, and the paper
REPLICATES = 2000


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="of a semantic data set; what all methods share")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, table and plot")
    parser.add_argument("--test-split", default="val", help="scored at the end (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one training each (0)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="changes for all methods"
    )
    parser.add_argument("--only", nargs="+", choices=[m.folder for m in METHODS], help="some of the methods")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, which share the cores (1)")
    arguments = parser.parse_args(argv)
    try:
        load_recipe(arguments.recipe, arguments.set)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    return arguments


# -- training ----------------------------------------------------------------------------------------------------


def train(method: Method, seed: int, arguments: argparse.Namespace) -> Path:
    """Train in a process of its own, or go on with it; the folder of the model."""
    folder = arguments.out / f"{method.folder}-{seed}"
    if (folder / "eval_results.json").is_file():
        return folder
    command = [sys.executable, "-m", "maskcls_hf.cli", "train", "--recipe", arguments.recipe]
    command += ["--data", str(arguments.data), "--out", str(folder)]
    for change in (*arguments.set, *method.changes, f"training.seed={seed}"):
        command += ["--set", change]
    if any(folder.glob("checkpoint-*")):
        command.append("--resume")
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{method.name}, seed {seed}: training, see {folder / 'train.log'}", flush=True)
    with (folder / "train.log").open("a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=True)
    return folder


# -- scores of every image ---------------------------------------------------------------------------------------


def measure(folder: Path, data: SegmentationDataset) -> dict[str, NDArray[np.float64]]:
    """Measurements of each image of the test split, kept beside the model."""
    file = folder / f"test-{data.split}.npz"
    if file.is_file():
        return dict(np.load(file))
    predictor = Predictor.from_pretrained(folder)
    metrics = new_metrics(data)
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in metrics}
    for index in track(range(len(data)), f"Scoring {folder.name}"):
        sample = data[index]
        truth = GroundTruth.from_sample(sample, data.void_id)
        found = predictor(sample["image"].as_subclass(torch.Tensor), task="semantic")
        rows["mean_iou"].append(metrics["mean_iou"].measure(found["segmentation"], truth))
        rows["pq"].append(metrics["pq"].measure(found["segmentation"], found["segments_info"], truth))
    measurements = {name: torch.stack(values).double().numpy() for name, values in rows.items()}
    np.savez_compressed(file, **measurements)
    return measurements


def write_scores(file: Path, measurements: dict[str, NDArray[np.float64]], data: SegmentationDataset) -> None:
    """Scores and intervals of one model, as `maskcls evaluate --json` writes them, for `maskcls push --results`."""
    scores: dict[str, float] = {}
    for name, metric in new_metrics(data).items():
        rows, bootstrap = torch.from_numpy(measurements[name]), Bootstrap(metric, REPLICATES)
        metric.add(rows)
        bootstrap.add(rows)
        known = {score: value for score, value in metric.compute().items() if name == "mean_iou" or "stuff" in score}
        scores |= known
        for score, (low, high) in bootstrap.intervals().items():
            if score in known:
                scores |= {f"{score}_low": low, f"{score}_high": high}
        if name == "mean_iou":
            per_class = metric.per_class()
    settings = {"split": data.split, "images": len(data), "bootstrap": REPLICATES}
    write_json(file, {"settings": settings, "scores": scores, "per_class": per_class})


def new_metrics(data: SegmentationDataset) -> dict[str, Any]:
    """mIoU, and PQ with every class as stuff (PQ_st, paper Section 4.1), which counts segments of all sizes alike."""
    return {
        "mean_iou": MeanIoU(data.id2label, data.void_id),
        "pq": PanopticQuality(data.id2label, list(data.id2label)),
    }


# -- scores of all images, with intervals ------------------------------------------------------------------------


def replicates(measurements: list[dict[str, NDArray]], data: SegmentationDataset) -> dict[str, NDArray[np.float64]]:
    """Scores (1 + REPLICATES,) of a method, averaged over its seeds: of all images, then of resampled images.

    The resamples are the same for all methods, so that their differences are paired.
    """
    scores = {}
    for name, metric in new_metrics(data).items():
        of_seeds = []
        for rows in measurements:
            images, bootstrap = torch.from_numpy(rows[name]), Bootstrap(metric, REPLICATES)
            bootstrap.add(images)
            of_seeds.append([metric.scores(images.sum(0))[name].item(), *bootstrap.scores()[name]])
        scores[name] = 100 * np.mean(of_seeds, axis=0)
    return scores


def with_interval(values: NDArray[np.float64], signed: bool = False) -> str:
    low, high = np.percentile(values[1:], [2.5, 97.5])
    sign = "+" if signed else ""
    return f"{values[0]:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def table(results: dict[Method, dict[str, NDArray[np.float64]]], parameters: dict[Method, int]) -> Iterator[str]:
    """Scores, then what each step of the paper's argument adds, and all together, as Markdown."""
    names = list(SCORES)
    yield f"| model | million parameters | {' | '.join(SCORES.values())} |"
    yield "|---|---:|" + "---|" * len(names)
    for method, scores in results.items():
        millions = f"{parameters[method] / 1e6:.2f}"
        yield f"| {method.name} | {millions} | {' | '.join(with_interval(scores[name]) for name in names)} |"
    yield ""
    yield f"| difference | {' | '.join(SCORES.values())} |"
    yield "|---|" + "---|" * len(names)
    steps = list(pairwise(results.items()))
    if len(steps) > 1:
        steps.append((steps[0][0], steps[-1][1]))  # all steps together
    for (before, old), (after, new) in steps:
        changes = (with_interval(new[name] - old[name], signed=True) for name in names)
        yield f"| {after.name} over {before.name} | {' | '.join(changes)} |"


def plot(results: dict[Method, dict[str, NDArray[np.float64]]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SCORES), figsize=(10, 0.55 * len(results) + 1.2), sharey=True)
    rows = np.arange(len(results))[::-1]
    for axis, (name, label) in zip(axes, SCORES.items(), strict=True):
        values = np.stack([scores[name] for scores in results.values()])
        low, high = np.percentile(values[:, 1:], [2.5, 97.5], axis=1)
        axis.errorbar(values[:, 0], rows, xerr=[values[:, 0] - low, high - values[:, 0]], fmt="o", capsize=4)
        for row, value in zip(rows, values[:, 0], strict=True):
            axis.annotate(f"{value:.1f}", (value, row), xytext=(0, 7), textcoords="offset points", ha="center")
        axis.set_xlabel(f"{label} (%), 95 % interval over images")
        axis.set_ylim(-0.6, len(results) - 0.3)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(rows, [method.name for method in results])
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    arguments = parse_arguments(argv)
    recipe = load_recipe(arguments.recipe, arguments.set)
    try:
        data = open_dataset(arguments.data, arguments.test_split, layout=recipe.data.layout, **recipe.data.options)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"--data {arguments.data}: {error}")
    methods = [method for method in METHODS if not arguments.only or method.folder in arguments.only]
    runs = [(method, seed) for seed in arguments.seeds for method in methods]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        folders = dict(zip(runs, pool.map(lambda run: train(*run, arguments), runs), strict=True))
    measured = {run: measure(folder, data) for run, folder in folders.items()}
    for run, folder in folders.items():
        write_scores(folder / f"scores-{data.split}.json", measured[run], data)
    results = {m: replicates([measured[m, seed] for seed in arguments.seeds], data) for m in methods}
    parameters = {m: SavedModel(folders[m, arguments.seeds[0]]).parameters() or 0 for m in methods}
    lines = list(table(results, parameters))
    print("\n".join(lines))
    (arguments.out / "comparison.md").write_text("\n".join(lines) + "\n")
    title = f"{arguments.recipe}, {arguments.test_split}: {len(data)} images, {recipe.schedule.max_steps} steps each"
    plot(results, title, arguments.out / "comparison.png")
    summary = {
        method.folder: {name: values[0] for name, values in scores.items()} for method, scores in results.items()
    }
    facts = {
        "command": shlex.join(["python", "examples/compare.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": str(date.today()),
        "machine": f"{describe_device(torch.device('cpu'))}, torch {torch.__version__}",
    }
    write_json(arguments.out / "comparison.json", {**facts, "scores": summary})
    return summary


if __name__ == "__main__":
    main()
