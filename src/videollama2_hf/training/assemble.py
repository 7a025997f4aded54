"""Models of parts that were trained apart: what the first stages start from."""

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..checkpoint_videollama2 import PLACEHOLDER_TOKENS, add_placeholder_tokens
from ..configuration_videollama2 import VideoLlama2AudioConfig, VideoLlama2Config
from ..modeling_beats import VideoLlama2AudioModel
from ..modeling_videollama2 import VideoLlama2ForConditionalGeneration
from ..processing_videollama2 import VideoLlama2Processor
from ..tokenization_videollama2 import load_tokenizer


def assemble_model(
    language_model: str | os.PathLike,
    vision_tower: str | os.PathLike,
    connector_type: str = "stc_connector_v35",
    num_frames: int = 16,
    **options: Any,
) -> tuple[VideoLlama2ForConditionalGeneration, VideoLlama2Processor]:
    """
    A language model and a vision tower with a new, random connector between them: what stage 1 starts from.

    Args:
        language_model: Folder or Hub name of a causal language model with its tokenizer and chat template.
        vision_tower: Folder or Hub name of a CLIP or SigLIP model, whole or its vision half.
        **options: What else [`VideoLlama2Config`] takes.

    Returns:
        Model, in float32, and processor; `save_pretrained` of both makes a folder for a recipe's `model`.
    """
    language = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    vision_config = AutoConfig.from_pretrained(vision_tower)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    language.config.dtype = vision_config.dtype = torch.float32  # not what their own checkpoints are in
    tokenizer = load_tokenizer(str(language_model))
    add_placeholder_tokens(tokenizer)
    config = VideoLlama2Config(
        text_config=language.config,
        vision_config=vision_config,
        connector_type=connector_type,  # type: ignore[arg-type]  # checked by the configuration
        num_frames=num_frames,
        tie_word_embeddings=language.config.tie_word_embeddings,
        **{f"{token[1:-1]}_token_id": tokenizer.convert_tokens_to_ids(token) for token in PLACEHOLDER_TOKENS},
        **options,
    )
    model: Any = VideoLlama2ForConditionalGeneration(config)
    tower_class: Any = type(model.model.vision_tower)
    model.model.vision_tower.load_state_dict(
        tower_class.from_pretrained(vision_tower, config=vision_config, dtype=torch.float32).state_dict()
    )
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    return model, VideoLlama2Processor.from_config(config, tokenizer)


def add_audio_tower(
    checkpoint: str | os.PathLike, audio_tower: str | os.PathLike
) -> tuple[VideoLlama2ForConditionalGeneration, VideoLlama2Processor]:
    """
    A model that sees, with BEATs and a new, random audio projector: what stage 3 starts from.

    Args:
        checkpoint: Folder or Hub name of the model.
        audio_tower: Microsoft's BEATs file (`.pt`, with `cfg` and `model`).
    """
    content = torch.load(audio_tower, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not {"cfg", "model"} <= set(content):
        raise ValueError(f"{audio_tower} is no file of BEATs; it must hold `cfg` and `model`.")
    cfg, weights = content["cfg"], content["model"]
    sizes = {
        "embed_dim": cfg.get("embed_dim"),
        "hidden_size": cfg.get("encoder_embed_dim"),
        "intermediate_size": cfg.get("encoder_ffn_embed_dim"),
        "num_hidden_layers": cfg.get("encoder_layers"),
        "num_attention_heads": cfg.get("encoder_attention_heads"),
        "conv_pos": cfg.get("conv_pos"),
        "conv_pos_groups": cfg.get("conv_pos_groups"),
        "num_buckets": cfg.get("num_buckets"),
        "max_distance": cfg.get("max_distance"),
        "num_classes": len(weights["predictor.weight"]) if "predictor.weight" in weights else 0,
    }
    audio_config = VideoLlama2AudioConfig(**{name: value for name, value in sizes.items() if value is not None})
    seeing = VideoLlama2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    config = VideoLlama2Config.from_dict({**seeing.config.to_dict(), "audio_config": audio_config.to_dict()})
    model: Any = VideoLlama2ForConditionalGeneration(config)
    model.load_state_dict(seeing.state_dict(), strict=False)
    tower = VideoLlama2AudioModel.from_pretrained(None, config=audio_config, state_dict=weights)
    model.model.audio_tower.load_state_dict(tower.state_dict())
    processor = VideoLlama2Processor.from_pretrained(checkpoint)
    return model, VideoLlama2Processor.from_config(config, processor.tokenizer)


__all__ = ["add_audio_tower", "assemble_model"]
