"""Tiny configurations and batches that the tests share."""

import torch
from torch import Tensor
from transformers import ConvNextConfig, ResNetConfig, SwinConfig

from maskcls_hf import MaskClsConfig, PerPixelConfig

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "encoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_layers": 3,
    "decoder_ffn_dim": 48,
    "fpn_feature_size": 32,
    "mask_feature_size": 16,
}
# What Max-DeepLab has of its own, with the weights of its code.
MAX_DEEPLAB = {
    "matching": "pq",
    "pq_weight": 3.0,
    "mask_id_weight": 0.3,
    "instance_discrimination_weight": 1.0,
    "semantic_weight": 1.0,
    "exclusive_masks": True,
}


def resnet() -> ResNetConfig:
    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic", out_features=STAGES
    )


def bottleneck_resnet() -> ResNetConfig:
    return ResNetConfig(embedding_size=8, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], out_features=STAGES)


def swin() -> SwinConfig:
    return SwinConfig(embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=4, out_features=STAGES)


def convnext() -> ConvNextConfig:
    return ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=STAGES)


def maskcls_config(**fields) -> MaskClsConfig:
    return MaskClsConfig(
        **{
            "backbone_config": resnet(),
            "num_queries": 7,
            **({} if "id2label" in fields else {"num_labels": 5}),
            **SIZES,
            **fields,
        }
    )


def perpixel_config(**fields) -> PerPixelConfig:
    return PerPixelConfig(
        **{"backbone_config": resnet(), **({} if "id2label" in fields else {"num_labels": 5}), **SIZES, **fields}
    )


def segments(
    sizes: list[tuple[int, int]], numbers: list[int], num_labels: int = 5
) -> tuple[list[Tensor], list[Tensor]]:
    """Random rectangles as segments of images of `sizes`: mask_labels and class_labels."""
    mask_labels, class_labels = [], []
    for (height, width), number in zip(sizes, numbers, strict=True):
        masks = torch.zeros(number, height, width, dtype=torch.bool)
        for mask in masks:
            top, left = int(torch.randint(height // 2, ())), int(torch.randint(width // 2, ()))
            mask[top : top + height // 2, left : left + width // 2] = True
        mask_labels.append(masks)
        class_labels.append(torch.randint(num_labels, (number,)))
    return mask_labels, class_labels


def pixel_mask(sizes: list[tuple[int, int]], padded: tuple[int, int]) -> Tensor:
    mask = torch.zeros(len(sizes), *padded, dtype=torch.int64)
    for image, (height, width) in enumerate(sizes):
        mask[image, :height, :width] = 1
    return mask


def pad_labels(masks: list[Tensor], padded: tuple[int, int]) -> list[Tensor]:
    height, width = padded
    return [torch.nn.functional.pad(m, (0, width - m.shape[2], 0, height - m.shape[1])) for m in masks]
