"""Models of transformers as they are: OneFormer, and whatever predicts probability-mask pairs.

So it does if it returns `class_queries_logits` and `masks_queries_logits`. Their own processor makes the input; the
maps are ours.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING, BatchFeature

from ..models.image_processing_maskcls import MaskClsImageProcessor
from ..models.inference_defaults import WITHOUT_DEFAULTS, checked_inference_defaults
from ..models.modeling_maskcls import MaskClsForUniversalSegmentationOutput, image_sizes
from ..models.post_processing import OutputMapsMixin

_PAIRS = ("class_queries_logits", "masks_queries_logits")
NOT_RUN = {
    "detr": "maskcls_hf.convert.pairs_from_detr makes probability-mask pairs of what it predicts",
    "videomt": "it segments videos, not images",
}


def universal_class(model_type: str) -> Any:
    """Class of transformers for the saved models of a type that predict pairs; None: they don't."""
    if model_type in NOT_RUN or model_type not in CONFIG_MAPPING:
        return None
    return MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING.get(CONFIG_MAPPING[model_type], None)


class UniversalProcessor(OutputMapsMixin):
    """A processor of transformers in the place of a `MaskClsImageProcessor`.

    It makes the input, and maps are made as ours makes them.

    Args:
        theirs: an image processor, or a processor with one. One that takes tasks (OneFormer's) is told the task.

    Raises:
        ValueError: it takes tasks but has no tokenizer for them, or nothing says which classes are things; or it cuts
            images into windows.
    """

    do_convert_rgb = True
    input_data_format = device = num_labels = None

    def __init__(self, theirs: Any):
        images = getattr(theirs, "image_processor", theirs)
        self.theirs, self.images = theirs, images
        self.size, self.do_resize = images.size, images.do_resize
        reader = MaskClsImageProcessor()
        self.fetch_images, self.process_image = reader.fetch_images, reader.process_image
        self.inference_defaults = checked_inference_defaults(
            getattr(images, "inference_defaults", None) or WITHOUT_DEFAULTS
        )
        self.label_ids_to_fuse: list[int] | None = getattr(images, "label_ids_to_fuse", None)
        self.takes_task = "task_inputs" in images.model_input_names
        if self.takes_task:
            self._read_metadata()
        if getattr(images, "do_split_image", False):
            raise ValueError(
                f"{type(images).__name__} cuts images into windows (do_split_image=True): set do_split_image=False and "
                "do_pad=True, and cut large images by tile=; or load model and image processor from their folder, by "
                "Predictor.from_pretrained."
            )

    def _read_metadata(self) -> None:
        kind = type(self.images).__name__
        if self.theirs is self.images:
            raise ValueError(f"{kind} alone makes no task inputs: give the processor with its tokenizer too.")
        metadata = getattr(self.images, "metadata", None)
        if not metadata:
            raise ValueError(
                f"{kind} has no class metadata, so that nothing says which classes are things: make it with "
                'class_info_file, a JSON file {"0": {"name": "car", "isthing": 1}, ...}, and repo_path, its folder.'
            )
        self.num_labels = len(metadata["class_names"])
        self.label_ids_to_fuse = sorted({*range(self.num_labels)} - {*metadata["thing_ids"]})

    def __call__(
        self, images: Sequence[Tensor], task: str | None = None, return_tensors: str = "pt", **options: Any
    ) -> BatchFeature:
        """What the processor gives for images, and `pixel_mask` and `original_sizes`.

        Args:
            images: (3, H, W) each, on the 0..255 scale.
            task: that a processor with tasks is told; None: panoptic.
            return_tensors: not looked at: "pt".
            options: of the processor.

        Raises:
            ValueError: the processor does not resize to the given `size`.
        """
        of_task = {"task_inputs": [task or "panoptic"] * len(images)} if self.takes_task else {}
        inputs = self._processed(self.theirs, images, options | of_task)
        if "pixel_mask" not in inputs:  # where white images lie in what comes out
            white = [torch.full_like(image, 255) for image in images]
            plain = dict(do_normalize=False, do_rescale=False)
            inputs["pixel_mask"] = (
                (self._processed(self.images, white, options | plain)["pixel_values"] != 0).any(1).long()
            )
        inputs["original_sizes"] = torch.tensor([image.shape[-2:] for image in images])
        return inputs

    def _processed(self, processor: Any, images: Sequence[Tensor], options: dict[str, Any]) -> BatchFeature:
        try:
            inputs: BatchFeature = processor(images=list(images), return_tensors="pt", **options)
        except (KeyError, TypeError) as error:
            if "size" not in options:
                raise
            raise ValueError(f"{type(self.images).__name__} does not resize to {options['size']}: {error}") from error
        return inputs

    def to_dict(self) -> dict[str, Any]:
        """Fields of their image processor, with our `inference_defaults`."""
        return {**self.images.to_dict(), "inference_defaults": self.inference_defaults}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Theirs, with our `inference_defaults` among its options."""
        self.images.inference_defaults = self.inference_defaults
        self.theirs.save_pretrained(folder)


def as_processor(theirs: Any, model: Any) -> Any:
    """An image processor of ours as it is, another one as [`UniversalProcessor`].

    Args:
        theirs: a processor; None stays None.
        model: that it is for.

    Raises:
        ValueError: model and processor cannot run as they are; says what to do.
    """
    processor = theirs if theirs is None or hasattr(theirs, "task_options") else UniversalProcessor(theirs)
    takes_task = "task_inputs" in _inputs_of(model)
    kind = type(model).__name__
    if takes_task and not getattr(processor, "takes_task", False):
        raise ValueError(f"{kind} is told the task: give it its own processor, which makes task inputs.")
    if takes_task and model.config.is_training:
        raise ValueError(f"{kind} with is_training=True takes texts too: load it with is_training=False.")
    return processor


def _inputs_of(model: Any) -> Collection[str]:
    """Names of what its `forward` takes."""
    forward = getattr(model, "forward", None)
    return () if forward is None else inspect.signature(forward).parameters


def pairs_of(network: Any, model: Any, inputs: BatchFeature) -> Any:
    """Outputs of a network, in which the sizes of the images are, whoever wrote it.

    Args:
        network: `model`, or what predicts in its place.
        model: of this package, or of transformers.
        inputs: of the image processor.

    Raises:
        ValueError: images of another size than a network of one size takes, or outputs that are no pairs.
    """
    taken = _inputs_of(model)
    if "original_sizes" in taken:
        return network(**inputs)
    size, fixed = tuple(inputs["pixel_values"].shape[-2:]), getattr(model.config, "image_size", None)
    kind = type(model).__name__
    if fixed is not None and size != (fixed, fixed):
        raise ValueError(f"{kind} takes images of {fixed} x {fixed}, its image processor gives {size[0]} x {size[1]}.")
    outputs = network(**{name: value for name, value in inputs.items() if name in taken})
    pairs = {name: getattr(outputs, name, None) for name in _PAIRS}
    if any(logits is None for logits in pairs.values()):
        raise ValueError(f"{kind} predicts no probability-mask pairs: its outputs have no {' and '.join(_PAIRS)}.")
    sizes = image_sizes(inputs["pixel_values"], inputs.get("pixel_mask"))
    return MaskClsForUniversalSegmentationOutput(**pairs, **sizes, original_sizes=inputs.get("original_sizes"))
