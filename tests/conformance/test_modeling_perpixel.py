"""PerPixelForSemanticSegmentation, PerPixelBaseline and PerPixelBaseline+, under transformers' common tests."""

import unittest

from segmentation_tester import SIZES, TINY, SegmentationModelTest
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from maskcls_hf import PerPixelConfig, PerPixelForSemanticSegmentation

# Tells the common tests to make `labels`.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["maskcls_perpixel"] = "PerPixelForSemanticSegmentation"


class PerPixelModelTest(SegmentationModelTest, unittest.TestCase):
    all_model_classes = (PerPixelForSemanticSegmentation,)
    config = PerPixelConfig(**TINY)
    config_fields = SIZES
    has_attentions = False
    expected = {"expected_num_hidden_layers": 4 + 4, "num_hidden_states_types": 1}
    does_not_apply = SegmentationModelTest.does_not_apply | {
        f"test_{name}gradient_checkpointing_*": "of ResNet, FPN and a linear classifier no layer is checkpointed"
        for name in ("", "peft_", "training_")
    }
    does_not_apply["test_training_gradient_checkpointing"] = does_not_apply["test_gradient_checkpointing_*"]


class PerPixelPlusModelTest(SegmentationModelTest, unittest.TestCase):
    all_model_classes = (PerPixelForSemanticSegmentation,)
    config = PerPixelConfig(transformer_module=True, **(TINY | {"num_labels": TINY["num_queries"]}))
    config_fields = SIZES | {"transformer_module": True}
    expected = {"num_hidden_states_types": 1}
