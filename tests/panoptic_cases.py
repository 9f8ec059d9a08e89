"""Seeded panoptic predictions and truths, in the form of panopticapi, for the tests and for its expected figures.

`python tests/panoptic_cases.py` writes tests/data/panopticapi_figures.json with panopticapi's own figures: it needs
`panopticapi` (github.com/cocodataset/panopticapi) to be importable, or its folder in the variable PANOPTICAPI.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FIGURES = Path(__file__).parent / "data" / "panopticapi_figures.json"
REAL = {
    "coco_panoptic_sample": ("panoptic_examples.json", "panoptic_examples"),
    "coco_stuff_panoptic": ("val/panoptic.json", "val/panoptic"),
    "car_parts": ("test/panoptic.json", "test/panoptic"),
}
CAR_PARTS_IMAGES = 12


@dataclass
class Segmentation:
    """ids: (H, W) int64, 0 = void. segments: records with id, category_id, area, and iscrowd where it is the truth."""

    ids: np.ndarray
    segments: list[dict[str, Any]]


@dataclass
class Case:
    categories: list[dict[str, Any]]
    pairs: list[tuple[Segmentation, Segmentation]]  # truth, prediction


def panopticapi() -> ModuleType | None:
    """panopticapi's evaluation module, if it is there."""
    folder = os.environ.get("PANOPTICAPI")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module("panopticapi.evaluation")
    except ImportError:
        return None


def random_case(seed: int, images: int = 4) -> Case:
    """Blocky maps with void, crowds (one of a class at most) and predictions derived from the truth.

    RandomState, because its numbers are the same in every version of numpy.
    """
    rng = np.random.RandomState(seed)
    categories = [{"id": 3 * k + 1, "isthing": int(k < 4), "name": f"class {k}"} for k in range(6)]
    pairs = []
    for _ in range(images):
        height, width = rng.randint(3, 6, 2)
        blocks = rng.randint(0, 8, (height, width))
        ids = np.kron(blocks, np.ones((8, 8), dtype=np.int64))
        truth = _with_segments(ids, rng, categories, crowds=True)
        pairs.append((truth, perturbed(truth, rng, categories)))
    return Case(categories, pairs)


def real_case(name: str, seed: int = 0) -> Case:
    """A data set of ../shared/data with perturbed copies of its truth as predictions."""
    annotations, folder = (DATA / name / part for part in REAL[name])
    contents = json.loads(annotations.read_text())
    rng = np.random.RandomState(seed)
    pairs = []
    for annotation in contents["annotations"][: CAR_PARTS_IMAGES if name == "car_parts" else None]:
        rgb = np.array(Image.open(folder / annotation["file_name"]).convert("RGB"), dtype=np.int64)
        truth = Segmentation(rgb @ [1, 256, 65536], annotation["segments_info"])
        pairs.append((truth, perturbed(truth, rng, contents["categories"])))
    return Case(contents["categories"], pairs)


def _with_segments(
    ids: np.ndarray, rng: np.random.RandomState, categories: list[dict[str, Any]], crowds: bool
) -> Segmentation:
    segments: list[dict[str, Any]] = []
    for i in np.unique(ids[ids > 0]).tolist():
        category = categories[rng.randint(len(categories))]
        has_crowd = any(s["iscrowd"] and s["category_id"] == category["id"] for s in segments)
        iscrowd = int(crowds and category["isthing"] and not has_crowd and rng.rand() < 0.3)
        area = int((ids == i).sum())
        segments.append({"id": i, "category_id": category["id"], "area": area, "iscrowd": iscrowd})
    return Segmentation(ids, segments)


def perturbed(truth: Segmentation, rng: np.random.RandomState, categories: list[dict[str, Any]]) -> Segmentation:
    """A prediction: the truth moved by some pixels, segments left out, joined, split, renamed, and some in void."""
    ids = np.roll(truth.ids, rng.randint(-1, 2, 2) * max(1, len(truth.ids) // 100), axis=(0, 1))
    classes = {segment["id"]: segment["category_id"] for segment in truth.segments}
    for i in list(classes):
        choice = rng.rand()
        if choice < 0.1:
            ids[ids == i] = 0
        elif choice < 0.2:
            ids[ids == i] = rng.choice(list(classes))
        elif choice < 0.35:  # some pixels go to a new segment
            part = (ids == i) & (rng.rand(*ids.shape) < rng.rand())
            new = max(int(ids.max()), max(classes)) + 1
            if new < 256**3:
                ids[part] = new
                classes[new] = classes[i]
        elif choice < 0.5:
            classes[i] = categories[rng.randint(len(categories))]["id"]
    empty = (truth.ids == 0) & (ids == 0)
    if empty.any() and rng.rand() < 0.7 and ids.max() + 1 < 256**3:
        new = int(ids.max()) + 1
        ids[empty] = new
        classes[new] = categories[rng.randint(len(categories))]["id"]
    present = np.unique(ids[ids > 0]).tolist()
    return Segmentation(ids, [{"id": i, "category_id": classes[i]} for i in present])


def write(case: Case, folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """PNG files in folder/truth and folder/prediction; the annotations of each image."""
    annotations = []
    for number, pair in enumerate(case.pairs):
        records = []
        for kind, segmentation in zip(("truth", "prediction"), pair, strict=True):
            (folder / kind).mkdir(exist_ok=True, parents=True)
            rgb = np.stack([segmentation.ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
            Image.fromarray(rgb).save(folder / kind / f"{number}.png")
            segments = [dict(segment) for segment in segmentation.segments]
            records.append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
        annotations.append((records[0], records[1]))
    return annotations


def figures(evaluation: ModuleType, case: Case) -> dict[str, Any]:
    """panopticapi's scores of a case."""
    categories = {category["id"]: category for category in case.categories}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        annotations = write(case, Path(folder))
        stat = evaluation.pq_compute_single_core(
            0, annotations, os.path.join(folder, "truth"), os.path.join(folder, "prediction"), categories
        )
    results: dict[str, Any] = {}
    for group, isthing in (("", None), ("_things", True), ("_stuff", False)):
        with contextlib.suppress(ZeroDivisionError):  # no class of this kind
            average, per_class = stat.pq_average(categories, isthing)
            results |= {score + group: float(average[score]) for score in ("pq", "sq", "rq")}
            if isthing is None:
                counted = [i for i in categories if stat[i].tp + stat[i].fp + stat[i].fn]
                results["per_class"] = {
                    categories[i]["name"]: {score: float(per_class[i][score]) for score in ("pq", "sq", "rq")}
                    for i in counted
                }
    return results


def all_cases() -> dict[str, Case]:
    cases = {f"random {seed}": random_case(seed) for seed in range(20)}
    return cases | {name: real_case(name) for name in REAL if (DATA / name).exists()}


if __name__ == "__main__":
    module = panopticapi()
    if module is None:
        sys.exit("panopticapi is not importable: set PANOPTICAPI to the folder of its repository.")
    FIGURES.parent.mkdir(exist_ok=True)
    expected = {name: figures(module, case) for name, case in all_cases().items()}
    FIGURES.write_text(json.dumps(expected, indent=1) + "\n")
    print(f"{FIGURES}: {len(expected)} cases")
