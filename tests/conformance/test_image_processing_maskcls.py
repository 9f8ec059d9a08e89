"""MaskClsImageProcessor under transformers' common image processing tests."""

import unittest

from image_processor_tester import SegmentationImageProcessingTest

from maskcls_hf.models.image_processing_maskcls import MaskClsImageProcessor


class MaskClsImageProcessingTest(SegmentationImageProcessingTest, unittest.TestCase):
    image_processing_class = MaskClsImageProcessor
    # Older releases of the common tests pass images of 4 channels without saying that they are to stay.
    fields = SegmentationImageProcessingTest.fields | {"do_convert_rgb": False}
