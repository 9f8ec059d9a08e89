"""Samples -> batch of tensors for the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import naming_image
from .sample import VOID, Sample, void_value


class MaskClsCollator:
    """Makes a batch of samples with the image processor. Picklable, for loader workers.

    Crowd regions become void. Segments of which a crop shows nothing drop out. A batch without padding has no
    `pixel_mask`, one without void pixels no `void_mask`. Classes of samples start at 0, whatever `label_offset` the
    image processor has for files.

    Args:
        image_processor: a `MaskClsImageProcessor`; its label format decides whether the batch has `mask_labels`
            and `class_labels`, or `labels`.
        keep_ground_truth: the batch also has `ground_truth`, a list of `metrics.GroundTruth` of the size that the
            samples have, for scores at the original size.
        processor_kwargs: options for the call of the image processor, such as `do_resize=False` for crops that
            have their final size already.

    Raises:
        ValueError: (on call) samples with and without instances in one batch; the image processor's void id is a
            class of the samples; what the image processor finds wrong. The message names the images.
    """

    def __init__(self, image_processor: Any, *, keep_ground_truth: bool = False, **processor_kwargs: Any):
        self.image_processor = image_processor
        self.keep_ground_truth = keep_ground_truth
        self.processor_kwargs = {"label_offset": 0, "input_data_format": "channels_first", **processor_kwargs}

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        for sample in samples:
            check_sample(sample)
        names = ", ".join(sample["name"] for sample in samples)
        with naming_image(names):
            return self._batch(samples, names)

    def _batch(self, samples: Sequence[Sample], names: str) -> dict[str, Any]:
        semantic = [sample["instance_id_to_semantic_id"] is None for sample in samples]
        if any(semantic) and not all(semantic):
            raise ValueError(f"A batch holds semantic maps or instance maps, not both: images {names}.")
        try:
            batch = dict(
                self.image_processor(
                    images=[sample["image"].as_subclass(Tensor) for sample in samples],
                    return_tensors="pt",
                    **self._annotations(samples),
                    **self.processor_kwargs,
                )
            )
        except ValueError as error:
            raise ValueError(f"{error} (image 0, 1, ... of this batch: {names})") from error
        # Where nothing is padded or void the model need not look for it: a tenth of a step on a CPU.
        if batch["pixel_mask"].all():
            del batch["pixel_mask"]
        if "void_mask" in batch and not batch["void_mask"].any():
            del batch["void_mask"]
        if self.keep_ground_truth:
            batch["ground_truth"] = [_ground_truth(sample) for sample in samples]
        return batch

    def _annotations(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The image processor's arguments for the targets of the samples."""
        void_id = self.processor_kwargs.get("void_id", self.image_processor.void_id)
        pixels = [sample["segmentation_map"].as_subclass(Tensor) for sample in samples]
        if samples[0]["instance_id_to_semantic_id"] is None:
            if void_id is None:
                void_id = void_value(pixels[0])
            return {"segmentation_maps": [_with_void_id(p[0], void_id) for p in pixels], "void_id": void_id}
        classes = [_classes_without_crowd(sample) for sample in samples]
        if any(void_id in named.values() for named in classes):
            raise ValueError(_VOID_IS_CLASS.format(void_id))
        if any(p.dtype == torch.bool for p in pixels):
            stacks = [_as_stack(p, named) for p, named in zip(pixels, classes, strict=True)]
            return {"segmentation_maps": [s for s, _ in stacks], "class_labels": [labels for _, labels in stacks]}
        return {"segmentation_maps": [p[0] for p in pixels], "instance_id_to_semantic_id": classes}


NEEDED = ("image", "segmentation_map", "instance_id_to_semantic_id", "crowd_ids", "name")


def check_sample(sample: Any) -> None:
    """Raise `ValueError` for what no reader of this package gives."""
    if not isinstance(sample, Mapping) or any(name not in sample for name in NEEDED):
        got = f"a dict with {', '.join(map(str, sample))}" if isinstance(sample, Mapping) else type(sample).__name__
        raise ValueError(
            f"A sample is a dict with {', '.join(NEEDED)}, got {got}. Rows of a table become samples by "
            "maskcls_hf.data.SegmentationTable or SegmentationStream."
        )


_VOID_IS_CLASS = (
    "void_id={} of the image processor is a class of the data set: make the image processor with "
    "MaskClsImageProcessor(**dataset.processor_fields())."
)


def _with_void_id(class_map: Tensor, void_id: int) -> Tensor:
    """The map with this value where it is void."""
    own = void_value(class_map)
    if own == void_id:
        return class_map
    class_map = class_map.int()
    if bool((class_map == void_id).any()):
        raise ValueError(_VOID_IS_CLASS.format(void_id))
    return class_map.masked_fill(class_map == own, void_id)


def _classes_without_crowd(sample: Sample) -> dict[int, int | None]:
    """Classes of the ids, `VOID` (below every class, so void for the image processor) for crowds."""
    classes = sample["instance_id_to_semantic_id"]
    assert classes is not None
    return {**classes, **dict.fromkeys(sample["crowd_ids"], VOID)}


def _as_stack(pixels: Tensor, classes: dict[int, int | None]) -> tuple[Tensor, Tensor]:
    """A map of ids (1, H, W) or a stack (M, H, W) -> the stack of what has a class or is void, and its labels."""
    there = set(classes) if pixels.dtype == torch.bool else set(pixels.unique().tolist())
    kept = [segment for segment, label in classes.items() if label is not None and segment in there]
    labels = torch.tensor([classes[segment] for segment in kept], dtype=torch.int64, device="cpu")
    if pixels.dtype == torch.bool:
        return pixels[kept], labels
    return pixels == torch.tensor(kept, dtype=pixels.dtype, device=pixels.device).view(-1, 1, 1), labels


def _ground_truth(sample: Sample) -> Any:
    from ..metrics.ground_truth import GroundTruth  # metrics imports data

    pixels = sample["segmentation_map"].as_subclass(Tensor)
    return GroundTruth.from_sample(sample, void_value(pixels))
