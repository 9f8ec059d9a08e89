"""Score a model on instance data: IoU of the classes, F1 at IoU 0.5 and mask AP, on a grid of crops or whole images.

python examples/evaluate_instances.py --model runs/nuclei --data dsb2018_nuclei --crop 128 256
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.data import SegmentationFolder
from maskcls_hf.metrics import InstanceF1, MaskAP, MeanIoU


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a saved model and its image processor")
    parser.add_argument("--data", type=Path, required=True, help="folder with labels.json and SPLIT/instances")
    parser.add_argument("--split", default="val", help="(default: %(default)s)")
    parser.add_argument("--crop", type=int, nargs="+", default=[256], help="sizes of the crops; 0: whole images (256)")
    parser.add_argument(
        "--middle", action="store_true", help="one crop an image, its middle; default: all side by side"
    )
    parser.add_argument("--enlarge", type=float, default=1.0, help="network pixels an image pixel (1); 0: as saved")
    parser.add_argument("--threshold", type=float, default=0.8, help="lowest class probability for F1 (0.8)")
    parser.add_argument(
        "--overlap", type=float, default=0.8, help="part of its mask an instance must win, for F1 (0.8)"
    )
    parser.add_argument("--limit", type=int, help="only so many images")
    parser.add_argument("--output", type=Path, help="JSON file for the scores")
    arguments = parser.parse_args(argv)
    if not (arguments.model / "config.json").is_file():
        parser.error(f"--model {arguments.model}: no saved model there (config.json is missing)")
    return arguments


def crops_of(image: Tensor, ids: Tensor, size: int, middle: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Crops of `size` x `size` side by side, in the middle of an image (3, H, W) with its instance ids (H, W); or the
    `middle` one alone.

    Where the image is smaller than a crop, and for size 0, the crops have its length.
    """

    def slices(length: int) -> list[slice]:
        step = min(size, length) or length
        if middle:
            return [slice((length - step) // 2, (length + step) // 2)]
        first = length % step // 2
        return [slice(start, start + step) for start in range(first, length - step + 1, step)]

    for rows in slices(ids.shape[0]):
        for columns in slices(ids.shape[1]):
            yield image[:, rows, columns], ids[rows, columns]


def instance_masks(ids: Tensor) -> np.ndarray:
    """Map of ids (H, W), 0 for background -> masks (n, H, W)."""
    present = ids.unique()
    return (ids[None] == present[present != 0][:, None, None]).numpy()


class Scores:
    """All scores of one size of crops; every class but the stuff ones counts as things."""

    def __init__(self, id2label: dict[int, str], stuff_ids: list[int]):
        self.thing_ids = [label_id for label_id in id2label if label_id not in stuff_ids]
        self.mean_iou = MeanIoU(id2label)
        self.f1 = InstanceF1()
        self.ap = MaskAP({label_id: id2label[label_id] for label_id in self.thing_ids})

    def update(self, ids: Tensor, semantic: Tensor, panoptic: dict, instances: dict) -> None:
        """Add one crop: true instance ids (H, W) and what the three post-processing methods return."""
        (thing,) = self.thing_ids
        true = instance_masks(ids)
        self.mean_iou.update(semantic, (ids != 0).long() * thing)
        found = [info["id"] for info in panoptic["segments_info"] if info["label_id"] == thing]
        segmentation = panoptic["segmentation"]
        self.f1.update((segmentation[None] == torch.tensor(found).view(-1, 1, 1)).numpy(), true)
        things = [i for i, info in enumerate(instances["segments_info"]) if info["label_id"] == thing]
        self.ap.update(
            instances["segmentation"][things].numpy(),
            [thing] * len(things),
            [instances["segments_info"][i]["score"] for i in things],
            true,
            [thing] * len(true),
        )

    def compute(self) -> dict[str, float]:
        return self.mean_iou.compute() | self.f1.compute() | self.ap.compute()


@torch.no_grad()
def evaluate(
    model: MaskClsForUniversalSegmentation,
    image_processor: MaskClsImageProcessor,
    data: SegmentationFolder,
    crop: int,
    arguments: argparse.Namespace,
) -> dict[str, float]:
    scores = Scores(data.id2label, data.stuff_ids)
    for index in range(min(arguments.limit or len(data), len(data))):
        image = data[index]["image"].as_subclass(Tensor)
        instance_ids = data[index]["segmentation_map"][0].as_subclass(Tensor)
        for pixels, ids in crops_of(image, instance_ids, crop, arguments.middle):
            options = {}
            if arguments.enlarge:
                height, width = (round(length * arguments.enlarge) for length in ids.shape)
                options = {"size": {"height": height, "width": width}}
            outputs = model(**image_processor(pixels, return_tensors="pt", **options))
            semantic = image_processor.post_process_semantic_segmentation(outputs)[0]
            panoptic = image_processor.post_process_panoptic_segmentation(
                outputs, threshold=arguments.threshold, overlap_mask_area_threshold=arguments.overlap
            )[0]
            instances = image_processor.post_process_instance_segmentation(
                outputs, threshold=0.0, return_binary_maps=True
            )[0]
            scores.update(ids, semantic, panoptic, instances)
    return scores.compute()


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    arguments = parse_arguments(argv)
    try:
        data = SegmentationFolder(arguments.data, arguments.split)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"--data {arguments.data}: {error}")
    if not data.has_instances:
        sys.exit(f"--data {arguments.data}: holds class maps (labels), not instance maps (instances).")
    model = MaskClsForUniversalSegmentation.from_pretrained(arguments.model).eval()
    image_processor = MaskClsImageProcessor.from_pretrained(arguments.model)
    results = {}
    for crop in arguments.crop:
        name = f"{crop} px crops" if crop else "whole images"
        results[name] = evaluate(model, image_processor, data, crop, arguments)
        print(name)
        for score, value in results[name].items():
            print(f"  {score:<16} {value:.4f}")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
