"""Parameter names of the papers' code, facebookresearch/MaskFormer and Mask2Former on detectron2, and ours."""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor
from transformers import PreTrainedConfig

from .maskformer import rename

PREDICTOR = "sem_seg_head.predictor"
PIXEL_DECODER = "sem_seg_head.pixel_decoder"

# No parameters: the modules fix them, or they belong to the image processor.
CONSTANTS = re.compile(r"criterion\.empty_weight|pixel_(mean|std)|.*\.(relative_position_index|num_batches_tracked)")
# The published files are older than the class with a pixel decoder of its own.
OLDER_NAME = re.compile(r"^sem_seg_head\.(?!pixel_decoder\.|predictor\.)")
# Projections of queries, keys and values, stacked in one tensor.
STACKED = re.compile(r"(?P<attention>.*attn\.)(in_proj_|qkv\.)(?P<leaf>weight|bias)")


def parameters(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters by the current names of the papers' code, stacked projections taken apart.

    `...attn.in_proj_weight` and `...attn.qkv.weight` become `...attn.{q,k,v}_proj.weight`.
    """
    result = {}
    for name, tensor in state_dict.items():
        name = OLDER_NAME.sub(f"{PIXEL_DECODER}.", name).replace(".static_query.", ".query_feat.")
        if name.endswith(".transformer.level_embed"):  # not a module's
            name += ".weight"
        stacked = STACKED.fullmatch(name)
        if stacked:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                result[f"{stacked['attention']}{letter}_proj.{stacked['leaf']}"] = part
        elif not CONSTANTS.fullmatch(name):
            result[name] = tensor
    return result


def our_names(state: Mapping[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
    """`state`, from `parameters`, by the names of our model of this configuration."""
    modules = dict(_original_modules(config))
    return {rename(name, modules): tensor for name, tensor in state.items()}


def _original_modules(config: PreTrainedConfig) -> Iterator[tuple[str, str]]:
    """Prefixes of parameter names, of the paper's code and ours."""
    if config.backbone_config.model_type == "swin":
        yield from swin_modules(config.backbone_config.depths)
    else:
        yield from _resnet_modules(config.backbone_config)
    if config.pixel_decoder == "deformable":
        yield from mask2former_modules(config)
        return
    yield from _pixel_decoder_modules(config)
    if config.model_type == "maskcls_perpixel" and not config.transformer_module:
        yield PREDICTOR, "classifier"
        return
    heads = "" if config.model_type == "maskcls_perpixel" else "segmentation_module."
    yield f"{PREDICTOR}.class_embed", f"{heads}class_predictor"
    yield f"{PREDICTOR}.mask_embed", f"{heads}mask_embedder"
    yield f"{PREDICTOR}.input_proj", "model.transformer_decoder.input_projection"
    yield f"{PREDICTOR}.query_embed", "model.transformer_decoder.queries_embedder"
    yield f"{PREDICTOR}.transformer.decoder.norm", "model.transformer_decoder.norm"
    for layer in range(config.decoder_layers):
        original, ours = f"{PREDICTOR}.transformer.decoder.layers.{layer}", f"model.transformer_decoder.layers.{layer}"
        yield from _transformer_layer_modules(original, ours, ["self_attn", "cross_attn"])


def _pixel_decoder_modules(config: PreTrainedConfig) -> Iterator[tuple[str, str]]:
    levels = len(config.backbone_config.out_features)
    for level in range(levels):
        for original, ours in (("adapter", "laterals"), ("layer", "outputs")):
            original, ours = f"{PIXEL_DECODER}.{original}_{level + 1}", f"model.pixel_decoder.{ours}.{level}"
            yield original, f"{ours}.conv"
            yield f"{original}.norm", f"{ours}.norm"
    yield f"{PIXEL_DECODER}.mask_features", "model.pixel_decoder.mask_projection"
    yield f"{PIXEL_DECODER}.input_proj", "model.pixel_decoder.input_projection"
    for layer in range(config.encoder_layers):
        original = f"{PIXEL_DECODER}.transformer.encoder.layers.{layer}"
        yield from _transformer_layer_modules(original, f"model.pixel_decoder.encoder.layers.{layer}", ["self_attn"])


def mask2former_modules(config: PreTrainedConfig) -> Iterator[tuple[str, str]]:
    """Of Mask2Former's decoders and heads."""
    ours = "model.pixel_decoder"
    for level in range(3):
        for index, part in enumerate(("conv", "norm")):
            yield f"{PIXEL_DECODER}.input_proj.{level}.{index}", f"{ours}.input_projections.{level}.{part}"
        yield f"{PREDICTOR}.input_proj.{level}", f"model.transformer_decoder.input_projections.{level}"
    for original, part in (("adapter_1", "laterals.0"), ("layer_1", "outputs.0")):
        yield f"{PIXEL_DECODER}.{original}", f"{ours}.{part}.conv"
        yield f"{PIXEL_DECODER}.{original}.norm", f"{ours}.{part}.norm"
    yield f"{PIXEL_DECODER}.mask_features", f"{ours}.mask_projection"
    yield f"{PIXEL_DECODER}.transformer.level_embed", f"{ours}.level_embedding"
    yield f"{PIXEL_DECODER}.transformer.encoder.layers", f"{ours}.layers"
    for layer in range(config.encoder_layers):
        original = f"{PIXEL_DECODER}.transformer.encoder.layers.{layer}"
        yield from _transformer_layer_modules(original, f"{ours}.layers.{layer}", ["self_attn"])
    ours = "model.transformer_decoder"
    yield f"{PREDICTOR}.class_embed", "segmentation_module.class_predictor"
    yield f"{PREDICTOR}.mask_embed", "segmentation_module.mask_embedder"
    yield f"{PREDICTOR}.query_feat", f"{ours}.queries_features"
    yield f"{PREDICTOR}.query_embed", f"{ours}.queries_embedder"
    yield f"{PREDICTOR}.level_embed", f"{ours}.level_embedding"
    yield f"{PREDICTOR}.decoder_norm", f"{ours}.norm"
    for layer in range(config.decoder_layers):
        for kind, name in (("self", "self_attn"), ("cross", "multihead_attn")):
            original = f"{PREDICTOR}.transformer_{kind}_attention_layers.{layer}"
            yield f"{original}.{name}", f"{ours}.layers.{layer}.{kind}_attn"
            yield f"{original}.{name}.out_proj", f"{ours}.layers.{layer}.{kind}_attn.o_proj"
            yield f"{original}.norm", f"{ours}.layers.{layer}.{kind}_attn_layer_norm"
        original = f"{PREDICTOR}.transformer_ffn_layers.{layer}"
        yield f"{original}.norm", f"{ours}.layers.{layer}.final_layer_norm"
        for index in (1, 2):
            yield f"{original}.linear{index}", f"{ours}.layers.{layer}.mlp.fc{index}"


def _transformer_layer_modules(original: str, ours: str, attentions: list[str]) -> Iterator[tuple[str, str]]:
    for index, attention in enumerate(attentions):
        name = "multihead_attn" if attention == "cross_attn" else attention
        yield f"{original}.{name}", f"{ours}.{attention}"
        yield f"{original}.{name}.out_proj", f"{ours}.{attention}.o_proj"
        yield f"{original}.norm{index + 1}", f"{ours}.{attention}_layer_norm"
    yield f"{original}.norm{len(attentions) + 1}", f"{ours}.final_layer_norm"
    yield f"{original}.linear1", f"{ours}.mlp.fc1"
    yield f"{original}.linear2", f"{ours}.mlp.fc2"


def _resnet_modules(backbone: PreTrainedConfig) -> Iterator[tuple[str, str]]:
    stem = "model.backbone.embedder.embedder"
    if getattr(backbone, "stem_type", "basic") == "deep":
        for index in range(3):
            yield f"backbone.stem.conv{index + 1}", f"{stem}.{index}.conv"
            yield f"backbone.stem.conv{index + 1}.norm", f"{stem}.{index}.norm"
    else:
        yield "backbone.stem.conv1", f"{stem}.convolution"
        yield "backbone.stem.conv1.norm", f"{stem}.normalization"
    for stage, depth in enumerate(backbone.depths):
        for block in range(depth):
            ours = f"model.backbone.encoder.stages.{stage}.layers.{block}"
            parts = {f"conv{index + 1}": f"layer.{index}" for index in range(3)} | {"shortcut": "shortcut"}
            for original, part in parts.items():
                yield f"backbone.res{stage + 2}.{block}.{original}", f"{ours}.{part}.convolution"
                yield f"backbone.res{stage + 2}.{block}.{original}.norm", f"{ours}.{part}.normalization"


def swin_modules(depths: list[int]) -> Iterator[tuple[str, str]]:
    """Prefixes of parameter names of a Swin with these depths, of the paper's code and ours."""
    yield "backbone.patch_embed.proj", "model.backbone.swin.embeddings.patch_embeddings.projection"
    yield "backbone.patch_embed.norm", "model.backbone.swin.embeddings.norm"
    yield "backbone.layers", "model.backbone.swin.encoder.layers"
    for stage, depth in enumerate(depths):
        yield f"backbone.norm{stage}", f"model.backbone.hidden_states_norms.stage{stage + 1}"
        for block in range(depth):
            original = f"backbone.layers.{stage}.blocks.{block}"
            ours = f"model.backbone.swin.encoder.layers.{stage}.blocks.{block}"
            yield f"{original}.norm1", f"{ours}.layernorm_before"
            yield f"{original}.norm2", f"{ours}.layernorm_after"
            for part in ("q_proj", "k_proj", "v_proj"):
                yield f"{original}.attn.{part}", f"{ours}.attention.{part}"
            yield f"{original}.attn.proj", f"{ours}.attention.o_proj"
            yield f"{original}.attn", f"{ours}.attention.relative_position_bias"
