"""Checkpoints of EoMT's own code (tue-mps/eomt, with timm's DINOv2 or transformers' DINOv3) -> our models: by the names
of transformers' EoMT, the architecture inferred from names and shapes.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import DINOv3ViTConfig, EomtConfig, EomtDinov3Config

from ..models.configuration_maskcls import MaskClsConfig
from .eomt import DINOV3_FIELDS, POSITIONS, SHARED_FIELDS, config_from_eomt, state_from_eomt, with_base
from .pretrained_backbones import open_backbone

PROBABILITIES = "attn_mask_probs"
CONSTANTS = re.compile(r"encoder\.pixel_(mean|std)|criterion\..*")
# Names of theirs, below `network.` -> names of transformers' EoMT.
NAMES = (
    (r"^encoder\.backbone\.(patch_embed\.)?cls_token$", "embeddings.cls_token"),
    (r"^encoder\.backbone\.(patch_embed\.register_tokens|reg_token)$", "embeddings.register_tokens"),
    (r"^encoder\.backbone\.pos_embed$", POSITIONS),
    (r"^encoder\.backbone\.patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^encoder\.backbone\.patch_embed\.patch_embeddings\.", "embeddings.patch_embeddings."),
    (r"^encoder\.backbone\.norm\.", "layernorm."),
    (r"^encoder\.backbone\.blocks\.", "layers."),
    (r"^(layers\.\d+\.)attn\.proj\.", r"\1attention.out_proj."),
    (r"^(layers\.\d+\.)attn\.", r"\1attention."),
    (r"^(layers\.\d+\.)ls(\d)\.gamma$", r"\1layer_scale\2.lambda1"),
    (r"^q\.", "query."),
    (r"^class_head\.", "class_predictor."),
    (r"^mask_head\.0\.", "mask_head.fc1."),
    (r"^mask_head\.2\.", "mask_head.fc2."),
    (r"^mask_head\.4\.", "mask_head.fc3."),
    (r"^upscale\.(\d+)\.norm\.", r"upscale_block.block.\1.layernorm2d."),
    (r"^upscale\.(\d+)\.", r"upscale_block.block.\1."),
)


def is_eomt(state: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint is one of EoMT's code."""
    return PROBABILITIES in state or f"network.{PROBABILITIES}" in state


def from_original_eomt(
    state: Mapping[str, Tensor], where: str, base: str | os.PathLike[str] | None = None, **overrides: Any
) -> tuple[MaskClsConfig, dict[str, Tensor]]:
    """Configuration and weights by our names.

    Args:
        state: parameters by the names in the file.
        where: names the checkpoint in messages.
        base: weights of a pretrained ViT, which the checkpoint has the differences to; see `eomt.with_base`.
        overrides: fields of the configuration; `num_attention_heads` are those of the ViT, one for 64 channels if not
            given.

    Raises:
        ValueError: names or shapes that no EoMT has; differences without a base, or a base for whole weights.
    """
    named = {}
    for name, value in state.items():
        name = re.sub(r"^network\.", "", name.replace("._orig_mod", ""))  # of a compiled network
        if CONSTANTS.fullmatch(name):
            continue
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        named[name] = value
    probabilities = named.pop(PROBABILITIES).float()
    if probabilities.min() < 0:  # a difference to the ones that they start from
        probabilities = probabilities + 1
    named = _taken_apart(named)
    heads = overrides.pop("num_attention_heads", None)
    try:
        theirs: Any = _eomt_config(named, heads, base)
    except KeyError as error:
        raise ValueError(f"{where} is no checkpoint of EoMT's code: it has no {error}.") from error
    fields = config_from_eomt(theirs.to_dict()) | {
        "mask_probabilities": probabilities.tolist(),
        "compatibility": "paper",
        "masks_in_evaluation": False,  # a flag there, off in its evaluation, whatever the probabilities
    }
    fields = {name: value for name, value in fields.items() if name not in ("dtype", "label2id")}
    fields["query_blocks"] = len(probabilities)
    if "id2label" in overrides:
        del fields["id2label"]
    config = MaskClsConfig(**(fields | overrides))
    return config, with_base(state_from_eomt(named, theirs), config, base, where)


def _taken_apart(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Projections that timm has in one, each for itself; the position of a class token, which transformers' EoMT has
    not, added to the token.
    """
    result: dict[str, Tensor] = {}
    shapes = {name: value.shape for name, value in named.items()}
    gated = {  # whose first layer is that of the gate and that of the values
        name.removesuffix("fc2.weight")
        for name, shape in shapes.items()
        if name.endswith(".mlp.fc2.weight") and shapes.get(name.replace("fc2", "fc1"), [0])[0] == 2 * shape[1]
    }
    for name, value in named.items():
        block, _, leaf = name.rpartition(".")
        if block.endswith(".attention.qkv"):
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                result[f"{block.removesuffix('qkv')}{letter}_proj.{leaf}"] = part
        elif block.removesuffix("fc1") in gated:
            gate, up = value.chunk(2)
            result |= {name.replace(".fc1.", ".gate_proj."): gate, name.replace(".fc1.", ".up_proj."): up}
        elif block.removesuffix("fc2") in gated:
            result[name.replace(".fc2.", ".down_proj.")] = value
        else:
            result[name] = value
    positions = result.get(POSITIONS)
    if positions is not None:
        prefix = positions.shape[1] - math.isqrt(positions.shape[1]) ** 2
        if prefix == 1:
            result["embeddings.cls_token"] = result["embeddings.cls_token"] + positions[:, :1]
        result[POSITIONS] = positions[0, prefix:]
        result.setdefault("embeddings.register_tokens", positions.new_zeros(1, 0, positions.shape[2]))
    return result


def _eomt_config(
    state: Mapping[str, Tensor], heads: int | None, base: str | os.PathLike[str] | None
) -> EomtConfig | EomtDinov3Config:
    """The configuration of transformers' EoMT that weights by its names tell; KeyError: the name of one that is not
    there. What they do not tell of a DINOv3 is that of `base`, else as published.
    """
    kernels = state["embeddings.patch_embeddings." + ("projection." if POSITIONS in state else "") + "weight"]
    size, channels, patch_size, _ = kernels.shape
    layers = {int(name.split(".")[1]) for name in state if name.startswith("layers.")}
    blocks = {name.split(".")[2] for name in state if name.startswith("upscale_block.")}
    fields: dict[str, Any] = dict(
        hidden_size=size,
        num_channels=channels,
        patch_size=patch_size,
        num_hidden_layers=len(layers),
        num_attention_heads=heads or max(1, size // 64),
        num_register_tokens=state["embeddings.register_tokens"].shape[1],
        num_queries=len(state["query.weight"]),
        num_labels=len(state["class_predictor.weight"]) - 1,
        num_upscale_blocks=len(blocks),
    )
    if POSITIONS in state:
        gated = "layers.0.mlp.gate_proj.weight" in state
        if not gated:
            fields["mlp_ratio"] = len(state["layers.0.mlp.fc1.weight"]) // size
        side = math.isqrt(len(state[POSITIONS])) * patch_size
        return EomtConfig(image_size=side, use_swiglu_ffn=gated, **fields)
    fields["intermediate_size"] = len(state["layers.0.mlp.up_proj.weight"])
    fields["use_gated_mlp"] = "layers.0.mlp.gate_proj.weight" in state
    for name, part in (("query", "attention.q_proj"), ("key", "attention.k_proj"), ("value", "attention.v_proj")):
        fields[f"{name}_bias"] = f"layers.0.{part}.bias" in state
    fields["proj_bias"] = any(f"layers.0.attention.{part}.bias" in state for part in ("o_proj", "out_proj"))
    fields["mlp_bias"] = "layers.0.mlp.up_proj.bias" in state
    published: Any = DINOv3ViTConfig() if base is None else open_backbone(base).config()
    untold = {*SHARED_FIELDS, *DINOV3_FIELDS} - {*fields, "image_size"}
    fields |= {name: getattr(published, name) for name in untold if hasattr(published, name)}
    if base is not None and heads is None:
        fields["num_attention_heads"] = published.num_attention_heads
    theta = getattr(published, "rope_theta", 100.0)
    return EomtDinov3Config(rope_parameters={"rope_type": "default", "rope_theta": theta}, **fields)
