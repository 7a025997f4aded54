"""Connectors against recordings of the original, every type on several grids."""

import copy
import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import nn

from videollama2_hf.configuration_videollama2 import (
    ConnectorType,
    VideoLlama2AudioConfig,
    VideoLlama2Config,
    get_connector_output_size,
    get_num_visual_tokens,
)
from videollama2_hf.connector_videollama2 import BlockConv3d, PointwiseConv2d, build_connector


GOLDENS = Path(__file__).parent / "goldens" / "connector_only"
MANIFEST = json.loads((GOLDENS / "manifest.json").read_text())
GRIDS = [
    (name, grid)
    for name, case in MANIFEST["cases"].items()
    for grid, shape in case["shapes"].items()
    if isinstance(shape, list) and not name.startswith("mlp3x")  # the original builds mlp3x_gelu but cannot run it
]


def make_config(connector_type: str, in_features: int = 24, hidden_size: int = 32, **kwargs) -> VideoLlama2Config:
    return VideoLlama2Config(
        text_config={
            "model_type": "qwen2",
            "hidden_size": hidden_size,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 64,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": in_features,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        connector_type=connector_type,
        **kwargs,
    )


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDENS / "inputs.safetensors"), load_file(GOLDENS / "outputs.safetensors")


@pytest.mark.parametrize(("name", "grid"), GRIDS)
def test_output_equals_original(name, grid, tensors):
    inputs, outputs = tensors
    connector_type, in_features, hidden_size = name.rsplit("_", 2)
    connector = build_connector(make_config(connector_type, int(in_features), int(hidden_size))).eval()
    prefix = f"{name}.w."
    weights = {key.removeprefix(prefix): value.float() for key, value in inputs.items() if key.startswith(prefix)}
    connector.load_state_dict(weights, strict=True)
    frames, side, _ = (int(n) for n in grid.split("x"))
    with torch.no_grad():
        tokens = connector(inputs[f"x.{in_features}.{frames}x{side}"].float())
    torch.testing.assert_close(
        tokens, outputs[f"{name}.y.{frames}x{side}"], atol=1e-5, rtol=1e-5
    )  # 7e-6 on one thread
    assert tokens.shape[1] == get_num_visual_tokens(connector_type, frames, side, side)


@pytest.mark.parametrize(
    "connector_type", ["stc_connector", "stc_connector_v35", "spatial_pool", "linear", "mlp2x_gelu"]
)
@pytest.mark.parametrize(("num_frames", "side"), [(2, 4), (7, 5), (33, 2)])
def test_token_count_is_what_the_connector_returns(connector_type, num_frames, side):
    connector = build_connector(make_config(connector_type, 32, 32, connector_depth=1)).eval()
    tokens = connector(torch.randn(2, num_frames, side**2, 32))
    assert tokens.shape == (2, get_num_visual_tokens(connector_type, num_frames, side, side), 32)


def test_frame_mlp_keeps_every_token_of_every_frame():
    connector = build_connector(make_config("frame_mlp2x_gelu"))
    features = torch.randn(2, 3, 17, 24)
    tokens = connector(features)
    assert tokens.shape[1] == get_num_visual_tokens("frame_mlp2x_gelu", 3, 4, 4, num_class_tokens=1)
    torch.testing.assert_close(tokens[:, 17:34], connector(features[:, 1:2]))


def test_depth_and_readout_are_configurable():
    connector = build_connector(make_config("stc_connector", connector_depth=2, connector_mlp_depth=3))
    assert [name for name, _ in connector.s1.named_children()] == ["b1", "b2"]
    assert len(connector.readout) == 5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"connector_type": "mlp3x_gelu"}, "mlp3x_gelu"),
        ({"connector_type": "identity"}, "identity"),
        ({"connector_type": "spatial_conv"}, "must equal text_config.hidden_size"),
        ({"connector_type": "spatial_pool"}, "must equal text_config.hidden_size"),
        ({"connector_type": "stc_connector_v35", "num_frames": 1}, "at least 2 x 2 x 2"),
        ({"connector_type": "stc_connector", "vision_feature_select_strategy": "full"}, "square grid"),
        ({"connector_type": "linear", "num_frames": 0}, "at least 1, got 0"),
        ({"connector_type": "linear", "vision_feature_layer": 7}, "between -3 and 2"),
        ({"connector_type": "linear", "image_token_id": 5, "video_token_id": 5}, "three different ids"),
    ],
)
def test_what_cannot_run_is_refused_with_a_sentence(kwargs, message):
    with pytest.raises(StrictDataclassError, match=message):
        make_config(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layerdrop": 3}, "layerdrop is a probability"),
        ({"hidden_act": "foo"}, "'foo'"),
        ({"num_attention_heads": 7}, "multiple of num_attention_heads"),
        ({"conv_pos_groups": 7}, "multiple of conv_pos_groups"),
        ({"num_mel_bins": 100}, "multiple of patch_size"),
    ],
)
def test_audio_towers_that_cannot_run_are_refused(kwargs, message):
    with pytest.raises(StrictDataclassError, match=message):
        VideoLlama2AudioConfig(**kwargs)


def test_unknown_type_names_the_allowed_ones():
    with pytest.raises(ValueError, match="'qformer'; choose one of stc_connector, .*frame_mlp2x_gelu"):
        get_connector_output_size("qformer", 8, 4, 4)


@pytest.mark.parametrize("connector_type", ["stc_connector", "stc_connector_v35", "stp_connector", "spatial_conv"])
@pytest.mark.parametrize(("num_frames", "side"), [(4, 4), (5, 5)])  # whole windows of the sampler, and a rest
def test_products_of_matrices_equal_convolutions(connector_type, num_frames, side):
    """Outputs and gradients, against timm's RegStage and torch's convolutions as they are."""
    torch.manual_seed(0)
    ours = build_connector(make_config(connector_type, 32, 32, connector_depth=2)).double()
    theirs = copy.deepcopy(ours)
    replaced = {PointwiseConv2d: nn.Conv2d, BlockConv3d: nn.Conv3d}
    classes = [type(module) for module in theirs.modules()]
    assert (BlockConv3d in classes) != (connector_type == "stp_connector")
    assert (PointwiseConv2d in classes) != (connector_type == "spatial_conv")
    for module in theirs.modules():
        module.__class__ = replaced.get(type(module), type(module))
    features = torch.randn(2, num_frames, side**2, 32, dtype=torch.double)
    torch.testing.assert_close(ours(features), theirs(features), atol=1e-12, rtol=1e-12)
    for connector in (ours, theirs):
        connector(features).square().sum().backward()
    for (name, parameter), reference in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(parameter.grad, reference.grad, atol=1e-10, rtol=1e-10, msg=name)


def test_gradient_checkpointing_changes_nothing():
    connector = build_connector(make_config("stc_connector", connector_depth=1)).train()
    features = torch.randn(1, 4, 16, 24)
    plain = connector(features)
    connector.gradient_checkpointing = True
    connector._gradient_checkpointing_func = lambda function, *args: torch.utils.checkpoint.checkpoint(
        function, *args, use_reentrant=False
    )
    torch.testing.assert_close(connector(features), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("connector_type", get_args(ConnectorType))
def test_half_precision_on_a_cpu(connector_type, dtype):
    """Where PyTorch itself lacks an operation for it, too."""
    torch.manual_seed(0)
    connector = build_connector(make_config(connector_type, in_features=32, connector_depth=1)).eval()
    features = torch.randn(1, 4, 16, 32)
    with torch.no_grad():
        expected = connector(features)
        rounded = connector.to(dtype)(features.to(dtype))
    assert rounded.dtype == dtype
    torch.testing.assert_close(rounded.float(), expected, atol=0.05, rtol=0.05)
