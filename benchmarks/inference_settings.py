"""What settings of inference are worth on a validation set: PQ, and F1 of the things at IoU 0.5, of the maps that a
user gets. The network runs once for each way of cutting images up; all else is done again with its outputs.

Without duplicates, holes and fragments, and with them (`mask_cleanup.py`):

    python benchmarks/inference_settings.py clean-up --model model_cards/maskcls-nuclei-tiny --data dsb2018_nuclei

The settings of the highest F1, one after the other, beginning with those of the paper; `--save` writes them into the
`preprocessor_config.json` of the model:

    python benchmarks/inference_settings.py search --model model_cards/maskcls-nuclei-tiny --data dsb2018_nuclei --save
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from maskcls_hf.data import SegmentationDataset, open_dataset
from maskcls_hf.inference import Predictor
from maskcls_hf.inference.evaluation import model_classes
from maskcls_hf.metrics import Segments
from maskcls_hf.metrics.instances import InstanceF1
from maskcls_hf.metrics.metric import METRICS
from maskcls_hf.models.inference_defaults import BUILT_IN, NO_CLEAN_UP, merged_defaults

OUTPUTS = ("class_queries_logits", "masks_queries_logits", "padded_sizes", "valid_sizes", "original_sizes")
WAYS = ("tile", "overlap", "enlarge")
PAPER: dict[str, Any] = {
    "panoptic": {"threshold": 0.8, "overlap_mask_area_threshold": 0.8} | NO_CLEAN_UP["panoptic"],
    "instance": {"threshold": 0.5} | NO_CLEAN_UP["instance"],
}
# What is tried, in this order; the best is kept before the next is tried.
GRID: dict[str, dict[str, tuple[Any, ...]]] = {
    "panoptic": {
        "tile": (96, 128, 160),
        "overlap_mask_area_threshold": (0.6, 0.4, 0.2),
        "threshold": (0.7, 0.6, 0.5, 0.4, 0.3),
        "mask_threshold": (0.4, 0.6),
        "max_hole_share": (0.05,),
        "min_fragment_share": (0.05, 0.2),
        "overlap": (0.4,),
    },
    "instance": {
        "tile": (96, 128, 160),
        "max_mask_iou": (0.8, 0.4, 0.2, 0.1),
        "threshold": (0.4, 0.6, 0.7),
        "mask_threshold": (0.4, 0.6),
        "max_hole_share": (0.05,),
        "min_fragment_share": (0.05, 0.2),
        "overlap": (0.4,),
    },
}


class Remembering(Predictor):
    """Keeps the outputs of the network for the images and tiles that it has seen."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.known: dict[Any, Any] = {}

    def _outputs(self, images: Sequence[Tensor], *options: Any) -> Any:
        key = tuple((tuple(image.shape), image.numpy().tobytes()) for image in images)
        if key not in self.known:
            outputs = super()._outputs(images, *options)
            self.known[key] = SimpleNamespace(**{name: getattr(outputs, name) for name in OUTPUTS})
        return self.known[key]


class Trial:
    """A model on the images of a split."""

    def __init__(self, model: str, data: SegmentationDataset, every: int):
        self.model, self.data = model, data
        self.predictor: Remembering = Remembering.from_pretrained(model)
        self.ways: dict[str, Any] = {}
        of_model = model_classes(self.predictor.id2label, data.id2label)
        self.names, self.stuff = self.predictor.id2label, of_model[data.stuff_ids].tolist()
        self.images: list[tuple[Tensor, Segments]] = []
        for index in range(0, len(data), every):
            sample = data[index]
            true = sample["segments"]
            self.images.append((sample["image"].as_subclass(Tensor), true))
            true.class_labels[:] = of_model[true.class_labels]

    def scores(self, task: Any, ways: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, float]:
        """F1, precision and recall at IoU 0.5; of panoptic maps PQ too; things found, and seconds."""
        if ways != self.ways or not self.predictor.known:
            self.predictor, self.ways = Remembering.from_pretrained(self.model, **ways), dict(ways)
        f1 = InstanceF1(self.names, self.stuff)
        metrics = [f1] if task == "instance" else [f1, METRICS["panoptic_quality"](self.names, stuff_ids=self.stuff)]
        things, start = 0, time.perf_counter()
        for image, true in self.images:
            (found,) = self.predictor.predict(image, {task: dict(options)}, input_data_format="channels_first")
            shown = {
                name: found[task][name] for name in ("segmentation", "segments_info")
            }  # the best where they overlap
            for metric in metrics:
                metric.add(metric.measure(Segments.from_output(shown), true)[None])
            things += sum(info["label_id"] not in self.stuff for info in shown["segments_info"])
        scores = {name: score for metric in metrics for name, score in metric.compute().items()}
        return scores | {"things": things, "seconds": time.perf_counter() - start}


def line(name: str, scores: Mapping[str, float]) -> str:
    shown = ("f1", "precision", "recall", "pq", "pq_things", "pq_stuff")
    cells = [f"{scores[score]:.4f}" if score in scores else "" for score in shown]
    return f"| {' | '.join([name, *cells, str(scores['things'])])} |"


HEAD = "| settings | F1 | precision | recall | PQ | PQ things | PQ stuff | things found |\n" + "|---" * 8 + "|"


def clean_up(trial: Trial, ways: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Both tasks with and without each part of the clean-up."""
    print(HEAD)
    parts = ("max_mask_iou", "max_hole_share", "min_fragment_share")
    for task in ("panoptic", "instance"):
        off, built_in = NO_CLEAN_UP[task], {name: BUILT_IN[task][name] for name in parts if name in BUILT_IN[task]}
        tried: dict[str, dict[str, Any]] = {"as in the paper's code": {}}
        tried |= {f"{name} {built_in[name]}": {name: built_in[name]} for name in built_in}
        tried |= {"all of them": built_in}
        for name, changed in tried.items():
            known = {key: value for key, value in options.items() if key in BUILT_IN[task]}
            print(line(f"{task}, {name}", trial.scores(task, ways, known | off | changed)), flush=True)


def merit(scores: Mapping[str, float]) -> tuple[float, float]:
    """F1; where it is the same, PQ."""
    return scores["f1"], scores.get("pq", 0.0)


def search(trial: Trial, task: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """The `inference_defaults` of the highest F1, and that. What is `given` stays so."""
    settings: dict[str, Any] = {"tile": 0} | PAPER[task]
    settings |= {name: value for name, value in given.items() if name in (*WAYS, *BUILT_IN[task])}

    def scores(tried: Mapping[str, Any]) -> dict[str, float]:
        ways = {name: value for name, value in tried.items() if name in WAYS}
        return trial.scores(task, ways, {name: value for name, value in tried.items() if name not in WAYS})

    best = scores(settings)
    print(line(f"{task}, as in the paper's code", best), flush=True)
    for name, values in GRID[task].items():
        for value in values if name not in given else ():
            tried = settings | {name: value}
            if tried != settings:
                found = scores(tried)
                print(line(f"{name} {value}", found), flush=True)
                if merit(found) > merit(best):
                    best, settings = found, tried
    ways = {name: value for name, value in settings.items() if name in WAYS and value}
    options = {name: value for name, value in settings.items() if name not in WAYS}
    return ways | {"task": task, task: options}, best["f1"]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("clean-up", "search"))
    parser.add_argument("--model", required=True, help="folder")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--layout")
    parser.add_argument("--every", type=int, default=1, help="only every so many images")
    parser.add_argument("--task", choices=tuple(GRID), nargs="+", default=tuple(GRID), help="of the search")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="tile=128, threshold=0.5, ..."
    )
    parser.add_argument("--save", action="store_true", help="what the search finds, into the model's folder")
    arguments = parser.parse_args()
    trial = Trial(arguments.model, open_dataset(arguments.data, arguments.split, arguments.layout), arguments.every)
    print(f"{len(trial.images)} images of {Path(arguments.data).name}, {arguments.split}; {arguments.model}\n")
    given = {key: json.loads(value) for key, value in (option.split("=") for option in arguments.option)}
    if arguments.what == "clean-up":
        ways = {name: given.pop(name) for name in WAYS if name in given}
        clean_up(trial, ways, given)
        return
    print(HEAD)
    found = sorted((search(trial, task, given) for task in arguments.task), key=lambda one: one[1])
    defaults = merged_defaults(*(settings for settings, _ in found))  # of the better task last: its ways count
    print(f"\nF1 {found[-1][1]:.4f} with {json.dumps(defaults)}")
    if arguments.save:
        path = Path(arguments.model, "preprocessor_config.json")
        fields = json.loads(path.read_text())
        saved = merged_defaults(fields.get("inference_defaults", {}), defaults)
        path.write_text(json.dumps(fields | {"inference_defaults": saved}, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
