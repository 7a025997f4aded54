"""transformers' own video processor suite on our video processor."""

import unittest

from transformers.video_utils import VideoMetadata
from transformers_tests.test_video_processing_common import VideoProcessingTestMixin, prepare_video_inputs

from videollama2_hf import VideoLlama2VideoProcessor


class VideoProcessorTester:
    batch_size = 5
    num_frames = 8
    num_channels = 3

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return prepare_video_inputs(
            batch_size=self.batch_size,
            num_frames=self.num_frames,
            num_channels=self.num_channels,
            min_resolution=30,
            max_resolution=80,
            equal_resolution=equal_resolution,
            return_tensors=return_tensors,
        )

    def expected_output_video_shape(self, videos):
        return self.num_frames, self.num_channels, 18, 18


class VideoProcessingTest(VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = VideoLlama2VideoProcessor
    test_cast_dtype = True
    # The suite expects the first two numbers.
    video_processor_dict = {
        "size": {"shortest_edge": 20},
        "crop_size": {"height": 18, "width": 18},
        "do_center_crop": True,
        "num_frames": 8,
        "max_frames": 100,
        "sample_endpoints": True,
    }

    def setUp(self):
        super().setUp()
        self.video_processor_tester = VideoProcessorTester()

    def test_call_sample_frames(self):
        """All but the last demand: an error for more frames than the video has. Here frames repeat, as for a file."""
        processor = VideoLlama2VideoProcessor(**self.video_processor_dict)
        with self.assertRaises(ValueError):  # the suite's other error, so that below it is the last one that is missed
            processor.sample_frames(VideoMetadata(total_num_frames=8), fps=3)
        with self.assertRaisesRegex(AssertionError, "ValueError not raised"):
            super().test_call_sample_frames()
        videos = self.video_processor_tester.prepare_video_inputs(return_tensors="torch")
        self.assertEqual(processor(videos, num_frames=10, return_tensors="pt").pixel_values_videos.shape[1], 10)
