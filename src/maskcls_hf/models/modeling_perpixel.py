"""Per-pixel classification: the paper's baselines, made of the same parts (Section 4.1)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.utils.generic import can_return_tuple

from .class_rows import kept_classes, set_classes, with_rows
from .configuration_maskcls import checked_classes
from .configuration_perpixel import PerPixelConfig, check_several_classes
from .contracts import layer_suffix
from .layers import MLP
from .losses import checked_pixel_labels, per_pixel_loss, pixels_of_step
from .modeling_base import MaskClsPixelLevelModel, MaskClsPreTrainedModel, image_sizes
from .modeling_maskcls import MaskClsModel
from .outputs import PerPixelForSemanticSegmentationOutput


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
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalised images.
            labels (`torch.Tensor` of shape `(B, H, W)`, *optional*): classes, `semantic_loss_ignore_index` where the
                loss must not look (void, padding).
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): 1 for image, 0 for padding, which must lie
                at the bottom and on the right. None: no padding.
            original_sizes (`torch.Tensor` of shape `(B, 2)`, *optional*): handed through to the output.
            num_items_in_batch: labelled pixels of the whole optimiser step, see `count_pixels`.
        """
        if labels is not None:
            shape = (len(pixel_values), pixel_values.shape[-2], pixel_values.shape[-1])
            ignore_index = self.config.semantic_loss_ignore_index
            labels = checked_pixel_labels(labels, self.config.num_labels, ignore_index, shape).to(pixel_values.device)
        want_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        all_layers = labels is not None and self.config.deep_supervision
        if self.config.transformer_module:
            feature_maps, features, decoded = self.model.embed(
                pixel_values, pixel_mask, output_attentions, all_layers=all_layers
            )
            layers = [features.mask_logits(self.mask_embedder(layer)) for layer in decoded.layers(all_layers)]
        else:
            decoded = None
            feature_maps, features = self.model.encode(pixel_values, pixel_mask)
            layers = [self.classifier(features.project()).contiguous()]
        base = self.model.as_output(feature_maps, features, decoded, want_hidden, with_embeddings=False)
        terms = None if labels is None else self.losses(layers, labels, num_items_in_batch)
        return PerPixelForSemanticSegmentationOutput(
            loss=None if terms is None else torch.stack(list(terms.values())).sum(),
            logits=layers[-1],
            hidden_states=base.hidden_states,
            attentions=base.attentions,
            loss_dict=terms,
            **image_sizes(pixel_values, pixel_mask),
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
            decoder.queries_embedder = with_rows(decoder.queries_embedder, kept)
            self.config.num_queries = len(kept)
        else:
            self.classifier = with_rows(self.classifier, kept)
        set_classes(self.config, id2label)
        return self
