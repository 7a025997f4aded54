"""
Checkpoints of transformers' own port of Video-LLaVA (`-hf`), as they are or repaired.

The port has no attention over time in its video tower, another activation, and random rows behind the vocabulary.
Repairing takes the video tower that the original loads.
"""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, VideoLlavaConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ..checkpoint_videollama2 import PLACEHOLDER_TOKENS, add_placeholder_tokens
from ..configuration_videollama2 import LanguageBindVisionConfig, VideoLlama2Config
from ..tokenization_videollama2 import load_tokenizer
from .languagebind import IMAGE_TOWER, VIDEO_TOWER, Tower, compare, describe, read_repository
from .sources import Dropped, Part, Source, fetch, keep_name, named
from .tensors import ConversionError, read_folder


# Keys of transformers' port, as released and as its later versions write them, and ours.
_PORT_KEYS = (
    (re.compile(r"^(?:model\.)?image_tower\.(?:vision_model\.)?"), IMAGE_TOWER.prefix),
    (re.compile(r"^(?:model\.)?video_tower\.(?:vision_model\.)?"), VIDEO_TOWER.prefix),
    (re.compile(r"^(?:model\.)?multi_modal_projector\.linear_1\."), "model.mm_projector.0."),
    (re.compile(r"^(?:model\.)?multi_modal_projector\.linear_2\."), "model.mm_projector.2."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(?:model\.)?language_model\.(?:model\.)?"), "model."),
)
# Tokens that the port's conversion script adds behind the vocabulary, with random rows.
_PORT_TOKENS = ("<image>", "<video>", "<pad>")
_VISION_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)
# Relative difference of two tensors from which on they do not come from the same training.
_UNRELATED = 0.1
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def open_port(
    folder: Path, config_dict: dict[str, Any], vision_tower: str | Path | None, video_tower: str | Path | None
) -> Source:
    """A checkpoint of transformers' `VideoLlavaForConditionalGeneration`, as it is or with LanguageBind's towers."""
    if vision_tower is not None and video_tower is None:
        raise ConversionError(
            f"{folder} is of transformers' port, which is repaired with LanguageBind's video tower. Pass it too: "
            "--video-tower PATH."
        )
    native = _read_port_config(folder, config_dict)
    tensors = read_folder(folder)
    if not tensors:
        raise ConversionError(f"{folder} holds no weights: neither model*.safetensors nor pytorch_model*.bin.")
    part = Part("transformers' port", folder, tensors, _rename_port)
    vision = {name: getattr(native.vision_config, name) for name in _VISION_FIELDS}
    tower_config = {"model_type": LanguageBindVisionConfig.model_type, "add_time_attn": False, **vision}
    image_config, video_config = tower_config, dict(tower_config)
    parts, one_way = [part], None
    notes = ["The rows that transformers' port adds behind the vocabulary, with random values, are cut off."]
    if video_tower is None:
        notes.append(
            "As transformers' port computes it: without attention over time, and with the activation "
            f"{vision['hidden_act']}. --video-tower LanguageBind/LanguageBind_Video_merge repairs both."
        )
    else:
        video_part, video_config = _repair(VIDEO_TOWER, video_tower, part, notes)
        parts.insert(0, video_part)
        if vision_tower is not None:
            image_part, image_config = _repair(IMAGE_TOWER, vision_tower, part, notes)
            parts.insert(0, image_part)
        else:
            image_config = {**tower_config, "hidden_act": video_config.get("hidden_act", "gelu")}
        one_way = (
            f"{folder.name} was repaired with LanguageBind's attention over time, for which transformers' Video-LLaVA "
            "has no place; there is no way back to its layout."
        )
    tokenizer = _load_port_tokenizer(folder)
    vocabulary = len(tokenizer) - len(PLACEHOLDER_TOKENS)
    text_config = native.text_config.to_dict()
    if vocabulary > text_config["vocab_size"]:
        raise ConversionError(
            f"The tokenizer in {folder} has {vocabulary} tokens, its {CONFIG_NAME} only {text_config['vocab_size']}."
        )
    text_config |= {"vocab_size": vocabulary, "pad_token_id": tokenizer.pad_token_id}
    ids = tokenizer.convert_tokens_to_ids(list(PLACEHOLDER_TOKENS))
    config = VideoLlama2Config(
        text_config=text_config,
        vision_config=image_config,
        video_config=video_config,
        connector_type="frame_mlp2x_gelu",
        vision_feature_layer=native.vision_feature_layer,
        vision_feature_select_strategy=native.vision_feature_select_strategy,
        video_feature_select_strategy="full",
        num_frames=video_config.get("num_frames", LanguageBindVisionConfig().num_frames),
        **dict(zip(("image_token_id", "video_token_id", "audio_token_id"), ids)),
    )
    generation_config = None
    if (folder / GENERATION_CONFIG_NAME).is_file():
        generation_config = json.loads((folder / GENERATION_CONFIG_NAME).read_text(encoding="utf-8"))
        generation_config["pad_token_id"] = tokenizer.pad_token_id  # <pad> is one of the rows that are cut
    return Source(
        "full",
        folder,
        config_dict,
        config,
        parts,
        tokenizer,
        None,
        folder,
        rows=dict.fromkeys(_EMBEDDINGS, vocabulary),
        generation_config=generation_config,
        one_way=one_way,
        notes=notes,
    )


def _read_port_config(folder: Path, config_dict: dict[str, Any]) -> Any:
    """The configuration as transformers reads it, defaults filled in; refused where this model cannot be the same."""
    try:
        native: Any = VideoLlavaConfig.from_dict(config_dict)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConversionError(f"{CONFIG_NAME} of {folder} is not one of Video-LLaVA: {error}") from None
    unsupported = {
        name: getattr(native, name)
        for name, value in (("projector_hidden_act", "gelu"), ("multimodal_projector_bias", True))
        if getattr(native, name) != value
    }
    if not isinstance(native.vision_feature_layer, int):
        unsupported["vision_feature_layer"] = native.vision_feature_layer
    if native.vision_config.model_type != "clip_vision_model":
        unsupported["vision_config.model_type"] = native.vision_config.model_type
    if unsupported:
        raise ConversionError(
            f"{folder} has {unsupported}, which no released Video-LLaVA has and which is not supported."
        )
    return native


def _rename_port(name: str) -> str | Dropped:
    for pattern, replacement in _PORT_KEYS:
        name, count = pattern.subn(replacement, name)
        if count:
            break
    return keep_name(name)


def _repair(tower: Tower, given: str | Path, port: Part, notes: list[str]) -> tuple[Part, dict[str, Any]]:
    """
    LanguageBind's tower in place of the port's, and its configuration.

    The port's tower is LanguageBind's without its attention over time, and frozen in training. So the other tensors
    must be the same, up to rounding; if they are not, it was another tower.
    """
    part, config = read_repository(tower, fetch(given))
    theirs = dict(named(part))
    ours = {target: tensor for target, tensor in named(port) if target.startswith(tower.prefix)}
    if tower.has_time and not (config.get("add_time_attn") and any(".temporal_attn." in name for name in theirs)):
        raise ConversionError(
            f"{given} has no attention over time, so it repairs nothing. Pass LanguageBind_Video_merge: "
            f"{tower.option} PATH."
        )
    differences = compare(ours, theirs)
    worst = max(differences, key=differences.__getitem__, default="")
    if differences.get(worst, 0) > _UNRELATED:
        shape = list(theirs[worst].shape) if worst in theirs else "missing"
        raise ConversionError(
            f"{given} is not the {tower.label} that {port.folder} was made with: {worst} is {shape} there and "
            f"{list(ours[worst].shape)} here, the relative difference {differences[worst]:.2g}. Pass another: "
            f"{tower.option} PATH."
        )
    notes.append(f"The {tower.label} is that of {given}; the port's is {describe(differences, ours, theirs)}.")
    return part, config


def _load_port_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """
    The tokenizer without the tokens that the port added, then with this package's placeholders. Pads with `<unk>`, as
    the original does.
    """
    try:
        loaded: Any = load_tokenizer(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConversionError(f"The tokenizer in {folder} cannot be read: {reason}") from None
    state = json.loads(loaded.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in _PORT_TOKENS]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token=loaded.bos_token,
        eos_token=loaded.eos_token,
        unk_token=loaded.unk_token,
        pad_token=loaded.unk_token,
        model_max_length=loaded.model_max_length,
        clean_up_tokenization_spaces=False,
    )
    highest = max(tokenizer.get_vocab().values())
    if highest + 1 != len(tokenizer):
        more = sorted(token["content"] for token in state["added_tokens"] if token["id"] >= len(tokenizer))
        raise ConversionError(
            f"The tokenizer in {folder} has tokens behind <image>, <video> and <pad>: {', '.join(more[:5])}. Their "
            "rows would be cut with those of the port, so it is not converted."
        )
    add_placeholder_tokens(tokenizer)
    return tokenizer
