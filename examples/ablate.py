"""The paper's ablations in small: matching, number of queries, decoder layers, deep supervision, kind of inference.

Trains one base model and models that differ from it in one thing each, by one recipe, with the same seed and budget;
scores all on the test split and writes a table for each question, with 95 % intervals, and a plot. A run that is
finished is kept in a JSON file: kept in git, another machine goes on with the missing runs only. A run that was stopped
goes on where it was.

    python examples/ablate.py --recipe camvid --data camvid --test-split test --out runs/ablate-camvid \\
      --results model_cards/camvid/ablation.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskcls_hf.inference import Predictor
from maskcls_hf.models.inference_defaults import NO_CLEAN_UP
from studies import (
    Method,
    Scores,
    Study,
    add_jobs,
    begin,
    class_map_of,
    difference_table,
    facts_of_run,
    measure,
    report,
    score_table,
    scores_of,
    study_parser,
    train_all,
)

BASE = ("model.matching=bipartite", "model.num_queries=100", "model.decoder_layers=6", "model.deep_supervision=true")
RESAMPLES = 500  # all are kept in the results, so that differences to runs of other machines are paired


def variant(name: str, folder: str, *changes: str) -> Method:
    return Method(name, folder, (*BASE, *changes))


base = variant("base", "base")
general = variant("general inference", "general")  # with the base model
fixed = variant("fixed matching", "fixed", "model.matching=fixed", "model.num_queries=num_labels")
bipartite_k = variant("bipartite matching, N = K", "bipartite_k", "model.num_queries=num_labels")
boxes = variant("matching by boxes", "box", "model.matching=box")
queries = {n: variant(f"{n} queries", f"queries_{n}", f"model.num_queries={n}") for n in (20, 50, 200)}
one_layer = variant("1 decoder layer", "layers_1", "model.decoder_layers=1")
last_layer = variant("no deep supervision", "no_deep_supervision", "model.deep_supervision=false")


@dataclass(frozen=True)
class Question:
    """A table: what it compares, by the names there; the pairs (before, after) whose difference answers it; what the
    paper answers, where that is known to the last digit."""

    name: str
    methods: dict[str, Method]
    differences: tuple[tuple[str, str], ...]
    paper: str = ""


QUESTIONS = (
    Question(
        "Matching",
        {
            "fixed, N = K": fixed,
            "bipartite, N = K": bipartite_k,
            "bipartite by boxes, N = 100": boxes,
            "bipartite by masks, N = 100 (base)": base,
        },
        (
            ("fixed, N = K", "bipartite, N = K"),
            ("bipartite, N = K", "bipartite by masks, N = 100 (base)"),
            ("bipartite by boxes, N = 100", "bipartite by masks, N = 100 (base)"),
        ),
        "The paper: bipartite over fixed matching +0.5 mIoU on ADE20K; on COCO panoptic PQ 43.7 by boxes and 46.5 by "
        "masks.",
    ),
    Question(
        "Number of queries",
        {"N = 20": queries[20], "N = 50": queries[50], "N = 100 (base)": base, "N = 200": queries[200]},
        (("N = 100 (base)", "N = 20"), ("N = 100 (base)", "N = 50"), ("N = 100 (base)", "N = 200")),
    ),
    Question("Decoder layers", {"1": one_layer, "6 (base)": base}, (("1", "6 (base)"),)),
    Question(
        "Deep supervision",
        {"loss of the last layer": last_layer, "loss of all layers (base)": base},
        (("loss of the last layer", "loss of all layers (base)"),),
    ),
    Question(
        "Inference of the base model (Section 3.4)",
        {"general": general, "semantic": base},
        (("general", "semantic"),),
    ),
)
METHODS = tuple(dict.fromkeys(method for question in QUESTIONS for method in question.methods.values()))


# -- runs --------------------------------------------------------------------------------------------------------


def general_map_of(folder: Path, void_id: int) -> Callable[[Tensor], Tensor]:
    """General inference (paper Section 3.4) with a saved model: a pixel goes to the pair i whose p_i(c_i) * m_i is the
    greatest there, and gets its class c_i. Pairs whose most likely class is "no object" take no part."""
    predictor = Predictor.from_pretrained(folder)
    # The panoptic map without what reduces false positives, one segment a class.
    options = NO_CLEAN_UP["panoptic"] | {"threshold": 0.0, "mask_threshold": 0.0, "overlap_mask_area_threshold": 0.0}

    def class_map(image: Tensor) -> Tensor:
        found = predictor(image, task="panoptic", label_ids_to_fuse=list(predictor.id2label), **options)
        class_of_segment = [void_id, *(segment["label_id"] for segment in found["segments_info"])]
        return torch.tensor(class_of_segment)[found["segmentation"].long()]

    return class_map


def training_folder(method: Method, arguments: argparse.Namespace) -> Path:
    return arguments.out / (base.folder if method is general else method.folder)


class Results:
    """The finished runs, in a JSON file with a line each.

    Raises:
        ValueError: the file holds runs of another recipe, other changes or another split.
    """

    def __init__(self, path: Path, study: Study):
        self.path = path
        arguments = study.arguments
        self.settings = {"recipe": study.recipe.name, "set": arguments.set, "test_split": arguments.test_split}
        self.runs: dict[str, dict[str, Any]] = {}
        if path.is_file():
            content = json.loads(path.read_text())
            if (kept := content.get("settings")) != self.settings:
                raise ValueError(
                    f"{path} has runs with {kept}, now asked for are {self.settings}: give the same arguments, or "
                    "another file."
                )
            self.runs = content["runs"]

    def add(self, method: Method, scores: Scores, facts: dict[str, str]) -> None:
        resamples = {name: np.round(values, 2).tolist() for name, values in scores.items()}
        self.runs[method.folder] = {"changes": method.changes, **facts, "scores": resamples}
        self.save()

    def save(self) -> None:
        known = [method.folder for method in METHODS]
        runs = {name: self.runs[name] for name in known if name in self.runs}
        missing = [name for name in known if name not in self.runs]
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(run)}" for name, run in runs.items())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = f'  "settings": {json.dumps(self.settings)},\n  "missing": {json.dumps(missing)},'
        partial = self.path.with_suffix(".part")
        partial.write_text(f'{{\n{head}\n  "runs": {{\n{lines}\n  }}\n}}\n')
        partial.replace(self.path)  # never half a file

    def scores(self, method: Method) -> Scores | None:
        run = self.runs.get(method.folder)
        return None if run is None else {name: np.array(values) for name, values in run["scores"].items()}


def run_missing(study: Study, results: Results, facts: dict[str, str]) -> None:
    """Train and score what the results lack, and keep each run in them as soon as it is there."""
    arguments, data = study.arguments, study.data
    missing = [method for method in study.methods if method.folder not in results.runs]
    trainings: dict[Path, Method] = {}
    for method in missing:
        trainings.setdefault(training_folder(method, arguments), method)
    for folder in train_all(trainings, arguments):
        for method in missing:
            if training_folder(method, arguments) == folder:
                class_map = general_map_of(folder, data.void_id) if method is general else class_map_of(folder)
                measured = measure(folder / f"test-{data.split}-{method.folder}.npz", data, class_map)
                results.add(method, scores_of([measured], data, RESAMPLES), facts)


# -- tables ------------------------------------------------------------------------------------------------------


def tables(found: dict[Method, Scores]) -> Iterator[str]:
    """A section for each question, as Markdown."""
    for question in QUESTIONS:
        results = results_of(question, found)
        missing = [name for name in question.methods if name not in results]
        differences = [(before, after) for before, after in question.differences if {before, after} <= results.keys()]
        yield f"### {question.name}\n"
        yield from score_table(results, {})
        yield ""
        if differences:
            yield from difference_table(results, differences)
            yield ""
        if missing:
            yield f"Not run yet: {'; '.join(missing)}.\n"
        if question.paper:
            yield f"{question.paper}\n"


def results_of(question: Question, found: dict[Method, Scores]) -> dict[str, Scores]:
    return {name: found[method] for name, method in question.methods.items() if method in found}


def main(argv: list[str] | None = None) -> dict[str, Scores]:
    parser = study_parser(__doc__, METHODS)
    parser.add_argument("--results", type=Path, metavar="FILE", help="finished runs (OUT/ablation.json)")
    add_jobs(parser)
    study = begin(parser, METHODS, argv)
    path = study.arguments.results or study.arguments.out / "ablation.json"
    try:
        results = Results(path, study)
    except ValueError as error:
        parser.error(f"--results: {error}")
    run_missing(study, results, facts_of_run("ablate.py", argv, study))
    found = {method: scores for method in METHODS if (scores := results.scores(method)) is not None}
    groups = {question.name: results for question in QUESTIONS if (results := results_of(question, found))}
    report(path.with_suffix(""), tables(found), groups, study.title)
    return {method.folder: scores for method, scores in found.items()}


if __name__ == "__main__":
    main()
