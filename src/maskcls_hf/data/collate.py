"""Samples -> batch of tensors for the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .folder_dataset import Sample


class MaskClsCollator:
    """Augments samples and makes a batch of them with the image processor. Picklable, for loader workers.

    Instances of which a crop shows nothing drop out. A batch without padding has no
    `pixel_mask`, one without void pixels no `void_mask`.

    Args:
        image_processor: a `MaskClsImageProcessor`; its label format decides whether the batch has `mask_labels`
            and `class_labels`, or `labels`.
        transform: called as `transform(image, segmentation_map)`, for instance what `train_transform` makes.
        processor_kwargs: options for the call of the image processor, such as `do_resize=False` for crops that
            have their final size already.
    """

    def __init__(self, image_processor: Any, transform: Callable[..., Any] | None = None, **processor_kwargs: Any):
        self.image_processor = image_processor
        self.transform = transform
        self.processor_kwargs = processor_kwargs

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        pairs = [(sample["image"], sample["segmentation_map"]) for sample in samples]
        if self.transform is not None:
            pairs = [self.transform(*pair) for pair in pairs]
        classes_of_segments = [sample["instance_id_to_semantic_id"] for sample in samples]
        semantic = [classes is None for classes in classes_of_segments]
        if any(semantic) and not all(semantic):
            raise ValueError("A batch holds semantic maps or instance maps, not both.")
        batch = self.image_processor(
            images=[image.as_subclass(torch.Tensor) for image, _ in pairs],
            segmentation_maps=[ids[0].as_subclass(torch.Tensor) for _, ids in pairs],
            instance_id_to_semantic_id=None if all(semantic) else classes_of_segments,
            return_tensors="pt",
            **self.processor_kwargs,
        )
        batch = dict(batch)
        # Where nothing is padded or void the model need not look for it: a tenth of a step on a CPU.
        if batch["pixel_mask"].all():
            del batch["pixel_mask"]
        if "void_mask" in batch and not batch["void_mask"].any():
            del batch["void_mask"]
        return batch
