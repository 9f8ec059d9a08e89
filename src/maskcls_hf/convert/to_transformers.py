"""Ours as a model of transformers: MaskFormer or Mask2Former, whichever has its parts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import (
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from ..inference.loading import load_image_processor, load_model, saved_config
from ..models.configuration_maskcls import MaskClsConfig
from ..models.image_processing_maskcls import MaskClsImageProcessor
from . import mask2former, maskformer
from .mask2former import is_mask2former

logger = logging.get_logger(__name__)

PROCESSOR_OPTIONS = (
    "do_resize", "size", "resample", "size_divisor", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std", "do_pad", "num_labels",
)  # fmt: skip
# Of ours, what neither has.
REQUIRED_VALUES = {"architecture": "encoder_decoder", "query_priors": False, "exclusive_masks": False}


def to_transformers(
    model: PreTrainedModel,
) -> MaskFormerForInstanceSegmentation | Mask2FormerForUniversalSegmentation:
    """transformers' MaskFormer or Mask2Former with the weights of `model`: same logits for images without padding.

    What it cannot represent and what only matters in training or for padded batches is logged as a warning.

    Raises:
        `ValueError`: it would compute something else; the message lists every reason.
    """
    config = model.config
    family: Any = mask2former if is_mask2former(config) else maskformer
    reasons = list(obstacles(config))
    if reasons:
        raise ValueError(f"transformers' {family.NAME} cannot represent this model:\n- " + "\n- ".join(reasons))
    for change in family.changes(config):
        logger.warning(f"Converted to transformers' {family.NAME}: {change}")
    theirs: Any = family.model_of_config(config)
    result = theirs.load_state_dict(family.state_to_theirs(model), strict=False)
    wrong = [name for name in result.missing_keys if not family.has_no_counterpart(name)] + result.unexpected_keys
    if wrong:
        raise ValueError(f"transformers' {family.NAME} and this model differ in the parameters {', '.join(wrong)}.")
    return theirs.to(model.device, model.dtype).train(model.training)


def obstacles(config: PreTrainedConfig) -> Iterator[str]:
    """Why a model of transformers would give other outputs than a model of this configuration."""
    if config.model_type != MaskClsConfig.model_type:
        yield f"model_type={config.model_type!r}: MaskFormer has mask classification only, no per-pixel classifier."
        return
    family: Any = mask2former if is_mask2former(config) else maskformer
    for name, value in REQUIRED_VALUES.items():
        if getattr(config, name) != value:
            yield f"{name}={getattr(config, name)!r}: {family.NAME} has {value!r} only."
    yield from family.obstacles(config)


def processor_to_transformers(
    processor: MaskClsImageProcessor, processor_class: Any = MaskFormerImageProcessor
) -> MaskFormerImageProcessor | Mask2FormerImageProcessor:
    """transformers' image processor with the options of ours.

    Args:
        processor_class: `MaskFormerImageProcessor` or `Mask2FormerImageProcessor`.

    Raises:
        `ValueError`: `label_offset` is neither 0 nor 1.
    """
    name = processor_class.__name__
    if processor.label_offset not in (0, 1):
        raise ValueError(f"label_offset={processor.label_offset}: {name} knows 0 and 1 only.")
    if processor.label_ids_to_fuse:
        logger.warning(
            f"{name} does not keep label_ids_to_fuse: pass label_ids_to_fuse={processor.label_ids_to_fuse} to its "
            "post_process_panoptic_segmentation."
        )
    if processor.inference_defaults:
        logger.warning(
            f"{name} does not keep inference_defaults: give these options where you use it: "
            f"{processor.inference_defaults}."
        )
    stretches = (processor.image_fit or processor.compatibility) in ("stretch", "transformers")
    if processor.do_resize and processor.size_divisor and not stretches:
        logger.warning(
            f"{name} resizes images to multiples of size_divisor, where ours keeps their aspect ratio and pads: maps "
            "differ slightly."
        )
    options = {name: getattr(processor, name) for name in PROCESSOR_OPTIONS}
    return processor_class(**options, ignore_index=processor.void_id, do_reduce_labels=processor.label_offset == 1)


def save_as_transformers(path: str | Path, out: str | Path) -> None:
    """Convert the checkpoint at `path`, a folder or a name on the Hub, to one at `out` of transformers' MaskFormer or
    Mask2Former.

    Its image processor is converted too, if there is one.

    Raises:
        `ValueError`: as `to_transformers` and `processor_to_transformers`.
    """
    model_type = saved_config(path)["model_type"]
    if model_type != MaskClsConfig.model_type:
        raise ValueError(f"{path}: model_type={model_type!r}, expected 'maskcls'.")
    theirs = to_transformers(load_model(path))
    theirs.save_pretrained(out)
    try:
        processor = load_image_processor(path)
    except OSError:
        logger.warning(f"{path} has no image processor, and so the converted model gets none.")
    else:
        is_newer = isinstance(theirs, Mask2FormerForUniversalSegmentation)
        processor_class = Mask2FormerImageProcessor if is_newer else MaskFormerImageProcessor
        processor_to_transformers(processor, processor_class).save_pretrained(out)
