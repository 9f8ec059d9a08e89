"""Tiny random per-pixel models of every family that can be converted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    Data2VecVisionConfig,
    Data2VecVisionForSemanticSegmentation,
    DPTConfig,
    DPTForSemanticSegmentation,
    MobileNetV2Config,
    MobileNetV2ForSemanticSegmentation,
    MobileViTConfig,
    MobileViTForSemanticSegmentation,
    MobileViTV2Config,
    MobileViTV2ForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

import tiny
from maskcls_hf import PerPixelForSemanticSegmentation

CLASSES = {0: "sky", 1: "road", 2: "car", 3: "person", 4: "dog", 5: "bicycle"}
VIT: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=40, image_size=64, patch_size=16,
    auxiliary_channels=8, id2label=CLASSES,
)  # fmt: skip


def segformer() -> SegformerForSemanticSegmentation:
    sizes: dict[str, Any] = dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4])
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes, decoder_hidden_size=16, id2label=CLASSES))


def upernet(backbone=tiny.convnext) -> UperNetForSemanticSegmentation:
    sizes: dict[str, Any] = dict(hidden_size=16, use_auxiliary_head=backbone is tiny.convnext)
    auxiliary: dict[str, Any] = dict(auxiliary_channels=8, auxiliary_in_channels=24)
    return UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=backbone(), **sizes, **auxiliary, id2label=CLASSES)
    )


def dpt(**fields: Any) -> DPTForSemanticSegmentation:
    sizes: dict[str, Any] = dict(neck_hidden_sizes=[8, 8, 16, 16], backbone_out_indices=[0, 1, 2, 3])
    return DPTForSemanticSegmentation(DPTConfig(**(VIT | sizes | fields), fusion_hidden_size=16))


def dpt_hybrid() -> DPTForSemanticSegmentation:
    bit = {
        "model_type": "bit", "embedding_size": 8, "hidden_sizes": [8, 16, 24], "depths": [1, 1, 1],
        "global_padding": "same", "layer_type": "bottleneck", "embedding_dynamic_padding": True, "num_groups": 4,
        "out_features": ["stage1", "stage2", "stage3"],
    }  # fmt: skip
    return dpt(
        is_hybrid=True, backbone_config=bit, backbone_featmap_shape=[1, 24, 4, 4], neck_hidden_sizes=[8, 16, 16, 16],
        readout_type="project", neck_ignore_stages=[0, 1],
    )  # fmt: skip


def beit() -> BeitForSemanticSegmentation:
    return BeitForSemanticSegmentation(BeitConfig(**VIT, out_indices=[1, 2, 3, 4], use_relative_position_bias=True))


def data2vec() -> Data2VecVisionForSemanticSegmentation:
    return Data2VecVisionForSemanticSegmentation(Data2VecVisionConfig(**VIT, out_indices=[1, 2, 3, 4]))


def mobilevit() -> MobileViTForSemanticSegmentation:
    sizes: dict[str, Any] = dict(hidden_sizes=[16, 24, 32], neck_hidden_sizes=[4, 8, 12, 16, 20, 24, 32])
    return MobileViTForSemanticSegmentation(
        MobileViTConfig(**sizes, num_attention_heads=2, aspp_out_channels=16, id2label=CLASSES)
    )


def mobilevitv2() -> MobileViTV2ForSemanticSegmentation:
    return MobileViTV2ForSemanticSegmentation(
        MobileViTV2Config(width_multiplier=0.25, aspp_out_channels=16, id2label=CLASSES)
    )


def mobilenet_v2() -> MobileNetV2ForSemanticSegmentation:
    return MobileNetV2ForSemanticSegmentation(MobileNetV2Config(depth_multiplier=0.25, id2label=CLASSES))


def baseline() -> PerPixelForSemanticSegmentation:
    return PerPixelForSemanticSegmentation(tiny.perpixel_config(id2label=CLASSES))


def baseline_plus() -> PerPixelForSemanticSegmentation:
    return PerPixelForSemanticSegmentation(tiny.perpixel_config(id2label=CLASSES, transformer_module=True))


FAMILIES: dict[str, Callable[[], Any]] = {
    "segformer": segformer,
    "upernet": upernet,
    "upernet_swin": lambda: upernet(tiny.swin),
    "dpt": dpt,
    "dpt_hybrid": dpt_hybrid,
    "beit": beit,
    "data2vec": data2vec,
    "mobilevit": mobilevit,
    "mobilevitv2": mobilevitv2,
    "mobilenet_v2": mobilenet_v2,
    "baseline": baseline,
    "baseline_plus": baseline_plus,
}
SQUARE_ONLY = {"dpt", "dpt_hybrid", "beit", "data2vec"}


def images(family: str) -> torch.Tensor:
    """Smooth ones, so that neighboring pixels differ less than far ones: (2, 3, H, W)."""
    coarse = torch.randn(2, 3, 4, 4)
    return nn.functional.interpolate(coarse, size=(64, 64) if family in SQUARE_ONLY else (64, 96), mode="bicubic")


@torch.no_grad()
def with_varied_scores(model: Any, pixel_values: torch.Tensor) -> Any:
    """Weights that make scores of the size of trained ones, none of the classes ahead everywhere."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.xavier_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.train().momentum = 1.0
    model(pixel_values=pixel_values)  # the batch norms take the statistics
    model.eval()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    last = [c for c in convolutions if c.out_channels == len(CLASSES) and c.bias is not None]
    if last:  # the classifier, or it and that of an auxiliary head
        logits = model(pixel_values=pixel_values).logits
        for classifier in last:
            scale = 3 / logits.std((0, 2, 3))
            classifier.weight *= scale[:, None, None, None]
            classifier.bias.copy_(-(logits.mean((0, 2, 3)) - classifier.bias) * scale + torch.randn(len(CLASSES)))
    return model
