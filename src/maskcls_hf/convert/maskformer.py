"""transformers' MaskFormer: its checkpoints load as ours, and ours become theirs where it can represent them.

The two networks compute the same, under other names.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import MaskFormerConfig, MaskFormerForInstanceSegmentation, PreTrainedConfig, PreTrainedModel

from ..models.backbones import is_plain_vit
from ..models.options import DOWNLOAD_OPTIONS, chosen

NAME = "MaskFormer"

MAX_DEEPLAB_WEIGHTS = ("pq_weight", "mask_id_weight", "instance_discrimination_weight", "semantic_weight")

FILE_OPTIONS = ("variant", "use_safetensors", "weights_only", "disable_mmap", "ignore_mismatched_sizes")

# Fields of our configuration -> fields of theirs.
CONFIG_FIELDS = {
    "fpn_feature_size": "fpn_feature_size",
    "mask_feature_size": "mask_feature_size",
    "output_auxiliary_logits": "output_auxiliary_logits",
    "cross_entropy_weight": "cross_entropy_weight",
    "mask_weight": "mask_weight",
    "dice_weight": "dice_weight",
    "no_object_weight": "no_object_weight",
    "init_xavier_std": "init_xavier_std",
    "id2label": "id2label",
    "label2id": "label2id",
    "dtype": "dtype",
}
# Fields of our configuration -> fields of their decoder's.
DECODER_FIELDS = {
    "num_queries": "num_queries",
    "hidden_size": "d_model",
    "num_attention_heads": "decoder_attention_heads",
    "decoder_layers": "decoder_layers",
    "decoder_ffn_dim": "decoder_ffn_dim",
    "dropout": "dropout",
}
# Their Swin is a class of its own, with the fields of transformers' Swin.
SWIN_TYPES = ("swin", "maskformer-swin")
SWIN_FIELDS = (
    "image_size", "patch_size", "num_channels", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio",
    "qkv_bias", "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "hidden_act",
    "initializer_range", "layer_norm_eps",
)  # fmt: skip
SWIN_STAGES = ["stage1", "stage2", "stage3", "stage4"]
# Our heads that theirs lacks.
OWN_HEADS = ("segmentation_module.bbox_predictor.", "segmentation_module.semantic_predictor.")
# What computes something else than we do, unless it has this value.
REQUIRED_VALUES = {
    "decoder_config.auxiliary_loss": False,  # their decoder then feeds normalized states to the next layer
    "decoder_config.activation_function": "relu",
    "backbone_config.use_absolute_embeddings": False,
}


# -- ours as theirs ----------------------------------------------------------------------------------------------------


def obstacles(config: PreTrainedConfig) -> Iterator[str]:
    """Why MaskFormer would give other outputs than a model of this configuration."""
    if config.pixel_decoder != "fpn":
        yield f"pixel_decoder={config.pixel_decoder!r}: MaskFormer has 'fpn' only."
    if config.transformer_decoder != "standard":
        yield f"transformer_decoder={config.transformer_decoder!r}: MaskFormer has 'standard' only."
    if config.mask_kernel_size != 3:
        yield f"mask_kernel_size={config.mask_kernel_size}: MaskFormer has 3 only."
    if config.fpn_feature_size % 32:
        yield f"fpn_feature_size={config.fpn_feature_size}: MaskFormer's group norms need a multiple of 32."
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
    yield from training_changes(config)
    if config.freeze_batch_norm:
        yield "training changes its batch norms (here freeze_batch_norm=True)."


def training_changes(config: PreTrainedConfig) -> Iterator[str]:
    """What no model of transformers has of the losses of ours."""
    if config.matching != "bipartite":
        yield f"it trains with bipartite matching (here matching={config.matching!r})."
    if config.matching == "box":
        yield "it has no box head: pred_boxes is lost."
    lost = [name for name in MAX_DEEPLAB_WEIGHTS if getattr(config, name)]
    if lost:
        yield f"it trains without the losses of {', '.join(lost)}."


# -- theirs as ours ----------------------------------------------------------------------------------------------------


def config_from_maskformer(config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `MaskClsConfig` for the configuration of transformers' MaskFormer.

    `compatibility` turns `attend_to_padding` on, because their network never looks at pixel_mask. `deep_supervision`
    is on as in the paper, whatever their `use_auxiliary_loss` says: published checkpoints have it off, and with it on
    their forward fails.

    Raises:
        `ValueError`: a field has a value that our network has no counterpart for.
    """
    theirs: Any = MaskFormerConfig.from_dict(dict(config_dict))  # fills in what the file leaves out
    for field, required in REQUIRED_VALUES.items():
        part, name = field.split(".")
        value = getattr(getattr(theirs, part), name, required)  # a field of other backbones than Swin
        if value != required:
            raise ValueError(f"MaskFormerConfig: {field}={value!r} has no counterpart here; supported: {required!r}.")
    fields = {ours: getattr(theirs, name) for ours, name in CONFIG_FIELDS.items()}
    fields |= {ours: getattr(theirs.decoder_config, name) for ours, name in DECODER_FIELDS.items()}
    fields["output_auxiliary_logits"] = bool(theirs.output_auxiliary_logits)
    fields["compatibility"] = "transformers"
    fields["backbone_config"] = _backbone_from_maskformer(theirs.backbone_config)
    return fields


def _backbone_from_maskformer(backbone: PreTrainedConfig) -> dict[str, Any]:
    if backbone.model_type not in SWIN_TYPES:
        return backbone.to_dict()
    fields = {name: getattr(backbone, name) for name in SWIN_FIELDS}
    stages = SWIN_STAGES if backbone.model_type == "swin" else list(backbone.out_features)
    return {"model_type": "swin", **fields, "out_features": stages}


def _config_to_maskformer(config: PreTrainedConfig) -> MaskFormerConfig:
    """The configuration of transformers' MaskFormer for a `MaskClsConfig`, as far as it has the fields."""
    decoder = {theirs: getattr(config, ours) for ours, theirs in DECODER_FIELDS.items()}
    # Our dropout counts inside attention and feed-forward blocks too.
    decoder |= {"attention_dropout": config.dropout, "activation_dropout": config.dropout}
    decoder |= {"model_type": "detr", "encoder_attention_heads": config.num_attention_heads}
    fields = {theirs: getattr(config, ours) for ours, theirs in CONFIG_FIELDS.items()}
    fields["use_auxiliary_loss"] = False  # True makes their forward fail (transformers 5.23)
    backbone = config.backbone_config.to_dict()
    return MaskFormerConfig(**fields, decoder_config=decoder, backbone_config=backbone)


def model_of_config(config: PreTrainedConfig) -> MaskFormerForInstanceSegmentation:
    """The MaskFormer of transformers for a `MaskClsConfig`, without weights."""
    return MaskFormerForInstanceSegmentation(_config_to_maskformer(config))


def maskformer_modules(decoder_layers: int, backbone: PreTrainedConfig) -> dict[str, str]:
    """Prefixes of parameter names: ours -> theirs, for `rename`. `backbone` is either's configuration."""
    decoder = "model.pixel_level_module.decoder"
    modules = {
        "model.backbone": "model.pixel_level_module.encoder",
        "model.pixel_decoder.mask_projection": f"{decoder}.mask_projection",
        "model.transformer_decoder": "model.transformer_module",
        "model.transformer_decoder.layers": "model.transformer_module.decoder.layers",
        "model.transformer_decoder.norm": "model.transformer_module.decoder.layernorm",
        "segmentation_module.class_predictor": "class_predictor",
    }
    for layer in range(3):
        modules[f"segmentation_module.mask_embedder.layers.{layer}"] = f"mask_embedder.{layer}.0"
    for layer in range(decoder_layers):
        for name in ("attn", "attn_layer_norm"):
            ours = f"model.transformer_decoder.layers.{layer}.cross_{name}"
            modules[ours] = f"model.transformer_module.decoder.layers.{layer}.encoder_{name}"
    top = len(backbone.out_indices) - 1
    blocks = {f"model.pixel_decoder.outputs.{top}": f"{decoder}.fpn.stem"}
    for level in range(top):  # theirs starts at the coarsest
        blocks[f"model.pixel_decoder.laterals.{level}"] = f"{decoder}.fpn.layers.{top - 1 - level}.proj"
        blocks[f"model.pixel_decoder.outputs.{level}"] = f"{decoder}.fpn.layers.{top - 1 - level}.block"
    for ours, theirs in blocks.items():
        modules |= {f"{ours}.conv": f"{theirs}.0", f"{ours}.norm": f"{theirs}.1"}
    if backbone.model_type in SWIN_TYPES:
        modules |= swin_modules(backbone)
    return modules


def swin_modules(backbone: PreTrainedConfig) -> dict[str, str]:
    """Prefixes of parameter names of a Swin: ours -> theirs."""
    encoder = "model.pixel_level_module.encoder"
    modules = {"model.backbone.swin": f"{encoder}.model"}
    for index, stage in enumerate(SWIN_STAGES):
        modules[f"model.backbone.hidden_states_norms.{stage}"] = f"{encoder}.hidden_states_norms.{index}"
    for stage_index, depth in enumerate(backbone.depths):
        for block in range(depth):
            name = f"encoder.layers.{stage_index}.blocks.{block}"
            ours, theirs = f"model.backbone.swin.{name}", f"{encoder}.model.{name}"
            modules |= {
                f"{ours}.attention.relative_position_bias": f"{theirs}.attention.self",
                f"{ours}.attention.q_proj": f"{theirs}.attention.self.query",
                f"{ours}.attention.k_proj": f"{theirs}.attention.self.key",
                f"{ours}.attention.v_proj": f"{theirs}.attention.self.value",
                f"{ours}.attention.o_proj": f"{theirs}.attention.output.dense",
                f"{ours}.mlp.fc1": f"{theirs}.intermediate.dense",
                f"{ours}.mlp.fc2": f"{theirs}.output.dense",
            }
    return modules


def rename(name: str, modules: Mapping[str, str]) -> str:
    """`name` with its longest prefix that `modules` knows replaced.

    Examples:
        >>> rename("model.backbone.stem.weight", {"model.backbone": "encoder"})
        'encoder.stem.weight'
    """
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in modules:
            return ".".join([modules[prefix], *parts[end:]])
    return name


def _state_from_maskformer(model: PreTrainedModel, leave_out: Collection[str] = ()) -> dict[str, Tensor]:
    """Parameters of transformers' MaskFormer by our names, without those it calls `leave_out`."""
    config: Any = model.config
    modules = maskformer_modules(config.decoder_config.decoder_layers, config.backbone_config)
    ours = {theirs: name for name, theirs in modules.items()}
    state = model.state_dict()
    return {rename(name, ours): state[name] for name in state if name not in leave_out and not has_no_counterpart(name)}


def state_to_theirs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters of a `MaskClsForUniversalSegmentation` by the names of transformers' MaskFormer, without those of
    heads that it lacks.
    """
    modules = maskformer_modules(model.config.decoder_layers, model.config.backbone_config)
    state = model.state_dict()
    return {rename(name, modules): value for name, value in state.items() if not name.startswith(OWN_HEADS)}


def has_no_counterpart(name: str) -> bool:
    """Whether it is a constant of theirs, or their last norm of Swin, whose output nothing looks at."""
    return name.endswith((".relative_position_index", "criterion.empty_weight")) or ".encoder.model.layernorm." in name


def load_maskformer(path: Any, options: Mapping[str, Any]) -> tuple[dict[str, Tensor], set[str]]:
    """A checkpoint of transformers' MaskFormer, see [`read_theirs`]: its parameters by our names, and names that our
    model has no place for.
    """
    theirs, absent, unknown = read_theirs(MaskFormerForInstanceSegmentation, path, options, has_no_counterpart)
    return _state_from_maskformer(theirs, leave_out=absent), unknown


def read_theirs(
    model_class: Any, path: Any, options: Mapping[str, Any], has_no_counterpart: Callable[[str], bool]
) -> tuple[Any, set[str], set[str]]:
    """A checkpoint of a model of transformers, which itself reads the files, whatever their format, shards and older
    names.

    Args:
        model_class: of transformers.
        path: folder or name on the Hub.
        options: of `from_pretrained`.
        has_no_counterpart: of names of theirs that we need not.

    Returns:
        The model, names that the files lack or have in another shape, and names that it has no place for.
    """
    theirs, report = model_class.from_pretrained(
        path, output_loading_info=True, **chosen(options, DOWNLOAD_OPTIONS + FILE_OPTIONS)
    )
    absent = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    return theirs, absent, {name for name in report["unexpected_keys"] if not has_no_counterpart(name)}
