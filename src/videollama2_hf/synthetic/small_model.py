"""
The small model: VideoLLaMA 2.1-AV's architecture, all parts real, at 11 M parameters.

Frames of 64 x 64 and four seconds of sound are configuration, not code: 8 frames become 64 tokens (STC v35) and the
sound 96.
"""

from collections.abc import Iterable
from typing import Any

from ..configuration_videollama2 import VideoLlama2Config
from ..modeling_videollama2 import VideoLlama2ForConditionalGeneration
from ..processing_videollama2 import VideoLlama2Processor
from .world import SECONDS


FRAME_SIZE = 64
NUM_FRAMES = 8
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen2's, without its default system message.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""


def build_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> Any:
    """
    A byte-level BPE tokenizer as Qwen2's, trained on texts: their words are one token each, and any other text is
    spelled in smaller ones, down to bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    pattern = Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_world_tokenizer() -> Any:
    """The tokenizer of the small model, trained on what the world's questions and captions say."""
    import numpy as np

    from .rows import draw_row

    texts = []
    for index in range(4000):
        row = draw_row(np.random.default_rng([7, index]), {"text": 1, "audio_visual": 1, "image": 1})
        for question in row.questions:
            texts += [f"{row.context} {question.text}", f"{question.text}\n", question.answer, f" {question.answer}"]
    texts += ["user", "assistant", "system"] * 50
    return build_tokenizer(texts)


def build_config(tokenizer: Any, **kwargs: Any) -> VideoLlama2Config:
    """
    The small model's configuration; `kwargs` replace what it has.

    The embedding matrix has rows for the tokenizer's vocabulary only; the placeholders lie behind it.
    """
    vocab_size = len(tokenizer.get_vocab())
    placeholders = {"image_token_id": vocab_size, "video_token_id": vocab_size + 1, "audio_token_id": vocab_size + 2}
    if "<image>" in tokenizer.get_vocab():
        names = ("image", "video", "audio")
        placeholders = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<{name}>") for name in names}
        vocab_size = min(placeholders.values())
    values: dict[str, Any] = {
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": vocab_size,
            "hidden_size": 256,
            "intermediate_size": 640,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            # As large as 1 / sqrt(hidden_size). From the usual 0.02, which is for wider models, attention starts so
            # flat that looking things up in a text is not learned in any reasonable time.
            "initializer_range": 0.06,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            # As the language model's, which connectors without RegStage need.
            "hidden_size": 256,
            "intermediate_size": 640,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": FRAME_SIZE,
            "patch_size": 8,
            "vision_use_head": False,
        },
        "audio_config": {
            "embed_dim": 128,
            "num_mel_bins": 64,
            "hidden_size": 192,
            "intermediate_size": 640,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "conv_pos": 64,
            "num_buckets": 128,
            "max_distance": 200,
            # Of a published tower that is tuned; this one is trained from nothing.
            "layer_wise_gradient_decay_ratio": 1.0,
            "layerdrop": 0.0,
            "num_classes": 0,
            "max_source_positions": 96,
        },
        "connector_type": "stc_connector_v35",
        "connector_depth": 2,
        "num_frames": NUM_FRAMES,
        **placeholders,
    }
    return VideoLlama2Config(**{**values, **kwargs})


def build_processor(config: VideoLlama2Config, tokenizer: Any) -> VideoLlama2Processor:
    """The small model's processor: one window of four seconds, in which the whole track is heard."""
    return VideoLlama2Processor.from_config(
        config, tokenizer, chunk_length=round(SECONDS), audio_mode="full", clip_duration=SECONDS / 8
    )


def build_model(config: VideoLlama2Config, seed: int = 0) -> VideoLlama2ForConditionalGeneration:
    """
    The small model with new weights. The vision tower's positions start as sines and cosines of the patch grid:
    from random ones it takes many times longer to learn shapes.
    """
    import torch

    torch.manual_seed(seed)
    model = VideoLlama2ForConditionalGeneration(config)
    vision: Any = config.vision_config
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    side, width = vision.image_size // vision.patch_size, vision.hidden_size // 4
    frequencies = 100.0 ** -(torch.arange(width) / width)
    angles = torch.arange(side)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    grid = torch.cat([axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)], dim=2)
    with torch.no_grad():
        positions.copy_(grid.reshape(side * side, -1) * 0.5)
    return model


def save_untrained(output_dir: str, seed: int = 0) -> None:
    """Writes the small model with new weights, and its processor, into a folder that `from_pretrained` loads."""
    tokenizer = build_world_tokenizer()
    config = build_config(tokenizer)
    build_processor(config, tokenizer).save_pretrained(output_dir)
    build_model(config, seed).save_pretrained(output_dir)


def export(model_dir: str, output_dir: str) -> None:
    """
    Writes a trained small model for shipping: weights in bfloat16, without the copies of this package's code that
    `save_pretrained` puts beside them.
    """
    import json
    from pathlib import Path

    import torch

    model = VideoLlama2ForConditionalGeneration.from_pretrained(model_dir, dtype=torch.bfloat16)
    VideoLlama2Processor.from_pretrained(model_dir).save_pretrained(output_dir)
    model.save_pretrained(output_dir)
    for path in Path(output_dir).glob("*.py"):
        path.unlink()
    for path in Path(output_dir).glob("*.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        if _drop_auto_map(values):
            path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _drop_auto_map(values: Any) -> bool:
    """Takes every `auto_map` out of a JSON value, in place; whether there was one."""
    if not isinstance(values, dict):
        return False
    found = values.pop("auto_map", None) is not None
    return any([found, *(_drop_auto_map(value) for value in values.values())])


__all__ = [
    "build_config",
    "build_model",
    "build_processor",
    "build_tokenizer",
    "build_world_tokenizer",
    "export",
    "save_untrained",
]
