"""The paper's comparison on your data: per-pixel against mask classification, same backbone, data and budget.

Trains five models with one recipe, scores each on the test split and writes a table with 95 % intervals, a plot and
all numbers, and beside each model its own scores. Stopped at any point it goes on where it was.

    python examples/compare.py --recipe camvid --data camvid --test-split test --out runs/compare-camvid --jobs 2
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch

from maskcls_hf.data import SegmentationDataset
from maskcls_hf.hub.saved_model import SavedModel
from maskcls_hf.metrics import Bootstrap
from maskcls_hf.utils.writing import write_json
from studies import (
    REPLICATES,
    Measurements,
    Method,
    Scores,
    add_jobs,
    begin,
    class_map_of,
    difference_table,
    facts_of_run,
    measure,
    new_metrics,
    report,
    score_table,
    scores_of,
    study_parser,
    train_all,
    without_intervals,
)

# In the order of the paper's argument: each differs from the one before it in one thing.
METHODS = (
    Method("PerPixelBaseline", "per_pixel", ("model.kind=per_pixel", "model.transformer_module=false")),
    Method("PerPixelBaseline+", "per_pixel_plus", ("model.kind=per_pixel", "model.transformer_module=true")),
    Method("MaskFormer, fixed matching, N = K", "fixed", ("model.matching=fixed", "model.num_queries=num_labels")),
    Method("MaskFormer, bipartite matching, N = K", "bipartite_k", ("model.num_queries=num_labels",)),
    Method("MaskFormer, bipartite matching, N = 100", "bipartite_100", ("model.num_queries=100",)),
)


def write_scores(file: Path, measurements: Measurements, data: SegmentationDataset) -> None:
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


def table(results: dict[str, Scores], parameters: list[int]) -> Iterator[str]:
    """Scores, then what each step of the paper's argument adds, and all together, as Markdown."""
    yield from score_table(results, {"million parameters": [f"{number / 1e6:.2f}" for number in parameters]})
    yield ""
    steps = list(pairwise(results))
    if len(steps) > 1:
        steps.append((steps[0][0], steps[-1][1]))  # all steps together
    yield from difference_table(results, steps)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = study_parser(__doc__, METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one training each (0)")
    add_jobs(parser)
    study = begin(parser, METHODS, argv)
    arguments, data, methods = study.arguments, study.data, study.methods

    folders = {(m, seed): arguments.out / f"{m.folder}-{seed}" for seed in arguments.seeds for m in methods}
    runs = {folder: m.changed(f"training.seed={seed}") for (m, seed), folder in folders.items()}
    list(train_all(runs, arguments))
    measured = {}
    for run, folder in folders.items():
        measured[run] = measure(folder / f"test-{data.split}.npz", data, class_map_of(folder))
        write_scores(folder / f"scores-{data.split}.json", measured[run], data)

    results = {m.name: scores_of([measured[m, seed] for seed in arguments.seeds], data) for m in methods}
    parameters = [SavedModel(folders[m, arguments.seeds[0]]).parameters() or 0 for m in methods]
    report(arguments.out / "comparison", table(results, parameters), {"": results}, study.title)
    summary = {m.folder: without_intervals(results[m.name]) for m in methods}
    write_json(arguments.out / "comparison.json", {**facts_of_run("compare.py", argv, study), "scores": summary})
    return summary


if __name__ == "__main__":
    main()
