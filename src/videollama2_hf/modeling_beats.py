"""
BEATs, the audio tower of VideoLLaMA 2.1-AV ("BEATs: Audio Pre-Training with Acoustic Tokenizers", 2022).

Attribute names are those of the original code (`videollama2/model/beats/`): the checkpoints' keys depend on them.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .checkpoint_videollama2 import AUDIO_WEIGHT_RENAMINGS
from .configuration_videollama2 import VideoLlama2AudioConfig


class ScaleGradient(torch.autograd.Function):
    """The identity, with the gradient multiplied by `scale`."""

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.scale, None


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    attn_weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if position_bias is not None:
        attn_weights = attn_weights + position_bias
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()
    return attn_output, attn_weights


def relative_position_buckets(length: int, num_buckets: int, max_distance: int, device: torch.device) -> torch.Tensor:
    """
    Bucket of every relative position (key minus query) from `-(length - 1)` to `length - 1`: int64, (2 * length - 1).

    Half of the buckets are for keys after the query. In each half, half of the buckets hold one distance each, the
    rest grow logarithmically up to `max_distance`; the logarithm is taken in float32, as the original does.
    """
    relative_position = torch.arange(1 - length, length, device=device)
    num_buckets //= 2
    offset = (relative_position > 0).long() * num_buckets
    distance = relative_position.abs()
    num_exact = num_buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / num_exact) / torch.log(torch.tensor(max_distance / num_exact))
    large = num_exact + (ratio * (num_buckets - num_exact)).long()
    large = large.clamp(max=num_buckets - 1)
    return offset + torch.where(distance < num_exact, distance, large)


class VideoLlama2AudioPositionalConv(nn.Module):
    """
    Convolution over time that encodes positions, its weight `g * v / |v|` for every kernel tap (weight normalisation).

    Not torch's `weight_norm`: the original adds 1e-6 under the root, which changes small taps. Checkpoints call the
    two factors `weight_g` and `weight_v`, names that transformers takes for its own and renames.
    """

    def __init__(self, config: VideoLlama2AudioConfig):
        super().__init__()
        self.groups = config.conv_pos_groups
        self.padding = config.conv_pos // 2
        size = (config.hidden_size, config.hidden_size // config.conv_pos_groups, config.conv_pos)
        self.g = nn.Parameter(torch.empty(1, 1, config.conv_pos))
        self.v = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(clips, tokens, width) -> the same"""
        weight = self.v.float()
        weight = weight * torch.rsqrt(weight.square().sum(dim=(0, 1), keepdim=True) + 1e-6)
        weight = self.g.float() * weight
        # oneDNN's bfloat16 kernel is wrong for groups of fewer than 16 channels (torch 2.13, CPUs with AMX).
        is_wrong = hidden_states.device.type == "cpu" and weight.shape[1] < 16
        with torch.autocast("cpu", enabled=False) if is_wrong else nullcontext():
            dtype = torch.promote_types(hidden_states.dtype, torch.float32) if is_wrong else hidden_states.dtype
            positions = nn.functional.conv1d(
                hidden_states.to(dtype).transpose(1, 2),
                weight.to(dtype),
                self.bias.to(dtype),
                padding=self.padding,
                groups=self.groups,
            )
        positions = positions.to(hidden_states.dtype)
        # An even kernel with padding on both sides gives one output too many.
        return nn.functional.gelu(positions[..., : hidden_states.shape[1]]).transpose(1, 2)


class VideoLlama2AudioAttention(nn.Module):
    """Self-attention with a relative position bias that every query gates for itself."""

    def __init__(self, config: VideoLlama2AudioConfig, has_relative_attention_bias: bool):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False

        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        if config.gru_rel_pos:
            self.grep_linear = nn.Linear(self.head_dim, 8)
            self.grep_a = nn.Parameter(torch.empty(1, self.num_heads, 1, 1))
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(config.num_buckets, self.num_heads)

    def position_bias(self, length: int, device: torch.device) -> torch.Tensor:
        """The bias of every head between every two tokens: (heads, length, length)."""
        buckets = relative_position_buckets(length, self.config.num_buckets, self.config.max_distance, device)
        # (heads, 2 * length - 1), contiguous, since the table takes over its strides and every layer reads the table.
        by_distance = self.relative_attention_bias(buckets).T.contiguous()
        # Row i of the table is a window of `by_distance` that starts one further to the left than row i - 1's.
        return by_distance.unfold(1, length, 1).flip(1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        gated_bias: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`gated_bias`: memory for the gated bias, (clips, heads, tokens, tokens), instead of new memory."""
        hidden_shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

        bias = position_bias.unsqueeze(0)
        if self.config.gru_rel_pos:
            gates = self.grep_linear(query).unflatten(-1, (2, 4)).sum(-1).sigmoid()  # (clips, heads, tokens, 2)
            gate_a, gate_b = gates.unbind(-1)
            gate = gate_a.unsqueeze(-1) * (gate_b.unsqueeze(-1) * self.grep_a - 1.0) + 2.0
            bias = torch.mul(gate, position_bias, out=gated_bias)  # (clips, heads, tokens, tokens)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            position_bias=bias,
            is_causal=self.is_causal,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        attn_output = self.out_proj(attn_output.reshape(*hidden_states.shape[:-1], -1))
        return attn_output, attn_weights


class VideoLlama2AudioEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: VideoLlama2AudioConfig, has_relative_attention_bias: bool):
        super().__init__()
        self.self_attn = VideoLlama2AudioAttention(config, has_relative_attention_bias)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.dropout = config.hidden_dropout
        self.activation_dropout = config.activation_dropout
        # Deep norm: the residual weighs more the deeper the encoder is.
        self.alpha = (2 * config.num_hidden_layers) ** 0.25 if config.deep_norm else 1.0

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states, _ = self.self_attn(hidden_states, position_bias, attention_mask, **kwargs)
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        hidden_states = self.self_attn_layer_norm(residual * self.alpha + hidden_states)

        residual = hidden_states
        hidden_states = self.fc1(hidden_states)
        hidden_states = self.activation_fn(hidden_states.float()).to(hidden_states.dtype)
        hidden_states = nn.functional.dropout(hidden_states, p=self.activation_dropout, training=self.training)
        hidden_states = self.fc2(hidden_states)
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        return self.final_layer_norm(residual * self.alpha + hidden_states)


class VideoLlama2AudioEncoder(nn.Module):
    def __init__(self, config: VideoLlama2AudioConfig):
        super().__init__()
        self.config = config
        self.pos_conv = nn.ModuleList([VideoLlama2AudioPositionalConv(config)])
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # All layers share one table. The original registers it in each of them, so its files hold equal copies.
        self.layers = nn.ModuleList(
            VideoLlama2AudioEncoderLayer(config, has_relative_attention_bias=i == 0)
            for i in range(config.num_hidden_layers)
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask.unsqueeze(-1).to(hidden_states.dtype)
        hidden_states = hidden_states + self.pos_conv[0](hidden_states)
        hidden_states = self.layer_norm(hidden_states)
        hidden_states = nn.functional.dropout(hidden_states, p=self.config.hidden_dropout, training=self.training)

        attention: Any = self.layers[0].self_attn
        position_bias = attention.position_bias(hidden_states.shape[1], hidden_states.device)
        attention_mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        # Without gradients all layers write their bias to one place: on a CPU, new memory of that size costs twice as
        # much as the product.
        gated_bias = None
        if self.config.gru_rel_pos and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            gated_bias = position_bias.new_empty(len(hidden_states), *position_bias.shape)
        scale = self.config.layer_wise_gradient_decay_ratio
        for layer in self.layers:
            if scale != 1.0 and hidden_states.requires_grad:
                hidden_states = ScaleGradient.apply(hidden_states, scale)
            if self.training and torch.rand([]) < self.config.layerdrop:
                continue
            hidden_states = layer(hidden_states, position_bias, attention_mask, gated_bias=gated_bias, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class VideoLlama2AudioModel(PreTrainedModel):
    """
    BEATs without its classification head's output: Kaldi filter banks in, one feature per patch out.

    Flash attention cannot add a position bias, so the tower runs with `sdpa`, `flex_attention` or `eager`.
    """

    config: VideoLlama2AudioConfig
    base_model_prefix = "audio_tower"
    main_input_name = "input_features"
    input_modalities = ("audio",)
    _input_embed_layer = "patch_embedding"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VideoLlama2AudioEncoderLayer"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": VideoLlama2AudioEncoderLayer,
        "attentions": VideoLlama2AudioAttention,
    }
    # Equal copies of the shared table (see VideoLlama2AudioEncoder).
    _keys_to_ignore_on_load_unexpected = [r"encoder\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.weight$"]

    def __init__(self, config: VideoLlama2AudioConfig):
        super().__init__(config)
        self.patch_embedding = nn.Conv2d(
            1, config.embed_dim, kernel_size=config.patch_size, stride=config.patch_size, bias=config.conv_bias
        )
        self.layer_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.post_extract_proj = (
            nn.Linear(config.embed_dim, config.hidden_size) if config.embed_dim != config.hidden_size else None
        )
        self.encoder = VideoLlama2AudioEncoder(config)
        if config.num_classes:
            self.predictor = nn.Linear(config.hidden_size, config.num_classes)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, VideoLlama2AudioPositionalConv):
            std = (4 / (self.config.conv_pos * self.config.hidden_size)) ** 0.5
            init.normal_(module.v, mean=0.0, std=std)
            # The norm of a tap of `v`, so that the weight starts as `v`. Its shape is not asked: ZeRO-3 holds none.
            num_values = self.config.hidden_size * (self.config.hidden_size // self.config.conv_pos_groups)
            init.constant_(module.g, std * num_values**0.5)
            init.zeros_(module.bias)
        elif isinstance(module, VideoLlama2AudioAttention) and self.config.gru_rel_pos:
            init.ones_(module.grep_a)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        # Code outside of transformers is taken not to honour "this weight is loaded already"; this code does.
        super()._initialize_weights(module, is_custom_code=False)

    def get_token_mask(self, input_features_mask: torch.Tensor) -> torch.Tensor:
        """
        Which tokens a padded batch really has: (clips, time) mask of the filter banks -> bool (clips, tokens).

        A clip of `n` frames has `n // patch_size` patches in time; a last partial patch is dropped, as it is in a clip
        that stands alone.
        """
        config = self.config
        num_patches = input_features_mask.shape[1] // config.patch_size
        valid = input_features_mask.sum(dim=1) // config.patch_size
        patches = torch.arange(num_patches, device=valid.device) < valid[:, None]
        return patches.repeat_interleave(config.num_mel_bins // config.patch_size, dim=1)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutput:
        r"""
        Args:
            input_features: Kaldi log-mel filter banks, not normalised: (clips, time, num_mel_bins).
            input_features_mask: 1 for frames of the clip, 0 for padding behind it: (clips, time). `None`: no padding.

        Returns:
            `last_hidden_state`: (clips, tokens, hidden_size); the tokens of one patch in time follow each other.
        """
        config = self.config
        dtype = self.patch_embedding.weight.dtype
        features = ((input_features - config.mel_mean) / (2 * config.mel_std)).to(dtype)
        hidden_states = self.patch_embedding(features.unsqueeze(1)).flatten(2).transpose(1, 2)
        hidden_states = self.layer_norm(hidden_states)
        if self.post_extract_proj is not None:
            hidden_states = self.post_extract_proj(hidden_states)
        token_mask = None
        # A graph that is compiled cannot ask whether anything is padded; the mask is right either way.
        if input_features_mask is not None and (torch.compiler.is_compiling() or not input_features_mask.all()):
            token_mask = self.get_token_mask(input_features_mask)
        return self.encoder(hidden_states, token_mask, **kwargs)


register_checkpoint_conversion_mapping("VideoLlama2AudioModel", AUDIO_WEIGHT_RENAMINGS, overwrite=True)
AutoModel.register(VideoLlama2AudioConfig, VideoLlama2AudioModel, exist_ok=True)

__all__ = ["VideoLlama2AudioModel"]
