"""Configuration of VideoLLaMA 2 and Video-LLaVA, and the one formula for how many tokens a medium becomes."""

from typing import Literal, get_args

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2CLS
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.models.clip.configuration_clip import CLIPVisionConfig

from .checkpoint_videollama2 import ORIGINAL_MODEL_TYPES, convert_original_config, is_original_config


ConnectorType = Literal[
    "stc_connector",
    "stc_connector_v35",
    "stp_connector",
    "spatial_conv",
    "spatial_pool",
    "mlp2x_gelu",
    "linear",
    "frame_mlp2x_gelu",
]

VISION_MODEL_TYPES = ("clip_vision_model", "siglip_vision_model", "languagebind_vision")
VisualModality = Literal["image", "video"]

# Per connector type with a 3D sampler: kernel (= stride) over (time, height, width), and zero padding.
CONNECTOR_SAMPLERS = {
    "stc_connector": ((2, 2, 2), 1),
    "stc_connector_v35": ((2, 2, 2), 0),
    "stp_connector": ((2, 2, 2), 0),
    "spatial_conv": ((1, 2, 2), 1),
    "spatial_pool": ((1, 2, 2), 0),
}


def get_connector_output_size(connector_type: str, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """
    Size of a connector's output grid: (time, height, width), in tokens.

    Args:
        connector_type: One of the names in `ConnectorType`.
        num_frames: Frames that enter the connector (an image of VideoLLaMA 2 enters as `num_frames` equal frames).
        height, width: The vision tower's patch grid.

    Raises:
        ValueError: The type is unknown, or the input is smaller than the sampler's window.
    """
    if connector_type in ("mlp2x_gelu", "linear"):  # averaged over time before the projection
        return 1, height, width
    if connector_type == "frame_mlp2x_gelu":
        return num_frames, height, width
    if connector_type not in CONNECTOR_SAMPLERS:
        allowed = ", ".join(get_args(ConnectorType))
        raise ValueError(f"Unknown connector type {connector_type!r}; choose one of {allowed}.")
    kernel, padding = CONNECTOR_SAMPLERS[connector_type]
    time, rows, columns = ((n + 2 * padding - k) // k + 1 for n, k in zip((num_frames, height, width), kernel))
    if min(time, rows, columns) < 1:
        smallest = " x ".join(str(max(1, k - 2 * padding)) for k in kernel)
        raise ValueError(
            f"{connector_type} needs at least {smallest} (frames x rows x columns of patches), got "
            f"{num_frames} x {height} x {width}; raise `num_frames` or choose another connector."
        )
    return time, rows, columns


def get_num_visual_tokens(
    connector_type: str, num_frames: int, height: int, width: int, num_class_tokens: int = 0
) -> int:
    """
    Tokens that one video (or image) becomes in the language model's input.

    `num_class_tokens` counts the class tokens kept in front of every frame's patches; only `frame_mlp2x_gelu` can
    carry them (Video-LLaVA's video tower keeps one). See [`get_connector_output_size`] for the other arguments.
    """
    time, rows, columns = get_connector_output_size(connector_type, num_frames, height, width)
    return time * (rows * columns + num_class_tokens)


def get_num_audio_tokens(num_mel_frames: int, num_mel_bins: int = 128, patch_size: int = 16) -> int:
    """Tokens that one clip of `num_mel_frames` filter-bank frames becomes (1496 for the 2998 frames of 30 s)."""
    return (num_mel_frames // patch_size) * (num_mel_bins // patch_size)


@strict
class VideoLlama2AudioConfig(PreTrainedConfig):
    r"""
    Configuration of BEATs, the audio tower. The defaults are those of `BEATs_iter3_plus_AS2M`, the tower of
    VideoLLaMA2.1-7B-AV, where they are written in code (`videollama2/model/beats/BEATs.py`) and not in `config.json`.

    Args:
        embed_dim (`int`): Width of the patch embedding, before the projection to `hidden_size`.
        conv_pos (`int`): Kernel size of the convolution that encodes positions.
        conv_pos_groups (`int`): Its groups.
        num_buckets (`int`), max_distance (`int`): Relative position buckets, and the distance (in tokens) from which
            all positions share the last bucket.
        layerdrop (`float`): Probability to skip a layer in training.
        layer_wise_gradient_decay_ratio (`float`): Factor on the gradient that enters every layer in training.
        num_classes (`int`): Outputs of the classification head of a fine-tuned BEATs; the head is kept with the
            weights but not used. 0 for a tower without the head.
        mel_mean (`float`), mel_std (`float`): Filter banks are normalised by `(x - mel_mean) / (2 * mel_std)`.
    """

    model_type = "videollama2_audio"
    base_config_key = "audio_config"

    num_mel_bins: int = 128
    patch_size: int = 16
    embed_dim: int = 512
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    layerdrop: float | int = 0.05
    layer_norm_eps: float = 1e-5
    conv_bias: bool = False
    conv_pos: int = 128
    conv_pos_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    gru_rel_pos: bool = True
    deep_norm: bool = True
    layer_wise_gradient_decay_ratio: float | int = 0.6
    num_classes: int = 527
    mel_mean: float = 15.41663
    mel_std: float = 6.55582
    initializer_range: float = 0.02
    # Tokens of a 30 s clip; serving libraries read the name.
    max_source_positions: int = 1496

    def validate_architecture(self):
        for name in ("hidden_dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, between 0 and 1; got {getattr(self, name)}.")
        if self.hidden_act not in ACT2CLS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACT2CLS)}; got {self.hidden_act!r}.")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )
        if self.hidden_size % self.conv_pos_groups != 0:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of conv_pos_groups ({self.conv_pos_groups})."
            )
        if self.num_mel_bins % self.patch_size != 0:
            raise ValueError(
                f"num_mel_bins ({self.num_mel_bins}) must be a multiple of patch_size ({self.patch_size})."
            )


@strict
class LanguageBindVisionConfig(CLIPVisionConfig):
    r"""
    Configuration of LanguageBind's vision tower: CLIP's, with attention over time in front of every spatial block.

    Args:
        add_time_attn (`bool`): Whether the temporal blocks are there (the video tower) or not (the image tower).
        num_frames (`int`): Frames in one temporal window; longer videos are cut into windows of this length.
    """

    model_type = "languagebind_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 14
    hidden_act: str = "gelu"
    add_time_attn: bool = True
    num_frames: int = 8


@strict
class VideoLlama2Config(PreTrainedConfig):
    r"""
    Configuration of VideoLLaMA 2, and of Video-LLaVA as the same model with other parts.

    The defaults are VideoLLaMA2-7B: CLIP ViT-L/14-336, 8 frames, `stc_connector`, Mistral-7B.

    Args:
        text_config: The language model: any causal language model of transformers. Tested: mistral, mixtral, qwen2,
            llama, gemma2, phi3.
        vision_config: The vision tower: `clip_vision_model`, `siglip_vision_model` or `languagebind_vision`.
        video_config: A second vision tower for videos (Video-LLaVA). `None`: images and videos share one tower.
        audio_config: BEATs. `None`: the model does not hear.
        connector_type: The projection from the vision tower to the language model. `frame_mlp2x_gelu` is
            Video-LLaVA's, on every token of every frame; `mlp2x_gelu` and `linear` are VideoLLaMA 2's, which average
            over time first.
        connector_depth: RegStage blocks before and after the sampler of the `stc_*` and `stp_*` connectors.
        connector_mlp_depth: Linear layers of their readout.
        audio_connector_type: `mlp2x_gelu` or `linear`, on every audio token.
        vision_feature_layer: Index into the tower's hidden states (-2: the output of the last layer but one). Layers
            behind it never run.
        vision_feature_select_strategy: `"default"` drops a class token, `"full"` keeps it.
        video_feature_select_strategy: The same for videos; `None` takes the images' value.
        num_frames: Frames that an image is repeated to and the default number of frames of a video.
        image_token_id, video_token_id, audio_token_id: Placeholder ids. They may lie beyond the vocabulary.

    Raises:
        huggingface_hub.errors.StrictDataclassError: A value, or a combination that cannot run; the message names the
            values allowed.
    """

    model_type = "videollama2"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="mistral"),
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_vision_model",
            init_kwargs={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
            },
        ),
        "video_config": SubConfigSpec(config_class=AutoConfig, model_type="languagebind_vision", optional=True),
        "audio_config": SubConfigSpec(config_class=VideoLlama2AudioConfig, optional=True),
    }
    keys_to_ignore_at_inference = ["past_key_values"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    video_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    connector_type: ConnectorType = "stc_connector"
    connector_depth: int = 4
    connector_mlp_depth: int = 2
    audio_connector_type: Literal["mlp2x_gelu", "linear"] = "mlp2x_gelu"
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    video_feature_select_strategy: Literal["default", "full"] | None = None
    num_frames: int = 8
    image_token_id: int = 32000
    video_token_id: int = 32001
    audio_token_id: int = 32002
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name in ("vision_config", "video_config"):
            tower = getattr(self, name)
            if tower is not None and tower.model_type not in VISION_MODEL_TYPES:
                raise ValueError(
                    f"{name} must be of model_type {', '.join(VISION_MODEL_TYPES)}, got {tower.model_type!r}."
                )
        if self.text_config.is_encoder_decoder:
            raise ValueError(
                f"text_config must be that of a decoder-only language model, got {self.text_config.model_type!r}."
            )
        # Whether the head is tied is the language model's business; the attribute at the top is what transformers
        # reads.
        if self.text_config.tie_word_embeddings:
            self.tie_word_embeddings = True

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As for every configuration; a dictionary written by the original code is understood too."""
        if is_original_config(config_dict):
            checkpoint = kwargs.get("name_or_path") or config_dict.get("_name_or_path") or "."
            config_dict = convert_original_config(config_dict, str(checkpoint))
        return super(VideoLlama2Config, VideoLlama2Config).from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As for every configuration; converts here, where it is still known where the dictionary came from."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if is_original_config(config_dict):
            config_dict = convert_original_config(config_dict, str(pretrained_model_name_or_path))
        return config_dict, kwargs

    def select_strategy(self, modality: VisualModality) -> str:
        """`"default"` or `"full"`, for images or for videos."""
        if modality == "video" and self.video_feature_select_strategy is not None:
            return self.video_feature_select_strategy
        return self.vision_feature_select_strategy

    def tower_config(self, modality: VisualModality) -> PreTrainedConfig:
        """Configuration of the tower that sees images, or videos."""
        return self.video_config if modality == "video" and self.video_config is not None else self.vision_config

    @property
    def image_num_frames(self) -> int:
        """Frames that one image enters the connector as: 1 where the connector works frame by frame."""
        return 1 if self.connector_type == "frame_mlp2x_gelu" else self.num_frames

    def num_visual_tokens(self, modality: VisualModality, num_frames: int | None = None) -> int:
        """Tokens of one image, or of one video of `num_frames` frames, in this model."""
        tower = self.tower_config(modality)
        grid = tower.image_size // tower.patch_size
        if modality == "image":
            num_frames = self.image_num_frames
        keeps_class_token = self.select_strategy(modality) == "full" and tower.model_type != "siglip_vision_model"
        return get_num_visual_tokens(
            self.connector_type, num_frames or self.num_frames, grid, grid, int(keeps_class_token)
        )

    def validate_connector(self):
        """Refuses what the original accepts and then crashes on (its connectors and its `temporal_aggregator`)."""
        hidden_size, text_size = self.vision_config.hidden_size, self.text_config.hidden_size
        if self.video_config is not None and self.video_config.hidden_size != hidden_size:
            raise ValueError(
                f"One connector serves both towers, so their widths must be equal: vision_config.hidden_size is "
                f"{hidden_size}, video_config.hidden_size is {self.video_config.hidden_size}."
            )
        if self.connector_type in ("spatial_conv", "spatial_pool") and hidden_size != text_size:
            raise ValueError(
                f"{self.connector_type} does not change the width: vision_config.hidden_size ({hidden_size}) must "
                f"equal text_config.hidden_size ({text_size}). Choose stc_connector, stc_connector_v35 or "
                f"stp_connector for towers of another width."
            )
        if self.connector_type != "frame_mlp2x_gelu":
            for modality in get_args(VisualModality):
                tower = self.tower_config(modality)
                if self.select_strategy(modality) == "full" and tower.model_type != "siglip_vision_model":
                    raise ValueError(
                        f"The class token that `vision_feature_select_strategy='full'` keeps has no place in the "
                        f"square grid of {self.connector_type}; use 'default', or connector_type='frame_mlp2x_gelu'."
                    )
        for name in ("connector_depth", "connector_mlp_depth", "num_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for modality in get_args(VisualModality):
            self.num_visual_tokens(modality)  # raises when the grid or num_frames is too small for the sampler

    def validate_vision_feature_layer(self):
        for name in ("vision_config", "video_config"):
            tower = getattr(self, name)
            if tower is not None:
                depth = tower.num_hidden_layers
                if not -depth - 1 <= self.vision_feature_layer <= depth:
                    raise ValueError(
                        f"vision_feature_layer must be between {-depth - 1} and {depth} for the {depth} layers of "
                        f"{name}, got {self.vision_feature_layer}."
                    )

    def validate_placeholders(self):
        ids = (self.image_token_id, self.video_token_id, self.audio_token_id)
        if len(set(ids)) != 3 or min(ids) < 0:
            raise ValueError(
                "image_token_id, video_token_id and audio_token_id must be three different ids that are not "
                f"negative, got {ids}."
            )


def _make_alias(name: str) -> type[VideoLlama2Config]:
    """A class whose only purpose is that AutoConfig finds it under the original's `model_type`; loading through it
    gives a [`VideoLlama2Config`]."""
    return type(f"{name.title().replace('_', '')}Config", (VideoLlama2Config,), {"model_type": name})


# transformers decides by these two tables what a model can do (pipelines, serving), before any class is imported.
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault("videollama2", "VideoLlama2ForConditionalGeneration")
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault("videollama2", "VideoLlama2ForConditionalGeneration")
AutoConfig.register("languagebind_vision", LanguageBindVisionConfig, exist_ok=True)
AutoConfig.register("videollama2_audio", VideoLlama2AudioConfig, exist_ok=True)
AutoConfig.register("videollama2", VideoLlama2Config, exist_ok=True)
VideoLlama2Config.register_for_auto_class()
for _name in ORIGINAL_MODEL_TYPES:
    if _name.startswith("videollama2_"):
        AutoConfig.register(_name, _make_alias(_name), exist_ok=True)

__all__ = [
    "ConnectorType",
    "LanguageBindVisionConfig",
    "VideoLlama2AudioConfig",
    "VideoLlama2Config",
    "get_connector_output_size",
    "get_num_audio_tokens",
    "get_num_visual_tokens",
]
