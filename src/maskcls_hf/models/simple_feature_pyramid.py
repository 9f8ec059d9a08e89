"""A feature pyramid of a plain ViT, whose maps all have one stride (ViTDet, arXiv 2203.16527, Section 3)."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BackboneOutput

CELLS = (8, 4, 2, 1)  # of the levels along two patches


class SimpleFeaturePyramid(nn.Module):
    """A plain ViT as a backbone of four maps with strides p/4, p/2, p and 2p, p the patch size.

    All are made of the ViT's last map: by two transposed convolutions (with norm and GELU between), by one, as it is,
    and by max pooling. The 1x1 and 3x3 convolutions that the paper puts on each level are left out: the FPN pixel
    decoder brings its own.

    Images are filled up with zeros to whole patches at the bottom and the right, and the maps cropped to
    ceil(size / stride). So no pixel is lost, and a map stands for less than one cell more than the image. Padding to
    multiples of 2p (`size_divisor` of the image processor) makes both the same.

    The ViT sees padding: nothing masks its attention, and its positions are relative to the padded image.

    Args:
        vit: a backbone of `AutoBackbone`.
        patch_size: (height, width) in pixels.
    """

    def __init__(self, vit: Any, patch_size: tuple[int, int]):
        super().__init__()
        last = vit.channels[-1]
        self.patch_size = patch_size
        self.channels = [last // 4, last // 2, last, last]
        self.vit = vit
        self.feature_pyramid = nn.ModuleList(
            [
                nn.Sequential(double(last, last // 2), PixelNorm(last // 2), nn.GELU(), double(last // 2, last // 4)),
                double(last, last // 2),
                nn.Identity(),
                nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True),
            ]
        )

    def forward(self, pixel_values: Tensor) -> BackboneOutput:
        """(B, 3, H, W) -> `feature_maps`, finest first."""
        (height, width), (rows, columns) = pixel_values.shape[-2:], self.patch_size
        whole = F.pad(pixel_values, (0, -width % columns, 0, -height % rows))
        features = self.vit(whole).feature_maps[-1]  # (B, C, h, w)
        maps = []
        for level, cells in zip(self.feature_pyramid, CELLS, strict=True):
            size = -(-height * cells // (2 * rows)), -(-width * cells // (2 * columns))
            maps.append(level(features)[..., : size[0], : size[1]])
        return BackboneOutput(feature_maps=tuple(maps))


def double(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)


class PixelNorm(nn.LayerNorm):
    """Layer norm over the channels of each cell: (B, C, h, w) -> (B, C, h, w)."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.movedim(1, -1)).movedim(-1, 1)


def patch_size_of(backbone: Any) -> tuple[int, int] | None:
    """Patch size (height, width) of a plain ViT; None: a backbone with stages of several strides."""
    config = backbone.config
    if config.model_type == "timm_backbone":
        strides = {stage["reduction"] for stage in backbone._backbone.feature_info.info}
        return (min(strides), min(strides)) if len(strides) == 1 else None
    if not is_plain_vit(config):
        return None
    patch_size = config.patch_size
    return (patch_size, patch_size) if isinstance(patch_size, int) else (patch_size[0], patch_size[1])


def is_plain_vit(config: PreTrainedConfig) -> bool:
    """Whether a configuration of transformers has patches and no stages; False for timm's, which do not say."""
    return hasattr(config, "patch_size") and not hasattr(config, "depths")


def check_plain_vit(vit: Any) -> None:
    """
    Raises:
        `ValueError`: it does not give its last map.
    """
    config = vit.config
    if config.model_type == "timm_backbone":
        return
    if config.out_features[-1] != vit.stage_names[-1]:
        raise ValueError(
            f"backbone_config (model_type={config.model_type!r}): of a plain ViT the last map is taken, but "
            f"out_features={config.out_features} ends before the last layer, {vit.stage_names[-1]!r}. Leave "
            "out_features and out_indices out."
        )
    if not getattr(config, "reshape_hidden_states", True):
        raise ValueError(f"backbone_config (model_type={config.model_type!r}) needs reshape_hidden_states=True.")
