"""The backbone: anything of transformers' AutoBackbone with stages, or a plain ViT."""

import copy
import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BackboneOutput

from .layers import ValidRegion, masked_group_norm


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
    backbone = auto_backbone(config)
    patch_size = patch_size_of(backbone)
    if patch_size is not None:
        _check_plain_vit(backbone)
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
        backbone.embedder.embedder = _DeepStem(config.num_channels, config.embedding_size)
    elif stem_type != "basic":
        raise ValueError(f"backbone_config: stem_type={stem_type!r} must be one of ['basic', 'deep'].")
    dilations = getattr(config, "last_stage_dilations", None)
    if dilations is not None:
        _dilate(backbone.encoder.stages[-1].layers, dilations)
    return backbone


def auto_backbone(config: PreTrainedConfig) -> Any:
    """Of AutoBackbone; timm's ViTs for images of any size."""
    backbone: Any = AutoBackbone.from_config(config, trust_remote_code=False)
    of_timm = getattr(getattr(backbone, "_backbone", None), "model", None)
    if getattr(of_timm, "dynamic_img_size", None) is False and patch_size_of(backbone) is not None:
        return AutoBackbone.from_config(config, trust_remote_code=False, dynamic_img_size=True)
    return backbone


def _dilate(blocks: Any, dilations: list[int]) -> None:
    """Dilate the 3x3 convolution of each bottleneck block; the sizes of the feature maps stay."""
    if len(dilations) != len(blocks) or len(blocks[0].layer) != 3:
        raise ValueError(
            f"backbone_config: last_stage_dilations={dilations} must have one number for each bottleneck block of the "
            f"last stage, {len(blocks)}."
        )
    for block, dilation in zip(blocks, dilations, strict=True):
        convolution = block.layer[1].convolution
        convolution.dilation = convolution.padding = (dilation, dilation)


class _DeepStem(nn.Sequential):
    """Three 3x3 convolutions, the first with stride 2: (B, 3, H, W) -> (B, out_channels, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int):
        half = out_channels // 2
        sizes = [(in_channels, half, 2), (half, half, 1), (half, out_channels, 1)]
        super().__init__(*(_ConvBatchNormReLU(a, b, stride) for a, b, stride in sizes))


class _ConvBatchNormReLU(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.conv(features)).relu()


def dry_run(backbone: Any, channels: int) -> tuple[list[Tensor], dict[str, Tensor]] | None:
    """Feature maps of a backbone, and the parameters that they are made of, on meta tensors: shapes and the graph of
    gradients, while nothing is computed. None: it looks at values, or does not take images of this size.
    """
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
    """Make every parameter that no map of a dry run depends on a buffer: checkpoints keep it, and it never learns.

    As a parameter, without a gradient, it would stop DistributedDataParallel.

    Args:
        backbone: changed in place.
        maps: feature maps of [`dry_run`].
        parameters: those that the maps were made of, by their names in the backbone.
    """
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


def freeze(backbone: Any) -> None:
    """Make a backbone keep all weights and statistics as loaded, without dropout; of a plain ViT all but the pyramid
    over it, which is new.
    """
    getattr(backbone, "vit", backbone).eval().requires_grad_(False)


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
                nn.Sequential(
                    upsample2x(last, last // 2), PixelNorm(last // 2), nn.GELU(), upsample2x(last // 2, last // 4)
                ),
                upsample2x(last, last // 2),
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


def upsample2x(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """A transposed convolution: (B, in_channels, h, w) -> (B, out_channels, 2 h, 2 w)."""
    return nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)


class PixelNorm(nn.LayerNorm):
    """Layer norm over the channels of each cell: (B, C, h, w) -> (B, C, h, w)."""

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
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


def _check_plain_vit(vit: Any) -> None:
    """A plain ViT must give its last map, as a map.

    Raises:
        `ValueError`: it does not.
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


class _Current(threading.local):
    """The batch whose forward pass runs in this thread. Modules keep nothing of a call: threads share them."""

    batch: "_PaddedBatch | None" = None


CURRENT = _Current()


class _PaddedBatch(TorchFunctionMode):
    """Where a batch is image; `with` it, the layers of a backbone look at nothing else.

    Hooks on its layers ask it (`PaddingMaskHooks`). Functions that look at whole maps, whichever module calls them, are
    met as a mode of torch: means, maxima and norms over rows and columns (squeeze-and-excitation and its kin, response
    norms), group norms, average pooling, filling up. `watch_functions=False` spares a backbone without them the cost.
    """

    def __init__(self, region: ValidRegion | None, watch_functions: bool):
        super().__init__()
        self.region = region  # None: padding is to be seen
        self.watch_functions = watch_functions and region is not None and not region.complete
        self.outer: list[_PaddedBatch | None] = []
        self.outsides: dict[tuple[Any, ...], Tensor] = {}
        self.filled: Tensor | None = None  # the last map that was filled up, zero in its padding already

    def __enter__(self) -> "_PaddedBatch":
        if self.watch_functions:
            super().__enter__()
        self.outer.append(CURRENT.batch)
        CURRENT.batch = self
        return self

    def __exit__(self, *error: Any) -> None:
        CURRENT.batch = self.outer.pop()
        if self.watch_functions:
            super().__exit__(*error)

    def outside(self, height: int, width: int, device: torch.device) -> Tensor | None:
        """True outside the images on a grid of cells (B, height, width); None: nothing is."""
        if self.region is None or self.region.complete:
            return None
        grid = (height, width, device)
        is_known = not torch.compiler.is_compiling()  # while a program is traced, sizes may be symbols
        outside = self.outsides.get(grid) if is_known else None
        if outside is None:
            outside = ~self.region.mask_at(height, width).to(device)
            if is_known:
                self.outsides[grid] = outside
        return outside

    def outside_of(self, features: Tensor) -> Tensor | None:
        """The same for a map (B, C, h, w): (B, 1, h, w)."""
        outside = self.outside(features.shape[2], features.shape[3], features.device)
        return None if outside is None else outside[:, None]

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        guard = GUARDED_FUNCTIONS.get(function, unguarded)
        return guard(self, function, *args, **kwargs or {})


def unguarded(batch: _PaddedBatch, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that does not look at whole maps, as it is."""
    return function(*args, **kwargs)


def reduce(
    nothing: float | None,
    batch: _PaddedBatch,
    function: Callable[..., Any],
    features: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """A sum, norm or maximum over rows and columns, to which padding adds `nothing` (None: the least value).

    Args:
        nothing: what padding counts as. None: the least value of the type.
        batch: where the maps are image.
        function: of torch, called with `features` and the further arguments.
        features: (B, C, h, w) or (B, h, w, C).
        args: further arguments of the function, such as the axes.
        kwargs: the same by their names.
    """
    axes = _spatial_axes(features, args[0] if args and function is not torch.Tensor.norm else kwargs.get("dim"))
    if axes is None:
        return function(features, *args, **kwargs)
    outside = batch.outside(features.shape[axes[0]], features.shape[axes[1]], features.device)
    if outside is None:
        return function(features, *args, **kwargs)
    outside = outside[..., None] if axes == (1, 2) else outside[:, None]
    nothing = torch.finfo(features.dtype).min if nothing is None else nothing
    result = function(features.masked_fill(outside, nothing), *args, **kwargs)
    if function not in MEANS:
        return result
    # Where the mean over rows alone is taken (FocalNet), that over columns follows: it gets its share here too.
    share = (~outside).float().mean(axes, keepdim=True).clamp(min=1e-12).to(result.dtype)
    return result / (share if result.ndim == 4 else share.flatten(1))


def _spatial_axes(features: Tensor, dim: Any) -> tuple[int, int] | None:
    """Axes of rows and columns, if a reduction over `dim` is one over them: of (B, C, h, w) or of (B, h, w, C)."""
    if features.ndim != 4 or dim is None:
        return None
    axes = sorted(axis % 4 for axis in ([dim] if isinstance(dim, int) else dim))
    return {(2, 3): (2, 3), (1, 2): (1, 2), (2,): (2, 3)}.get(tuple(axes))


def _pool_to_one(
    batch: _PaddedBatch, function: Callable[..., Any], features: Tensor, output_size: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """Adaptive pooling, where it leaves one cell, is a mean or a maximum."""
    outside = batch.outside_of(features) if output_size in (1, (1, 1), [1, 1]) and features.ndim == 4 else None
    if outside is None:
        return function(features, output_size, *args, **kwargs)
    if function is F.adaptive_avg_pool2d:
        return reduce(0.0, batch, torch.Tensor.mean, features, (2, 3), keepdim=True)
    return function(features.masked_fill(outside, torch.finfo(features.dtype).min), output_size, *args, **kwargs)


def _group_norm(
    batch: _PaddedBatch,
    function: Callable[..., Any],
    features: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    outside = batch.outside_of(features) if features.ndim == 4 else None
    if outside is None:
        return function(features, num_groups, weight, bias, eps)
    return masked_group_norm(features, ~outside, num_groups, weight, bias, eps)


def _fill_up(
    batch: _PaddedBatch,
    function: Callable[..., Any],
    features: Tensor,
    pad: Any,
    mode: str = "constant",
    value: Any = None,
) -> Tensor:
    """Rows and columns added to a map: padding becomes as they are."""
    outside = batch.outside_of(features) if features.ndim == 4 and len(pad) == 4 and mode == "constant" else None
    if outside is None:
        return function(features, pad, mode, value)
    nothing = least(features) if value == float("-inf") else value or 0.0
    batch.filled = function(torch.where(outside, nothing, features), pad, mode, value)
    return batch.filled


def _average_pool(
    batch: _PaddedBatch,
    function: Callable[..., Any],
    features: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """What a window holds beyond the image is zero where it would be beyond the border too, else it does not count."""
    options = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    outside = None if features is batch.filled or features.ndim != 4 else batch.outside_of(features)
    if outside is None:
        return function(features, *options)
    pooled = function(features.masked_fill(outside, 0.0), *options)
    if divisor_override is not None or (count_include_pad and padding not in (0, (0, 0))):
        return pooled
    return pooled / function((~outside).to(features.dtype), *options).clamp(min=1e-4)


MEANS = (torch.Tensor.mean, torch.mean)
GUARDED_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((*MEANS, torch.Tensor.norm, torch.linalg.vector_norm), partial(reduce, 0.0)),
    **dict.fromkeys((torch.Tensor.amax, torch.amax), partial(reduce, None)),
    **dict.fromkeys((F.adaptive_avg_pool2d, F.adaptive_max_pool2d), _pool_to_one),
    F.group_norm: _group_norm,
    F.pad: _fill_up,
    F.avg_pool2d: _average_pool,
}


def least(features: Tensor) -> Tensor:
    """(B, C, h, w) -> the least value of each map (B, C, 1, 1): it never wins where a window has a cell of the image,
    and stays finite where it has none.
    """
    return features.amin((2, 3), keepdim=True)


# Backbones of transformers without any of GUARDED_FUNCTIONS.
WITHOUT_GLOBAL_FUNCTIONS = ("convnext", "dinov3_convnext", "maskformer-swin", "resnet", "swin", "swinv2")
# By class name, so that a backbone is imported (and timm installed) only where it is used.
PATCH_MERGINGS = ("SwinPatchMerging", "Swinv2PatchMerging", "MaskFormerSwinPatchMerging")
WINDOW_LAYERS = ("SwinLayer", "Swinv2Layer", "MaskFormerSwinLayer")


class PaddingMaskHooks:
    """Forward hooks on every layer of a backbone that mixes cells, and the `_PaddedBatch` that they ask.

    What enters a convolution is zero outside the image (for max pooling: the least value), as beyond the border of an
    image that is not padded. The windows of Swin and its kin do not attend to cells outside, those that fill up a
    window included (unless `attend_to_filling`, as transformers' Swin does). Other attention is left alone; which
    backbones see padding, `sees_padding` says.
    """

    def __init__(self, backbone: nn.Module, attend_to_filling: bool = False):
        self.attend_to_filling = attend_to_filling
        self.watch_functions = False
        stride = 1  # of the layer, in pixels
        module: Any
        for module in backbone.modules():
            name = type(module).__name__
            if isinstance(module, PreTrainedModel):
                self.watch_functions |= module.config.model_type not in WITHOUT_GLOBAL_FUNCTIONS
                stride = getattr(module.config, "patch_size", 1)
            if isinstance(module, (nn.Conv2d, nn.MaxPool2d)) and as_pair(module.kernel_size) > as_pair(module.stride):
                module.register_forward_pre_hook(_fill_windows)
            elif isinstance(module, nn.ConstantPad2d):  # torch.compile does not show F.pad to modes
                module.register_forward_pre_hook(_fill_before_padding)
                module.register_forward_hook(_note_filled)
            elif name in PATCH_MERGINGS:
                module.register_forward_pre_hook(_fill_merged)
                stride *= 2
            elif name in WINDOW_LAYERS:
                module.attention.register_forward_pre_hook(partial(self.mask_keys, module, stride))
            elif name == "GlobalContext" and isinstance(getattr(module, "conv_attn", None), nn.Module):
                module.conv_attn.register_forward_hook(_hide_outside)

    def batch(self, region: ValidRegion | None) -> _PaddedBatch:
        """What a forward pass is made `with`; without a region padding is seen."""
        return _PaddedBatch(region, self.watch_functions)

    def mask_keys(
        self, layer: Any, stride: int, attention: nn.Module, inputs: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """Masks the keys that are not image.

        Args:
            layer: of Swin, which has the attention.
            stride: of the layer, in pixels of the image.
            attention: the module before which this runs.
            inputs: windows (B * number of windows, L, C), and the mask of shifted windows or None.

        Returns:
            What the attention gets instead. None: nothing is to be masked.
        """
        windows, shift_mask = inputs  # (B * number of windows, L, C), (number of windows, L, L), L = window ** 2
        batch = _current_batch()
        region = None if batch is None else batch.region
        if region is None:
            return None
        height, width = (-(-size // stride) for size in region.padded_size)
        window, shift = layer.window_size, layer.shift_size
        filling = (0, -width % window, 0, -height % window)
        if region.complete and (self.attend_to_filling or not any(filling)):
            return None
        inside = region.mask_at(height, width).to(windows.device)
        inside = F.pad(inside, filling, value=self.attend_to_filling)  # (B, h, w) in whole windows
        inside = inside.roll((-shift, -shift), (1, 2))
        inside = inside.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)
        keys = inside.flatten(3).flatten(0, 2)  # (B * number of windows, L)
        if type(layer).__name__ == "Swinv2Layer":  # compares directions; zeros have none: NaN in float16
            windows = windows.masked_fill(~keys[:, :, None], 1.0)
        # Finite, so that windows without any image stay finite too.
        mask = torch.zeros_like(keys, dtype=windows.dtype).masked_fill(~keys, -1e4)[:, None]
        if shift_mask is None:
            return windows, mask.expand(-1, keys.shape[1], -1)
        return windows, mask + shift_mask.repeat(keys.shape[0] // shift_mask.shape[0], 1, 1)


def _current_batch() -> _PaddedBatch | None:
    """The batch of this thread's forward pass.

    Raises:
        `RuntimeError`: a layer runs again in the backward pass, and nothing says on which batch.
    """
    batch = CURRENT.batch
    if batch is None and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "A layer of the backbone runs again in the backward pass, without knowing where its batch is padded. "
            "Checkpoint activations by model.gradient_checkpointing_enable(), or whole calls of the model."
        )
    return batch


def checkpoint_with_batch(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A function that checkpoints activations as `checkpoint` does, and runs layers again on the batch of the first
    time, in whichever thread.
    """

    def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        batch = CURRENT.batch or _PaddedBatch(None, watch_functions=False)

        def with_batch(*inner_args: Any, **inner_kwargs: Any) -> Any:
            if CURRENT.batch is batch:  # the first time
                return function(*inner_args, **inner_kwargs)
            with _PaddedBatch(batch.region, batch.watch_functions):
                return function(*inner_args, **inner_kwargs)

        return checkpoint(with_batch, *args, **kwargs)

    return checkpointed


def _fill_windows(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Of a convolution or max pooling."""
    features, *rest = inputs  # (B, C, h, w)
    batch = _current_batch()
    outside = None if batch is None or features is batch.filled else batch.outside_of(features)
    if outside is None:
        return None
    nothing = least(features) if isinstance(module, nn.MaxPool2d) and not hasattr(module, "pad") else 0.0
    return torch.where(outside, nothing, features), *rest


def _fill_before_padding(module: nn.ConstantPad2d, inputs: tuple[Tensor]) -> Tensor | None:
    batch = _current_batch()
    outside = None if batch is None else batch.outside_of(inputs[0])
    return None if outside is None else torch.where(outside, module.value, inputs[0])


def _note_filled(module: nn.Module, inputs: tuple[Tensor], features: Tensor) -> None:
    batch = _current_batch()
    if batch is not None and batch.region is not None:
        batch.filled = features


def _fill_merged(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    features, (height, width) = inputs  # (B, h * w, C)
    batch = _current_batch()
    outside = None if batch is None else batch.outside(height, width, features.device)
    if outside is None:
        return None
    return features.masked_fill(outside.flatten(1)[:, :, None], 0.0), (height, width)


def _hide_outside(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor | None:
    """Of a softmax over the cells (B, 1, h, w)."""
    batch = _current_batch()
    outside = None if batch is None else batch.outside_of(logits)
    return None if outside is None else logits.masked_fill(outside, torch.finfo(logits.dtype).min)


def as_pair(size: int | Sequence[int]) -> tuple[int, ...]:
    """Height and width, of one number for both or of two."""
    return (size, size) if isinstance(size, int) else tuple(size)


# model_type of transformers -> classes of it that the hooks must find: an upstream rename is noticed.
GUARDED_FAMILIES: dict[str, tuple[str, ...]] = {
    "bit": (),
    "convnext": (),
    "convnextv2": (),
    "dinov3_convnext": (),
    "focalnet": (),
    "hgnet_v2": (),
    "maskformer-swin": ("MaskFormerSwinPatchMerging", "MaskFormerSwinLayer"),
    "pp_lcnet": (),
    "pp_lcnet_v3": (),
    "pp_lcnet_v4": (),
    "resnet": (),
    "rt_detr_resnet": (),
    "swin": ("SwinPatchMerging", "SwinLayer"),
    "swinv2": ("Swinv2PatchMerging", "Swinv2Layer"),
    "textnet": (),
    "timm_backbone": (),
}
# Files of timm whose layers are guarded: all but what they call attention.
GUARDED_TIMM_FILES = frozenset(
    [
        # models
        *("_efficientnet_blocks", "_features", "byobnet", "convnext", "cspnet", "cspnext", "densenet", "dla", "dpn"),
        *("efficientnet", "fasternet", "fastvit", "focalnet", "ghostnet", "hgnet", "hrnet", "inception_next"),
        *("lcnetv2", "metaformer", "mobilenetv3", "nfnet", "rdnet", "regnet", "repghost", "repvit", "res2net"),
        *("resnest", "resnet", "resnetv2", "rexnet", "selecsls", "senet", "sknet", "starnet", "tresnet", "vovnet"),
        "xception_aligned",
        # layers
        *("activations", "activations_me", "adaptive_avgmax_pool", "blur_pool", "cbam", "classifier", "conv2d_same"),
        *("conv_bn_act", "drop", "eca", "format", "global_context", "grn", "helpers", "layer_scale", "mixed_conv2d"),
        *("mlp", "norm", "norm_act", "padding", "pool2d_same", "selective_kernel", "separable_conv"),
        *("space_to_depth", "split_attn", "squeeze_excite", "std_conv", "weight_init"),
    ]
)
# What they call attention, and is a mean over the map or over the channels.
POOLED_ATTENTION = (
    *("ChannelAttn", "LightChannelAttn", "LightSpatialAttn", "SpatialAttn"),
    *("SelectiveKernelAttn", "SplitAttn"),
)


def sees_padding(backbone: nn.Module) -> str | None:
    """What part of a backbone may look at padding, for nothing is known to keep it out; None: there is none."""
    names = {type(module).__name__ for module in backbone.modules()}
    families = [module.config for module in backbone.modules() if isinstance(module, PreTrainedModel)]
    for config in families:
        required = GUARDED_FAMILIES.get(config.model_type)
        if required is None or not names.issuperset(required):
            return f"the {config.model_type} backbone"
        if config.model_type == "bit" and config.global_padding == "SAME" and not config.embedding_dynamic_padding:
            return "the bit backbone with global_padding='SAME'"  # a pooling without padding shifts the grid
    for module in backbone.modules():
        package, file = (type(module).__module__.split(".")[place] for place in (0, -1))
        name = type(module).__name__
        is_attention = ("Attention" in name or "Attn" in name) and name not in POOLED_ATTENTION
        if package == "timm" and (file not in GUARDED_TIMM_FILES or is_attention):
            return f"timm's {name}"
    return None if families else f"the backbone {type(backbone).__name__}"
