"""BEATs against recordings of the original, and what the original cannot do: padded batches."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from videollama2_hf.configuration_videollama2 import VideoLlama2AudioConfig, get_num_audio_tokens
from videollama2_hf.modeling_beats import (
    VideoLlama2AudioModel,
    VideoLlama2AudioPositionalConv,
    relative_position_buckets,
)


GOLDENS = Path(__file__).parent / "goldens" / "qwen2_siglip_beats_av"


@pytest.fixture(scope="module")
def recorded():
    return {**load_file(GOLDENS / "inputs.safetensors"), **load_file(GOLDENS / "outputs.safetensors")}


def make_config(**kwargs) -> VideoLlama2AudioConfig:
    cfg = json.loads((GOLDENS / "manifest.json").read_text())["beats_config"]
    return VideoLlama2AudioConfig(
        embed_dim=cfg["embed_dim"],
        hidden_size=cfg["encoder_embed_dim"],
        intermediate_size=cfg["encoder_ffn_embed_dim"],
        num_hidden_layers=cfg["encoder_layers"],
        num_attention_heads=cfg["encoder_attention_heads"],
        conv_pos=cfg["conv_pos"],
        conv_pos_groups=cfg["conv_pos_groups"],
        num_buckets=cfg["num_buckets"],
        max_distance=cfg["max_distance"],
        num_classes=cfg["predictor_class"],
        **kwargs,
    )


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def tower(request):
    model = VideoLlama2AudioModel._from_config(make_config(), attn_implementation=request.param).eval()
    state = torch.load(GOLDENS / "audio_tower.bin", weights_only=True)
    state = {re.sub(r"^model\.audio_tower\.", "", key): value.float() for key, value in state.items()}
    state = {re.sub(r"pos_conv\.0\.weight_([gv])$", r"pos_conv.0.\1", key): value for key, value in state.items()}
    copies = {key for key in state if "relative_attention_bias" in key and ".layers.0." not in key}
    model.load_state_dict({key: value for key, value in state.items() if key not in copies}, strict=True)
    for key in copies:
        torch.testing.assert_close(state[key], model.encoder.layers[0].self_attn.relative_attention_bias.weight.data)
    return model


def test_buckets_equal_original(recorded):
    buckets = relative_position_buckets(1496, 320, 800, torch.device("cpu"))
    assert torch.equal(buckets, recorded["beats.rel_pos_bucket_row0_1496"].long())


def test_position_bias_and_convolution_weight_equal_original(tower, recorded):
    bias = tower.encoder.layers[0].self_attn.position_bias(12, torch.device("cpu"))
    assert torch.equal(bias, recorded["beats.rel_pos_bias_12x12"])
    # Every layer multiplies it: with the strides of the embedding that takes four times as long.
    assert bias.is_contiguous()
    captured = {}
    real = torch.nn.functional.conv1d

    def spy(x, weight, *args, **kwargs):
        captured["weight"] = weight
        return real(x, weight, *args, **kwargs)

    torch.nn.functional.conv1d = spy
    try:
        tower.encoder.pos_conv[0](torch.zeros(1, 8, 32))
    finally:
        torch.nn.functional.conv1d = real
    torch.testing.assert_close(captured["weight"], recorded["beats.pos_conv.effective_weight"], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("key", "frames"),
    [
        ("audio_0.beats", 304),
        ("audio_0[:, :150].beats", 150),
        ("audio_0[:, :47].beats", 47),
        ("audio_0[:, :16].beats", 16),
    ],
)
def test_features_equal_original(tower, recorded, key, frames):
    with torch.no_grad():
        features = tower(recorded["audio_0"].float()[:, :frames]).last_hidden_state
    torch.testing.assert_close(features, recorded[key], atol=5e-6, rtol=1e-5)
    assert features.shape[1] == get_num_audio_tokens(frames)


def test_batch_equals_original(tower, recorded):
    clips = torch.cat([recorded[f"audio_{i}"] for i in range(3)]).float()
    with torch.no_grad():
        features = tower(clips).last_hidden_state
    torch.testing.assert_close(features, recorded["audio_batch3.beats"], atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("width", [64, 192, 768])
def test_the_convolution_is_the_same_in_bfloat16(width):
    """With 4, 12 and 48 channels a group: oneDNN's bfloat16 kernel gives something else for fewer than 16."""
    torch.manual_seed(0)
    convolution = VideoLlama2AudioPositionalConv(
        VideoLlama2AudioConfig(hidden_size=width, num_attention_heads=4, conv_pos=64)
    )
    for parameter in convolution.parameters():
        nn.init.normal_(parameter)
    hidden_states = torch.randn(2, 97, width)
    with torch.no_grad():
        expected = convolution(hidden_states)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = convolution(hidden_states)
        low = convolution.bfloat16()(hidden_states.bfloat16())
        double = convolution.double()(hidden_states.double())
    assert low.dtype == torch.bfloat16 and double.dtype == torch.float64
    for result in (mixed, low):
        assert (result.float() - expected).norm() < 0.02 * expected.norm()


def test_thirty_seconds_equal_original(tower, recorded):
    t, f = torch.arange(2998, dtype=torch.float64)[:, None], torch.arange(128, dtype=torch.float64)
    clip = 15.4 + 6 * torch.sin(0.013 * t) * torch.cos(0.11 * f) + 2 * torch.sin(0.7 * t + 0.3 * f)
    with torch.no_grad():
        features = tower(clip.bfloat16().float()[None]).last_hidden_state
    torch.testing.assert_close(features[:, ::16], recorded["audio_full.beats_every16"], atol=1e-5, rtol=1e-5)


def test_padded_clip_equals_the_clip_alone(tower, recorded):
    """The original attends to padding; with a mask, a clip does not depend on what it is batched with."""
    short, long = recorded["audio_0"].float()[:, :150], recorded["audio_1"].float()
    batch = torch.full((2, 304, 128), -15.0)
    batch[0, :150], batch[1] = short[0], long[0]
    mask = torch.zeros(2, 304, dtype=torch.long)
    mask[0, :150] = mask[1] = 1
    with torch.no_grad():
        padded = tower(batch, mask).last_hidden_state
        alone = tower(short).last_hidden_state
    token_mask = tower.get_token_mask(mask)
    assert token_mask.sum(1).tolist() == [get_num_audio_tokens(150), get_num_audio_tokens(304)]
    torch.testing.assert_close(padded[0][token_mask[0]], alone[0], atol=5e-6, rtol=1e-5)


def test_layers_that_share_the_memory_of_their_bias_give_the_same(tower):
    """They do where no gradients are recorded; a batch has its own bias for every clip."""
    features = 15 + 6 * torch.randn(2, 96, 128)
    with torch.no_grad():
        shared = tower(features).last_hidden_state
    own = tower(features).last_hidden_state
    assert own.requires_grad
    torch.testing.assert_close(shared, own, atol=1e-5, rtol=1e-5)  # with gradients PyTorch takes another kernel


def test_hidden_states_are_recorded(tower, recorded):
    outputs = tower(recorded["audio_0"].float(), output_hidden_states=True)
    torch.testing.assert_close(outputs.hidden_states[0], recorded["audio_0.beats.encoder_input"], atol=5e-6, rtol=1e-5)
    layer_0 = recorded["audio_0.beats.layer0_TBC"].transpose(0, 1)
    torch.testing.assert_close(outputs.hidden_states[1], layer_0, atol=5e-6, rtol=1e-5)


def test_gradients_are_scaled_layer_by_layer(recorded):
    """`layer_wise_gradient_decay_ratio`: every layer's input receives 0.6 of the gradient (GradMultiply)."""
    gradients = {}
    for ratio in (1.0, 0.6):
        torch.manual_seed(0)
        model = VideoLlama2AudioModel(make_config(layer_wise_gradient_decay_ratio=ratio)).eval()
        model(recorded["audio_0"].float()).last_hidden_state.square().sum().backward()
        gradients[ratio] = [model.encoder.layers[i].fc1.weight.grad for i in (1, 0)]
        gradients[ratio].append(model.patch_embedding.weight.grad)
    for depth, (plain, scaled) in enumerate(zip(gradients[1.0], gradients[0.6])):
        torch.testing.assert_close(scaled, plain * 0.6**depth, rtol=1e-4, atol=1e-6)


def test_layerdrop_skips_layers_in_training_only(recorded):
    model = VideoLlama2AudioModel(make_config(layerdrop=1.0))
    clip = recorded["audio_0"].float()
    dropped = model.train()(clip, output_hidden_states=True)
    assert len(dropped.hidden_states) == 0
    assert len(model.eval()(clip, output_hidden_states=True).hidden_states) == 3
