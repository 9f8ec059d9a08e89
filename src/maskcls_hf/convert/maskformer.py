"""Our models -> transformers' MaskFormer, where it can represent them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import (
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from ..inference.loading import load_image_processor, load_model, saved_config
from ..models.backbones import is_plain_vit
from ..models.configuration_maskcls import MaskClsConfig
from ..models.image_processing_maskcls import MaskClsImageProcessor
from ..models.interchange_maskformer import SWIN_STAGES, config_to_maskformer, has_no_counterpart, state_to_maskformer

MAX_DEEPLAB_WEIGHTS = ("pq_weight", "mask_id_weight", "instance_discrimination_weight", "semantic_weight")

logger = logging.get_logger(__name__)

PROCESSOR_OPTIONS = (
    "do_resize", "size", "resample", "size_divisor", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std", "do_pad", "num_labels",
)  # fmt: skip


def to_transformers(model: PreTrainedModel) -> MaskFormerForInstanceSegmentation:
    """transformers' MaskFormer with the weights of `model`: same logits for images without padding.

    What it cannot represent and what only matters in training or for padded batches is logged as a warning.

    Raises:
        `ValueError`: MaskFormer would compute something else; the message lists every reason.
    """
    config = model.config
    reasons = list(obstacles(config))
    if reasons:
        raise ValueError("transformers' MaskFormer cannot represent this model:\n- " + "\n- ".join(reasons))
    for change in changes(config):
        logger.warning(f"Converted to transformers' MaskFormer: {change}")
    theirs: Any = MaskFormerForInstanceSegmentation(config_to_maskformer(config))
    result = theirs.load_state_dict(state_to_maskformer(model), strict=False)
    wrong = [name for name in result.missing_keys if not has_no_counterpart(name)] + result.unexpected_keys
    if wrong:
        raise ValueError(f"transformers' MaskFormer and this model differ in the parameters {', '.join(wrong)}.")
    return theirs.to(model.device, model.dtype).train(model.training)


def processor_to_transformers(processor: MaskClsImageProcessor) -> MaskFormerImageProcessor:
    """transformers' image processor with the options of ours.

    Raises:
        `ValueError`: `label_offset` is neither 0 nor 1.
    """
    if processor.label_offset not in (0, 1):
        raise ValueError(f"label_offset={processor.label_offset}: MaskFormerImageProcessor knows 0 and 1 only.")
    if processor.label_ids_to_fuse:
        logger.warning(
            "MaskFormerImageProcessor does not keep label_ids_to_fuse: pass "
            f"label_ids_to_fuse={processor.label_ids_to_fuse} to its post_process_panoptic_segmentation."
        )
    if processor.do_resize and processor.size_divisor:
        logger.warning(
            "MaskFormerImageProcessor resizes images to multiples of size_divisor, where ours keeps their aspect "
            "ratio and pads: maps differ slightly."
        )
    options = {name: getattr(processor, name) for name in PROCESSOR_OPTIONS}
    return MaskFormerImageProcessor(
        **options, ignore_index=processor.void_id, do_reduce_labels=processor.label_offset == 1
    )


def save_as_transformers(path: str | Path, out: str | Path) -> None:
    """Convert the checkpoint at `path`, a folder or a name on the Hub, to one of transformers' MaskFormer at `out`.

    Its image processor is converted too, if there is one.

    Raises:
        `ValueError`: as `to_transformers` and `processor_to_transformers`.
    """
    model_type = saved_config(path)["model_type"]
    if model_type != MaskClsConfig.model_type:
        raise ValueError(f"{path}: model_type={model_type!r}, expected 'maskcls'.")
    to_transformers(load_model(path)).save_pretrained(out)
    try:
        processor = load_image_processor(path)
    except OSError:
        logger.warning(f"{path} has no image processor, and so the converted model gets none.")
    else:
        processor_to_transformers(processor).save_pretrained(out)


def obstacles(config: PreTrainedConfig) -> Iterator[str]:
    """Why MaskFormer would give other outputs than a model of this configuration."""
    if config.model_type != "maskcls":
        yield f"model_type={config.model_type!r}: MaskFormer has mask classification only, no per-pixel classifier."
        return
    if config.pixel_decoder != "fpn":
        yield f"pixel_decoder={config.pixel_decoder!r}: MaskFormer has 'fpn' only."
    if config.transformer_decoder != "standard":
        yield f"transformer_decoder={config.transformer_decoder!r}: MaskFormer has 'standard' only."
    if config.query_priors:
        yield "query_priors=True: MaskFormer's queries have none."
    if config.mask_kernel_size != 3:
        yield f"mask_kernel_size={config.mask_kernel_size}: MaskFormer has 3 only."
    if config.fpn_feature_size % 32:
        yield f"fpn_feature_size={config.fpn_feature_size}: MaskFormer's group norms need a multiple of 32."
    if config.exclusive_masks:
        yield "exclusive_masks=True: MaskFormer's masks do not exclude each other."
    backbone = config.backbone_config
    if is_plain_vit(backbone):
        yield f"backbone_config.model_type={backbone.model_type!r}: MaskFormer has no feature pyramid for plain ViTs."
    stem_type = getattr(backbone, "stem_type", "basic")
    if stem_type != "basic":
        yield f"backbone_config.stem_type={stem_type!r}: transformers' ResNet has 'basic' only."
    if getattr(backbone, "last_stage_dilations", None):
        yield "backbone_config.last_stage_dilations: transformers' ResNet has none."
    if backbone.model_type == "swin" and list(backbone.out_features) != SWIN_STAGES:
        yield f"backbone_config.out_features={backbone.out_features}: MaskFormer uses all four stages of Swin."


def changes(config: PreTrainedConfig) -> Iterator[str]:
    """What is lost without effect on the outputs of images that are not padded."""
    if not config.attend_to_padding:
        yield (
            "it ignores pixel_mask: an image padded in a batch gives other outputs than alone, and Swin's windows "
            "attend to the zeros that fill them up."
        )
    if config.deep_supervision:
        yield "use_auxiliary_loss=False (here deep_supervision=True), because its forward fails with True."
    if config.matching != "bipartite":
        yield f"it trains with bipartite matching (here matching={config.matching!r})."
    if config.matching == "box":
        yield "it has no box head: pred_boxes is lost."
    lost = [name for name in MAX_DEEPLAB_WEIGHTS if getattr(config, name)]
    if lost:
        yield f"it trains without the losses of {', '.join(lost)}."
    if config.freeze_batch_norm:
        yield "training changes its batch norms (here freeze_batch_norm=True)."
