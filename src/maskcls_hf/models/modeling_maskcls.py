"""Mask classification for segmentation: an image becomes N probability-mask pairs (paper Section 3.2)."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers.utils.generic import can_return_tuple

from .class_rows import kept_classes, set_classes, with_columns, with_rows
from .configuration_maskcls import MaskClsConfig, checked_classes
from .contracts import PixelFeatures, SegmentLogits
from .label_tensors import as_labels
from .losses import MaskClsCriterion
from .modeling_base import MaskClsPixelLevelModel, MaskClsPreTrainedModel, image_sizes
from .outputs import MaskClsForUniversalSegmentationOutput, MaskClsModelOutput
from .segmentation_module import SegmentationModule
from .transformer_decoders import TRANSFORMER_DECODERS, DecoderOutput


class MaskClsModel(MaskClsPixelLevelModel):
    """The network without its heads: image -> per-pixel and per-segment embeddings."""

    _auto_class: Any = "AutoModel"

    def __init__(self, config):
        super().__init__(config)
        self.transformer_decoder = TRANSFORMER_DECODERS[config.transformer_decoder](
            config, self.pixel_decoder.context_channels
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
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalised images.
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
        predict: Callable[[Tensor, PixelFeatures], SegmentLogits] | None = None,
        all_layers: bool = False,
    ) -> tuple[list[Tensor], PixelFeatures, DecoderOutput]:
        """Feature maps of the backbone, what the pixel decoder and what the transformer decoder make of them.

        Args:
            all_layers: masks of all layers will be made, so that the per-pixel embeddings are worth making.
        """
        want_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        feature_maps, features = self.encode(pixel_values, pixel_mask)
        if all_layers:
            features.project()
        return feature_maps, features, self.transformer_decoder(features, predict, bool(want_attentions))


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
        self.model = MaskClsModel(config)
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
    ) -> MaskClsForUniversalSegmentationOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalised images.
            mask_labels (`list[torch.Tensor]`, *optional*): ground-truth segments of each image (M, H, W), bool; or
                a map (H, W) of their places in class_labels, -1 in none: a few bytes a pixel, whatever M.
            class_labels (`list[torch.Tensor]`, *optional*): their classes (M,), int64.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): 1 for image, 0 for padding, which must lie
                at the bottom and on the right. None: no padding.
            void_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): True where the loss must not look.
            original_sizes (`torch.Tensor` of shape `(B, 2)`, *optional*): handed through to the output.
            num_items_in_batch: counts of the whole optimiser step, see `maskcls_hf.models.losses.count_items`.
            output_auxiliary_logits (`bool`, *optional*): return the pairs of the inner layers.
        """
        if (mask_labels is None) != (class_labels is None):
            raise ValueError("mask_labels and class_labels belong together: give both or neither.")
        want_auxiliary = (
            self.config.output_auxiliary_logits if output_auxiliary_logits is None else output_auxiliary_logits
        )
        want_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        all_layers = want_auxiliary or (mask_labels is not None and self.config.deep_supervision)

        def predict(segment_embeddings: Tensor, features: PixelFeatures) -> SegmentLogits:
            return self.segmentation_module(segment_embeddings, features)

        feature_maps, features, decoded = self.model.embed(
            pixel_values, pixel_mask, output_attentions, predict, all_layers
        )
        layers = [self.segmentation_module(embedding, features) for embedding in decoded.layers(all_layers)]
        looks_inside = bool(want_hidden or decoded.attentions)
        base = self.model.as_output(feature_maps, features, decoded, want_hidden, with_embeddings=looks_inside)
        fields: dict[str, Any] = dict(base)
        if want_auxiliary:
            fields["auxiliary_logits"] = [layer.as_output() for layer in layers[:-1]]
        sizes = image_sizes(pixel_values, pixel_mask)
        if mask_labels is not None and class_labels is not None:
            padded_size = (pixel_values.shape[-2], pixel_values.shape[-1])
            if void_mask is not None:
                void_mask = as_labels(void_mask, "void_mask").to(pixel_values.device)
                if void_mask.shape != (len(pixel_values), *padded_size):
                    raise ValueError(f"void_mask {tuple(void_mask.shape)} must be {(len(pixel_values), *padded_size)}.")
            counted = self.counted_pixels(pixel_mask, void_mask)
            supervised = layers if self.config.deep_supervision else layers[-1:]
            pixels = self.segmentation_module.of_pixels(features)
            terms = self.criterion(
                supervised,
                mask_labels,
                class_labels,
                counted,
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
        )

    def counted_pixels(self, pixel_mask: Tensor | None, void_mask: Tensor | None) -> Tensor | None:
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
        module.class_predictor = with_rows(module.class_predictor, outputs)
        if module.semantic_predictor is not None:
            module.semantic_predictor = with_rows(module.semantic_predictor, kept)
        if self.config.query_priors:
            module.class_priors = with_columns(module.class_priors, outputs)
        if self.config.matching == "fixed":
            decoder = self.model.transformer_decoder
            decoder.queries_embedder = with_rows(decoder.queries_embedder, kept)
            if self.config.query_priors:
                module.class_priors = with_rows(module.class_priors, kept)
                module.mask_priors = with_rows(module.mask_priors, kept)
            self.config.num_queries = len(kept)
        set_classes(self.config, id2label)
        self.__dict__.pop("criterion", None)
        return self
