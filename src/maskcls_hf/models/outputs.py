"""What the models return."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


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

    Where gradients are off, `pixel_decoder_last_hidden_state` is there only if `output_hidden_states` or
    `output_attentions`: predicting does without per-pixel embeddings.

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
        pred_boxes: (B, N, 4) centre, width and height in 0..1 of the image without its padding, with a box head.
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
