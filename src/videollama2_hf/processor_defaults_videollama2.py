"""What a model's configuration says about its processor."""

from inspect import signature
from typing import Any, Literal

from transformers.image_utils import PILImageResampling
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .checkpoint_videollama2 import MISTRAL_SYSTEM_MESSAGE, PLACEHOLDER_TOKENS, add_placeholder_tokens
from .configuration_videollama2 import VideoLlama2Config
from .feature_extraction_videollama2 import VideoLlama2FeatureExtractor
from .image_processing_videollama2 import VideoLlama2ImageProcessor
from .prompt_videollama2 import VIDEO_LLAVA_CHAT_TEMPLATE, build_chat_template
from .tokenization_videollama2 import HUB_ARGUMENTS
from .video_processing_videollama2 import VideoLlama2VideoProcessor


# What `from_pretrained` of a processor may be given that is no option of it.
LOADING_ARGUMENTS = (*HUB_ARGUMENTS, "trust_remote_code", "code_revision", "use_fast", "_from_auto", "_commit_hash")
# Attributes of a tokenizer that may be given when a processor is made.
_TOKENIZER_OPTIONS = (
    "padding_side",
    "truncation_side",
    "model_max_length",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
)


def get_processor_arguments(
    config: VideoLlama2Config,
    tokenizer: PreTrainedTokenizerBase,
    vision_preprocessor: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """
    Arguments of [`VideoLlama2Processor`] besides the tokenizer; see its `from_config`.

    Args:
        options: Options of the parts that are to differ: each goes to every part that has it.

    Raises:
        TypeError: No part has an option of that name.
        ValueError: The placeholder ids of the configuration are not the tokenizer's.
    """
    names = {
        "image": VideoLlama2ImageProcessor.valid_kwargs.__annotations__,
        "video": VideoLlama2VideoProcessor.valid_kwargs.__annotations__,
        "audio": set(signature(VideoLlama2FeatureExtractor).parameters) - {"kwargs"},
        "text": _TOKENIZER_OPTIONS,
    }
    given = {part: {name: options[name] for name in options if name in names[part]} for part in names}
    unknown = sorted(set(options).difference(*given.values()))
    if unknown:
        raise TypeError(f"No part of the processor has the option {' or '.join(unknown)}; check the spelling.")
    # Prompts are there to be continued; see `apply_chat_template` for training.
    for name, value in {"padding_side": "left", **given["text"]}.items():
        setattr(tokenizer, name, value)
    add_placeholder_tokens(tokenizer)
    for token in PLACEHOLDER_TOKENS:
        name, token_id = f"{token[1:-1]}_token_id", tokenizer.convert_tokens_to_ids(token)
        if getattr(config, name) != token_id:
            raise ValueError(
                f"config.{name} is {getattr(config, name)}, but {token} has the id {token_id} in the tokenizer. Set "
                "the former to the latter."
            )
    text_config: Any = config.text_config
    system_message, chat_template, add_bos_token = None, tokenizer.chat_template, False
    if text_config.model_type in ("mistral", "mixtral"):  # the rule of `mm_infer` in videollama2/__init__.py
        system_message = MISTRAL_SYSTEM_MESSAGE
    if not chat_template and config.connector_type == "frame_mlp2x_gelu":
        chat_template, add_bos_token = VIDEO_LLAVA_CHAT_TEMPLATE, True
    image_options = _vision_options(config, "image", vision_preprocessor)
    video_options = {"num_frames": config.num_frames, **_vision_options(config, "video", vision_preprocessor)}
    audio_options: dict[str, Any] = {}
    if config.audio_config is not None:
        audio_config: Any = config.audio_config
        audio_options["feature_size"] = audio_config.num_mel_bins
    arguments = {
        "image_processor": VideoLlama2ImageProcessor(**{**image_options, **given["image"]}),
        "video_processor": VideoLlama2VideoProcessor(**{**video_options, **given["video"]}),
        "feature_extractor": VideoLlama2FeatureExtractor(**{**audio_options, **given["audio"]}),
        "chat_template": build_chat_template(chat_template, system_message) if chat_template else None,
        "connector_type": config.connector_type,
        "patch_size": config.tower_config("image").patch_size,
        "video_patch_size": config.tower_config("video").patch_size,
        "image_num_frames": config.image_num_frames,
        "image_class_tokens": _num_class_tokens(config, "image"),
        "video_class_tokens": _num_class_tokens(config, "video"),
        "has_audio": config.audio_config is not None,
        "context_length": getattr(text_config, "max_position_embeddings", None),
        "add_bos_token": add_bos_token,
    }
    if config.audio_config is not None:
        arguments["audio_patch_size"] = audio_config.patch_size
    return arguments


def _num_class_tokens(config: VideoLlama2Config, modality: Literal["image", "video"]) -> int:
    has_class_token = config.tower_config(modality).model_type != "siglip_vision_model"
    return int(has_class_token and config.select_strategy(modality) == "full")


def _vision_options(
    config: VideoLlama2Config, modality: Literal["image", "video"], preprocessor: dict[str, Any] | None
) -> dict[str, Any]:
    """Options of the image or the video processor for the vision tower of a model."""
    tower: Any = config.tower_config(modality)
    if tower.model_type == "languagebind_vision":  # its own transforms; languagebind/image and video/processing_*.py
        options = {"size": {"shortest_edge": tower.image_size}, "antialias": False}
        window = tower.num_frames if tower.add_time_attn else None
        video = {"resample": PILImageResampling.BILINEAR, "sample_endpoints": True, "temporal_window": window}
        return options if modality == "image" else options | video
    if preprocessor is not None:
        names = VideoLlama2ImageProcessor.valid_kwargs.__annotations__
        return {name: value for name, value in preprocessor.items() if name in names}
    if tower.model_type == "siglip_vision_model":
        size = {"height": tower.image_size, "width": tower.image_size}
        return {"size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return {"size": {"shortest_edge": tower.image_size}}


__all__ = ["LOADING_ARGUMENTS", "get_processor_arguments"]
