"""What transformers' common tests ask a model tester for, and the small network they all run on."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from applicability import ListsWhatDoesNotApply
from transformers import Dinov2Config, PreTrainedConfig, PreTrainedModel, ResNetConfig
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin


class SegmentationModelTester:
    """Sizes and inputs. The names of the first block are those that the common tests read."""

    batch_size = 2
    num_hidden_layers = 2
    num_attention_heads = 2
    is_training = True
    # Expected shapes: attentions (.., N, N), first of the hidden states (.., height / 4, width / 4).
    seq_length = key_length = 16
    hidden_size = 24
    expected_num_hidden_layers = 4 + 4 + 3  # backbone, pixel decoder, transformer decoder with its input
    num_hidden_states_types = 4  # the three above and their sum

    num_queries = 16
    num_labels = 4
    height, width = 64, 96

    def __init__(self, config: PreTrainedConfig, **expected: Any):
        self.config = config
        vars(self).update(expected)

    def get_config(self) -> PreTrainedConfig:
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        pixel_mask = torch.ones(self.batch_size, self.height, self.width, dtype=torch.long)
        pixel_mask[0, :, -16:] = 0
        pixel_values = torch.rand(self.batch_size, 3, self.height, self.width)
        return self.get_config(), {"pixel_values": pixel_values, "pixel_mask": pixel_mask}

    def segments(self) -> dict[str, list[torch.Tensor]]:
        """One segment in the first image, two in the second: columns of the images."""
        columns = torch.arange(self.width).expand(self.height, -1)
        masks = [[columns < 20], [columns < 30, columns >= 50]]
        return {
            "mask_labels": [torch.stack(of_image).float() for of_image in masks],
            "class_labels": [torch.arange(len(of_image)) for of_image in masks],
        }


class SegmentationModelTest(ListsWhatDoesNotApply, ModelTesterMixin):
    """The common tests for classes that take `pixel_values`, `pixel_mask` and segments."""

    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True
    classes_with_segments: ClassVar[tuple[type[PreTrainedModel], ...]] = ()
    config: ClassVar[PreTrainedConfig]
    config_fields: ClassVar[dict[str, Any]] = {}  # for ConfigTester
    expected: ClassVar[dict[str, Any]] = {}  # attributes of the model tester that differ
    does_not_apply: ClassVar[dict[str, str]] = {
        "test_model_get_set_embeddings": "an image model has no input embeddings"
    }

    def setUp(self) -> None:
        self.model_tester = SegmentationModelTester(self.config, **self.expected)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class in self.classes_with_segments:
            inputs |= self.model_tester.segments()
        return inputs

    def test_config(self) -> None:
        tester = ConfigTester(self, type(self.config), has_text_modality=False, **self.config_fields)
        tester.run_common_tests()


def tiny_backbone() -> ResNetConfig:
    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def tiny_vit() -> Dinov2Config:
    return Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=4)


SIZES = {
    "num_queries": SegmentationModelTester.num_queries,
    "hidden_size": 32,
    "fpn_feature_size": 32,
    "mask_feature_size": 32,
    "encoder_layers": SegmentationModelTester.num_hidden_layers,
    "decoder_layers": SegmentationModelTester.num_hidden_layers,
    "num_attention_heads": SegmentationModelTester.num_attention_heads,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
TINY = {"backbone_config": tiny_backbone(), "num_labels": SegmentationModelTester.num_labels, **SIZES}
