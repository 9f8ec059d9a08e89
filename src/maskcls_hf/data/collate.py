"""Samples -> batch of tensors for the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .errors import naming_image
from .sample import Sample, Segments


class MaskClsCollator:
    """Makes a batch of samples with the image processor. Picklable, for loader workers.

    Crowd regions become void. Segments of which a crop shows nothing drop out. A batch without padding has no
    `pixel_mask`, one without void pixels no `void_mask`. Classes of samples start at 0, whatever `label_offset` the
    image processor has for files.

    Args:
        image_processor: a `MaskClsImageProcessor`; its label format decides whether the batch has `mask_labels`
            and `class_labels`, or `labels`.
        keep_ground_truth: the batch also has `ground_truth`, a list of `Segments` of the size that the
            samples have, for scores at the original size.
        processor_kwargs: options for the call of the image processor, such as `do_resize=False` for crops that
            have their final size already.

    Raises:
        ValueError: (on call) the image processor's void id is a class of the samples; what the image processor finds
            wrong. The message names the images.

    Examples:
        >>> import torch
        >>> from maskcls_hf import MaskClsImageProcessor
        >>> from maskcls_hf.data.sample import as_sample
        >>> segments = Segments.from_class_map(torch.tensor([[0, 1], [1, 1]]))
        >>> sample = as_sample(torch.zeros(3, 2, 2, dtype=torch.uint8), segments, "tiny")
        >>> collate = MaskClsCollator(MaskClsImageProcessor(num_labels=2), do_resize=False)
        >>> batch = collate([sample])
        >>> batch["class_labels"]
        [tensor([0, 1])]
    """

    def __init__(self, image_processor: Any, *, keep_ground_truth: bool = False, **processor_kwargs: Any):
        self.image_processor = image_processor
        self.keep_ground_truth = keep_ground_truth
        self.processor_kwargs = {"label_offset": 0, "input_data_format": "channels_first", **processor_kwargs}

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The batch of some samples.

        Args:
            samples: B of them, of any sizes.

        Returns:
            `pixel_values` (B, 3, H, W); `pixel_mask` (B, H, W); of each image `mask_labels` (M, H, W) and
            `class_labels` (M,), and `void_mask` (B, H, W), or `labels` (B, H, W); `ground_truth`. Which of them: see
            above.
        """
        for sample in samples:
            _check_sample(sample)
        names = ", ".join(sample["segments"].name for sample in samples)
        with naming_image(names):
            return self._batch(samples, names)

    def _batch(self, samples: Sequence[Sample], names: str) -> dict[str, Any]:
        segments = [sample["segments"] for sample in samples]
        void_id = self.processor_kwargs.get("void_id", self.image_processor.void_id)
        if any(bool((of_image.class_labels == void_id).any()) for of_image in segments if void_id is not None):
            raise ValueError(
                f"void_id={void_id} of the image processor is a class of the data set: make the image processor with "
                "MaskClsImageProcessor(**dataset.processor_fields())."
            )
        try:
            batch = dict(
                self.image_processor(
                    images=[sample["image"].as_subclass(Tensor) for sample in samples],
                    segmentation_maps=segments,
                    return_tensors="pt",
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
            batch["ground_truth"] = segments
        return batch


def _check_sample(sample: Any) -> None:
    """Raise `ValueError` for what no reader of this package gives."""
    is_dict = isinstance(sample, Mapping)
    if not (is_dict and "image" in sample and isinstance(sample.get("segments"), Segments)):
        got = f"a dict with {', '.join(map(str, sample))}" if is_dict else type(sample).__name__
        raise ValueError(
            f"A sample is a dict with image and segments, an instance of Segments, got {got}. Rows of a table become "
            "samples by maskcls_hf.data.SegmentationTable or SegmentationStream."
        )
