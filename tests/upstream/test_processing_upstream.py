"""transformers' own processor suite on our processor."""

import unittest
from pathlib import Path
from unittest.mock import patch

from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoVideoProcessor, testing_utils

from videollama2_hf.configuration_videollama2 import VideoLlama2Config
from videollama2_hf.feature_extraction_videollama2 import VideoLlama2FeatureExtractor
from videollama2_hf.image_processing_videollama2 import VideoLlama2ImageProcessor
from videollama2_hf.processing_videollama2 import VideoLlama2Processor
from videollama2_hf.prompt_videollama2 import build_chat_template
from videollama2_hf.tokenization_videollama2 import load_tokenizer
from videollama2_hf.video_processing_videollama2 import VideoLlama2VideoProcessor


# Media are read with PyAV, so tests for which upstream needs librosa or torchcodec run without them.
with patch.multiple(testing_utils, require_librosa=lambda test: test, require_torchcodec=lambda test: test):
    from transformers_tests.test_processing_common import ProcessorTesterMixin


TOKENIZER = Path(__file__).parents[1] / "goldens" / "processing" / "tokenizers" / "qwen2"
SOUND_TOKENS = 1496  # every sound fills the same window

AutoImageProcessor.register(VideoLlama2Config, slow_image_processor_class=VideoLlama2ImageProcessor, exist_ok=True)
AutoVideoProcessor.register(VideoLlama2Config, VideoLlama2VideoProcessor, exist_ok=True)
AutoFeatureExtractor.register(VideoLlama2Config, VideoLlama2FeatureExtractor, exist_ok=True)
AutoProcessor.register(VideoLlama2Config, VideoLlama2Processor, exist_ok=True)


class VideoLlama2ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = VideoLlama2Processor

    # Lengths to pad to: an image is 45 tokens and a video with its sound 45 + 1496.
    videos_text_kwargs_max_length = 167 + SOUND_TOKENS
    videos_unstructured_max_length = 176 + SOUND_TOKENS
    audio_text_kwargs_max_length = 300 + SOUND_TOKENS
    audio_unstructured_max_length = 76 + SOUND_TOKENS

    @classmethod
    def _setup_image_processor(cls):
        return VideoLlama2ImageProcessor(size={"shortest_edge": 56})

    @classmethod
    def _setup_video_processor(cls):
        return VideoLlama2VideoProcessor(size={"shortest_edge": 56})

    @classmethod
    def _setup_feature_extractor(cls):
        return VideoLlama2FeatureExtractor()

    @classmethod
    def _setup_tokenizer(cls):
        return load_tokenizer(TOKENIZER)

    @staticmethod
    def prepare_processor_dict():
        template = load_tokenizer(TOKENIZER).chat_template
        return {"has_audio": True, "chat_template": build_chat_template(template)}

    # A video of ours gives the frames that are asked for, also if it has fewer: 8 unless told otherwise.
    @property
    def video_sampling_expectations(self):
        return [
            {"num_frames": 3, "fps": None, "expected_dim": 1, "output_length": 3},
            {"num_frames": None, "fps": 10, "expected_dim": 1, "output_length": 20},
            {"do_sample_frames": False, "fps": 10, "expected_dim": 1, "output_length": 60},
            {"do_sample_frames": False, "expected_dim": 1, "output_length": 60},
            {"expected_dim": 1, "output_length": 8},
        ]

    def test_apply_chat_template_video_frame_sampling(self):
        """All but the last demand: that frames in a list are not sampled. Ours are, as those of any other video."""
        with self.assertRaisesRegex(AssertionError, "ValueError not raised"):
            super().test_apply_chat_template_video_frame_sampling()
