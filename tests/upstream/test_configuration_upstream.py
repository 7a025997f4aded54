"""transformers' own configuration suite on our configurations."""

import dataclasses
import json
import unittest
from types import SimpleNamespace

from transformers import PreTrainedConfig
from transformers_tests.test_configuration_common import ConfigTester

from transformers_tests.utils.test_configuration_utils import config_common_kwargs
from videollama2_hf.configuration_videollama2 import (
    LanguageBindVisionConfig,
    VideoLlama2AudioConfig,
    VideoLlama2Config,
)


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SIZES, "image_size": 28, "patch_size": 14}


def tiny_videollama2(**kwargs) -> VideoLlama2Config:
    text_config = {"model_type": "qwen2", "vocab_size": 99, "num_key_value_heads": 2, **SIZES}
    vision_config = {"model_type": "siglip_vision_model", **VISION}
    return VideoLlama2Config(**{"text_config": text_config, "vision_config": vision_config, **kwargs})


class TwoTowersConfigTester(ConfigTester):
    def create_and_test_config_from_and_save_pretrained_composite(self):
        """
        Not run: it loads every sub-configuration by its class from the file of the whole, and Video-LLaVA's two
        towers are of one class; the class reads the one under its `base_config_key`, the image tower's.
        """


class ConfigurationTest(unittest.TestCase):
    def run_suite(self, config_class, config, tester_class=ConfigTester, **inputs) -> None:
        self.model_tester = SimpleNamespace(get_config=lambda: config)  # where the suite looks for other values
        tester_class(self, config_class=config_class, has_text_modality=False, **inputs).run_common_tests()

    def test_videollama2(self):
        config = tiny_videollama2(audio_config={**SIZES, "embed_dim": 16}, num_frames=4)
        self.run_suite(VideoLlama2Config, config, num_frames=4, connector_type="stc_connector_v35")

    def test_video_llava(self):
        config = tiny_videollama2(
            vision_config={"model_type": "languagebind_vision", "add_time_attn": False, **VISION},
            video_config={"model_type": "languagebind_vision", "num_frames": 4, **VISION},
            connector_type="frame_mlp2x_gelu",
            num_frames=4,
        )
        written = json.loads(config.to_json_string())  # the suite compares what it passes with what is written
        inputs = {name: written[name] for name in ("vision_config", "video_config", "connector_type", "num_frames")}
        self.run_suite(VideoLlama2Config, config, TwoTowersConfigTester, **inputs)

    def test_audio(self):
        config = VideoLlama2AudioConfig(**SIZES, embed_dim=16)
        self.run_suite(VideoLlama2AudioConfig, config, hidden_size=32, num_attention_heads=4)

    def test_languagebind(self):
        config = LanguageBindVisionConfig(**VISION)
        self.run_suite(LanguageBindVisionConfig, config, hidden_size=32, num_attention_heads=4, num_frames=4)

    def test_the_values_passed_by_the_suite_are_complete(self):
        """The suite passes what our stand-in lists; a field that a new version of transformers adds belongs there."""
        common = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"transformers_version"}
        self.assertEqual(common, set(config_common_kwargs))
        for name, value in config_common_kwargs.items():
            self.assertNotEqual(getattr(PreTrainedConfig(), name), value)
