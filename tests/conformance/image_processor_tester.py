"""What transformers' common image processing tests ask an image processor tester for."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from applicability import ListsWhatDoesNotApply
from transformers import BaseImageProcessor
from transformers.image_utils import ImageInput
from transformers.models.maskformer.modeling_maskformer import MaskFormerForInstanceSegmentationOutput
from transformers_tests.test_image_processing_common import (
    ImageProcessingTester,
    ImageProcessingTestMixin,
    PostProcessSemanticSegmentationTestMixin,
)


class SegmentationImageProcessingTester(ImageProcessingTester):
    """Sizes, and outputs of a model; `size` and the fields of `parent.fields` go to the processor."""

    num_labels = 5
    num_queries = 3
    grid = {"height": 8, "width": 16}

    def __init__(self, parent: SegmentationImageProcessingTest):
        size = {"shortest_edge": 32, "longest_edge": 80}
        super().__init__(parent, batch_size=3, max_resolution=100, size=size, **parent.fields)

    def _get_image_processing_classes(self) -> dict[str, type[BaseImageProcessor]]:
        return {"torchvision": self.parent.image_processing_class}

    def expected_output_image_shape(self, images: list[ImageInput]) -> tuple[int, ...]:
        channels, *size = super().expected_output_image_shape(images)
        divisor = self.size_divisor
        return channels, *(-(-edge // divisor) * divisor for edge in size)

    def prepare_post_process_semantic_segmentation_inputs(self) -> tuple[dict[str, Any], dict[str, int]]:
        outputs = MaskFormerForInstanceSegmentationOutput(
            class_queries_logits=torch.randn(self.batch_size, self.num_queries, self.num_labels + 1),
            masks_queries_logits=torch.randn(self.batch_size, self.num_queries, *self.grid.values()),
        )
        return {"outputs": outputs}, {"num_labels": self.num_labels, **self.grid}


class SegmentationImageProcessingTest(
    ListsWhatDoesNotApply, PostProcessSemanticSegmentationTestMixin, ImageProcessingTestMixin
):
    """The common tests for image processors of mask classification."""

    image_processor_tester_class = SegmentationImageProcessingTester
    test_cast_dtype = True
    image_processing_class: ClassVar[type[BaseImageProcessor]]
    fields: ClassVar[dict[str, Any]] = {"size_divisor": 32}
