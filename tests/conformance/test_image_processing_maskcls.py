"""MaskClsImageProcessor under transformers' common image processing tests."""

import unittest

from image_processor_tester import SegmentationImageProcessingTest

from maskcls_hf.image_processing_maskcls import MaskClsImageProcessor


class MaskClsImageProcessingTest(SegmentationImageProcessingTest, unittest.TestCase):
    image_processing_class = MaskClsImageProcessor
