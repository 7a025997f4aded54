"""transformers' own image processor suite on our image processor, as each of the three families of towers needs it."""

import unittest

from transformers_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin

from videollama2_hf import VideoLlama2ImageProcessor


class ImageProcessorTester(ImageProcessingTester):
    def _get_image_processing_classes(self):
        """By name of the folder upstream; ours is not in upstream's table."""
        return {"torchvision": VideoLlama2ImageProcessor}


class ClipTester(ImageProcessorTester):
    def __init__(self, parent, **kwargs):
        kwargs = {"size": {"shortest_edge": 20}, "crop_size": {"height": 18, "width": 18}, **kwargs}
        super().__init__(parent, do_center_crop=True, do_convert_rgb=True, **kwargs)


class SiglipTester(ImageProcessorTester):
    def __init__(self, parent, **kwargs):
        kwargs = {"size": {"height": 18, "width": 20}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **kwargs}
        super().__init__(parent, exact=True, do_pad_to_square=True, **kwargs)


class LanguageBindTester(ImageProcessorTester):
    def __init__(self, parent, **kwargs):
        super().__init__(parent, size={"shortest_edge": 18}, antialias=False, **kwargs)

    def expected_output_image_shape(self, images):
        """A shortest edge without a crop size is cropped to a square of that edge, unless the crop is turned off."""
        return self.num_channels, 18, 18


class ClipImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ClipTester
    test_cast_dtype = True


class SiglipImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = SiglipTester
    test_cast_dtype = True

    def test_call_numpy_4_channels(self):
        """With `exact=True` images are resized by Pillow, which takes RGB; others are refused."""
        with self.assertRaisesRegex(ValueError, "exact=True works on RGB pixels"):
            super().test_call_numpy_4_channels()


class LanguageBindImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = LanguageBindTester
    test_cast_dtype = True
