"""
Connectors: from the vision tower's patches to the language model's input.

Every connector takes features of shape (videos, frames, patches, width), the patches of a square grid in row-major
order, and returns tokens of shape (videos, tokens, hidden_size), ordered by time, then row, then column; how many is
given by `configuration_videollama2.get_num_visual_tokens`. Attribute names (`s1`, `sampler`, `readout`, ...) are
those of the original's `videollama2/model/projector.py`: the checkpoints' keys depend on them.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .configuration_videollama2 import CONNECTOR_SAMPLERS, VideoLlama2Config


# How many frames pass a tower or a stage of convolutions at once, without gradients.
FRAMES_AT_ONCE = 64


def split_frames(frames: torch.Tensor, module: nn.Module, window: int = 1) -> tuple[torch.Tensor, ...]:
    """
    Frames in pieces that pass a module one after the other, so that its memory does not grow with a video's length.

    They stay in one piece where gradients are recorded, in graphs that are compiled, and where the module's weights
    are sharded: then all processes must run it equally often.

    Args:
        frames: (frames, ...).
        window: Frames that belong together; every piece but the last has a multiple of it.
    """
    is_sharded = any(hasattr(p, "ds_id") or hasattr(p, "placements") for p in module.parameters())
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_sharded:
        return (frames,)
    return frames.split(max(1, FRAMES_AT_ONCE // window) * window)


def _build_mlp(depth: int, in_features: int, out_features: int) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(out_features, out_features)]
    return layers


class MeanPool3d(nn.AvgPool3d):
    """PyTorch has no 3D pooling of half precision on CPUs: there it is computed in float32 and rounded once."""

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        if volume.device.type == "cpu" and volume.dtype in (torch.bfloat16, torch.float16):
            return super().forward(volume.float()).to(volume.dtype)
        return super().forward(volume)


class PointwiseConv2d(nn.Conv2d):
    """
    A 1 x 1 convolution as one matrix product over all pixels.

    Frames come out of the tower with their channels last in memory, timm's norms keep them so, and then nothing is
    copied. In bfloat16 on a CPU the whole connector takes two thirds of the time that it takes as convolutions.
    """

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """(frames, channels, h, w) -> the same with the other number of channels"""
        return nn.functional.linear(frames.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class BlockConv3d(nn.Conv3d):
    """A convolution whose windows do not overlap, the stride being the kernel, as one matrix product over them."""

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(videos, channels, frames, h, w) -> the same with the other number of channels, fewer of the rest"""
        padding: Any = [n for n in reversed(self.padding) for _ in range(2)]
        volume = nn.functional.pad(volume, padding)
        for dim, size in enumerate(self.kernel_size, 2):
            length = volume.shape[dim] // size * size  # what does not fill a window is left out
            volume = volume.narrow(dim, 0, length).unfold(dim, size, size)
        windows = volume.movedim(1, 4).flatten(4)  # (videos, frames, h, w, channels * window)
        return nn.functional.linear(windows, self.weight.flatten(1), self.bias).movedim(-1, 1)


class STCConnector(nn.Module):
    """
    Spatial-Temporal Convolution connector (paper, section 2.2) and its ablations.

    RegStage blocks on every frame, a 3D sampler over time and space, RegStage blocks on every sampled frame, and an
    MLP. `spatial_conv` and `spatial_pool` have no RegStage; `stp_connector` and `spatial_pool` pool where the others
    convolve.
    """

    def __init__(self, config: VideoLlama2Config):
        super().__init__()
        in_features, hidden_size = config.vision_config.hidden_size, config.text_config.hidden_size
        kernel_size, padding = CONNECTOR_SAMPLERS[config.connector_type]
        has_stages = config.connector_type not in ("spatial_conv", "spatial_pool")
        pools = config.connector_type in ("stp_connector", "spatial_pool")

        self.gradient_checkpointing = False  # transformers sets this, and the function with it
        self._gradient_checkpointing_func: Callable | None = None
        self.s1 = self._build_stage(config.connector_depth, in_features, hidden_size) if has_stages else nn.Identity()
        sampler = (
            MeanPool3d(kernel_size)
            if pools
            else BlockConv3d(hidden_size, hidden_size, kernel_size, stride=kernel_size, padding=padding)
        )
        self.sampler = nn.Sequential(sampler, nn.SiLU())
        self.s2 = self._build_stage(config.connector_depth, hidden_size, hidden_size) if has_stages else nn.Identity()
        self.readout = nn.Sequential(*_build_mlp(config.connector_mlp_depth, hidden_size, hidden_size))

    @staticmethod
    def _build_stage(depth: int, in_channels: int, out_channels: int) -> nn.Module:
        # timm takes seconds to import: only who builds such a connector pays for it.
        from timm.layers import LayerNorm2d
        from timm.models.regnet import RegStage

        stage = RegStage(
            depth, in_channels, out_channels, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d
        )
        for module in stage.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
                module.__class__ = PointwiseConv2d  # the same parameters under the same names
        return stage

    def _run_stage(self, stage: nn.Module, frames: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and self._gradient_checkpointing_func is not None and self.training:
            return self._gradient_checkpointing_func(stage.__call__, frames)
        pieces = split_frames(frames, stage)
        return stage(frames) if len(pieces) == 1 else torch.cat([stage(piece) for piece in pieces])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(videos, frames, patches, width) -> (videos, tokens, hidden_size)"""
        num_videos, num_frames, num_patches, _ = features.shape
        side = math.isqrt(num_patches)
        frames = features.flatten(0, 1).transpose(1, 2).unflatten(2, (side, side))  # (videos * frames, width, h, w)
        frames = self._run_stage(self.s1, frames)
        volume = frames.unflatten(0, (num_videos, num_frames)).transpose(1, 2)  # (videos, hidden, frames, h, w)
        volume = self.sampler(volume)
        num_sampled = volume.shape[2]
        frames = self._run_stage(self.s2, volume.transpose(1, 2).flatten(0, 1))
        tokens = frames.flatten(2).transpose(1, 2)  # (videos * sampled frames, h * w, hidden)
        tokens = tokens.reshape(num_videos, num_sampled * tokens.shape[1], -1)
        return self.readout(tokens)


class TemporalMeanMLP(nn.Sequential):
    """VideoLLaMA 2's `mlp2x_gelu`: the mean over the frames, then two linear layers (one token per patch)."""

    def __init__(self, config: VideoLlama2Config):
        super().__init__(*_build_mlp(2, config.vision_config.hidden_size, config.text_config.hidden_size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features.mean(dim=1))


class TemporalMeanLinear(nn.Linear):
    """VideoLLaMA 2's `linear`: the mean over the frames, then one linear layer (one token per patch)."""

    def __init__(self, config: VideoLlama2Config):
        super().__init__(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features.mean(dim=1))


class FrameMLP(nn.Sequential):
    """Video-LLaVA's `mlp2x_gelu`: two linear layers on every token of every frame, nothing pooled."""

    def __init__(self, config: VideoLlama2Config):
        super().__init__(*_build_mlp(2, config.vision_config.hidden_size, config.text_config.hidden_size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features.flatten(1, 2))


def build_connector(config: VideoLlama2Config) -> nn.Module:
    """The connector that `config.connector_type` names."""
    if config.connector_type in CONNECTOR_SAMPLERS:
        return STCConnector(config)
    return {"mlp2x_gelu": TemporalMeanMLP, "linear": TemporalMeanLinear, "frame_mlp2x_gelu": FrameMLP}[
        config.connector_type
    ](config)


def build_audio_connector(config: VideoLlama2Config) -> nn.Module:
    """The projection of every audio token: (clips, tokens, width) -> (clips, tokens, hidden_size)."""
    in_features, hidden_size = config.audio_config.hidden_size, config.text_config.hidden_size
    if config.audio_connector_type == "linear":
        return nn.Linear(in_features, hidden_size)
    return nn.Sequential(*_build_mlp(2, in_features, hidden_size))


__all__ = ["STCConnector", "build_audio_connector", "build_connector", "split_frames"]
