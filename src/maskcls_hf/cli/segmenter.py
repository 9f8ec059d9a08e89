"""Images -> segments, for one of the three tasks, as the files of `maskcls segment` need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray

from ..inference.loading import class_of_saved
from ..inference.predictor import Predictor, Task
from ..models.mask_runs import MaskRuns
from ..models.modeling_maskcls import PerPixelForSemanticSegmentation


@dataclass
class SegmentedImage:
    """
    Args:
        ids: (H, W), the id of the segment at each pixel; a number that no segment has where there is none.
        segments: records `id`, `label_id`, `area`, and, but for semantic maps, `score`. An id is a class in semantic
            maps; instances are painted best on top.
        masks: the whole instances, in the order of `segments`.
    """

    ids: NDArray[Any]
    segments: list[dict[str, Any]]
    masks: list[MaskRuns] = field(default_factory=list)


class Segmenter:
    """A saved model and its image processor, ready for one task.

    Args:
        name: folder or name on the Hub, of this package or of transformers' MaskFormer.
        options: arguments of the processor's `post_process_<task>_segmentation`, such as `threshold`.
        inference: arguments of `Predictor`, such as `tile`.

    Raises:
        ValueError: no model, another kind of model, or one that cannot do the task.
    """

    def __init__(
        self, name: str, task: Task, device: str | torch.device = "cpu", *, options: dict[str, Any], **inference: Any
    ):
        if task != "semantic" and class_of_saved(name) is PerPixelForSemanticSegmentation:
            raise ValueError(f"{name} classifies pixels and knows no segments: use --task semantic.")
        self.predictor = Predictor.from_pretrained(name, device, **inference)
        self.predictor.check({task: options})
        self.task, self.options = task, options

    @property
    def names(self) -> dict[int, str]:
        return self.predictor.id2label

    @property
    def classes_of_one_segment(self) -> Sequence[int]:
        """Classes that have one segment an image: all in semantic maps, stuff in panoptic ones."""
        if self.task == "semantic":
            return list(self.names)
        return (self.predictor.image_processor.label_ids_to_fuse or []) if self.task == "panoptic" else []

    def __call__(self, images: Sequence[Any]) -> list[SegmentedImage]:
        """Segment images of any kind that the image processor takes; arrays and tensors are (C, H, W)."""
        tasks = {self.task: self.options}
        found = self.predictor.predict(list(images), tasks, input_data_format="channels_first")
        results = [of_image[self.task] for of_image in found]
        return [
            SegmentedImage(result["segmentation"].numpy(), result["segments_info"], result.get("masks", []))
            for result in results
        ]
