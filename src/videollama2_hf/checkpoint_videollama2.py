"""
Original checkpoints: what their `config.json`, files and keys mean here. No other module knows the original's names.

The weights of a [`VideoLlama2ForConditionalGeneration`] are saved under the original's keys, so a checkpoint of the
original loads as it is, and a model saved here has the keys that the original reads.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, cached_file

from .tokenization_videollama2 import load_tokenizer


# model_type of the original's config.json -> the language model's own. Plain "videollama2" is the original's alias of
# mistral; a config.json of this package has the same model_type but no `mm_vision_tower`.
ORIGINAL_MODEL_TYPES = {
    "videollama2": "mistral",
    "videollama2_mistral": "mistral",
    "videollama2_mixtral": "mixtral",
    "videollama2_qwen2": "qwen2",
    "videollama2_llama": "llama",
    "videollama2_gemma2": "gemma2",
    "videollama2_phi3": "phi3",
    "llava": "llama",  # Video-LLaVA; told from native LLaVA by `mm_video_tower`
}

PLACEHOLDER_TOKENS = ("<image>", "<video>", "<audio>")

# The system message that VideoLLaMA 2 puts in front of a question when the language model is Mistral or Mixtral
# (`mm_infer` in videollama2/__init__.py). Two spaces and single line breaks as there.
MISTRAL_SYSTEM_MESSAGE = (
    "<<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal "
    "content. Please ensure that your responses are socially unbiased and positive in nature.\nIf a question does not "
    "make any sense, or is not factually coherent, explain why instead of answering something not correct. If you "
    "don't know the answer to a question, please don't share false information.\n<</SYS>>"
)

_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

# Towers of the released models, so that reading a checkpoint does not need the tower's own repository.
_KNOWN_TOWERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "openai/clip-vit-large-patch14-336": (
        {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
        {
            "do_resize": True,
            "size": {"shortest_edge": 336},
            "do_center_crop": True,
            "crop_size": {"height": 336, "width": 336},
            "resample": 3,
            "image_mean": _CLIP_MEAN,
            "image_std": _CLIP_STD,
        },
    ),
    "google/siglip-so400m-patch14-384": (
        {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
        {
            "do_resize": True,
            "size": {"height": 384, "width": 384},
            "do_center_crop": False,
            "resample": 3,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    ),
}
# Values of the released towers (spec of the LanguageBind repositories), used when the repository cannot be read.
_LANGUAGEBIND_TOWER = {"model_type": "languagebind_vision", "hidden_act": "gelu", "num_frames": 8}

# Keys of the original's config.json that are about its training or its media, not about the language model.
_MULTIMODAL_KEYS = (
    "architectures",
    "freeze_mm_mlp_adapter",
    "hidden_size_a",
    "image_aspect_ratio",
    "max_sequence_length",
    "num_frames",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "transformers_version",
    "tune_mm_mlp_adapter",
    "tune_mm_mlp_adapter_a",
    "use_mm_proj",
)

# Original keys -> ours, and back when a model is saved (transformers reverses them), below `model.` or without it.
WEIGHT_RENAMINGS = [
    *(
        WeightRenaming(rf"^(?:model\.|){name}\.", f"language_model.{name}.")
        for name in ("embed_tokens", "layers", "norm")
    ),
    WeightRenaming(r"^(?:model\.|)vision_tower\.vision_tower\.", "vision_tower."),
]
# BEATs, wherever it stands in a model; see `VideoLlama2AudioPositionalConv`.
AUDIO_WEIGHT_RENAMINGS = [
    WeightRenaming(rf"encoder\.pos_conv\.0\.weight_{name}", f"encoder.pos_conv.0.{name}") for name in ("g", "v")
]
# Video-LLaVA's two towers. Not among the renamings, which hold for every model and also name the keys that are saved.
VIDEO_LLAVA_KEY_MAPPING = {
    r"^model\.image_tower\.image_tower\.": "model.vision_tower.",
    r"^model\.video_tower\.video_tower\.": "model.video_tower.",
}


def is_original_config(config_dict: dict[str, Any]) -> bool:
    """Whether a `config.json` was written by the original code of VideoLLaMA 2 or Video-LLaVA."""
    model_type = config_dict.get("model_type")
    if model_type == "llava":
        return "mm_video_tower" in config_dict
    return model_type in ORIGINAL_MODEL_TYPES and "vision_config" not in config_dict


def is_video_llava_checkpoint(
    checkpoint: str | os.PathLike | None, config: PreTrainedConfig | None = None, **hub_kwargs
) -> bool:
    """Whether a checkpoint is Video-LLaVA's, as the original or as this package saves it."""
    if config is not None:
        return getattr(config, "video_config", None) is not None
    path = checkpoint and cached_file(
        str(checkpoint), CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs
    )
    config_dict = _read_json(path) if path else {}
    return bool(config_dict.get("mm_video_tower") or config_dict.get("video_config"))


def _find_file(checkpoint: str, reference: str, filename: str) -> str | None:
    """
    A file of something that a checkpoint refers to: by a path relative to itself or to the folder it lies in, an
    absolute path, or a Hub name.
    """
    for folder in (Path(checkpoint) / reference, Path(checkpoint).parent / reference, Path(reference)):
        if (folder / filename).is_file():
            return str(folder / filename)
    if os.path.isabs(reference) or reference.startswith("."):
        return None
    try:
        return cached_file(reference, filename, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # offline, no such repository, or a path that is not a repository's name
        return None


def _read_json(path: str) -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _tower_config(checkpoint: str, tower: str | dict[str, Any], kind: str) -> dict[str, Any]:
    """Configuration of a vision tower that `config.json` only names; `kind` is `_tower_kind`'s."""
    if isinstance(tower, dict):
        return tower
    if tower in _KNOWN_TOWERS:
        return _KNOWN_TOWERS[tower][0]
    path = _find_file(checkpoint, tower, CONFIG_NAME)
    if path is None:
        if kind == "languagebind":
            return {**_LANGUAGEBIND_TOWER, "add_time_attn": "video" in tower.lower()}
        raise OSError(
            f"The checkpoint names its vision tower {tower!r} but does not describe it, and the tower's {CONFIG_NAME} "
            f"was found neither under {checkpoint} nor on the Hub. Put it into "
            f"{Path(checkpoint) / tower}."
        )
    config = _read_json(path)
    config = config.get("vision_config", config)
    model_type = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "languagebind": "languagebind_vision"}
    names = set(CONFIG_MAPPING[model_type[kind]].default_config_fields()) - {"dtype", "transformers_version"}
    return {
        "model_type": model_type[kind],
        **{key: value for key, value in config.items() if key in names - {"model_type"}},
    }


def _tower_kind(tower: str) -> str:
    # The original's rule (`build_vision_tower`): by substring, clip first.
    for kind in ("languagebind", "clip", "siglip"):
        if kind in tower.lower():
            return kind
    raise ValueError(
        f"Unknown vision tower {tower!r} in `mm_vision_tower`; the original builds towers whose name contains "
        "'clip' or 'siglip'."
    )


def read_tensor_shapes(checkpoint: str) -> dict[str, tuple[int, ...]]:
    """
    Names and shapes of all tensors in a local checkpoint folder, from headers alone; empty for anything else.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    folder = Path(checkpoint)
    for path in sorted(folder.glob("model*.safetensors")):
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            shapes.update({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})  # noqa: SIM118
    if not shapes:
        import torch

        for path in sorted(folder.glob("pytorch_model*.bin")):
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            shapes.update({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    return shapes


def infer_audio_config(shapes: dict[str, tuple[int, ...]], prefix: str = "model.audio_tower.") -> dict[str, Any]:
    """
    BEATs' sizes from its tensors' shapes. The original keeps them in code and not in `config.json`; `max_distance`
    leaves no trace in the tensors and keeps its default.
    """
    tower = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    if not tower:
        return {}
    attention = "encoder.layers.0.self_attn."
    hidden_size, per_group, conv_pos = tower["encoder.pos_conv.0.weight_v"]
    num_buckets, num_heads = tower[f"{attention}relative_attention_bias.weight"]
    layers = {int(key.split(".")[2]) for key in tower if key.startswith("encoder.layers.")}
    return {
        "patch_size": tower["patch_embedding.weight"][-1],
        "embed_dim": tower["patch_embedding.weight"][0],
        "conv_bias": "patch_embedding.bias" in tower,
        "hidden_size": hidden_size,
        "intermediate_size": tower["encoder.layers.0.fc1.weight"][0],
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": num_heads,
        "conv_pos": conv_pos,
        "conv_pos_groups": hidden_size // per_group,
        "num_buckets": num_buckets,
        "gru_rel_pos": f"{attention}grep_a" in tower,
        "num_classes": tower["predictor.weight"][0] if "predictor.weight" in tower else 0,
    }


def find_original_config(checkpoint: str | os.PathLike, **hub_kwargs) -> dict[str, Any] | None:
    """`config.json` of a folder or Hub repository if the original code wrote it, else `None`."""
    path = cached_file(str(checkpoint), CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    config_dict = _read_json(path) if path is not None else {}
    return config_dict if is_original_config(config_dict) else None


def load_original_tokenizer(checkpoint: str, config_dict: dict[str, Any], **kwargs) -> PreTrainedTokenizerBase:
    """
    The tokenizer of an original checkpoint, with the three placeholder tokens added behind its vocabulary.

    Their ids follow the last id of the tokenizer, so they may fall behind the embedding (Mistral) or into rows that
    only pad it (Qwen2): the model never looks them up and never generates them.
    """
    # Without `config` the tokenizer would ask AutoConfig, which asks this function.
    config = CONFIG_MAPPING[ORIGINAL_MODEL_TYPES[config_dict["model_type"]]]()
    tokenizer = load_tokenizer(checkpoint, config=config, **kwargs)
    add_placeholder_tokens(tokenizer)
    return tokenizer


def add_placeholder_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes `<image>`, `<video>` and `<audio>` special tokens of the tokenizer, in this order, if they are not."""
    tokenizer.add_tokens(list(PLACEHOLDER_TOKENS), special_tokens=True)


def convert_original_config(
    config_dict: dict[str, Any],
    checkpoint: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    towers: Mapping[str, str | dict[str, Any]] | None = None,
    tensor_shapes: dict[str, tuple[int, ...]] | None = None,
) -> dict[str, Any]:
    """
    The arguments of [`VideoLlama2Config`] for an original checkpoint's `config.json`.

    Args:
        config_dict: The content of `config.json`.
        checkpoint: The folder or Hub repository it came from; towers and tokenizer are looked up there.
        tokenizer: The tokenizer, if it is not that of `checkpoint`.
        towers: Folders or repositories to read instead of towers that `config.json` names, or their configurations.
        tensor_shapes: Shapes of the audio tower's tensors, if they are not those of `checkpoint`.

    Raises:
        ValueError: The configuration is one that the original cannot run either.
        OSError: The vision tower is named but described nowhere.
    """
    is_video_llava = config_dict["model_type"] == "llava"
    text_config = {
        key: value
        for key, value in config_dict.items()
        if not key.startswith("mm_") and key not in _MULTIMODAL_KEYS and not key.startswith("_")
    }
    text_config["model_type"] = ORIGINAL_MODEL_TYPES[config_dict["model_type"]]

    tower = config_dict.get("mm_image_tower" if is_video_llava else "mm_vision_tower")
    if tower is None:
        raise ValueError(
            f"config.json of {checkpoint} has model_type {config_dict['model_type']!r} but names no vision tower "
            "(`mm_vision_tower`); it does not describe a whole VideoLLaMA 2 model."
        )
    towers = towers or {}
    converted = {
        "text_config": text_config,
        "vision_config": _tower_config(checkpoint, towers.get(tower, tower), _tower_kind(tower)),
        "connector_type": config_dict.get("mm_projector_type", "linear"),
        "vision_feature_layer": config_dict.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": (
            "full" if config_dict.get("mm_vision_select_feature", "patch") == "cls_patch" else "default"
        ),
        "num_frames": config_dict.get("num_frames") or 8,
        "dtype": config_dict.get("dtype", config_dict.get("torch_dtype")),
    }
    if is_video_llava:
        tower = config_dict["mm_video_tower"]
        converted["video_config"] = _tower_config(checkpoint, towers.get(tower, tower), "languagebind")
        converted["video_feature_select_strategy"] = "full"  # the original's video tower ignores the option
        converted["connector_type"] = {"mlp2x_gelu": "frame_mlp2x_gelu"}.get(
            converted["connector_type"], converted["connector_type"]
        )
    if config_dict.get("mm_audio_tower") is not None:
        if tensor_shapes is None:
            tensor_shapes = read_tensor_shapes(checkpoint)
        converted["audio_config"] = infer_audio_config(tensor_shapes)
        converted["audio_connector_type"] = config_dict.get("mm_projector_a_type", "linear")

    try:
        if tokenizer is None:
            tokenizer = load_original_tokenizer(checkpoint, config_dict)
        ids = tokenizer.convert_tokens_to_ids(list(PLACEHOLDER_TOKENS))
    except (OSError, ValueError):  # a folder of weights only: behind the vocabulary, as for a tokenizer of that size
        ids = [config_dict["vocab_size"] + i for i in range(3)]
    converted.update(zip(("image_token_id", "video_token_id", "audio_token_id"), ids))
    return converted


def load_original_image_processor_config(
    config_dict: dict[str, Any], checkpoint: str, towers: dict[str, str] | None = None
) -> dict[str, Any] | None:
    """
    `preprocessor_config.json` of the vision tower that an original checkpoint names (not of the checkpoint, which the
    original does not read). `None` for LanguageBind's towers, whose preprocessing is code. See
    [`convert_original_config`] for the arguments.
    """
    tower = config_dict.get("mm_vision_tower")
    if tower is None or _tower_kind(tower) == "languagebind":
        return None
    tower = (towers or {}).get(tower, tower)
    if tower in _KNOWN_TOWERS:
        return _KNOWN_TOWERS[tower][1]
    path = _find_file(checkpoint, tower, "preprocessor_config.json")
    if path is not None:
        return _read_json(path)
    raise OSError(
        f"preprocessor_config.json of the vision tower {tower!r} was found neither under {checkpoint} nor on the Hub. "
        f"Put it into {Path(checkpoint) / tower}."
    )


__all__ = [
    "MISTRAL_SYSTEM_MESSAGE",
    "PLACEHOLDER_TOKENS",
    "VIDEO_LLAVA_KEY_MAPPING",
    "add_placeholder_tokens",
    "convert_original_config",
    "find_original_config",
    "infer_audio_config",
    "is_original_config",
    "is_video_llava_checkpoint",
    "load_original_image_processor_config",
    "load_original_tokenizer",
    "read_tensor_shapes",
]
