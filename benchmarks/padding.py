"""How much an image's result depends on the padding of its batch:  python benchmarks/padding.py

An image of 200 x 300 pixels goes through full-size networks with random weights, alone (padded to 224 x 320, multiples
of 32) and beside a larger image. Differences are in standard deviations of the logits.
"""

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    ConvNextConfig,
    ConvNextV2Config,
    Dinov2Config,
    PreTrainedConfig,
    ResNetConfig,
    SwinConfig,
    Swinv2Config,
)

from maskcls_hf import MaskClsConfig, MaskClsForUniversalSegmentation

STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES = {
    "ResNet-50": ResNetConfig(out_features=STAGES),
    "ConvNeXt-T": ConvNextConfig(hidden_sizes=[96, 192, 384, 768], depths=[3, 3, 9, 3], out_features=STAGES),
    "Swin-T": SwinConfig(out_features=STAGES),
    "SwinV2-T": Swinv2Config(window_size=8, out_features=STAGES),
    "ConvNeXtV2-T": ConvNextV2Config(hidden_sizes=[96, 192, 384, 768], depths=[3, 3, 9, 3], out_features=STAGES),
    "ViT-S, patches of 16": Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=16),
}
SIZE, ALONE, PADDED = (200, 300), (224, 320), [(224, 416), (320, 320), (448, 640)]


def logits(model: MaskClsForUniversalSegmentation, image: Tensor, padded: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Class logits, and mask logits of the cells inside the image, alone or beside one of the padded size."""
    (height, width), images = SIZE, 1 if padded == ALONE else 2
    pixel_values = torch.randn(images, 3, *padded, generator=torch.Generator().manual_seed(0))
    pixel_mask = torch.ones(images, *padded, dtype=torch.int64)
    pixel_values[0], pixel_mask[0] = 0, 0
    pixel_values[0, :, :height, :width], pixel_mask[0, :height, :width] = image, 1
    with torch.inference_mode():
        outputs = model(pixel_values, pixel_mask=pixel_mask)
    return outputs.class_queries_logits[:1], outputs.masks_queries_logits[:1, :, : height // 4, : width // 4]


def largest_difference(backbone: PreTrainedConfig, attend_to_padding: bool) -> tuple[float, float]:
    """Of class and mask logits, over the padded sizes."""
    torch.manual_seed(0)
    config = MaskClsConfig(backbone_config=backbone, num_labels=20, attend_to_padding=attend_to_padding)
    model = MaskClsForUniversalSegmentation(config).eval()
    image = torch.randn(1, 3, *SIZE)
    alone = logits(model, image, ALONE)
    others = [logits(model, image, padded) for padded in PADDED]
    classes, masks = (
        max(((other[part] - alone[part]).abs().max() / alone[part].std()).item() for other in others) for part in (0, 1)
    )
    return classes, masks


def main() -> None:
    table = Table(title=f"Largest difference of logits, alone or padded (torch {torch.__version__}, CPU, float32)")
    for heading in ("backbone", "attend_to_padding", "class logits", "mask logits"):
        table.add_column(heading)
    for name, backbone in BACKBONES.items():
        for attend_to_padding in (False, True):
            classes, masks = largest_difference(backbone, attend_to_padding)
            table.add_row(name, str(attend_to_padding), f"{classes:.1e}", f"{masks:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
