"""transformers' EoMT, with DINOv2 and with DINOv3: its checkpoints load as ours, which keep the ViT as a backbone of
transformers."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EomtConfig,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    PreTrainedModel,
)

from ..models.configuration_maskcls import MaskClsConfig
from ..models.modeling_maskcls import MaskClsForUniversalSegmentation
from .mask2former import LOSS_FIELDS
from .maskformer import read_theirs

# Fields of our configuration -> fields of theirs.
CONFIG_FIELDS = LOSS_FIELDS | {"query_blocks": "num_blocks", "upscale_blocks": "num_upscale_blocks"}
SHARED_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "initializer_range", "layer_norm_eps",
    "image_size", "patch_size", "num_channels", "layerscale_value", "drop_path_rate", "num_register_tokens",
)  # fmt: skip
DINOV3_FIELDS = (
    "attention_dropout", "intermediate_size", "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias",
    "pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale",
)  # fmt: skip
# Names of theirs -> ours, those of the ViT's blocks and norm apart.
NAMES = (
    (r"^query\.", "model.encoder.queries_embedder."),
    (r"^class_predictor\.", "segmentation_module.class_predictor."),
    (r"^upscale_block\.block\.(\d+)\.conv1\.", r"model.encoder.upscale.\1.0."),
    (r"^upscale_block\.block\.(\d+)\.conv2\.", r"model.encoder.upscale.\1.2."),
    (r"^upscale_block\.block\.(\d+)\.layernorm2d\.", r"model.encoder.upscale.\1.3."),
    (r"^embeddings\.", "model.encoder.vit.embeddings."),
)
VIT = "model.encoder.vit"


def config_from_eomt(config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `MaskClsConfig` for the configuration of transformers' EoMT.

    Raises:
        `ValueError`: a dropout or a head that our network has no counterpart for.
    """
    is_dinov3 = config_dict.get("model_type") == EomtDinov3Config.model_type
    theirs: Any = (EomtDinov3Config if is_dinov3 else EomtConfig).from_dict(dict(config_dict))
    if theirs.hidden_act != "gelu" or theirs.hidden_dropout_prob:
        raise ValueError(
            f"{type(theirs).__name__}: hidden_act={theirs.hidden_act!r} and hidden_dropout_prob="
            f"{theirs.hidden_dropout_prob} have no counterpart here; supported: 'gelu' and 0."
        )
    vit = {name: getattr(theirs, name) for name in SHARED_FIELDS}
    if is_dinov3:
        vit |= {name: getattr(theirs, name) for name in DINOV3_FIELDS}
        vit |= {"model_type": "dinov3_vit", "use_gated_mlp": theirs.use_gated_mlp}
        vit["rope_theta"] = (theirs.rope_parameters or {}).get("rope_theta", theirs.default_theta)
    else:
        vit |= {"model_type": "dinov2_with_registers", "mlp_ratio": theirs.mlp_ratio}
        vit |= {"attention_probs_dropout_prob": theirs.attention_dropout, "use_swiglu_ffn": theirs.use_swiglu_ffn}
    fields = {ours: getattr(theirs, name) for ours, name in CONFIG_FIELDS.items()}
    return fields | {
        "architecture": "encoder_only",
        "mask_loss": "cross_entropy",
        "compatibility": "transformers",
        "backbone_config": vit,
    }


def state_from_eomt(model: PreTrainedModel, leave_out: Collection[str] = ()) -> dict[str, Tensor]:
    """Parameters of transformers' EoMT by our names, without those it calls `leave_out`."""
    is_dinov3 = isinstance(model, EomtDinov3ForUniversalSegmentation)
    with torch.device("meta"):  # the names of a block's projections differ between versions of transformers
        reference = _vit_names(model.config)
    layers, norm = (f"{VIT}.model.layer", f"{VIT}.norm") if is_dinov3 else (f"{VIT}.encoder.layer", f"{VIT}.layernorm")
    state, gated = {}, {}
    for name, value in model.state_dict().items():
        if name in leave_out or has_no_counterpart(name):
            continue
        if name == "embeddings.position_embeddings.weight":  # theirs has no position of the class token
            class_position = torch.zeros_like(value[:1])
            state[f"{VIT}.embeddings.position_embeddings"] = torch.cat([class_position, value])[None]
            continue
        head = re.fullmatch(r"mask_head\.fc(\d)\.(\w+)", name)
        if head:
            state[f"segmentation_module.mask_embedder.layers.{int(head[1]) - 1}.{head[2]}"] = value
            continue
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        name = re.sub(r"^layers\.", f"{layers}.", re.sub(r"^layernorm\.", f"{norm}.", name))
        if not is_dinov3 and (".mlp.gate_proj." in name or ".mlp.up_proj." in name):
            gated[name] = value
            continue
        if not is_dinov3:
            name = name.replace(".mlp.down_proj.", ".mlp.weights_out.")
        state[_of_this_version(name, reference)] = value
    for name, value in gated.items():
        if ".gate_proj." in name:
            joined = torch.cat([value, gated[name.replace(".gate_proj.", ".up_proj.")]])
            state[name.replace(".gate_proj.", ".weights_in.")] = joined
    return state


def _vit_names(config: Any) -> set[str]:
    return set(MaskClsForUniversalSegmentation(MaskClsConfig(**config_from_eomt(config.to_dict()))).state_dict())


def _of_this_version(name: str, reference: set[str]) -> str:
    """The name of a projection of attention as the ViT of this version of transformers has it."""
    candidates = [name, name.replace(".out_proj.", ".o_proj."), name.replace(".out_proj.", ".output.dense.")]
    for part, older in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        candidates.append(name.replace(f".attention.{part}.", f".attention.attention.{older}."))
    return next((candidate for candidate in candidates if candidate in reference), name)


def has_no_counterpart(name: str) -> bool:
    """Whether it is a constant of theirs, or a probability that our configuration has."""
    return name.startswith("criterion.") or name == "attn_mask_probs" or name.endswith(".inv_freq")


def load_eomt(model_class: Any, path: Any, options: dict[str, Any]) -> tuple[dict[str, Tensor], set[str]]:
    """A checkpoint of transformers' EoMT, of one of its two classes, as `maskformer.load_maskformer`. The probabilities
    of its masks become a field of the configuration: they are added to the options."""
    theirs, absent, unknown = read_theirs(model_class, path, options, has_no_counterpart)
    options.setdefault("mask_probabilities", theirs.attn_mask_probs.float().tolist())
    return state_from_eomt(theirs, leave_out=absent), unknown
