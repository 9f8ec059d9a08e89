"""Speed of a Predictor by its dtype, and how much of its maps stays:  python benchmarks/precision.py

Each dtype of the device beside float32 (on a GPU without TF32): the share of pixels whose class is the same, in
semantic and in panoptic maps, and the time of the network alone and of an image from its pixels to its panoptic map.
With trained models on images like those that they were trained on: maskcls-nuclei-tiny of this repository, and where
there is a folder ../shared the one of facades in it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import HERE, finish, machine, medians, write_record
from PIL import Image
from rich.console import Console
from rich.table import Table
from stages import DEVICE, exact
from transformers.utils import logging

from maskcls_hf.inference.predictor import Predictor, Result

ROOT = HERE.parent
SHARED = next((folder for folder in (ROOT.parent / "shared", ROOT / "shared") if folder.is_dir()), ROOT / "shared")
PLACES = {
    "nuclei, tiny": (
        ROOT / "model_cards/maskcls-nuclei-tiny",
        [SHARED / "data/dsb2018_nuclei/val/images", ROOT / "model_cards/maskcls-nuclei-tiny"],
    ),
    "facades, EfficientNet-Lite0": (
        SHARED / "models/facades_lite0_2h",
        [SHARED / "data/building_facades/val/images"],
    ),
}
MODELS = {
    name: places
    for name, places in PLACES.items()
    if places[0].is_dir() and ("EfficientNet" not in name or find_spec("timm") is not None)
}


@dataclass
class Way:
    """A way to predict, by its name in the table."""

    name: str
    options: dict[str, Any]
    is_exact: bool = False


def ways(compiled: bool) -> Iterator[Way]:
    yield Way("float32", {}, is_exact=True)
    if DEVICE == "cuda":
        yield Way("float32 with TF32", {})
    yield Way("bfloat16", {"dtype": "bfloat16"})
    if DEVICE == "cuda":
        yield Way("float16", {"dtype": "float16"})
    if compiled:
        yield Way("float32, compiled", {"compile": True})
        yield Way("bfloat16, compiled", {"compile": True, "dtype": "bfloat16"})


def photographs(folders: list[Path], number: int) -> list[Image.Image]:
    """The first images of the first folder that is there."""
    folder = next(folder for folder in folders if folder.is_dir())
    paths = [path for path in sorted(folder.iterdir()) if path.suffix in {".jpg", ".png"}][:number]
    return [Image.open(path).convert("RGB") for path in paths]


def classes(result: Result) -> np.ndarray:
    """Class of each pixel (H, W); -1 where there is no segment."""
    ids = result["segmentation"].numpy()
    table = np.full(max(ids.max() + 1, 1), -1)
    for info in result["segments_info"]:
        table[info["id"]] = info["label_id"]
    return table[ids]


def measure(way: Way, folder: Path, images: list[Image.Image], rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Times, and class maps by task."""
    predict = Predictor.from_pretrained(folder, DEVICE, **way.options)
    found: dict[str, list[np.ndarray]] = {"semantic": [], "panoptic": []}
    inputs = predict.image_processor(images[0], return_tensors="pt").to(DEVICE)
    for image in images:
        for result_by_task in predict.predict(image, {"semantic": {}, "panoptic": {"threshold": 0.5}}):
            for task, result in result_by_task.items():
                found[task].append(classes(result))
    finish()
    calls = {"network": lambda: predict.outputs(inputs), "image": lambda: predict(images[0], "panoptic", threshold=0.5)}
    seconds = medians(calls, rounds)
    return {"way": way.name, **seconds}, found


def agreement(maps: list[np.ndarray], exact_maps: list[np.ndarray]) -> float:
    return statistics.fmean((one == other).mean() for one, other in zip(maps, exact_maps, strict=True))


def main() -> None:
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="of each model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: as many as torch takes by itself)")
    parser.add_argument("--compile", action="store_true", help="also by torch.compile, which takes minutes")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of precision.json (default: benchmarks)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    title, results = machine(), []
    table = Table(title=title)
    table.add_column("model")
    table.add_column("dtype")
    for heading in ("network", "times", "image to map", "times", "semantic", "panoptic"):
        table.add_column(heading, justify="right")
    for name, (folder, sources) in MODELS.items():
        images = photographs(sources, arguments.images)
        reference: dict[str, Any] = {}
        for way in ways(arguments.compile):
            if way.is_exact:
                with exact():
                    times, maps = measure(way, folder, images, arguments.rounds)
                reference = {"times": times, "maps": maps}
            else:
                times, maps = measure(way, folder, images, arguments.rounds)
            result = {"model": name, **times}
            result |= {task: agreement(maps[task], reference["maps"][task]) for task in maps}
            results.append(result)
            cells = []
            for part in ("network", "image"):
                cells += [f"{1000 * times[part]:.1f} ms", f"{reference['times'][part] / times[part]:.2f}"]
            cells += [f"{100 * result[task]:.3f} %" for task in maps]
            table.add_row(name, way.name, *cells)
    Console(width=140).print(table)
    suffix = "" if DEVICE == "cpu" else "_gpu"
    write_record(arguments.out / f"precision{suffix}.json", title, arguments.rounds, results)


if __name__ == "__main__":
    main()
