"""
LanguageBind's vision tower (https://arxiv.org/abs/2310.01852), the two eyes of Video-LLaVA: CLIP's vision transformer
with attention over time in front of every spatial block. transformers' own port of Video-LLaVA drops that attention.

Only the temporal half of a layer is new here; everything else is transformers' CLIP, so a tower without temporal
attention (`add_time_attn=False`, LanguageBind's image tower) is `CLIPVisionModel` to the bit. The names of the
parameters are bound by LanguageBind's checkpoints.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import AutoModel
from transformers.models.clip.modeling_clip import (
    CLIPAttention,
    CLIPEncoderLayer,
    CLIPPreTrainedModel,
    CLIPVisionEmbeddings,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_videollama2 import LanguageBindVisionConfig


class LanguageBindVisionEncoderLayer(CLIPEncoderLayer):
    """
    CLIP's encoder layer behind attention over time.

    The layer sees frames, not videos: `hidden_states` is (frames, tokens, hidden_size), and every `config.num_frames`
    consecutive frames are one window. A token attends to the tokens at its own position in the frames of its window.
    There is no temporal MLP (it is commented out in the original's `modeling_video.py`).
    """

    def __init__(self, config: LanguageBindVisionConfig):
        super().__init__(config)
        self.num_frames = config.num_frames
        self.temporal_embedding = nn.Parameter(torch.zeros(1, config.num_frames, config.hidden_size))
        self.temporal_attn = CLIPAttention(config)
        self.temporal_layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: (frames, tokens, hidden_size), `frames` being a multiple of `config.num_frames`.
            attention_mask: For the spatial attention only; all frames of a window attend to each other.

        Returns:
            A tensor like `hidden_states`.
        """
        hidden_states = self._attend_over_time(hidden_states, **kwargs)
        return super().forward(hidden_states, attention_mask, **kwargs)

    def _attend_over_time(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        frames, tokens, width = hidden_states.shape
        check_whole_windows(frames, self.num_frames)
        # To (windows * tokens, num_frames, width): time becomes the sequence, each token position a row of the batch.
        hidden_states = hidden_states.reshape(-1, self.num_frames, tokens, width).transpose(1, 2)
        hidden_states = hidden_states.reshape(-1, self.num_frames, width)
        hidden_states = hidden_states + self.temporal_embedding
        attended, _ = self.temporal_attn(self.temporal_layer_norm1(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states.reshape(-1, tokens, self.num_frames, width).transpose(1, 2).reshape(frames, tokens, width)


def check_whole_windows(frames: int, num_frames: int) -> None:
    if frames % num_frames != 0:
        raise ValueError(
            f"LanguageBind's temporal attention takes windows of num_frames={num_frames} frames, got {frames} frames; "
            f"give every video a multiple of {num_frames} frames."
        )


class LanguageBindVisionEncoder(nn.Module):
    """The stack of `config.num_hidden_layers` layers, with or without attention over time."""

    def __init__(self, config: LanguageBindVisionConfig):
        super().__init__()
        self.config = config
        # CODEPATH: LanguageBind_Video_* have temporal attention, LanguageBind_Image does not.
        layer_class = LanguageBindVisionEncoderLayer if config.add_time_attn else CLIPEncoderLayer
        self.layers = nn.ModuleList([layer_class(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


@auto_docstring
class LanguageBindVisionPreTrainedModel(CLIPPreTrainedModel):
    config: LanguageBindVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")
    _input_embed_layer = "patch_embedding"
    _no_split_modules = ["CLIPVisionEmbeddings", "CLIPEncoderLayer", "LanguageBindVisionEncoderLayer"]
    _can_record_outputs = {
        "hidden_states": CLIPEncoderLayer,
        # The temporal attention is a CLIPAttention too, of another shape: (windows * tokens, heads, frames, frames).
        "attentions": OutputRecorder(CLIPAttention, index=1, layer_name="self_attn"),
    }
    # LanguageBind's repositories hold a text tower and the contrastive heads beside the vision tower.
    _keys_to_ignore_on_load_unexpected = [
        r"^text_model\.",
        r"^(text|visual)_projection\.",
        r"^logit_scale$",
        r"position_ids$",
    ]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        # For code outside transformers, the base class skips modules that hold no parameter of their own, and CLIP's
        # attention and MLP are such modules. It need not: the primitives below leave loaded weights alone.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, LanguageBindVisionEncoderLayer):
            std = module.embed_dim**-0.5 * self.config.initializer_factor
            init.normal_(module.temporal_embedding, mean=0.0, std=std)


@auto_docstring(
    custom_intro="""
    The vision tower of LanguageBind, without a head or projection on top: CLIP's vision model, with attention over
    time in every layer when `config.add_time_attn` is set.
    """
)
class LanguageBindVisionModel(LanguageBindVisionPreTrainedModel):
    def __init__(self, config: LanguageBindVisionConfig):
        super().__init__(config)
        self.embeddings = CLIPVisionEmbeddings(config)
        # "layrnorm" is CLIP's spelling, kept in all checkpoints.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = LanguageBindVisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        pixel_values (`torch.Tensor` of shape `(videos, frames, channels, height, width)`):
            The pixels, or `(videos * frames, channels, height, width)` with the frames of all videos in the first
            axis, as all outputs have them. With temporal attention every video needs a multiple of
            `config.num_frames` frames; those beyond the first `num_frames` form windows of their own.
        """
        if pixel_values.ndim == 5:
            if self.config.add_time_attn:  # CODEPATH: as above; a window must not reach into the next video
                check_whole_windows(pixel_values.shape[1], self.config.num_frames)
            pixel_values = pixel_values.flatten(0, 1)

        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        hidden_states = self.pre_layrnorm(hidden_states)
        last_hidden_state = self.encoder(hidden_states, **kwargs).last_hidden_state
        pooler_output = self.post_layernorm(last_hidden_state[:, 0])
        return BaseModelOutputWithPooling(last_hidden_state=last_hidden_state, pooler_output=pooler_output)


# Checkpoints, LanguageBind's and ours, write "vision_model." before every key, as CLIP's do.
register_checkpoint_conversion_mapping(
    "LanguageBindVisionModel", [PrefixChange(prefix_to_remove="vision_model")], overwrite=True
)
AutoModel.register(LanguageBindVisionConfig, LanguageBindVisionModel, exist_ok=True)

__all__ = ["LanguageBindVisionModel", "LanguageBindVisionPreTrainedModel"]
