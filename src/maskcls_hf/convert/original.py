"""Checkpoints of the papers' code -> our models, the architecture inferred from names and shapes."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, ResNetConfig, SwinConfig

from ..models.configuration_maskcls import MaskClsConfig, PerPixelConfig
from ..models.image_processing_maskcls import MaskClsImageProcessor, fields_of_eomt
from ..models.inference_defaults import WITHOUT_DEFAULTS
from ..models.kinds import KIND_OF_TYPE
from ..models.modeling_maskcls import MaskClsForUniversalSegmentation, PerPixelForSemanticSegmentation
from .checkpoint_files import as_tensors, read_checkpoint
from .mask2former import PARTS, is_mask2former
from .original_eomt import from_original_eomt, is_eomt
from .original_names import PIXEL_DECODER, PREDICTOR, our_names, parameters

MASK2FORMER = PARTS | dict(
    cross_entropy_weight=2.0, mask_weight=5.0, dice_weight=5.0, loss_points=12544
)  # fmt: skip
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def from_original(
    checkpoint: Mapping[str, Any] | str | Path, base: str | os.PathLike[str] | None = None, **overrides: Any
) -> MaskClsForUniversalSegmentation | PerPixelForSemanticSegmentation:
    """A model with the weights of a checkpoint of the papers' code (facebookresearch/MaskFormer and Mask2Former, and
    tue-mps/eomt).

    Args:
        checkpoint: a `.pkl` file of numpy arrays (anything else in it is refused), a file of tensors, or what
            they hold: names with arrays or tensors. ResNet and Swin backbones; FPN with or without transformer
            encoder, or Mask2Former's decoders; mask classification, PerPixelBaseline, PerPixelBaseline+; EoMT on
            DINOv2 or DINOv3.
        base: the pretrained ViT that the checkpoint holds the differences to, as those that EoMT's authors publish of
            DINOv3: a folder or a name on the Hub.
        overrides: fields of the configuration that names and shapes do not tell, such as `id2label`, `dropout`, or
            `num_attention_heads` if it is not the 8 of all the paper's models.

    Returns:
        the model, in evaluation mode. Its configuration has the behavior of the paper's code:
        `compatibility="paper"` (per-pixel models: `attend_to_padding=True`) and, with ResNets,
        `freeze_batch_norm=True`.

    Raises:
        `ValueError`: not such a checkpoint; names in it that the model has no place for, parameters of the model
            that it lacks, or other shapes, all listed.
    """
    where = str(checkpoint) if isinstance(checkpoint, (str, Path)) else "checkpoint"
    tensors = read_checkpoint(checkpoint) if isinstance(checkpoint, (str, Path)) else as_tensors(checkpoint, where)
    config: Any
    if is_eomt(tensors):
        config, state = from_original_eomt(tensors, where, base, **overrides)
    elif base is not None:
        raise ValueError(f"{where} is no EoMT: base={os.fspath(base)!r} is for its weights on DINOv3.")
    else:
        original = _Original(parameters(tensors), where)
        config = original.config(**overrides)
        state = our_names(original.state, config)
    model_class = KIND_OF_TYPE[config.model_type].model_class
    with torch.device("meta"):
        expected = model_class(config).state_dict()
    # Frozen batch norms count no batches.
    counters = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in expected.items() if _is_counter(name)}
    state |= counters
    _check_complete(state, expected, where)
    model: MaskClsForUniversalSegmentation | PerPixelForSemanticSegmentation = model_class.from_pretrained(
        None, config=config, state_dict=state
    )
    return model


def save_from_original(
    checkpoint: str | Path, out: str | Path, base: str | os.PathLike[str] | None = None, **overrides: Any
) -> None:
    """Write the model of `from_original` to the folder `out`, with an image processor.

    The checkpoint says nothing of its image processor: it is the default one (shortest edge 512, longest at most 2048;
    the paper's ADE20K setting), with the paper's panoptic threshold of 0.8; of a Mask2Former with `compatibility=
    "paper"` (MaskFormer's own maps are the exact ones). Edit its `size`, `label_offset` and `label_ids_to_fuse` for
    other data sets. EoMT's resizes and pads to the square that the positions of its ViT are for (of DINOv3, which has
    none, 640); its semantic models want `do_split_image`.

    Args:
        checkpoint: as of `from_original`.
        out: the folder, which is made.
        base: as of `from_original`.
        overrides: as of `from_original`.

    Raises:
        `ValueError`: as of `from_original`.
    """
    model = from_original(checkpoint, base, **overrides)
    label_format = "segments" if model.config.model_type == MaskClsConfig.model_type else "semantic"
    model.save_pretrained(out)
    fields: dict[str, Any] = dict(num_labels=model.config.num_labels, label_format=label_format)
    if getattr(model.config, "architecture", None) == "encoder_only":
        side = getattr(model.config.backbone_config, "image_size", 640)
        square = {"shortest_edge": side, "longest_edge": side}
        fields |= fields_of_eomt({"size": square, "do_pad": True}) | {"compatibility": "paper"}
    elif is_mask2former(model.config):
        fields["compatibility"] = "paper"
    else:
        fields["inference_defaults"] = WITHOUT_DEFAULTS
    MaskClsImageProcessor(**fields).save_pretrained(out)


def _is_counter(name: str) -> bool:
    return name.endswith(".num_batches_tracked")


def _check_complete(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Raise `ValueError` unless `state` has exactly the `expected` names and shapes."""
    problems = {
        "missing in the checkpoint": sorted(expected.keys() - state.keys()),
        "without a place in the model": sorted(state.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & state.keys())
            if state[name].shape != expected[name].shape
        ],
    }
    if any(problems.values()):
        lists = "\n".join(f"{len(names)} {what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise ValueError(f"{where} does not fit the architecture inferred from its names and shapes.\n{lists}")


class _Original:
    """Parameters of a checkpoint of the paper's code, and the architecture they tell."""

    def __init__(self, state: dict[str, Tensor], where: str):
        self.state = state
        self.where = where

    def shape(self, name: str) -> torch.Size:
        if name not in self.state:
            raise ValueError(
                f"{self.where} is not a checkpoint of the paper's code: it has no {name}. Its {len(self.state)} names "
                f"start with {sorted(self.state)[:3]}."
            )
        return self.state[name].shape

    def count(self, template: str) -> int:
        """How many of the names `template.format(0)`, `template.format(1)`, ... there are."""
        number = 0
        while template.format(number) in self.state:
            number += 1
        return number

    def config(self, **overrides: Any) -> PreTrainedConfig:
        is_mask2former = f"{PREDICTOR}.query_feat.weight" in self.state
        fields = self.mask2former_fields() if is_mask2former else self.pixel_decoder_fields()
        if "backbone.patch_embed.proj.weight" in self.state:
            fields["backbone_config"] = self.swin_config()
        else:
            fields |= {"backbone_config": self.resnet_config(), "freeze_batch_norm": True}
        has_transformer = f"{PREDICTOR}.query_embed.weight" in self.state
        if has_transformer and not is_mask2former:
            fields |= self.transformer_fields()
        if f"{PREDICTOR}.class_embed.weight" in self.state:
            fields["num_labels"] = self.shape(f"{PREDICTOR}.class_embed.weight")[0] - 1  # the last is "no object"
            return MaskClsConfig(**(fields | {"compatibility": "paper"} | overrides))
        name = f"{PREDICTOR}.query_embed.weight" if has_transformer else f"{PREDICTOR}.weight"
        fields |= {"num_labels": self.shape(name)[0], "transformer_module": has_transformer, "attend_to_padding": True}
        return PerPixelConfig(**(fields | overrides))

    def transformer_fields(self) -> dict[str, Any]:
        num_queries, hidden_size = self.shape(f"{PREDICTOR}.query_embed.weight")
        layers = f"{PREDICTOR}.transformer.decoder.layers"
        return {
            "num_queries": num_queries,
            "hidden_size": hidden_size,
            "decoder_layers": self.count(layers + ".{}.linear1.weight"),
            "decoder_ffn_dim": self.shape(f"{layers}.0.linear1.weight")[0],
        }

    def pixel_decoder_fields(self) -> dict[str, Any]:
        mask_feature_size, fpn_feature_size = self.shape(f"{PIXEL_DECODER}.mask_features.weight")[:2]
        fields = {"fpn_feature_size": fpn_feature_size, "mask_feature_size": mask_feature_size}
        layers = f"{PIXEL_DECODER}.transformer.encoder.layers"
        encoder_layers = self.count(layers + ".{}.linear1.weight")
        if not encoder_layers:
            return fields
        return fields | {
            "pixel_decoder": "fpn_encoder",
            "encoder_layers": encoder_layers,
            "encoder_ffn_dim": self.shape(f"{layers}.0.linear1.weight")[0],
        }

    def mask2former_fields(self) -> dict[str, Any]:
        """Of both decoders and the loss, whose weights and points all configurations of the paper share."""
        mask_feature_size, fpn_feature_size = self.shape(f"{PIXEL_DECODER}.mask_features.weight")[:2]
        encoder = f"{PIXEL_DECODER}.transformer.encoder.layers"
        layers = f"{PREDICTOR}.transformer_ffn_layers"
        num_queries, hidden_size = self.shape(f"{PREDICTOR}.query_embed.weight")
        return {
            **MASK2FORMER,
            "fpn_feature_size": fpn_feature_size,
            "mask_feature_size": mask_feature_size,
            "encoder_layers": self.count(encoder + ".{}.linear1.weight"),
            "encoder_ffn_dim": self.shape(f"{encoder}.0.linear1.weight")[0],
            "num_queries": num_queries,
            "hidden_size": hidden_size,
            "decoder_layers": self.count(layers + ".{}.linear1.weight"),
            "decoder_ffn_dim": self.shape(f"{layers}.0.linear1.weight")[0],
        }

    def resnet_config(self) -> ResNetConfig:
        deep_stem = "backbone.stem.conv3.weight" in self.state
        last_conv = "conv3" if "backbone.res2.0.conv3.weight" in self.state else "conv2"
        fields: dict[str, Any] = dict(
            num_channels=self.shape("backbone.stem.conv1.weight")[1],
            embedding_size=self.shape(f"backbone.stem.{'conv3' if deep_stem else 'conv1'}.weight")[0],
            stem_type="deep" if deep_stem else "basic",
            depths=[self.count(f"backbone.res{stage}.{{}}.conv1.weight") for stage in range(2, 6)],
            hidden_sizes=[self.shape(f"backbone.res{stage}.0.{last_conv}.weight")[0] for stage in range(2, 6)],
            layer_type="bottleneck" if last_conv == "conv3" else "basic",
            out_features=STAGES,
            # The weights do not tell, but every model of the paper with this stem has it (RES5_MULTI_GRID).
            last_stage_dilations=[1, 2, 4] if deep_stem else None,
        )
        return ResNetConfig(**fields)

    def swin_config(self) -> SwinConfig:
        embed_dim, num_channels, patch_size, _ = self.shape("backbone.patch_embed.proj.weight")
        first = [f"backbone.layers.{stage}.blocks.0" for stage in range(4)]
        tables = [self.shape(f"{block}.attn.relative_position_bias_table") for block in first]
        fields: dict[str, Any] = dict(
            num_channels=num_channels,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depths=[self.count(f"backbone.layers.{stage}.blocks.{{}}.norm1.weight") for stage in range(4)],
            num_heads=[heads for _, heads in tables],
            window_size=(math.isqrt(tables[0][0]) + 1) // 2,  # the table has (2 * window_size - 1) ** 2 rows
            mlp_ratio=self.shape(f"{first[0]}.mlp.fc1.weight")[0] / embed_dim,
            qkv_bias=f"{first[0]}.attn.q_proj.bias" in self.state,
            drop_path_rate=0.3,  # of all the paper's Swin models; training only
            out_features=STAGES,
        )
        return SwinConfig(**fields)
