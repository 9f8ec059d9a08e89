"""The yardsticks: transformers' own Mask2Former and EoMT under the same tests."""

import unittest
from typing import ClassVar

from segmentation_tester import SegmentationModelTest, SegmentationModelTester, tiny_backbone
from transformers import (
    EomtConfig,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerModel,
)

HEADS = SegmentationModelTester.num_attention_heads


class Mask2FormerModelTest(SegmentationModelTest, unittest.TestCase):
    all_model_classes = (Mask2FormerForUniversalSegmentation, Mask2FormerModel)
    classes_with_segments = (Mask2FormerForUniversalSegmentation,)
    config_fields = {
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 16,
        "dim_feedforward": 16,
        "num_attention_heads": HEADS,
        "encoder_layers": SegmentationModelTester.num_hidden_layers,
        "decoder_layers": SegmentationModelTester.num_hidden_layers + 1,
        "num_queries": SegmentationModelTester.num_queries,
    }
    config = Mask2FormerConfig(
        backbone_config=tiny_backbone(),
        num_labels=SegmentationModelTester.num_labels,
        train_num_points=100,
        dropout=0.0,
        **config_fields,
    )
    does_not_apply = SegmentationModelTest.does_not_apply | {
        "test_attention_outputs": "Mask2Former's output has no one field of hidden_states, but one of each part",
        "test_hidden_states_output": "Mask2Former's output has no hidden_states",
        "test_model_outputs_equivalence": "Mask2Former cannot make a tuple of its outputs where there is a loss",
        "test_retain_grad_hidden_states_attentions": "Mask2Former's output has no hidden_states",
    }


class EomtModelTest(SegmentationModelTest, unittest.TestCase):
    all_model_classes = (EomtForUniversalSegmentation,)
    classes_with_segments = (EomtForUniversalSegmentation,)
    has_attentions = False
    # Its positions are those of a square; hidden states are tokens: queries at the last of 2 blocks, 5 and 256 patches.
    expected = {"width": 64, "seq_length": 5 + 256, "hidden_size": 32, "expected_num_hidden_layers": 3}
    config_fields = {
        "hidden_size": 32,
        "num_hidden_layers": SegmentationModelTester.num_hidden_layers,
        "num_attention_heads": HEADS,
        "num_blocks": 1,
        "num_upscale_blocks": 1,
        "num_queries": SegmentationModelTester.num_queries,
    }
    config = EomtConfig(
        image_size=64, patch_size=4, num_labels=SegmentationModelTester.num_labels, train_num_points=100,
        **config_fields,
    )  # fmt: skip
    does_not_apply = SegmentationModelTest.does_not_apply | {
        "test_model_outputs_equivalence": "points of its loss are drawn anew at each call",
    }


class EomtDinov3ModelTest(EomtModelTest):
    does_not_apply: ClassVar[dict[str, str]] = {}  # those of its parent are wrapped already
    all_model_classes = (EomtDinov3ForUniversalSegmentation,)
    classes_with_segments = (EomtDinov3ForUniversalSegmentation,)
    config = EomtDinov3Config(
        image_size=64, patch_size=4, intermediate_size=16, num_labels=SegmentationModelTester.num_labels,
        train_num_points=100, **EomtModelTest.config_fields,
    )  # fmt: skip
