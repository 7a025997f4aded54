"""Video-LLaVA as a configuration of the same classes, against recordings of the original."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM

from videollama2_hf import VideoLlama2Config, VideoLlama2ForConditionalGeneration


GOLDENS = Path(__file__).parent / "goldens" / "video_llava"
CHECKPOINT = GOLDENS / "tiny-video-llava-7b"
MANIFEST = json.loads((GOLDENS / "manifest.json").read_text())
RECORDED = load_file(GOLDENS / "goldens.safetensors")


@pytest.fixture(scope="module")
def model():
    model, info = VideoLlama2ForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def expand(ids: torch.Tensor, labels: torch.Tensor | None, media: list[str], config: VideoLlama2Config):
    """The original's ids (one -200 per frame) in this model's: runs of placeholders; also the media used."""
    new_ids, new_labels, images, videos, queue = [], [], [], [], list(media)
    position = 0
    while position < len(ids):
        if ids[position] != -200:
            new_ids.append(int(ids[position]))
            new_labels.append(-100 if labels is None else int(labels[position]))
            position += 1
            continue
        name = queue.pop(0)
        if name.startswith("video"):
            videos.append(RECORDED[f"pixels.{name}"].float())
            run = [config.video_token_id] * config.num_visual_tokens("video")
            position += 8
        else:
            images.append(RECORDED[f"pixels.{name}"].float())
            run = [config.image_token_id] * config.num_visual_tokens("image")
            position += 1
        new_ids += run
        new_labels += [-100] * len(run)
    return new_ids, new_labels, images, videos


def as_inputs(rows) -> dict[str, torch.Tensor]:
    length = max(len(row[0]) for row in rows)
    images, videos = [m for row in rows for m in row[2]], [m for row in rows for m in row[3]]
    inputs = {
        "input_ids": torch.tensor([row[0] + [0] * (length - len(row[0])) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row[0]) + [0] * (length - len(row[0])) for row in rows]),
    }
    if images:
        inputs["pixel_values"] = torch.stack([image.reshape(3, *image.shape[-2:]) for image in images])
    if videos:  # recorded as (3, frames, H, W)
        inputs["pixel_values_videos"] = torch.stack(
            [video.reshape(3, 8, *video.shape[-2:]).transpose(0, 1) for video in videos]
        )
    return inputs


def row_inputs(row: str, config) -> dict[str, torch.Tensor]:
    case = MANIFEST["rows"][row]
    return as_inputs([expand(RECORDED[f"rows.{row}.input_ids"][0], None, case["media"], config)])


def test_configuration_follows_the_original(model):
    config = model.config
    assert config.connector_type == "frame_mlp2x_gelu"
    assert (config.vision_config.add_time_attn, config.video_config.add_time_attn) == (False, True)
    assert config.num_visual_tokens("video") == 8 * 5 and config.num_visual_tokens("image") == 4
    # The released sizes: 256 tokens an image, 2056 a video.
    tower = {"model_type": "languagebind_vision"}
    released = VideoLlama2Config(
        vision_config=tower | {"add_time_attn": False},
        video_config=tower,
        video_feature_select_strategy="full",
        connector_type="frame_mlp2x_gelu",
    )
    assert (released.num_visual_tokens("image"), released.num_visual_tokens("video")) == (256, 2056)


def test_saved_model_loads_by_the_auto_classes(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForMultimodalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_features(model):
    video = RECORDED["pixels.video_a"].transpose(0, 1)[None].float()
    with torch.no_grad():
        image = model.get_image_features(RECORDED["pixels.image_a"][None].float())
        outputs = model.get_video_features(video)
    torch.testing.assert_close(image.last_hidden_state, RECORDED["image_tower.selected"], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(image.pooler_output, RECORDED["image.projected"], atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.last_hidden_state, RECORDED["video_tower.selected"][0], atol=2e-5, rtol=1e-5)
    projected = RECORDED["video.projected"].flatten(1, 2)
    torch.testing.assert_close(outputs.pooler_output, projected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("row", list(MANIFEST["rows"]))
def test_logits_and_greedy_tokens(model, row):
    inputs = row_inputs(row, model.config)
    expected = RECORDED[f"rows.{row}.logits"]
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape[1] == MANIFEST["rows"][row]["sequence_length"]
    torch.testing.assert_close(logits[:, -expected.shape[1] :], expected, atol=1e-4, rtol=0)
    generated = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert generated[0, inputs["input_ids"].shape[1] :].tolist() == MANIFEST["rows"][row]["greedy"]


def test_training_batch_gives_the_recorded_loss_and_gradients(model):
    media = [["image_a"], ["video_a"], ["video_a", "image_b"], []]
    ids, labels, mask = (RECORDED[f"train_batch.{name}"] for name in ("input_ids", "labels", "attention_mask"))
    rows = [
        expand(ids[i][mask[i].bool()], labels[i][mask[i].bool()], media[i], model.config) for i in range(len(media))
    ]
    inputs = as_inputs(rows)
    length = inputs["input_ids"].shape[1]
    inputs["labels"] = torch.tensor([row[1] + [-100] * (length - len(row[1])) for row in rows])
    assert torch.equal(inputs["labels"], RECORDED["train_batch.merged_labels"].long())
    assert torch.equal(inputs["attention_mask"].bool(), RECORDED["train_batch.merged_attention_mask"].bool())
    loss = model(**inputs).loss
    torch.testing.assert_close(loss, RECORDED["train_batch.loss"], atol=1e-5, rtol=0)
    loss.backward()
    for name, parameter in {
        "lm_head.weight": model.lm_head.weight,
        "mm_projector.0.weight": model.model.mm_projector[0].weight,
    }.items():
        torch.testing.assert_close(parameter.grad, RECORDED[f"train_batch.grad.{name}"], atol=2e-6, rtol=1e-4)
    model.zero_grad()


def test_without_temporal_attention_video_is_another_model(model):
    """What transformers' own port computes: the recording without time agrees, the real one is far away."""
    config = VideoLlama2Config.from_pretrained(CHECKPOINT)
    config.video_config.add_time_attn = False
    timeless = VideoLlama2ForConditionalGeneration(config).eval()
    timeless.load_state_dict(model.state_dict(), strict=False)
    inputs = row_inputs("video", config)
    with torch.no_grad():
        logits = timeless(**inputs).logits[:, -32:]
    torch.testing.assert_close(logits, RECORDED["rows.video.logits.no_time"], atol=1e-4, rtol=0)
    assert (logits - RECORDED["rows.video.logits"][:, -32:]).abs().max() > 1.0


def test_native_port_agrees_only_without_temporal_attention(model):
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

    text = model.config.text_config.to_dict()
    vision = {
        key: getattr(model.config.vision_config, key)
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "image_size",
            "patch_size",
        )
    }
    native_config = VideoLlavaConfig(
        text_config=text,
        vision_config=vision | {"model_type": "clip_vision_model", "hidden_act": "gelu"},
        image_token_index=model.config.image_token_id,
        video_token_index=model.config.video_token_id,
        image_seq_length=4,
        video_seq_length=40,
    )
    native_config.text_config.vocab_size += 8
    native = VideoLlavaForConditionalGeneration(native_config).eval()
    state = {}
    for key, value in model.state_dict().items():
        key = key.replace("model.vision_tower.", "model.image_tower.")
        key = key.replace("mm_projector.0", "multi_modal_projector.linear_1")
        key = key.replace("mm_projector.2", "multi_modal_projector.linear_2")
        if "embed_tokens" in key or "lm_head" in key:
            value = torch.cat([value, torch.zeros(8, value.shape[1])])
        state[key] = value
    info = native.load_state_dict(state, strict=False)
    assert not info.missing_keys and all("temporal" in key for key in info.unexpected_keys)
    inputs = row_inputs("image", model.config)
    with torch.no_grad():
        ours = model(**inputs).logits
        theirs = native(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values_images=inputs["pixel_values"],
        ).logits[..., : ours.shape[-1]]
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)
    inputs = row_inputs("video", model.config)
    with torch.no_grad():
        theirs = native(**inputs).logits[:, -32:, : ours.shape[-1]]
    torch.testing.assert_close(theirs, RECORDED["rows.video.logits.no_time"], atol=1e-4, rtol=0)


def test_videos_need_whole_temporal_windows(model):
    with pytest.raises(ValueError, match="num_frames=8 frames, got 6"):
        model.get_video_features(torch.zeros(1, 6, 3, 28, 28))
    with pytest.raises(ValueError, match="num_frames=8 frames, got 4"):
        model.get_video_features([torch.zeros(4, 3, 28, 28), torch.zeros(12, 3, 28, 28)])
