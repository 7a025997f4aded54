"""transformers' own model, training and tensor-parallel suites on VideoLLaMA 2, Video-LLaVA and BEATs."""

import unittest

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from transformers_tests import test_tensor_parallel_mixin
from videollama2_hf import (
    VideoLlama2AudioConfig,
    VideoLlama2AudioModel,
    VideoLlama2Config,
    VideoLlama2ForConditionalGeneration,
    VideoLlama2Model,
    get_num_audio_tokens,
)


# The suites decide by class name which labels a model takes; our registration writes two of the three tables.
MODEL_MAPPING_NAMES.setdefault("videollama2", "VideoLlama2Model")
MODEL_MAPPING_NAMES.setdefault("videollama2_audio", "VideoLlama2AudioModel")
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None  # upstream runs these for a few models only
assert MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["videollama2"] == "VideoLlama2ForConditionalGeneration"
assert MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["videollama2"] == "VideoLlama2ForConditionalGeneration"

VISION = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
AUDIO = {
    "embed_dim": 16,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "num_classes": 0,
    "layerdrop": 0.0,
}


class VideoLlama2Tester:
    """Every row: text, a video with its sound, an image, text."""

    batch_size = 3
    num_text_tokens = 7
    num_frames = 4
    num_mel_frames = 32
    is_training = True
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_channels = 3
    image_size = 28
    vocab_size = 99
    pad_token_id = 0
    # Between the ids that the training suite learns (up to 19) and those that the suite cuts off the vocabulary.
    image_token_id = 60
    video_token_id = 61
    audio_token_id = 62
    causal_lm_class = VideoLlama2ForConditionalGeneration

    def __init__(self, parent):
        self.parent = parent
        self.seq_length = self.num_text_tokens + self.num_media_tokens(self.get_config())

    def get_config(self) -> VideoLlama2Config:
        return VideoLlama2Config(
            text_config={
                "model_type": "qwen2",
                "vocab_size": self.vocab_size,
                "hidden_size": self.hidden_size,
                "intermediate_size": 37,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "num_key_value_heads": 2,
                "max_position_embeddings": 580,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": self.pad_token_id,
            },
            vision_config={"model_type": "clip_vision_model", **VISION},
            audio_config=AUDIO,
            connector_type="stc_connector_v35",
            connector_depth=1,
            num_frames=self.num_frames,
            image_token_id=self.image_token_id,
            video_token_id=self.video_token_id,
            audio_token_id=self.audio_token_id,
            vocab_size=self.vocab_size,  # the training suite asks the configuration of the whole for it
        )

    def num_media_tokens(self, config: VideoLlama2Config) -> int:
        sound = get_num_audio_tokens(self.num_mel_frames) if config.audio_config is not None else 0
        return config.num_visual_tokens("video") + config.num_visual_tokens("image") + sound

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        text = ids_tensor([self.batch_size, self.num_text_tokens], self.image_token_id - 3) + 3
        runs = [[self.video_token_id] * config.num_visual_tokens("video")]
        inputs = {
            "pixel_values": floats_tensor([self.batch_size, 3, self.image_size, self.image_size]),
            "pixel_values_videos": floats_tensor(
                [self.batch_size, self.num_frames, 3, self.image_size, self.image_size]
            ),
        }
        if config.audio_config is not None:
            runs.append([self.audio_token_id] * get_num_audio_tokens(self.num_mel_frames))
            inputs["input_features"] = 15 + 10 * floats_tensor([self.batch_size, self.num_mel_frames, 128])
        runs.append([self.image_token_id] * config.num_visual_tokens("image"))
        media = torch.tensor(sum(runs, []), device=text.device).expand(self.batch_size, -1)
        input_ids = torch.cat([text[:, :3], media, text[:, 3:]], dim=1)
        return config, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **inputs}


class VideoLlavaTester(VideoLlama2Tester):
    """Video-LLaVA: two LanguageBind towers, a projection frame by frame, no sound."""

    def get_config(self) -> VideoLlama2Config:
        config = super().get_config().to_dict()
        tower = {"model_type": "languagebind_vision", "num_frames": self.num_frames, **VISION}
        config |= {
            "vision_config": tower | {"add_time_attn": False},
            "video_config": tower,
            "video_feature_select_strategy": "full",
            "connector_type": "frame_mlp2x_gelu",
            "audio_config": None,
        }
        return VideoLlama2Config.from_dict(config)


class VideoLlama2Suite(ModelTesterMixin):
    all_model_classes = (VideoLlama2Model, VideoLlama2ForConditionalGeneration)
    _is_composite = True
    test_all_params_have_gradient = False  # layers behind the selected one are kept with the weights but do not run
    # These check one fixed layout; ours is (videos, tokens, width) from the connector, tested in test_modeling.py.
    skip_test_image_features_output_shape = True
    skip_test_video_features_output_shape = True
    skip_test_audio_features_output_shape = True

    @unittest.skip("The generation suite is not in transformers' source distribution; see tests/test_modeling.py")
    def test_generation_tester_mixin_inheritance(self):
        pass


class VideoLlama2ModelTest(VideoLlama2Suite, TrainingTesterMixin, unittest.TestCase):
    def setUp(self):
        self.model_tester = VideoLlama2Tester(self)


class TensorParallelTester(VideoLlama2Tester):
    """The suite sends random ids and no media: all placeholders are beyond the vocabulary."""

    image_token_id, video_token_id, audio_token_id = 99, 100, 101


class TensorParallelTest(TensorParallelTesterMixin, unittest.TestCase):
    all_model_classes = (VideoLlama2Model, VideoLlama2ForConditionalGeneration)

    def setUp(self):
        self.model_tester = TensorParallelTester(self)


class VideoLlavaModelTest(VideoLlama2Suite, unittest.TestCase):
    def setUp(self):
        self.model_tester = VideoLlavaTester(self)
        if "get_audio_features" in self._testMethodName:
            self.skipTest("Video-LLaVA does not hear")


class AudioTester:
    batch_size = 3
    is_training = True
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_mel_frames = 32
    seq_length = get_num_audio_tokens(num_mel_frames)

    def get_config(self) -> VideoLlama2AudioConfig:
        return VideoLlama2AudioConfig(**AUDIO)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"input_features": floats_tensor([self.batch_size, self.num_mel_frames, 128])}


class AudioModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (VideoLlama2AudioModel,)
    test_resize_embeddings = False  # there is no vocabulary

    def setUp(self):
        self.model_tester = AudioTester()

    def test_model_get_set_embeddings(self):
        """The mixin's expects an `nn.Embedding`; filter banks are embedded by a convolution."""
        model = VideoLlama2AudioModel(self.model_tester.get_config())
        self.assertIs(model.get_input_embeddings(), model.patch_embedding)
        other = torch.nn.Conv2d(1, 16, kernel_size=16, stride=16, bias=False)
        model.set_input_embeddings(other)
        self.assertIs(model.patch_embedding, other)
        self.assertIsNone(model.get_output_embeddings())
