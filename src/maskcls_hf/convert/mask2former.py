"""transformers' Mask2Former: its checkpoints load as ours, and ours become theirs where it can represent them.

The two networks compute the same, under other names; their `decoder_layers` counts the prediction before the first
layer too.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, PreTrainedConfig, PreTrainedModel

from ..models.backbones import is_plain_vit
from .maskformer import OWN_HEADS, read_theirs, rename, training_changes

NAME = "Mask2Former"

# Fields of our configuration -> fields of theirs, and of EoMT's.
LOSS_FIELDS = {
    "num_queries": "num_queries",
    "cross_entropy_weight": "class_weight",
    "mask_weight": "mask_weight",
    "dice_weight": "dice_weight",
    "no_object_weight": "no_object_weight",
    "loss_points": "train_num_points",
    "loss_oversampling": "oversample_ratio",
    "loss_importance": "importance_sample_ratio",
    "id2label": "id2label",
    "label2id": "label2id",
    "dtype": "dtype",
}
CONFIG_FIELDS = LOSS_FIELDS | {
    "fpn_feature_size": "feature_size",
    "mask_feature_size": "mask_feature_size",
    "hidden_size": "hidden_dim",
    "encoder_layers": "encoder_layers",
    "encoder_ffn_dim": "encoder_feedforward_dim",
    "decoder_ffn_dim": "dim_feedforward",
    "num_attention_heads": "num_attention_heads",
    "dropout": "dropout",
    "deep_supervision": "use_auxiliary_loss",
    "init_xavier_std": "init_xavier_std",
    "output_auxiliary_logits": "output_auxiliary_logits",
}
# What makes a network of ours theirs.
PARTS = {
    "pixel_decoder": "deformable",
    "transformer_decoder": "masked_attention",
    "mask_loss": "cross_entropy",
    "mask_kernel_size": 1,
}
# What computes something else than we do, unless it has this value.
REQUIRED_VALUES = {
    "activation_function": "relu",
    "pre_norm": False,
    "common_stride": 4,
    "feature_strides": [4, 8, 16, 32],
}
PIXEL_DECODER, OUR_PIXEL_DECODER = "model.pixel_level_module.decoder", "model.pixel_decoder"
DECODER, OUR_DECODER = "model.transformer_module", "model.transformer_decoder"


def is_mask2former(config: PreTrainedConfig) -> bool:
    """Whether a configuration of ours has the decoders of Mask2Former."""
    return (config.pixel_decoder, config.transformer_decoder) == ("deformable", "masked_attention")


def config_from_mask2former(config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `MaskClsConfig` for the configuration of transformers' Mask2Former.

    `compatibility` turns `attend_to_padding` on, because their network never looks at pixel_mask.

    Raises:
        `ValueError`: a field has a value that our network has no counterpart for.
    """
    theirs: Any = Mask2FormerConfig.from_dict(dict(config_dict))  # fills in what the file leaves out
    backbone = theirs.backbone_config
    for field, required in REQUIRED_VALUES.items():
        value = getattr(theirs, field)
        if (list(value) if isinstance(value, (list, tuple)) else value) != required:
            raise ValueError(f"Mask2FormerConfig: {field}={value!r} has no counterpart here; supported: {required!r}.")
    if theirs.enforce_input_projection and theirs.feature_size == theirs.hidden_dim:
        raise ValueError("Mask2FormerConfig: enforce_input_projection=True has no counterpart here.")
    if theirs.decoder_layers < 2:
        raise ValueError(f"Mask2FormerConfig: decoder_layers={theirs.decoder_layers} leaves no layer, from 2 it does.")
    fields = {ours: getattr(theirs, name) for ours, name in CONFIG_FIELDS.items()} | PARTS
    fields["decoder_layers"] = theirs.decoder_layers - 1
    fields["output_auxiliary_logits"] = bool(theirs.output_auxiliary_logits)
    return fields | {"compatibility": "transformers", "backbone_config": backbone.to_dict()}


def config_to_mask2former(config: PreTrainedConfig) -> Mask2FormerConfig:
    """The configuration of transformers' Mask2Former for a `MaskClsConfig`, as far as it has the fields."""
    fields = {theirs: getattr(config, ours) for ours, theirs in CONFIG_FIELDS.items()}
    fields["decoder_layers"] = config.decoder_layers + 1
    if fields["train_num_points"] is None:
        del fields["train_num_points"]
    return Mask2FormerConfig(**fields, backbone_config=config.backbone_config.to_dict())


def model_of_config(config: PreTrainedConfig) -> Mask2FormerForUniversalSegmentation:
    """The Mask2Former of transformers for a `MaskClsConfig`, without weights."""
    return Mask2FormerForUniversalSegmentation(config_to_mask2former(config))


def has_no_counterpart(name: str) -> bool:
    """Whether it is a constant of theirs, or the last norm of Swin, whose output nothing looks at."""
    return name.startswith("criterion.") or ".encoder.swin.layernorm." in name


def obstacles(config: PreTrainedConfig) -> Iterator[str]:
    """Why Mask2Former would give other outputs than a model of this configuration."""
    if config.mask_kernel_size != 1:
        yield f"mask_kernel_size={config.mask_kernel_size}: Mask2Former has 1 only."
    if config.fpn_feature_size % 32:
        yield f"fpn_feature_size={config.fpn_feature_size}: Mask2Former's group norms need a multiple of 32."
    for name in ("pixel_decoder_options", "transformer_decoder_options"):
        if getattr(config, name):
            yield f"{name}={getattr(config, name)}: Mask2Former has the defaults only."
    backbone = config.backbone_config
    if is_plain_vit(backbone):
        yield f"backbone_config.model_type={backbone.model_type!r}: Mask2Former has no feature pyramid for plain ViTs."


def changes(config: PreTrainedConfig) -> Iterator[str]:
    """What is lost without effect on the outputs of images that are not padded."""
    if not config.attend_to_padding:
        yield "it ignores pixel_mask: an image padded in a batch gives other outputs than alone."
    yield from point_loss_changes(config)
    if config.freeze_batch_norm:
        yield "training changes its batch norms (here freeze_batch_norm=True)."


def point_loss_changes(config: PreTrainedConfig) -> Iterator[str]:
    """What Mask2Former, and EoMT, has not of the losses of ours."""
    if config.loss_points is None:
        yield "it compares masks at 12544 points (here loss_points=None, all pixels)."
    if config.mask_loss != "cross_entropy":
        yield f"it trains masks with cross-entropy (here mask_loss={config.mask_loss!r})."
    yield from training_changes(config)


def mask2former_modules(encoder_layers: int, decoder_layers: int) -> dict[str, str]:
    """Prefixes of parameter names: ours -> theirs, for `rename`. `decoder_layers` are counted as ours."""
    modules = {
        "model.backbone": "model.pixel_level_module.encoder",
        OUR_PIXEL_DECODER: PIXEL_DECODER,
        f"{OUR_PIXEL_DECODER}.layers": f"{PIXEL_DECODER}.encoder.layers",
        OUR_DECODER: DECODER,
        f"{OUR_DECODER}.level_embedding": f"{DECODER}.level_embed",
        f"{OUR_DECODER}.layers": f"{DECODER}.decoder.layers",
        f"{OUR_DECODER}.norm": f"{DECODER}.decoder.layernorm",
        "segmentation_module.class_predictor": "class_predictor",
    }
    for layer in range(3):
        theirs = f"{DECODER}.decoder.mask_predictor.mask_embedder.{layer}.0"
        modules[f"segmentation_module.mask_embedder.layers.{layer}"] = theirs
        for name, index in (("conv", 0), ("norm", 1)):
            projection = f"input_projections.{layer}"
            modules[f"{OUR_PIXEL_DECODER}.{projection}.{name}"] = f"{PIXEL_DECODER}.{projection}.{index}"
    for name, index in (("conv", 0), ("norm", 1)):
        modules[f"{OUR_PIXEL_DECODER}.laterals.0.{name}"] = f"{PIXEL_DECODER}.adapter_1.{index}"
        modules[f"{OUR_PIXEL_DECODER}.outputs.0.{name}"] = f"{PIXEL_DECODER}.layer_1.{index}"
    for ours, theirs, layers in (
        (f"{OUR_PIXEL_DECODER}.layers", f"{PIXEL_DECODER}.encoder.layers", encoder_layers),
        (f"{OUR_DECODER}.layers", f"{DECODER}.decoder.layers", decoder_layers),
    ):
        for layer in range(layers):
            modules |= {f"{ours}.{layer}.mlp.{name}": f"{theirs}.{layer}.{name}" for name in ("fc1", "fc2")}
    for layer in range(decoder_layers):
        for attention in ("self_attn", "cross_attn"):
            ours, theirs = f"{OUR_DECODER}.layers.{layer}", f"{DECODER}.decoder.layers.{layer}"
            modules[f"{ours}.{attention}.o_proj"] = f"{theirs}.{attention}.out_proj"
    return modules


def _state_from_mask2former(model: PreTrainedModel, leave_out: Collection[str] = ()) -> dict[str, Tensor]:
    """Parameters of transformers' Mask2Former by our names, without those it calls `leave_out`."""
    config: Any = model.config
    modules = mask2former_modules(config.encoder_layers, config.decoder_layers - 1)
    ours = {theirs: name for name, theirs in modules.items()}
    state = {}
    for name, value in model.state_dict().items():
        if name in leave_out or has_no_counterpart(name):
            continue
        if name == f"{PIXEL_DECODER}.level_embed":
            state[f"{OUR_PIXEL_DECODER}.level_embedding.weight"] = value
        elif "_attn.in_proj_" in name:  # torch's attention has the three as one
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                state[rename(name.replace("in_proj_", f"{part}_proj."), ours)] = rows
        else:
            state[rename(name, ours)] = value
    return state


def state_to_theirs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters of a `MaskClsForUniversalSegmentation` by the names of transformers' Mask2Former, without those of
    heads that it lacks.
    """
    modules = mask2former_modules(model.config.encoder_layers, model.config.decoder_layers)
    state, parts = {}, {}
    for name, value in model.state_dict().items():
        if name.startswith(OWN_HEADS):
            continue
        if name == f"{OUR_PIXEL_DECODER}.level_embedding.weight":
            state[f"{PIXEL_DECODER}.level_embed"] = value
        elif name.startswith(OUR_DECODER) and ".cross_attn." in name and ".o_proj." not in name:
            parts[rename(name, modules)] = value
        else:
            state[rename(name, modules)] = value
    for name in [name for name in parts if ".q_proj." in name]:
        joined = [parts[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
        state[name.replace(".q_proj.", ".in_proj_")] = torch.cat(joined)
    return state


def load_mask2former(path: Any, options: Mapping[str, Any]) -> tuple[dict[str, Tensor], set[str]]:
    """A checkpoint of transformers' Mask2Former, as `maskformer.load_maskformer`."""
    theirs, absent, unknown = read_theirs(Mask2FormerForUniversalSegmentation, path, options, has_no_counterpart)
    return _state_from_mask2former(theirs, leave_out=absent), unknown
