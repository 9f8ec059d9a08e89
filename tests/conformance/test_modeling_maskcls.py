"""MaskClsModel and MaskClsForUniversalSegmentation under transformers' common tests."""

import unittest

from segmentation_tester import SIZES, TINY, SegmentationModelTest, tiny_vit
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from maskcls_hf import MaskClsConfig, MaskClsForUniversalSegmentation, MaskClsModel

MODEL_MAPPING_NAMES["maskcls"] = "MaskClsModel"  # tells the common tests which class has no loss


class MaskClsModelTest(SegmentationModelTest, unittest.TestCase):
    all_model_classes = (MaskClsForUniversalSegmentation, MaskClsModel)
    classes_with_segments = (MaskClsForUniversalSegmentation,)
    config = MaskClsConfig(**TINY)
    config_fields = SIZES


class MaskClsFPNEncoderModelTest(SegmentationModelTest, unittest.TestCase):
    all_model_classes = (MaskClsForUniversalSegmentation, MaskClsModel)
    classes_with_segments = (MaskClsForUniversalSegmentation,)
    config = MaskClsConfig(pixel_decoder="fpn_encoder", **TINY)
    config_fields = SIZES | {"pixel_decoder": "fpn_encoder"}


class MaskClsMask2FormerModelTest(SegmentationModelTest, unittest.TestCase):
    """With Mask2Former's parts; the base model alone has no masks to attend to, and points would be drawn anew at each
    call."""

    all_model_classes = (MaskClsForUniversalSegmentation,)
    classes_with_segments = (MaskClsForUniversalSegmentation,)
    parts = {"pixel_decoder": "deformable", "transformer_decoder": "masked_attention", "mask_kernel_size": 1}
    config = MaskClsConfig(**parts, mask_loss="cross_entropy", **TINY)
    config_fields = SIZES | parts


class MaskClsEomtModelTest(SegmentationModelTest, unittest.TestCase):
    """A plain ViT alone: it has no class without heads, and its attention is not given out."""

    all_model_classes = (MaskClsForUniversalSegmentation,)
    classes_with_segments = (MaskClsForUniversalSegmentation,)
    parts = {"architecture": "encoder_only", "query_blocks": 1, "upscale_blocks": 1}
    config = MaskClsConfig(**(TINY | parts | {"backbone_config": tiny_vit()}), mask_loss="cross_entropy")
    config_fields = SIZES | parts
    has_attentions = False
    expected = {"expected_num_hidden_layers": 1 + 2 + 1}  # patches; these and their upscaled; queries
    does_not_apply = SegmentationModelTest.does_not_apply | {
        "test_can_capture_specific_layers_hidden_states": "hidden_states join those of patches, pyramid and queries",
        "test_retain_grad_hidden_states_attentions": "classes are read off the queries, beside the patches",
    }
