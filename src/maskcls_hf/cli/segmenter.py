"""Images -> segments, for one of the three tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..image_processing_maskcls import MaskClsImageProcessor
from ..modeling_maskcls import MaskClsForUniversalSegmentation
from ..modeling_perpixel import PerPixelForSemanticSegmentation

Task = Literal["semantic", "panoptic", "instance"]
TASKS: tuple[Task, ...] = get_args(Task)

MODELS: dict[str, type[PreTrainedModel]] = {
    "maskcls": MaskClsForUniversalSegmentation,
    "maskformer": MaskClsForUniversalSegmentation,  # transformers' own; converted while it loads
    "maskcls_perpixel": PerPixelForSemanticSegmentation,
}


@dataclass
class SegmentedImage:
    """
    Args:
        ids: (H, W), the id of the segment at each pixel; a number that no segment has where there is none.
        segments: records `id`, `label_id`, `area`, and, but for semantic maps, `score`. An id is a class in semantic
            maps; instances are painted best on top.
        masks: (n, H, W) bool, the whole instances, in the order of `segments`.
    """

    ids: NDArray[Any]
    segments: list[dict[str, Any]]
    masks: NDArray[np.bool_] | None = None


class Segmenter:
    """A saved model and its image processor, ready for one task.

    Args:
        name: folder or name on the Hub, of this package or of transformers' MaskFormer.
        options: arguments of the processor's `post_process_<task>_segmentation`, such as `threshold`.

    Raises:
        `ValueError`: no model, another kind of model, or one that cannot do the task.
    """

    def __init__(self, name: str, task: Task, device: str | torch.device = "cpu", **options: Any):
        model_type = model_type_of(name)
        if model_type not in MODELS:
            raise ValueError(f"{name} has model_type {model_type!r}; this command runs {', '.join(MODELS)}.")
        if model_type == "maskcls_perpixel" and task != "semantic":
            raise ValueError(f"{name} classifies pixels and knows no segments: use --task semantic.")
        self.model = MODELS[model_type].from_pretrained(name, dtype=torch.float32).to(device).eval()  # type: ignore[arg-type]
        self.image_processor = MaskClsImageProcessor.from_pretrained(name)
        self.task, self.options = task, options

    @property
    def names(self) -> dict[int, str]:
        return self.model.config.id2label

    @property
    def classes_of_one_segment(self) -> Sequence[int]:
        """Classes that have one segment an image: all in semantic maps, stuff in panoptic ones."""
        if self.task == "semantic":
            return list(self.names)
        return (self.image_processor.label_ids_to_fuse or []) if self.task == "panoptic" else []

    @torch.inference_mode()
    def __call__(self, images: Sequence[Any]) -> list[SegmentedImage]:
        """Segment images of any kind that the image processor takes."""
        inputs = self.image_processor(list(images), return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs)
        if self.task == "semantic":
            maps = self.image_processor.post_process_semantic_segmentation(outputs)
            return [semantic_result(class_map.cpu().numpy()) for class_map in maps]
        if self.task == "panoptic":
            results = self.image_processor.post_process_panoptic_segmentation(outputs, **self.options)
            return [SegmentedImage(r["segmentation"].cpu().numpy(), r["segments_info"]) for r in results]
        results = self.image_processor.post_process_instance_segmentation(
            outputs, return_binary_maps=True, **self.options
        )
        return [instance_result(r["segmentation"], r["segments_info"]) for r in results]


def model_type_of(name: str) -> str:
    try:
        return PreTrainedConfig.get_config_dict(name)[0]["model_type"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name} is neither the folder of a saved model nor a model on the Hub ({error}).") from error


def semantic_result(class_map: NDArray[Any]) -> SegmentedImage:
    labels, areas = np.unique(class_map, return_counts=True)
    segments = [
        dict(id=label, label_id=label, area=area) for label, area in zip(labels.tolist(), areas.tolist(), strict=True)
    ]
    return SegmentedImage(class_map, segments)


def instance_result(masks: Tensor, segments: list[dict[str, Any]]) -> SegmentedImage:
    """Masks (n, H, W), best first; ids from 1."""
    whole = masks.cpu().numpy()
    ids = np.zeros(whole.shape[1:], dtype=np.int32)
    for index in reversed(range(len(whole))):
        ids[whole[index]] = index + 1
    return SegmentedImage(ids, [info | {"id": index} for index, info in enumerate(segments, start=1)], whole)
