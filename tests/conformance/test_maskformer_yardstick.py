"""The yardstick: transformers' own MaskFormer under the same tests."""

import unittest

from image_processor_tester import SegmentationImageProcessingTest
from segmentation_tester import SegmentationModelTest, SegmentationModelTester, tiny_backbone
from transformers import (
    DetrConfig,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    MaskFormerModel,
)


class MaskFormerModelTest(SegmentationModelTest, unittest.TestCase):
    all_model_classes = (MaskFormerForInstanceSegmentation, MaskFormerModel)
    classes_with_segments = (MaskFormerForInstanceSegmentation,)
    expected = {"expected_num_hidden_layers": 4 + 3 + 3}  # its pixel decoder leaves out the coarsest map
    config_fields = {"mask_feature_size": 32, "fpn_feature_size": 32}
    config = MaskFormerConfig(
        backbone_config=tiny_backbone(),
        decoder_config=DetrConfig(
            d_model=32,
            num_queries=SegmentationModelTester.num_queries,
            encoder_layers=SegmentationModelTester.num_hidden_layers,
            decoder_layers=SegmentationModelTester.num_hidden_layers,
            encoder_attention_heads=SegmentationModelTester.num_attention_heads,
            decoder_attention_heads=SegmentationModelTester.num_attention_heads,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
        ),
        num_labels=SegmentationModelTester.num_labels,
        **config_fields,
    )
    does_not_apply = SegmentationModelTest.does_not_apply | {
        "test_can_capture_specific_layers_hidden_states": "MaskFormer's hidden_states join those of three parts",
    }


class MaskFormerImageProcessingTest(SegmentationImageProcessingTest, unittest.TestCase):
    image_processing_class = MaskFormerImageProcessor
