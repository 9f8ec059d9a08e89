"""The backbone: anything of transformers' AutoBackbone with stages, or a plain ViT."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedConfig

from .simple_feature_pyramid import SimpleFeaturePyramid, check_plain_vit, patch_size_of


def build_backbone(config: PreTrainedConfig) -> Any:
    """Backbone of a `backbone_config`, without weights: `.channels`, and `__call__(pixel_values).feature_maps`, finest
    first.

    A plain ViT (a `patch_size` and no stages; in timm the same stride everywhere) gets a [`SimpleFeaturePyramid`].
    timm's ViTs take images of any size (`dynamic_img_size`); its other transformers, Hiera and ViTPose only those of
    their own size. ConvNeXts do not see the rows and columns that their strides leave over: pad images to multiples of
    32, as the image processor does.

    The paper's R101c is DeepLab's ResNet: a ResNet configuration with `stem_type="deep"`, a stem of three
    convolutions, and `last_stage_dilations=[1, 2, 4]`, the multi-grid of its last three blocks.

    Raises:
        `ValueError`: a backbone with stages gives fewer than two feature maps, a plain ViT not its last one, or one of
            these two fields has a wrong value.
    """
    if config._attn_implementation == "sdpa":
        config._attn_implementation = None  # asked of the whole model: the best that this backbone has
    backbone: Any = AutoBackbone.from_config(config, trust_remote_code=False)
    patch_size = patch_size_of(backbone)
    if patch_size is not None:
        of_timm = getattr(backbone, "_backbone", None)
        if of_timm is not None and getattr(of_timm.model, "dynamic_img_size", None) is False:
            backbone = AutoBackbone.from_config(config, trust_remote_code=False, dynamic_img_size=True)
        check_plain_vit(backbone)
        return SimpleFeaturePyramid(backbone, patch_size)
    if len(backbone.channels) < 2:
        raise ValueError(
            f"The pixel decoder needs a feature pyramid, but backbone_config (model_type={config.model_type!r}) gives "
            f"{len(backbone.channels)} feature map: list its stages in out_features, or in out_indices for timm. (Only "
            "a plain ViT, which has a patch_size and no stages, gets its pyramid from one map.)"
        )
    if config.model_type == "swin":
        backbone.swin.layernorm = nn.Identity()  # its output is thrown away: each stage has a norm of its own
    stem_type = getattr(config, "stem_type", "basic") if config.model_type == "resnet" else "basic"
    if stem_type == "deep":
        backbone.embedder.embedder = DeepStem(config.num_channels, config.embedding_size)
    elif stem_type != "basic":
        raise ValueError(f"backbone_config: stem_type={stem_type!r} must be one of ['basic', 'deep'].")
    dilations = getattr(config, "last_stage_dilations", None)
    if dilations is not None:
        dilate(backbone.encoder.stages[-1].layers, dilations)
    return backbone


def dilate(blocks: Any, dilations: list[int]) -> None:
    """Dilate the 3x3 convolution of each bottleneck block; the sizes of the feature maps stay."""
    if len(dilations) != len(blocks) or len(blocks[0].layer) != 3:
        raise ValueError(
            f"backbone_config: last_stage_dilations={dilations} must have one number for each bottleneck block of the "
            f"last stage, {len(blocks)}."
        )
    for block, dilation in zip(blocks, dilations, strict=True):
        convolution = block.layer[1].convolution
        convolution.dilation = convolution.padding = (dilation, dilation)


class DeepStem(nn.Sequential):
    """Three 3x3 convolutions, the first with stride 2: (B, 3, H, W) -> (B, out_channels, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int):
        half = out_channels // 2
        sizes = [(in_channels, half, 2), (half, half, 1), (half, out_channels, 1)]
        super().__init__(*(ConvBatchNormReLU(a, b, stride) for a, b, stride in sizes))


class ConvBatchNormReLU(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.conv(features)).relu()


def dry_run(backbone: Any, channels: int) -> tuple[list[Tensor], dict[str, Tensor]] | None:
    """Feature maps of a backbone, and the parameters that they are made of, on meta tensors: shapes and the graph of
    gradients, while nothing is computed. None: it looks at values, or does not take images of this size."""
    side = getattr(backbone, "image_size", DRY_RUN_SIDE)  # of a network that takes one size only
    parameters = {name: torch.empty_like(p, device="meta").requires_grad_() for name, p in backbone.named_parameters()}
    stand_ins = {id(p): parameters[name] for name, p in backbone.named_parameters()}
    stand_ins |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in backbone.buffers()}
    copied = copy.deepcopy(backbone, memo=stand_ins).eval()  # some modules keep what they compute once
    # Not on the device meta by default: BEiT of transformers keeps an index for all models of the process.
    with torch.device("cpu"), torch.enable_grad():
        try:
            return list(copied(torch.empty(2, channels, side, side, device="meta")).feature_maps), parameters
        except Exception:  # whatever a network raises of what it cannot take
            return None


DRY_RUN_SIDE = 224


def check_maps(backbone: Any, maps: list[Tensor]) -> None:
    """Raise `ValueError` unless the maps of a dry run are (B, C, h, w) with the channels that the backbone names."""
    shapes = [tuple(m.shape) for m in maps]
    if any(len(s) != 4 for s in shapes) or [s[1] for s in shapes] != list(backbone.channels):
        raise ValueError(
            f"backbone_config: the pixel decoder takes maps (B, C, h, w) with C of {list(backbone.channels)}, but "
            f"{type(backbone).__name__} gives {shapes}, channels last perhaps. Use another backbone."
        )


def largest_stride(maps: list[Tensor]) -> int:
    """Of the maps of a dry run: a power of two. 32 at least, as a network may have coarser maps than it gives."""
    return max(32, 2 ** math.ceil(math.log2(DRY_RUN_SIDE / maps[-1].shape[2])))


def freeze_unused(backbone: Any, maps: list[Tensor], parameters: dict[str, Tensor]) -> None:
    """Make every parameter that no map of a dry run depends on a buffer: checkpoints keep it, and it never learns. As a
    parameter, without a gradient, it would stop DistributedDataParallel."""
    seen, nodes = set(), [m.grad_fn for m in maps]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes.extend(next_node for next_node, _ in node.next_functions)
    used = {id(node.variable) for node in seen if hasattr(node, "variable")}
    for path in [path for path, parameter in parameters.items() if id(parameter) not in used]:
        parent, _, name = path.rpartition(".")
        module = backbone.get_submodule(parent)
        module.register_buffer(name, module._parameters.pop(name).detach())


def freeze_batch_norm(backbone: nn.Module) -> None:
    """Make every batch norm use its loaded statistics and never learn."""
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.requires_grad_(False)
