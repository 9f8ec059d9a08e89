"""transformers' EoMT, with DINOv2 and with DINOv3: its checkpoints load as ours, which keep the ViT as a backbone of
transformers, and ours become theirs where it can represent them.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EomtConfig,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..models.configuration_maskcls import MaskClsConfig
from ..models.encoder_only import ACCESS
from ..models.modeling_maskcls import MaskClsForUniversalSegmentation
from .mask2former import LOSS_FIELDS, point_loss_changes
from .maskformer import OWN_HEADS, read_theirs
from .pretrained_backbones import open_backbone

NAME = "EoMT"

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
POSITIONS = "embeddings.position_embeddings.weight"


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


def _config_to_eomt(config: PreTrainedConfig) -> EomtConfig | EomtDinov3Config:
    """The configuration of transformers' EoMT for a `MaskClsConfig`, as far as it has the fields."""
    vit: Any = config.backbone_config
    fields = {theirs: getattr(config, ours) for ours, theirs in CONFIG_FIELDS.items()}
    fields |= {name: getattr(vit, name, 0) for name in SHARED_FIELDS}  # DINOv2 can be without registers
    if fields["train_num_points"] is None:
        del fields["train_num_points"]
    if vit.model_type == "dinov3_vit":
        fields |= {name: getattr(vit, name) for name in (*DINOV3_FIELDS, "use_gated_mlp")}
        return EomtDinov3Config(rope_parameters={"rope_type": "default", "rope_theta": vit.rope_theta}, **fields)
    fields |= {"mlp_ratio": vit.mlp_ratio, "attention_dropout": vit.attention_probs_dropout_prob}
    return EomtConfig(use_swiglu_ffn=vit.use_swiglu_ffn, **fields)


def model_of_config(config: PreTrainedConfig) -> EomtForUniversalSegmentation | EomtDinov3ForUniversalSegmentation:
    """The EoMT of transformers for a `MaskClsConfig`, without weights."""
    theirs: Any = _config_to_eomt(config)
    is_dinov3 = isinstance(theirs, EomtDinov3Config)
    return EomtDinov3ForUniversalSegmentation(theirs) if is_dinov3 else EomtForUniversalSegmentation(theirs)


def obstacles(config: PreTrainedConfig) -> Iterator[str]:
    """Why EoMT would give other outputs than a model of this configuration."""
    vit = config.backbone_config
    if vit.model_type not in ("dinov2", "dinov2_with_registers", "dinov3_vit"):
        yield f"backbone_config.model_type={vit.model_type!r}: transformers' EoMT has DINOv2 and DINOv3 only."
        return
    for name, value in (("hidden_act", "gelu"), ("hidden_dropout_prob", 0), ("qkv_bias", True)):
        if getattr(vit, name, value) != value:
            yield f"backbone_config.{name}={getattr(vit, name)!r}: EoMT has {value!r} only."
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(vit, name), int):
            yield f"backbone_config.{name}={getattr(vit, name)!r}: EoMT takes squares, one number."


def changes(config: PreTrainedConfig) -> Iterator[str]:
    """What is lost without effect on the outputs of images of its size."""
    yield f"it takes images of {config.backbone_config.image_size} pixels each way only, and resizes no positions."
    if not config.attend_to_padding:
        yield "it ignores pixel_mask: an image that is padded gives other outputs."
    if not config.deep_supervision:
        yield "it supervises all blocks with queries (here deep_supervision=False)."
    yield from point_loss_changes(config)


def at_size(model: PreTrainedModel, side: int) -> None:
    """Resize the positions of a model of ours to those of square images: another EoMT takes its own size only."""
    vit: Any = model.get_submodule(VIT)
    vit.config.image_size = model.config.backbone_config.image_size = side
    embeddings = vit.embeddings
    if not hasattr(embeddings, "position_embeddings"):  # DINOv3 turns tokens by where they are
        return
    patches = (side // vit.config.patch_size) ** 2
    with torch.no_grad():
        tokens = embeddings.position_embeddings.new_empty(1, patches + 1, vit.config.hidden_size)
        embeddings.position_embeddings = nn.Parameter(embeddings.interpolate_pos_encoding(tokens, side, side))


def our_names(theirs: Collection[str], config: Any) -> dict[str, str]:
    """Names of EoMT in transformers, with this configuration -> ours.

    Two of theirs are one of ours, `weights_in`, where the DINOv2 of this version of transformers has the two halves of
    a gated layer as one.
    """
    is_dinov3 = config.model_type == EomtDinov3Config.model_type
    access = ACCESS["dinov3_vit" if is_dinov3 else "dinov2_with_registers"]
    with torch.device("meta"):  # the names in a block differ between versions of transformers
        ours = MaskClsForUniversalSegmentation(MaskClsConfig(**config_from_eomt(config.to_dict())))
    reference = set(ours.state_dict())
    names = {}
    for name in theirs:
        if has_no_counterpart(name):
            continue
        new = name.removesuffix(".weight") if name == POSITIONS else name
        head = re.fullmatch(r"mask_head\.fc(\d)\.(\w+)", name)
        if head:
            new = f"segmentation_module.mask_embedder.layers.{int(head[1]) - 1}.{head[2]}"
        for pattern, replacement in NAMES:
            new = re.sub(pattern, replacement, new)
        new = re.sub(r"^layers\.", f"{VIT}.{access.layers}.", new)
        new = re.sub(r"^layernorm\.", f"{VIT}.{access.norm}.", new)
        names[name] = _of_this_version(new, reference)
    return names


def state_from_eomt(state: Mapping[str, Tensor], config: Any, leave_out: Collection[str] = ()) -> dict[str, Tensor]:
    """Parameters of transformers' EoMT, of this configuration of theirs, by our names, without those it calls
    `leave_out`.

    Args:
        state: parameters by their names.
        config: theirs.
        leave_out: their names of parameters that are not wanted.
    """
    result: dict[str, Tensor] = {}
    for name, ours in our_names(state, config).items():
        other = name.replace(".gate_proj.", ".up_proj.")
        if name in leave_out or other in leave_out or name not in state:
            continue
        value = state[name]
        if name == POSITIONS:  # theirs has no position of the class token
            value = torch.cat([torch.zeros_like(value[:1]), value])[None]
        elif ".weights_in." in ours and ".weights_in." not in name:
            if other == name:
                continue
            value = torch.cat([value, state[other]])
        result[ours] = value
    return result


def state_to_theirs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters of a `MaskClsForUniversalSegmentation` by the names of transformers' EoMT, without those of heads that
    it lacks. The position of the class token is a part of the token there.
    """
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(OWN_HEADS)}
    with torch.device("meta"):
        theirs = model_of_config(model.config)
    # Theirs hold in evaluation too.
    probabilities = torch.tensor(model.config.mask_probabilities, dtype=model.dtype, device=model.device)
    probabilities = probabilities * model.config.masks_in_evaluation
    state = {"attn_mask_probs": probabilities}
    used = set()
    positions = own.get(f"{VIT}.embeddings.position_embeddings")
    for name, ours in our_names(theirs.state_dict(), theirs.config).items():
        used.add(ours)
        if name == "embeddings.register_tokens" and ours not in own:  # of DINOv2 without any
            state[name] = torch.zeros_like(theirs.get_parameter(name), device=model.device)
            continue
        value = own[ours]
        if name == POSITIONS:
            value = value[0, 1:]
        elif name == "embeddings.cls_token" and positions is not None:
            value = value + positions[:, :1]
        elif ".weights_in." in ours and ".weights_in." not in name:
            value = value.chunk(2)[".up_proj." in name]
        state[name] = value
    return state | {name: value for name, value in own.items() if name not in used}


def _of_this_version(name: str, reference: set[str]) -> str:
    """The name of a projection as the ViT of this version of transformers has it."""
    candidates = [name, name.replace(".out_proj.", ".o_proj."), name.replace(".out_proj.", ".output.dense.")]
    candidates.append(re.sub(r"\.mlp\.(gate|up)_proj\.", ".mlp.weights_in.", name))
    candidates.append(name.replace(".mlp.down_proj.", ".mlp.weights_out."))
    for part, older in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        candidates.append(name.replace(f".attention.{part}.", f".attention.attention.{older}."))
    return next((candidate for candidate in candidates if candidate in reference), name)


def has_no_counterpart(name: str) -> bool:
    """Whether it is a constant of theirs, or a probability that our configuration has."""
    return name.startswith("criterion.") or name == "attn_mask_probs" or name.endswith(".inv_freq")


def load_eomt(model_class: Any, path: Any, options: dict[str, Any]) -> tuple[dict[str, Tensor], set[str]]:
    """A checkpoint of transformers' EoMT, of one of its two classes, as `maskformer.load_maskformer`.

    The probabilities of its masks become a field of the configuration: they are added to the options, and `base` is
    taken from them.

    Args:
        model_class: `EomtForUniversalSegmentation` or `EomtDinov3ForUniversalSegmentation`.
        path: folder or name on the Hub.
        options: of `from_pretrained`, changed in place.

    Returns:
        Parameters by our names, and names that our model has no place for.

    Raises:
        ValueError: as [`with_base`].
    """
    base = options.pop("base", None)
    theirs, absent, unknown = read_theirs(model_class, path, options, has_no_counterpart)
    options.setdefault("mask_probabilities", theirs.attn_mask_probs.float().tolist())
    state = state_from_eomt(theirs.state_dict(), theirs.config, leave_out=absent)
    return with_base(state, MaskClsConfig(**config_from_eomt(theirs.config.to_dict())), base, path), unknown


# -- weights that are deltas -------------------------------------------------------------------------------------------


def with_base(
    state: dict[str, Tensor], config: Any, base: str | os.PathLike[str] | None, where: object
) -> dict[str, Tensor]:
    """Whole weights by our names, of ones whose ViT may be what training has added to published weights: DINOv3 may not
    be passed on, so EoMT's authors publish the differences.

    Args:
        state: parameters by our names.
        config: ours.
        where: names the checkpoint in messages.
        base: what to add them to, as for `MaskClsForUniversalSegmentation.from_backbone`.

    Raises:
        ValueError: differences without a base, or a base for weights that are whole.
    """
    vit = {name: value for name, value in state.items() if name.startswith(f"{VIT}.")}
    if base is None:
        if _are_deltas(vit):
            raise ValueError(
                f"{where} holds the differences to the weights of a pretrained ViT, not whole weights: give these too, "
                "such as base='facebook/dinov3-vitl16-pretrain-lvd1689m' (maskcls convert --base), whose license is to "
                "be accepted on the Hub first."
            )
        return state
    model = MaskClsForUniversalSegmentation(config)
    open_backbone(base).load_into(model)
    pretrained = {name: value for name, value in model.state_dict().items() if name in vit}
    vit = {name: vit[name] for name in pretrained}  # what else there is has no place in the model
    apart, alone = (
        sum((value.float() - other).square().sum() for value, other in pairs)
        for pairs in (
            [(value, pretrained[name].float()) for name, value in vit.items()],
            [(value, 0.0) for value in vit.values()],
        )
    )
    if apart < alone:
        raise ValueError(f"{where} holds whole weights, to which {os.fspath(base)} must not be added: leave base out.")
    return state | {name: pretrained[name].to(value.dtype) + value for name, value in vit.items()}


def _are_deltas(vit: Mapping[str, Tensor]) -> bool:
    """Whether the weights of a ViT are differences: scales of norms start at 1, and hardly any ever is negative."""
    scales = [value.flatten() for name, value in vit.items() if "norm" in name and name.endswith(".weight")]
    return bool(scales) and bool((torch.cat(scales) > 0).float().mean() < 0.9)
