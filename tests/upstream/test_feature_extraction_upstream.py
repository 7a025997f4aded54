"""transformers' own feature extractor suites on our feature extractor."""

import unittest

import numpy as np
from transformers_tests.test_sequence_feature_extraction_common import SequenceFeatureExtractionTestMixin

from videollama2_hf import VideoLlama2FeatureExtractor


class FeatureExtractorTester:
    batch_size = 7
    min_seq_length = 40
    seq_length_diff = 10
    # The suite takes this plus the difference for the longest input, wherever the padding value is not 0.
    max_seq_length = 90
    feature_size = 12

    def prepare_feat_extract_dict(self):
        """Every value another one than the default."""
        return {
            "feature_size": self.feature_size,
            "sampling_rate": 8000,
            "padding_value": 0.5,
            "chunk_length": 10,
            "audio_mode": "full",
            "num_clips": 4,
            "clip_duration": 1.5,
        }

    def prepare_inputs_for_common(self, equal_length=False, numpify=False):
        """Features (time, mel bins) of growing length."""
        longest = self.max_seq_length + self.seq_length_diff
        lengths = range(self.min_seq_length, longest + 1, self.seq_length_diff)
        rng = np.random.default_rng(0)
        inputs = [rng.random((longest if equal_length else length, self.feature_size)) for length in lengths]
        return inputs if numpify else [array.tolist() for array in inputs]


class FeatureExtractionTest(SequenceFeatureExtractionTestMixin, unittest.TestCase):
    feature_extraction_class = VideoLlama2FeatureExtractor
    feat_extract_tester = FeatureExtractorTester()
