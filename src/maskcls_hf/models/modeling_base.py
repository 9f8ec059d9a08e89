"""What all models share: loading, initialisation, and the pixel-level module (paper Section 3.2)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .backbones import build_backbone, check_maps, dry_run, freeze_batch_norm, freeze_unused, largest_stride
from .checkpoint_manifest import require_whole
from .configuration_maskcls import MaskClsConfig
from .contracts import PixelFeatures, ValidRegion
from .interchange_maskformer import holds_maskformer, load_maskformer
from .layers import QueryTable, XavierLinear
from .outputs import MaskClsModelOutput
from .padding_mask_hooks import PaddingMaskHooks, checkpoint_with_batch, sees_padding
from .per_pixel_networks import build_per_pixel_network
from .pixel_decoders import PIXEL_DECODERS
from .transformer_decoders import DecoderOutput

logger = logging.get_logger(__name__)


class MaskClsPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving."""

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
        """Load a checkpoint of this package or of transformers' MaskFormer (`model_type` "maskformer").

        Arguments and result are those of `PreTrainedModel.from_pretrained`.

        Raises:
            DamagedCheckpoint: an OSError; the files are not those of the checkpoint's manifest.
        """
        path = pretrained_model_name_or_path
        require_whole(path, subfolder=kwargs.get("subfolder") or "")
        if cls.config_class.model_type != MaskClsConfig.model_type or not holds_maskformer(path, kwargs):
            return super().from_pretrained(path, *model_args, config=config, **kwargs)
        state, unknown = load_maskformer(path, kwargs)
        loaded = super().from_pretrained(None, *model_args, config=config or path, state_dict=state, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(loaded, tuple):
            loaded[1]["unexpected_keys"] = {*loaded[1]["unexpected_keys"], *unknown}
        model.config.name_or_path = model.name_or_path = str(path)
        return loaded

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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Rules of the paper's code: Xavier in the transformers, Kaiming (a = 1) in the pixel decoder, N(0, 1) for
        queries, torch's own defaults for the segmentation module."""
        # Only by the module that owns a parameter: transformers skips modules without one in code outside its package.
        if isinstance(module, XavierLinear):
            init.xavier_uniform_(module.weight, gain=self.config.init_xavier_std * module.gain)
            if module.zero_bias:
                init.zeros_(module.bias)
            else:
                uniform_bias(module)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            uniform_bias(module)
        elif isinstance(module, QueryTable):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
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


def uniform_bias(linear: nn.Linear) -> None:
    bound = 1 / math.sqrt(linear.in_features)
    init.uniform_(linear.bias, -bound, bound)


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
        if config.freeze_batch_norm:
            freeze_batch_norm(self.backbone)
        self.padding_masks = PaddingMaskHooks(self.backbone, attend_to_filling=is_converted)
        seeing = sees_padding(self.backbone)
        if seeing is not None and not config.attend_to_padding:
            logger.warning_once(
                f"{seeing} may look at the padding of a batch: an image can give slightly different results alone and "
                "in a batch with larger ones. Where that matters, use batches of images of one size."
            )
        self.trimming = None if seeing is not None or tried is None else largest_stride(tried[0])
        self.pixel_decoder = PIXEL_DECODERS[config.pixel_decoder](config, self.backbone.channels)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.config.freeze_batch_norm:
            freeze_batch_norm(self.backbone)
        return self

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[list[Tensor], PixelFeatures]:
        """Feature maps of the backbone, and what the pixel decoder makes of them."""
        seen = None if self.config.attend_to_padding else ValidRegion.of_batch(pixel_values, pixel_mask)
        if pixel_values.device.type == "cpu" and not torch.is_grad_enabled():
            # Max pooling is ten times as fast in this layout. Not with gradients: those of a strided 1x1 convolution of
            # under 16 channels write past their memory (github.com/uxlfoundation/oneDNN/issues/6035).
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        feature_maps = self.backbone_maps(pixel_values, seen)
        region = None if seen is None or seen.complete else seen
        return feature_maps, self.pixel_decoder(feature_maps, region)

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

    def as_output(
        self,
        feature_maps: list[Tensor],
        features: PixelFeatures,
        decoded: DecoderOutput | None,
        output_hidden_states: bool | None,
        with_embeddings: bool = True,
    ) -> MaskClsModelOutput:
        """`with_embeddings=False`: without per-pixel embeddings, unless they were made already."""
        embeddings = features.project() if with_embeddings else features.per_pixel_embeddings
        fields: dict[str, Any] = {}
        transformer_states: tuple[Tensor, ...] = ()
        if decoded is not None:
            fields["transformer_decoder_last_hidden_state"] = decoded.segment_embeddings[-1]
            transformer_states = (torch.zeros_like(decoded.segment_embeddings[0]), *decoded.segment_embeddings)
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            fields["encoder_hidden_states"] = tuple(feature_maps)
            fields["pixel_decoder_hidden_states"] = tuple(features.pyramid)
            fields["transformer_decoder_hidden_states"] = transformer_states
            fields["hidden_states"] = (*feature_maps, *features.pyramid, *transformer_states)
        if decoded is not None and decoded.attentions:
            fields["attentions"] = tuple(decoded.attentions[0::2])
            fields["cross_attentions"] = tuple(decoded.attentions[1::2])
        return MaskClsModelOutput(
            encoder_last_hidden_state=feature_maps[-1],
            pixel_decoder_last_hidden_state=embeddings,
            **fields,
        )


def image_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> dict[str, Any]:
    """`valid_sizes` and `padded_sizes` (B, 2) of a batch."""
    return {
        "valid_sizes": ValidRegion.of_batch(pixel_values, pixel_mask).sizes,
        "padded_sizes": ValidRegion.of_batch(pixel_values, None).sizes,
    }
