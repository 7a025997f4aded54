"""Small random models of every kind, for tests that need no recording."""

import torch

from videollama2_hf import VideoLlama2Config, VideoLlama2ForConditionalGeneration


TEXT_SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": {},
    "llama": {},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 256},
    "phi3": {"num_key_value_heads": 4},
}
VISION_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
AUDIO_SIZES = {
    "embed_dim": 16,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "num_classes": 0,
}


def make_config(family: str = "qwen2", vision: str = "siglip_vision_model", hears: bool = True, **kwargs):
    text = {"model_type": family, **TEXT_SIZES, **FAMILIES[family]}
    kwargs = {
        "connector_type": "stc_connector_v35",
        "connector_depth": 1,
        "num_frames": 4,
        # One placeholder inside the vocabulary, two beyond it.
        "image_token_id": 119,
        "video_token_id": 120,
        "audio_token_id": 121,
        **kwargs,
    }
    return VideoLlama2Config(
        text_config=text | kwargs.pop("text_config", {}),
        vision_config={"model_type": vision, **VISION_SIZES},
        audio_config=AUDIO_SIZES if hears else None,
        **kwargs,
    )


def make_model(family: str = "qwen2", seed: int = 0, attn_implementation: str | None = None, **kwargs):
    torch.manual_seed(seed)
    config = make_config(family, **kwargs)
    model = VideoLlama2ForConditionalGeneration._from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():  # far from the flat distribution of a fresh model, so that greedy tokens are stable
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25 if "lm_head" not in name else 0.6)
    return model
