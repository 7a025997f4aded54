"""transformers' own model suite on LanguageBind's towers."""

import unittest

import torch
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor

from videollama2_hf.configuration_videollama2 import LanguageBindVisionConfig
from videollama2_hf.modeling_languagebind import LanguageBindVisionModel


# The suites decide by name what a model can do: this one has no head, so no loss.
MODEL_MAPPING_NAMES.setdefault("languagebind_vision", "LanguageBindVisionModel")


class ImageTowerTester:
    batch_size = 3
    num_frames = 1
    is_training = True
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    seq_length = 5  # four patches and the class token
    add_time_attn = False

    def get_config(self) -> LanguageBindVisionConfig:
        return LanguageBindVisionConfig(
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            image_size=28,
            patch_size=14,
            add_time_attn=self.add_time_attn,
            num_frames=self.num_frames,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[LanguageBindVisionConfig, dict[str, torch.Tensor]]:
        return self.get_config(), {"pixel_values": floats_tensor([self.batch_size, 3, 28, 28])}


class VideoTowerTester(ImageTowerTester):
    num_frames = 4
    add_time_attn = True

    def prepare_config_and_inputs_for_common(self) -> tuple[LanguageBindVisionConfig, dict[str, torch.Tensor]]:
        return self.get_config(), {"pixel_values": floats_tensor([self.batch_size, self.num_frames, 3, 28, 28])}


class LanguageBindSuite(ModelTesterMixin):
    all_model_classes = (LanguageBindVisionModel,)
    test_resize_embeddings = False  # there is no vocabulary

    def test_model_get_set_embeddings(self):
        """The mixin's expects an `nn.Embedding`; pixels are embedded by a convolution."""
        model = LanguageBindVisionModel(self.model_tester.get_config())
        self.assertIs(model.get_input_embeddings(), model.embeddings.patch_embedding)
        other = torch.nn.Conv2d(3, 32, kernel_size=14, stride=14, bias=False)
        model.set_input_embeddings(other)
        self.assertIs(model.embeddings.patch_embedding, other)
        self.assertIsNone(model.get_output_embeddings())


class LanguageBindImageTowerTest(LanguageBindSuite, unittest.TestCase):
    def setUp(self):
        self.model_tester = ImageTowerTester()


class LanguageBindVideoTowerTest(LanguageBindSuite, unittest.TestCase):
    def setUp(self):
        self.model_tester = VideoTowerTester()
