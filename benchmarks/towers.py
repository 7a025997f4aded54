"""Rows of `model.py` for what encodes media: BEATs, the vision towers, the STC connector, images, long videos."""

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from common import measure, memory_row, peak_memory, time_row
from random_models import CLIP_L, QWEN2_HALF_B, SIGLIP, SMALL_AUDIO, SMALL_QWEN2, build, build_config
from torch import nn
from transformers import AutoModel

from videollama2_hf import (
    VideoLlama2AudioConfig,
    VideoLlama2AudioModel,
    VideoLlama2Config,
    VideoLlama2Model,
    connector_videollama2,
)
from videollama2_hf.connector_videollama2 import BlockConv3d, PointwiseConv2d, STCConnector
from videollama2_hf.modeling_beats import relative_position_buckets


TOWERS = {"CLIP-L/14-336": CLIP_L, "SigLIP-so400m/14-384": SIGLIP}
# Of the largest relative difference (norms) that a change of the order of additions gives.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def compare(ours: torch.Tensor, reference: torch.Tensor) -> str:
    """
    The relative difference of two results.

    Raises:
        AssertionError: It is larger than rounding explains.
    """
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    difference = float((ours - reference).float().norm() / reference.float().norm())
    assert difference <= TOLERANCE[ours.dtype], difference
    return f"relative difference {difference:.1g}"


# BEATs


def beats(short: bool, rounds: int, original: Path | None, dtype: torch.dtype, target: float) -> dict[str, Any]:
    """BEATs on 30 s of sound, as Kaldi filter banks."""
    config = VideoLlama2AudioConfig(**(SMALL_AUDIO if short else {}))
    model = build(VideoLlama2AudioModel, config, dtype=dtype)
    reference = load_original(original, model) if original else OriginalBias.build(model)
    features = 15 + 6 * torch.randn(1, 998 if short else 2998, 128)

    def run_reference() -> torch.Tensor:
        if original:
            return reference.extract_features(features.to(dtype))[0]
        return reference(features).last_hidden_state

    measured = measure({"ours": lambda: model(features).last_hidden_state, "reference": run_reference}, rounds)
    # The original rounds the filter banks before it normalises them, ours after; in float32 there is no difference.
    check = compare(measured["ours"]["result"], measured["reference"]["result"])
    name = "the original's code" if original else "eager attention, the original's way to the position bias"
    step = f"BEATs, {features.shape[1] // 100 + 1} s, {str(dtype).removeprefix('torch.')}"
    note = (
        "" if original else "Without `--original`: the reference lacks what the original computes to avoid overflows."
    )
    return time_row(step, name, target, measured, check, note)


class OriginalBias(VideoLlama2AudioModel):
    """Eager attention with the table of position buckets for every two tokens, in int64, at every call."""

    @classmethod
    def build(cls, model: VideoLlama2AudioModel) -> "OriginalBias":
        reference = build(cls, model.config.__class__(**model.config.to_dict()), attn_implementation="eager")
        reference.to(model.dtype).load_state_dict(model.state_dict(), assign=True)
        attention: Any = reference.encoder.layers[0].self_attn
        config = reference.config

        def position_bias(length: int, device: torch.device) -> torch.Tensor:
            by_distance = relative_position_buckets(
                length, config.num_buckets, config.max_distance, torch.device("cpu")
            )
            positions = torch.arange(length)
            buckets = by_distance[positions[None] - positions[:, None] + length - 1]
            return attention.relative_attention_bias(buckets.to(device)).permute(2, 0, 1)

        attention.position_bias = position_bias
        return reference


def load_original(checkout: Path, model: VideoLlama2AudioModel) -> nn.Module:
    """
    BEATs of a checkout of the original, branch `audio_visual`, with the weights of ours.

    Raises:
        FileNotFoundError: There is no BEATs.
    """
    folder = checkout / "videollama2" / "model" / "beats"
    if not (folder / "BEATs.py").exists():
        raise FileNotFoundError(
            f"{folder} does not hold BEATs.py; --original takes a checkout of "
            "https://github.com/DAMO-NLP-SG/VideoLLaMA2, branch audio_visual."
        )
    spec: Any = importlib.util.spec_from_file_location(
        "original_beats", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["original_beats"] = importlib.util.module_from_spec(spec)
    module: Any = importlib.import_module("original_beats.BEATs")
    config, ours = module.BEATsConfig(), model.config
    config.update(
        {
            "embed_dim": ours.embed_dim,
            "encoder_layers": ours.num_hidden_layers,
            "encoder_embed_dim": ours.hidden_size,
            "encoder_ffn_embed_dim": ours.intermediate_size,
            "encoder_attention_heads": ours.num_attention_heads,
            "conv_pos": ours.conv_pos,
        }
    )
    original = module.BEATs(config).to(model.dtype).eval()
    weights = {
        name.replace("pos_conv.0.g", "pos_conv.0.weight_g").replace("pos_conv.0.v", "pos_conv.0.weight_v"): value
        for name, value in model.state_dict().items()
    }
    table = "encoder.layers.{}.self_attn.relative_attention_bias.weight"
    weights |= {table.format(i): weights[table.format(0)] for i in range(ours.num_hidden_layers)}
    original.load_state_dict(weights, strict=True)
    return original


# Vision


def vision_tower(short: bool, rounds: int, tower: str, frames: int, dtype: torch.dtype) -> dict[str, Any]:
    """Up to the layer that is used, against all layers with eager attention and a list of their outputs."""
    config = build_config(TOWERS[tower], SMALL_QWEN2, short, connector_type="linear")
    model, reference = build_towers(config, dtype)
    size = config.vision_config.image_size
    video = torch.randn(1, frames, 3, size, size, dtype=dtype)

    def run_reference() -> torch.Tensor:
        return reference(video[0], output_hidden_states=True).hidden_states[-2]

    ours = lambda: model.get_video_features(video).last_hidden_state  # noqa: E731
    measured = measure({"ours": ours, "reference": run_reference}, rounds)
    result = measured["reference"]["result"]
    check = compare(measured["ours"]["result"], result if "SigLIP" in tower else result[:, 1:])
    step = f"{tower}, {frames} frame{'s' * (frames > 1)}, {str(dtype).removeprefix('torch.')}"
    return time_row(step, "transformers' tower, eager, all layers", 1.3, measured, check)


def image_question(short: bool, rounds: int, tower: str, copies: int, dtype: torch.dtype) -> dict[str, Any]:
    """The original makes a video of an image, and its tower runs on every copy."""
    config = build_config(TOWERS[tower], SMALL_QWEN2, short, connector_type="linear", num_frames=copies)
    model, reference = build_towers(config, dtype)
    size, seen = config.vision_config.image_size, []
    model.vision_tower.embeddings.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    image = torch.randn(1, 3, size, size, dtype=dtype)

    def run_reference() -> torch.Tensor:
        return reference(image.repeat(copies, 1, 1, 1), output_hidden_states=True).hidden_states[-2]

    ours = lambda: model.get_image_features(image).last_hidden_state  # noqa: E731
    measured = measure({"ours": ours, "reference": run_reference}, rounds)
    result = measured["reference"]["result"]
    result = result if "SigLIP" in tower else result[:, 1:]
    assert set(seen) == {1}
    check = compare(measured["ours"]["result"].expand_as(result), result) + "; one frame instead of all"
    step = f"an image through {tower}, {str(dtype).removeprefix('torch.')}"
    return time_row(step, f"the original's {copies} copies, eager, all layers", float(copies), measured, check)


def build_towers(config: VideoLlama2Config, dtype: torch.dtype) -> tuple[VideoLlama2Model, nn.Module]:
    """A model, and transformers' tower with the same weights and eager attention."""
    model = build(VideoLlama2Model, config, dtype=dtype)
    reference = (
        AutoModel.from_config(copy.deepcopy(config.vision_config), attn_implementation="eager").to(dtype).eval()
    )
    reference.load_state_dict(model.vision_tower.state_dict(), assign=True)
    return model, reference


# Connector


def stc_connector(short: bool, rounds: int, version: str, dtype: torch.dtype) -> dict[str, Any]:
    """The connector in matrix products, against timm's RegStage and torch's convolutions as they are."""
    vision, connector_type = (CLIP_L, "stc_connector") if version == "2" else (SIGLIP, "stc_connector_v35")
    width = {"hidden_size": 4096 if version == "2" else 3584, "num_attention_heads": 32 if version == "2" else 28}
    config = build_config(vision, QWEN2_HALF_B | ({} if short else width), short=short, connector_type=connector_type)
    ours = build(STCConnector, config, dtype=dtype)
    reference = as_convolutions(config, ours)
    frames, side = 8, config.vision_config.image_size // config.vision_config.patch_size
    features = torch.randn(1, frames, side**2, config.vision_config.hidden_size, dtype=dtype)
    measured = measure({"ours": lambda: ours(features), "reference": lambda: reference(features)}, rounds)
    check = compare(measured["ours"]["result"], measured["reference"]["result"])
    step = f"STC connector of VideoLLaMA {version}, {frames} x {side} x {side}, {str(dtype).removeprefix('torch.')}"
    return time_row(step, "timm's RegStage, torch's Conv3d", 1.25, measured, check)


def as_convolutions(config: VideoLlama2Config, connector: STCConnector) -> STCConnector:
    """The same connector as timm's RegStage and torch's convolutions run it; the weights are shared."""
    with torch.device("meta"):
        reference = STCConnector(config)
    reference.load_state_dict(connector.state_dict(), assign=True)
    replaced = {PointwiseConv2d: nn.Conv2d, BlockConv3d: nn.Conv3d}
    for module in reference.modules():
        module.__class__ = replaced.get(type(module), type(module))
    return reference.eval()


def long_video(short: bool, frames: int = 256) -> dict[str, Any]:
    """
    Frames through tower and connector in pieces, against all in one piece.

    Memory does not depend on the number of layers without gradients: one of each kind runs.
    """
    vision = SIGLIP | {"num_hidden_layers": 2}
    config = build_config(vision, QWEN2_HALF_B | {"num_hidden_layers": 1}, short, connector_depth=1)
    model = build(VideoLlama2Model, config, dtype=torch.bfloat16)
    size = config.vision_config.image_size
    video = torch.zeros(1, frames, 3, size, size, dtype=torch.bfloat16)
    video += torch.linspace(-1, 1, frames).view(1, -1, 1, 1, 1) * torch.randn(3, size, size)
    pieces, ours = peak_memory(lambda: model.get_video_features(video).pooler_output)
    at_once = connector_videollama2.FRAMES_AT_ONCE
    connector_videollama2.FRAMES_AT_ONCE = frames
    try:
        whole, reference = peak_memory(lambda: model.get_video_features(video).pooler_output)
    finally:
        connector_videollama2.FRAMES_AT_ONCE = at_once
    step = f"peak memory of {frames} frames through SigLIP and STC, pieces of {at_once}"
    return memory_row(step, "all frames in one piece", 1.0, ours, reference, compare(pieces, whole))
