"""LanguageBind's tower against recordings of the original (`goldens/video_llava`), and against transformers' CLIP."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, CLIPVisionConfig, CLIPVisionModel

from videollama2_hf.configuration_videollama2 import LanguageBindVisionConfig
from videollama2_hf.modeling_languagebind import LanguageBindVisionModel


GOLDENS = Path(__file__).parent / "goldens" / "video_llava"
IMAGE_TOWER = GOLDENS / "LanguageBind" / "LanguageBind_Image"
VIDEO_TOWER = GOLDENS / "LanguageBind" / "LanguageBind_Video_merge"
# float32 against another torch version, on values up to 23; measured 1.8e-5.
TOLERANCE = {"rtol": 0, "atol": 5e-5}


@pytest.fixture(scope="module")
def goldens() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "goldens.safetensors")


@pytest.fixture(scope="module")
def video_tower() -> LanguageBindVisionModel:
    return LanguageBindVisionModel.from_pretrained(VIDEO_TOWER).eval()


@pytest.fixture
def video(goldens) -> torch.Tensor:
    """(8, 3, 28, 28); the original puts channels before time."""
    return goldens["pixels.video_a"].transpose(0, 1)


def _tiny_config(**kwargs) -> LanguageBindVisionConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LanguageBindVisionConfig(**{**sizes, "image_size": 28, "patch_size": 14, "num_frames": 4, **kwargs})


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_image_tower_equals_the_original(goldens, attn_implementation):
    tower, info = LanguageBindVisionModel.from_pretrained(
        IMAGE_TOWER, attn_implementation=attn_implementation, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not tower.config.add_time_attn and tower.config.hidden_act == "gelu"
    with torch.no_grad():
        hidden_states = tower(goldens["pixels.image_a"][None], output_hidden_states=True).hidden_states
    assert len(hidden_states) == 4
    for index, hidden_state in enumerate(hidden_states):
        torch.testing.assert_close(hidden_state, goldens[f"image_tower.hidden.{index}"], **TOLERANCE)
    torch.testing.assert_close(hidden_states[-2][:, 1:], goldens["image_tower.selected"], **TOLERANCE)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_video_tower_equals_the_original(goldens, video, attn_implementation):
    tower, info = LanguageBindVisionModel.from_pretrained(
        VIDEO_TOWER, attn_implementation=attn_implementation, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert tower.config.add_time_attn and tower.config.num_frames == 8
    with torch.no_grad():
        hidden_states = tower(video, output_hidden_states=True).hidden_states
    assert len(hidden_states) == 4
    for index, hidden_state in enumerate(hidden_states):
        torch.testing.assert_close(hidden_state[None], goldens[f"video_tower.hidden.{index}"], **TOLERANCE)
    torch.testing.assert_close(hidden_states[-2][None], goldens["video_tower.selected"], **TOLERANCE)


def test_without_temporal_attention_equals_the_original_with_it_switched_off(goldens, video):
    """Also what transformers' own Video-LLaVA computes, which has no place for the temporal weights."""
    config = LanguageBindVisionConfig.from_pretrained(VIDEO_TOWER, add_time_attn=False)
    tower, info = LanguageBindVisionModel.from_pretrained(VIDEO_TOWER, config=config, output_loading_info=True)
    assert info["unexpected_keys"] and all(".temporal_" in key for key in info["unexpected_keys"])
    with torch.no_grad():
        selected = tower(video, output_hidden_states=True).hidden_states[-2][None]
    torch.testing.assert_close(selected, goldens["video_tower.selected.no_time"], **TOLERANCE)
    assert (selected - goldens["video_tower.selected"]).abs().max() > 1


@torch.no_grad()
def test_layers_can_be_run_one_by_one(goldens, video_tower, video):
    """The model runs the layers up to the selected one, and no further."""
    hidden_states = video_tower.pre_layrnorm(video_tower.embeddings(video))
    for layer in video_tower.encoder.layers[:2]:
        hidden_states = layer(hidden_states, attention_mask=None)
    torch.testing.assert_close(hidden_states[None], goldens["video_tower.selected"], **TOLERANCE)


@torch.no_grad()
def test_videos_and_windows_are_independent(video_tower, video):
    other = video.flip(0, -1)
    alone = [video_tower(clip).last_hidden_state for clip in (video, other)]
    assert not torch.allclose(alone[0], alone[1], atol=0.1)
    expected = torch.cat(alone)
    two_windows = torch.cat([video, other])
    torch.testing.assert_close(video_tower(two_windows).last_hidden_state, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(video_tower(two_windows[None]).last_hidden_state, expected, rtol=0, atol=1e-5)
    batch = torch.stack([video, other])
    outputs = video_tower(batch)
    torch.testing.assert_close(outputs.last_hidden_state, expected, rtol=0, atol=1e-5)
    assert outputs.pooler_output.shape == (16, 32)


@torch.no_grad()
def test_every_frame_of_a_window_sees_every_other(video_tower, video):
    before = video_tower(video).last_hidden_state
    changed = video.clone()
    changed[3] += 1
    after = video_tower(changed).last_hidden_state
    assert ((after - before).abs().amax(dim=(1, 2)) > 1e-3).all()


def test_broken_windows_are_refused(video_tower, video):
    with pytest.raises(ValueError, match="num_frames=8 frames, got 6 frames"):
        video_tower(video[:6])
    # Eight frames in all, but a window would hold the ends of two videos.
    with pytest.raises(ValueError, match="num_frames=8 frames, got 4 frames"):
        video_tower(video.reshape(2, 4, 3, 28, 28))
    hidden_states = torch.zeros(6, 5, 32)
    with pytest.raises(ValueError, match="got 6 frames"):
        video_tower.encoder.layers[0](hidden_states, attention_mask=None)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_without_temporal_attention_is_clip(attn_implementation):
    config = _tiny_config(add_time_attn=False, attn_implementation=attn_implementation)
    torch.manual_seed(0)
    tower = LanguageBindVisionModel(config).eval()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
    clip_config = CLIPVisionConfig(
        **{name: getattr(config, name) for name in names},
        patch_size=config.patch_size,
        hidden_act="gelu",
        attn_implementation=attn_implementation,
    )
    torch.manual_seed(0)
    clip = CLIPVisionModel(clip_config).eval()
    weights = tower.state_dict()
    assert weights.keys() == clip.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in clip.state_dict().items())
    pixels = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        expected = clip(pixels, output_hidden_states=True)
        outputs = tower(pixels, output_hidden_states=True)
    assert torch.equal(outputs.pooler_output, expected.pooler_output)
    assert all(map(torch.equal, outputs.hidden_states, expected.hidden_states))
    with torch.no_grad():
        by_video = tower(pixels[None]).last_hidden_state
    assert torch.equal(by_video, expected.last_hidden_state)  # three frames: any number will do


def test_attentions_are_the_spatial_ones(video):
    tower = LanguageBindVisionModel.from_pretrained(VIDEO_TOWER, attn_implementation="eager")
    with torch.no_grad():
        attentions = tower(video, output_attentions=True).attentions
    assert [tuple(attention.shape) for attention in attentions] == [(8, 4, 5, 5)] * 3


def test_save_and_load_through_auto_model(video_tower, video, tmp_path):
    video_tower.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert "vision_model.encoder.layers.0.temporal_attn.q_proj.weight" in keys
    assert all(key.startswith("vision_model.") for key in keys)  # as LanguageBind's own files
    reloaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(reloaded, LanguageBindVisionModel)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(reloaded(video).last_hidden_state, video_tower(video).last_hidden_state)


def test_temporal_weights_that_a_checkpoint_lacks_are_initialised():
    """An image tower grown into a video tower: built on the meta device, so `_init_weights` has to fill the rest."""
    config = LanguageBindVisionConfig.from_pretrained(IMAGE_TOWER, add_time_attn=True, num_frames=16)
    tower, info = LanguageBindVisionModel.from_pretrained(IMAGE_TOWER, config=config, output_loading_info=True)
    assert info["missing_keys"] and all(".temporal_" in key for key in info["missing_keys"])
    for layer in tower.encoder.layers:
        assert layer.temporal_embedding.shape == (1, 16, 32)
        assert layer.temporal_embedding.std().item() == pytest.approx(32**-0.5, rel=0.2)
        assert layer.temporal_attn.q_proj.weight.std().item() == pytest.approx((32 * 2 * 3) ** -0.5, rel=0.2)
        assert not layer.temporal_attn.q_proj.bias.any()
        assert (layer.temporal_layer_norm1.weight == 1).all()


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    tower = LanguageBindVisionModel(_tiny_config()).train()
    pixels = torch.randn(8, 3, 28, 28)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            tower.activation_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in tower.encoder.layers)
        tower.zero_grad()
        tower(pixels).last_hidden_state.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert "encoder.layers.0.temporal_embedding" in gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)
        assert gradient.any()
