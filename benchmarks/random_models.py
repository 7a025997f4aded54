"""Models in the shapes of the published ones with random weights, and sessions with them, for benchmarks."""

from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from videollama2_hf import VideoLlama2Config, VideoLlama2ForConditionalGeneration, VideoLlama2Processor
from videollama2_hf.session import Session


Module = TypeVar("Module", bound=nn.Module)

CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
QWEN2_HALF_B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
# What short forms take instead: the same parts, small.
SMALL_VISION = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL_VISION |= {"image_size": 112}
SMALL_TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_TEXT |= {"vocab_size": 2048}
SMALL_QWEN2 = QWEN2_HALF_B | SMALL_TEXT
SMALL_AUDIO = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL_AUDIO |= {"embed_dim": 64, "conv_pos": 32}

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a template for conversations."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="</s>", chat_template=_CHAT_TEMPLATE
    )


def build_config(
    vision: dict[str, Any] = CLIP_L, text: dict[str, Any] = QWEN2_HALF_B, short: bool = False, **options: Any
) -> VideoLlama2Config:
    """A configuration; `short` makes its towers and its language model small."""
    number = len(build_tokenizer())
    return VideoLlama2Config(
        vision_config=vision | (SMALL_VISION if short else {}),
        text_config=text | (SMALL_TEXT if short else {}),
        **{
            "tie_word_embeddings": text["tie_word_embeddings"],
            "image_token_id": number,
            "video_token_id": number + 1,
            "audio_token_id": number + 2,
            **options,
        },
    )


def build(model_class: type[Module], *arguments: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Module:
    """A module in evaluation mode whose weights are random, of a size that keeps what passes it near 1."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            if hasattr(model_class, "_from_config"):
                module = model_class._from_config(*arguments, dtype=dtype, **options)
            else:
                module = model_class(*arguments, **options)
    finally:
        torch.set_default_dtype(before)
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    fill(module)
    return module.eval()


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Weights from one pool of random numbers, which is much faster than drawing each."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(2**22 + 3).uniform_(-1.0, 1.0, generator=generator)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        values, bound = parameter.data.view(-1), (3 / (parameter.numel() // parameter.shape[0])) ** 0.5
        scaled = (pool * bound).to(values)
        for start in range(0, len(values), len(pool)):
            piece = values[start : start + len(pool)]
            piece.copy_(scaled[: len(piece)])


def build_session(config: VideoLlama2Config, dtype: torch.dtype) -> Session:
    """A session whose towers and connectors are in `dtype`, its language model in float32."""
    model = build(VideoLlama2ForConditionalGeneration, config, dtype=torch.float32)
    for part in (model.model.vision_tower, model.model.mm_projector):
        part.to(dtype)
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 1
    return Session(model, VideoLlama2Processor.from_config(config, build_tokenizer()))
