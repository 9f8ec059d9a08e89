"""Ours as a model of transformers: MaskFormer, Mask2Former or EoMT, whichever has its parts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import (
    EomtImageProcessor,
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
from . import eomt, mask2former, maskformer
from .mask2former import is_mask2former

logger = logging.get_logger(__name__)

PROCESSOR_OPTIONS = (
    "do_resize", "size", "resample", "size_divisor", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std", "do_pad", "num_labels",
)  # fmt: skip
# Of ours, what none has.
REQUIRED_VALUES = {"query_priors": False, "exclusive_masks": False}
IMAGE_PROCESSORS = {"MaskFormer": MaskFormerImageProcessor, "Mask2Former": Mask2FormerImageProcessor}


def to_transformers(
    model: PreTrainedModel,
) -> MaskFormerForInstanceSegmentation | Mask2FormerForUniversalSegmentation | PreTrainedModel:
    """Transformers' MaskFormer, Mask2Former or EoMT with the weights of `model`: same logits for images without
    padding; EoMT's for images of `backbone_config.image_size` only.

    What it cannot represent and what only matters in training or for padded batches is logged as a warning.

    Raises:
        `ValueError`: it would compute something else; the message lists every reason.
    """
    config = model.config
    family = _family_of(config)
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
    converted: PreTrainedModel = theirs.to(model.device, model.dtype)
    converted.train(model.training)
    return converted


def _family_of(config: PreTrainedConfig) -> Any:
    """The module of the model of transformers that has most of the parts of this configuration of ours."""
    if getattr(config, "architecture", None) == "encoder_only":
        return eomt
    return mask2former if is_mask2former(config) else maskformer


def obstacles(config: PreTrainedConfig) -> Iterator[str]:
    """Why a model of transformers would give other outputs than a model of this configuration."""
    if config.model_type != MaskClsConfig.model_type:
        yield f"model_type={config.model_type!r}: MaskFormer has mask classification only, no per-pixel classifier."
        return
    family = _family_of(config)
    for name, value in REQUIRED_VALUES.items():
        if getattr(config, name) != value:
            yield f"{name}={getattr(config, name)!r}: {family.NAME} has {value!r} only."
    yield from family.obstacles(config)


def processor_to_transformers(processor: MaskClsImageProcessor, processor_class: Any = MaskFormerImageProcessor) -> Any:
    """Transformers' image processor with the options of ours.

    Args:
        processor: ours.
        processor_class: `MaskFormerImageProcessor`, `Mask2FormerImageProcessor` or `EomtImageProcessor`.

    Raises:
        `ValueError`: `label_offset` is neither 0 nor 1; EoMT's would prepare other images.
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
    options = {name: getattr(processor, name) for name in PROCESSOR_OPTIONS}
    if processor_class is EomtImageProcessor:
        return EomtImageProcessor(**_options_of_eomt(processor, options))
    stretches = (processor.image_fit or processor.compatibility) in ("stretch", "transformers")
    if processor.do_resize and processor.size_divisor and not stretches:
        logger.warning(
            f"{name} resizes images to multiples of size_divisor, where ours keeps their aspect ratio and pads: maps "
            "differ slightly."
        )
    return processor_class(**options, ignore_index=processor.void_id, do_reduce_labels=processor.label_offset == 1)


def _options_of_eomt(processor: MaskClsImageProcessor, options: dict[str, Any]) -> dict[str, Any]:
    """Of `EomtImageProcessor`, which resizes and pads to a square, or cuts windows of the size of the short edge.

    Raises:
        `ValueError`: ours does something else; the message names the options.
    """
    size: Any = processor.size
    pad_size: Any = getattr(processor, "pad_size", None)
    side = size.shortest_edge
    square = pad_size is not None and {size.longest_edge, pad_size.height, pad_size.width} == {side}
    expected = {"do_resize": True, "do_autocontrast": False, "do_flip_channel_order": False}
    wrong = [
        f"{name}={getattr(processor, name)!r}" for name, value in expected.items() if getattr(processor, name) != value
    ]
    if processor.do_split_image and (size.longest_edge or not side):
        wrong.append(f"size={dict(size)} with do_split_image=True")
    if not processor.do_split_image and not (square and processor.do_pad):
        wrong.append(f"size={dict(size)}, pad_size={pad_size and dict(pad_size)} and do_pad={processor.do_pad}")
    if not processor.do_split_image and processor.pad_value != 0:
        wrong.append(f"pad_value={processor.pad_value}")
    if wrong:
        raise ValueError(
            f"EomtImageProcessor cannot represent {'; '.join(wrong)}: it resizes images to a size with shortest_edge = "
            "longest_edge and pads them to that square with pad_value=0, or cuts windows of the shortest_edge "
            "(do_split_image)."
        )
    if (processor.size_rounding or processor.compatibility) in ("nearest", "paper"):
        logger.warning("EomtImageProcessor rounds sizes down, not to the nearest: images differ by a pixel.")
    if processor.label_offset == 0 and processor.void_id is not None:
        logger.warning(f"EomtImageProcessor has no void: it reads the label {processor.void_id} as a class.")
    kept = {name: value for name, value in options.items() if name not in ("size_divisor", "num_labels")}
    return kept | {
        "size": {"shortest_edge": side, "longest_edge": size.longest_edge},
        "do_split_image": processor.do_split_image,
        "do_pad": not processor.do_split_image,
        "ignore_index": processor.void_id if processor.label_offset else None,
    }


def save_as_transformers(path: str | Path, out: str | Path) -> None:
    """Convert the checkpoint at `path`, a folder or a name on the Hub, to one at `out` of transformers' MaskFormer,
    Mask2Former or EoMT.

    Its image processor is converted too, if there is one. An EoMT is made for the size of its images.

    Raises:
        `ValueError`: as `to_transformers` and `processor_to_transformers`.
    """
    model_type = saved_config(path)["model_type"]
    if model_type != MaskClsConfig.model_type:
        raise ValueError(f"{path}: model_type={model_type!r}, expected 'maskcls'.")
    model = load_model(path)
    family = _family_of(model.config)
    processor_class = IMAGE_PROCESSORS.get(family.NAME, EomtImageProcessor)
    processor = None
    try:
        processor = load_image_processor(path)
    except OSError:
        logger.warning(f"{path} has no image processor, and so the converted model gets none.")
    converted = None if processor is None else processor_to_transformers(processor, processor_class)
    if family is eomt and converted is not None and not list(obstacles(model.config)):
        eomt.at_size(model, converted.size.shortest_edge)
    to_transformers(model).save_pretrained(out)
    if converted is not None:
        converted.save_pretrained(out)
