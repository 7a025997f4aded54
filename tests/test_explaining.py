"""Where tokens stand against what changes them, attention and gradients against their definitions, and the page."""

import json
import re
import shutil
from functools import partialmethod
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from golden_utils import GOLDENS
from test_cli_ask import CLIP, MODEL, run
from test_connector import make_config as make_connector_config
from tiny_models import VISION_SIZES, make_config, make_model
from videollama2_hf import VideoLlama2FeatureExtractor, VideoLlama2Processor
from videollama2_hf.configuration_videollama2 import CONNECTOR_SAMPLERS, ConnectorType
from videollama2_hf.connector_videollama2 import build_connector
from videollama2_hf.drawing import SILENCE
from videollama2_hf.explaining import _split_words, explain
from videollama2_hf.media_videollama2 import VideoClip, read_audio_track
from videollama2_hf.messages_videollama2 import SoundClip
from videollama2_hf.session import Session
from videollama2_hf.synthetic.rendering import render_clip
from videollama2_hf.synthetic.small_model import build_tokenizer
from videollama2_hf.synthetic.world import draw_clip
from videollama2_hf.token_places import HeardPart, get_token_windows, hear_sound, see_frames


CONNECTORS = get_args(ConnectorType)
WITHOUT_PROJECTION = {"hidden_size": 24, "num_attention_heads": 4}  # `spatial_conv` and `spatial_pool` keep the width
VIDEO_TOWER = {"model_type": "languagebind_vision", **VISION_SIZES, "num_frames": 2}
ANSWER = "a red circle moves"


@pytest.fixture(scope="module")
def tokenizer_texts():
    return ["What is it? a red circle moves to the left user assistant"] * 20


@pytest.fixture
def make_session(tokenizer_texts):
    def make(connector_type="stc_connector_v35", family="qwen2", hears=True, seed=0, **kwargs) -> Session:
        tokenizer = build_tokenizer(tokenizer_texts, vocab_size=330)
        size = len(tokenizer.get_vocab())
        text = {"vocab_size": size, "eos_token_id": tokenizer.eos_token_id}
        if connector_type.startswith("spatial"):
            text |= WITHOUT_PROJECTION
        ids = {"image_token_id": size, "video_token_id": size + 1, "audio_token_id": size + 2}
        text |= kwargs.pop("text_config", {})
        model = make_model(family, seed, hears=hears, connector_type=connector_type, text_config=text, **ids, **kwargs)
        processor = VideoLlama2Processor.from_config(model.config, tokenizer, chunk_length=2)
        return Session(model, processor)

    return make


def make_video(num_frames: int = 4, seed: int = 0) -> dict:
    frames = np.random.default_rng(seed).integers(0, 255, (num_frames, 28, 28, 3), dtype=np.uint8)
    return {"type": "video", "video": frames, "load_audio_from_video": False, "num_frames": num_frames}


def make_image(seed: int = 1) -> dict:
    pixels = np.random.default_rng(seed).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    return {"type": "image", "image": Image.fromarray(pixels)}


def make_noise(seconds: float = 3.0, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(16000 * seconds)).astype(np.float32)


def make_sound(seconds: float = 3.0) -> dict:
    return {"type": "audio", "audio": make_noise(seconds), "sampling_rate": 16000}


# Where tokens stand


@pytest.mark.parametrize("grid", [(4, 4, 4), (5, 5, 3), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("connector_type", CONNECTORS)
def test_a_patch_changes_the_tokens_that_stand_for_it(connector_type, grid):
    """Every patch of every frame, through the part of the connector that mixes over time and space."""
    torch.manual_seed(0)
    config = make_connector_config(connector_type, 8, 8, connector_depth=1)
    connector = build_connector(config).eval()
    frames, rows, columns = grid
    with_stages = connector_type in CONNECTOR_SAMPLERS

    def to_tokens(volume):  # (1, frames, rows, columns, width)
        if with_stages:
            return connector.sampler(volume.movedim(-1, 1))[0].flatten(1).T
        return connector(volume.flatten(2, 3))[0]

    volume = torch.randn(1, *grid, 8)
    windows = get_token_windows(connector_type, *grid)
    shares = torch.einsum("tf,ri,cj->trcfij", *windows).flatten(0, 2)
    with torch.no_grad():
        before = to_tokens(volume)
        assert len(before) == len(shares)
        for frame, row, column in np.ndindex(*grid):
            changed = volume.clone()
            changed[0, frame, row, column] += 1.0
            moved = (to_tokens(changed) != before).any(1)
            assert torch.equal(moved, shares[:, frame, row, column] > 0)
    sums = shares.flatten(1).sum(1)
    assert ((sums - 1).abs().lt(1e-6) | (sums == 0)).all() and sums.max() > 0


@pytest.mark.parametrize("num_frames", [4, 5])
@pytest.mark.parametrize("connector_type", CONNECTORS)
def test_a_frame_changes_the_tokens_that_stand_for_it(connector_type, num_frames):
    """Through tower and connector: exact in time. Inside a frame the tower mixes everything."""
    text = WITHOUT_PROJECTION if connector_type.startswith("spatial") else {}
    model = make_model(connector_type=connector_type, hears=False, text_config=text)
    pixels = torch.randn(1, num_frames, 3, 28, 28)
    time = get_token_windows(connector_type, num_frames, 4, 4)[0]
    with torch.no_grad():
        before = model.get_video_features(pixels).pooler_output[0].unflatten(0, (len(time), -1))
        for frame in range(num_frames):
            changed = pixels.clone()
            changed[0, frame, :, :7, :7] += 1.0
            after = model.get_video_features(changed).pooler_output[0].unflatten(0, (len(time), -1))
            moved = (after != before).any(-1).float().mean(1)
            assert torch.equal(moved > 0.9, time[:, frame] > 0) and torch.equal(moved > 0, time[:, frame] > 0)
    medium = see_frames(
        model.config,
        "video",
        "video 1",
        0,
        before.flatten(0, 1).shape[0],
        np.zeros((num_frames, 28, 28, 3)),
        [0.0] * num_frames,
        (0, 1),
        True,
    )
    unseen = [4] if num_frames == 5 and connector_type in ("stc_connector_v35", "stp_connector") else []
    assert medium.unseen_frames() == unseen and medium.frames_mixed == 1


def test_video_llava_mixes_the_frames_of_a_window():
    model = make_model(
        "llama",
        vision="clip_vision_model",
        hears=False,
        connector_type="frame_mlp2x_gelu",
        video_config=VIDEO_TOWER,
        video_feature_select_strategy="full",
    )
    pixels = torch.randn(1, 4, 3, 28, 28)
    medium = see_frames(model.config, "video", "video 1", 7, 4 * 17, np.zeros((4, 28, 28, 3)), [0.0] * 4, (0, 1), True)
    assert medium.num_class_tokens == 1 and medium.frames_mixed == 2
    with torch.no_grad():
        before = model.get_video_features(pixels).pooler_output[0].unflatten(0, (4, 17))
        pixels[0, 2] += 1.0
        after = model.get_video_features(pixels).pooler_output[0].unflatten(0, (4, 17))
    assert (after != before).any(-1).all(1).tolist() == [False, False, True, True]
    weights = torch.zeros(1, 4 * 17)
    weights[0, 17] = 16.0  # the class token of the second frame: spread over it
    weights[0, 18 + 6] = 1.0  # the patch in row 1, column 2
    expected = torch.zeros(4, 4, 4)
    expected[1] = 1.0
    expected[1, 1, 2] = 2.0
    assert torch.allclose(medium.place(weights)[0], expected)


def test_patches_and_pixels_lie_on_one_grid():
    """A tower whose patches do not cover the last pixels, as SigLIP's 27 of 14 in 384."""
    config = make_config(hears=False)
    config.vision_config.image_size = 33
    medium = see_frames(config, "video", "video 1", 0, 8, np.zeros((4, 33, 33, 3)), [0.0] * 4, (0, 1), True)
    assert medium.patch_grid == (4, 4) and medium.extent == 28 / 33
    values = torch.zeros(1, 4, 3, 33, 33)
    values[0, 3, 1, 7:14, 21:28] = 2.0
    values[0, 0, 0, 28:] = 1.0  # beyond the patches
    pooled = medium.pool(values)
    assert pooled[0, 3, 1, 3] == 2 * 49 and pooled.sum() == 2 * 49
    with torch.no_grad():  # the tower agrees
        tower = make_model(hears=False).model.vision_tower.embeddings.patch_embedding
        pixels = torch.zeros(1, 3, 33, 33)
        before = tower(pixels)
        pixels[0, 1, 7:14, 21:28] = 2.0
        moved = (tower(pixels) != before).any(1)[0]
    assert moved.nonzero().tolist() == [[1, 3]]


def test_seconds_and_bands_of_a_sound():
    """Which tokens' patches change with which filter banks, and which filter banks with which samples."""
    extractor = VideoLlama2FeatureExtractor(chunk_length=2)
    silence = extractor(extractor.silent_waveform(), 16000)["input_features"]
    assert np.abs(silence - SILENCE).max() < 1e-5
    noise = make_noise(2.0)
    features = extractor(noise, 16000)["input_features"][0]
    sound = hear_sound(extractor, SoundClip(noise, sampling_rate=16000), False, "audio 1", 0, 12 * 8, features, 16)
    assert sound.grid == (12, 8) and sound.step_seconds == pytest.approx(0.16)
    model = make_model(text_config={"vocab_size": 130})
    patches = []
    hook = model.model.audio_tower.patch_embedding.register_forward_hook(lambda *a: patches.append(a[2][0]))
    with torch.no_grad():
        for changed in (0.0, 1.0):
            inputs = torch.tensor(features)[None].clone()
            inputs[0, 5 * 16 : 6 * 16, 3 * 16 : 4 * 16] += changed
            tokens = model.get_audio_features(inputs).pooler_output[0]
    hook.remove()
    assert len(tokens) == sound.num_tokens
    moved = (patches[0] != patches[1]).any(0)  # (steps, bands)
    place = sound.place(moved.flatten().float()[None])[0]
    assert place.nonzero().tolist() == [[5, 3]]
    louder = noise.copy()
    first, last = (round(step * 0.16 * 16000) for step in (5, 6))
    louder[first:last] *= 3
    changed = np.abs(extractor(louder, 16000)["input_features"][0] - features).max(1) > 1e-3
    steps = sorted({row // 16 for row in np.flatnonzero(changed)})
    assert steps in ([5], [4, 5])  # a filter bank reaches 15 ms into the next


@pytest.mark.parametrize("mode", ["reference", "full"])
@pytest.mark.parametrize("part", [(None, None), (1.0, 3.5), (0.5, 1.2)], ids=str)
@pytest.mark.parametrize("of_video", [True, False])
def test_the_parts_heard_are_those_that_the_model_hears(mode, part, of_video, tmp_path):
    """Cut out of the sound and put one behind the other, they give the model's filter banks."""
    extractor = VideoLlama2FeatureExtractor(chunk_length=2, num_clips=3, clip_duration=0.5, audio_mode=mode)
    path = render_clip(draw_clip(np.random.default_rng(3)), tmp_path / "clip.mkv")
    start, end = part
    if of_video:
        clip: object = VideoClip(str(path), start, end)
        waveform, rate = extractor.load_video_audio(str(path), start, end), 16000
    else:
        clip = SoundClip(str(path), start, end)
        waveform, rate = extractor.load_audio_file(str(path), start, end)
    features = extractor(waveform, rate)["input_features"][0]
    sound = hear_sound(extractor, clip, of_video, "a", 0, 96, features, 16)
    assert (sound.start, round(sound.end, 3)) == (start or 0.0, end or 4.0)
    whole = read_audio_track(str(path))
    pieces = [whole[round(p.start * 16000) : round(p.end * 16000)] for p in sound.parts]
    assert [p.at for p in sound.parts] == pytest.approx([0, *np.cumsum([len(p) / 16000 for p in pieces])[:-1]])
    heard = extractor(np.concatenate(pieces).astype(waveform.dtype), 16000, audio_mode="reference")
    assert np.abs(heard["input_features"][0] - features).max() < 1e-2
    assert sound.fills_window() == (len(pieces) == 1 and len(pieces[0]) >= 1.9 * 16000)


def test_a_second_of_the_sound_is_found_where_it_is():
    """The steps of the window that change with a part of the sound lie there; what is not heard changes none."""
    extractor = VideoLlama2FeatureExtractor(chunk_length=8, num_clips=5, audio_mode="full")
    noise = make_noise(20.0)
    unheard, louder = noise.copy(), noise.copy()
    unheard[7 * 16000 : 8 * 16000] *= 10
    louder[round(9.6 * 16000) : round(10.4 * 16000)] *= 10
    before, same, after = (extractor(wave, 16000)["input_features"][0] for wave in (noise, unheard, louder))
    assert np.array_equal(before, same)
    steps = len(before) // 16
    sound = hear_sound(extractor, SoundClip(noise, sampling_rate=16000), False, "a", 0, steps * 8, before, 16)
    assert len(sound.parts) == 5 and not sound.fills_window()
    assert not any(part.start < 8 and part.end > 7 for part in sound.parts)
    moved = np.abs(after - before)[: steps * 16].reshape(steps, 16, 8, 16).max((1, 3)) > 1.0
    assert moved.any()
    sound.maps = torch.tensor(moved, dtype=torch.float32)[None]
    by_second = sound.maps_of_sound()[0].sum(1)
    times = sound.start + (np.arange(len(by_second)) + 0.5) * (sound.end - sound.start) / len(by_second)
    found = times[by_second.numpy() > 0]
    assert found.min() > 9.6 - 0.3 and found.max() < 10.4 + 0.3
    assert by_second.sum() == pytest.approx(float(sound.maps.sum()), rel=0.02)


def test_silence_is_in_no_second():
    extractor = VideoLlama2FeatureExtractor(chunk_length=2)
    noise = make_noise(0.96)
    features = extractor(noise, 16000)["input_features"][0]
    sound = hear_sound(extractor, SoundClip(noise, sampling_rate=16000), False, "a", 0, 96, features, 16)
    assert sound.parts == [HeardPart(0.0, 0.0, 0.96)]
    sound.maps = torch.ones(1, 12, 8)
    assert sound.maps_of_sound().shape == (1, 6, 8)
    assert torch.allclose(sound.maps_of_sound(), torch.ones(1, 6, 8), atol=1e-4)
    silent = hear_sound(extractor, VideoClip([noise]), True, "a", 0, 96, features, 16)
    silent.maps = sound.maps
    assert silent.parts == [] and not silent.maps_of_sound().any()


# Attention


def get_inputs(session, question, *media):
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]
    return session.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def read_attention(session, explanation, *media, layers=None):
    """Weights of the whole conversation, with no cache and no blocks: (words, length)."""
    inputs = get_inputs(session, explanation.question, *media)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([explanation.answer.token_ids])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    session.model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = session.model(**inputs, output_attentions=True).attentions
    weights = torch.stack([weights[0].mean(0) for weights in attentions])[layers or slice(None)].mean(0)
    return torch.stack([weights[[p - 1 for p in word.positions]].mean(0) for word in explanation.words])


MEDIA = {
    "video": [make_video()],
    "several": [make_image(), make_video(6), make_sound(), make_image(5)],
    "heard": [{"type": "video", "video": CLIP, "num_frames": 4}],
    "text": [],
}


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
@pytest.mark.parametrize("name", MEDIA)
def test_attention_is_that_of_the_model(make_session, family, name):
    window = {"sliding_window": 40} if family == "gemma2" else {}
    session = make_session(family=family, text_config=window)
    long_answer = " ".join([ANSWER] * 12)  # more tokens than are run at a time
    before = session.model.model.language_model.config._attn_implementation
    explanation = explain(session, "What is it?", *MEDIA[name], answer=long_answer)
    assert session.model.model.language_model.config._attn_implementation == before
    assert len(explanation.words) == 48 and len(explanation.answer.token_ids) > 33
    weights = read_attention(session, explanation, *MEDIA[name])
    kinds = {"heard": ["video 1", "sound of video 1"], "video": ["video 1"], "text": []}
    titles = kinds.get(name, ["image 1", "video 1", "audio 1", "image 2"])
    assert [medium.title for medium in explanation.media] == titles
    for number, medium in enumerate(explanation.media):
        own = weights[:, slice(*medium.span)]
        assert torch.allclose(medium.maps, medium.place(own), atol=1e-5)
        assert torch.allclose(medium.maps.flatten(1).sum(1), own.sum(1), atol=1e-5)
        assert torch.allclose(explanation.totals[:, number], own.sum(1), atol=1e-5)
    assert torch.allclose(explanation.totals.sum(1), torch.ones(48), atol=1e-4)
    assert explanation.text_map.shape == (48, len(explanation.text))
    counted = explanation.num_text_tokens + sum(medium.num_tokens for medium in explanation.media)
    assert counted == explanation.answer.num_prompt_tokens == weights.shape[1] - len(explanation.answer.token_ids)
    later = torch.ones(48, 48).triu().bool()  # no word looks at itself or at what comes after it
    assert not explanation.text_map[:, -48:][later].any()


def test_attention_of_chosen_layers(make_session):
    session = make_session()
    explanation = explain(session, "What is it?", make_video(), answer=ANSWER, layers=[-1])
    weights = read_attention(session, explanation, make_video(), layers=[1])
    medium = explanation.media[0]
    assert explanation.layers == [1]
    assert torch.allclose(explanation.totals[:, 0], weights[:, slice(*medium.span)].sum(1), atol=1e-5)


@pytest.mark.parametrize("connector_type", CONNECTORS)
def test_every_connector_is_explained(make_session, connector_type):
    """Maps hold all attention, but for tokens that stand for padding, before and behind a video."""
    session = make_session(connector_type, hears=False, video_config=None)
    explanation = explain(session, "What is it?", make_video(), make_image(), answer=ANSWER)
    gaps = explanation.totals[:, :2] - torch.stack([m.maps.flatten(1).sum(1) for m in explanation.media], 1)
    assert [medium.maps.shape for medium in explanation.media] == [(4, 4, 4, 4), (4, 1, 4, 4)]
    if connector_type == "spatial_conv":
        assert (gaps > 1e-3).all()
    else:
        assert gaps.abs().max() < 1e-5
    assert explanation.to_html()


def test_video_llava_is_explained(make_session):
    options = {"vision": "clip_vision_model", "hears": False, "video_config": VIDEO_TOWER}
    options |= {"connector_type": "frame_mlp2x_gelu", "video_feature_select_strategy": "full", "family": "llama"}
    session = make_session(**options)
    for method in ("attention", "gradient"):
        explanation = explain(session, "What is it?", make_video(), make_image(), answer=ANSWER, method=method)
        sums = [medium.maps.flatten(1).sum(1) for medium in explanation.media]
        assert torch.allclose(explanation.totals[:, :2], torch.stack(sums, 1), atol=1e-5)
    assert "class tokens" in explanation.to_html()


def test_the_answer_that_is_explained(make_session):
    session = make_session()
    said = session.ask("What is it?", make_video(), max_new_tokens=5)
    asked = explain(session, "What is it?", make_video(), max_new_tokens=5)
    given = explain(session, "What is it?", make_video(), answer=said)
    assert asked.answer.token_ids == given.answer.token_ids == said.token_ids and len(said.token_ids) == 5
    assert torch.equal(asked.totals, given.totals)
    assert [token for word in asked.words for token in word.token_ids] == said.token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rollout"}, "Unknown method 'rollout'; choose one of attention, gradient"),
        ({"layers": [2]}, "layers are numbers from 0 to 1"),
        ({"layers": []}, "layers are numbers"),
        ({"answer": ""}, "The answer is empty"),
    ],
)
def test_refusals(make_session, options, message):
    session = make_session(hears=False)
    with pytest.raises(ValueError, match=message):
        explain(session, "What?", **{"answer": ANSWER, **options})
    with pytest.raises(ValueError, match="Encoded media cannot be shown"):
        explain(session, "What?", {"type": "video", "video": session.encode(make_video())}, answer=ANSWER)


# Gradients


@pytest.mark.parametrize("name", ["several", "heard"])
def test_gradients_add_up_to_the_change_of_the_log_probability(make_session, name):
    """The upper half of every picture, or the first half of a sound, a little more or less of what it is."""
    session = make_session()
    assert session.model.config.audio_config.layer_wise_gradient_decay_ratio != 1
    explanation = explain(session, "What is it?", *MEDIA[name], answer=ANSWER, method="gradient")
    assert all(parameter.requires_grad and parameter.grad is None for parameter in session.model.parameters())
    inputs = dict(get_inputs(session, "What is it?", *MEDIA[name]))
    answer = torch.tensor([explanation.answer.token_ids])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
    del inputs["attention_mask"]
    model = session.model.double()

    def score(changed):
        with torch.no_grad():
            logits = model(**changed).logits[0, -answer.shape[1] - 1 : -1].log_softmax(-1)
        values = logits.gather(1, answer[0, :, None])[:, 0]
        start = explanation.answer.num_prompt_tokens
        return torch.stack([values[[p - start for p in word.positions]].sum() for word in explanation.words])

    order = {"pixel_values": 0, "pixel_values_videos": 0, "input_features": 0}
    for number, medium in enumerate(explanation.media):
        name = {"image": "pixel_values", "video": "pixel_values_videos"}.get(medium.title.split()[0], "input_features")
        index, order[name] = order[name], order[name] + 1
        scores = []
        for factor in (1.001, 0.999):
            values = inputs[name].double().clone()
            if name == "input_features":
                half, of_half = values[index, :96], medium.maps[:, :6]
                half.sub_(SILENCE).mul_(factor).add_(SILENCE)
            else:
                half, of_half = values[index, ..., :14, :], medium.maps[:, :, :2]
                half.mul_(factor)
            scores.append(score({**inputs, name: values}))
        slope = (scores[0] - scores[1]) / 0.002
        assert slope.abs().max() > 1e-3
        assert (of_half.flatten(1).sum(1) - slope).abs().max() < 0.02 * slope.abs().max()
        assert torch.allclose(medium.maps.flatten(1).sum(1), explanation.totals[:, number], atol=1e-5)


class OnePatch(torch.nn.Module):
    """A connector that sees one patch of one frame."""

    def __init__(self, frame: int, patch: int):
        super().__init__()
        self.frame, self.patch = frame, patch
        self.project = torch.nn.Linear(24, 32)

    def forward(self, features):
        return self.project(features[:, self.frame, self.patch])[:, None].expand(-1, 8, -1)


def test_gradients_are_where_the_information_is(make_session):
    session = make_session(hears=False)
    session.model.model.mm_projector = OnePatch(2, 6)
    explanation = explain(session, "What is it?", make_video(), answer=ANSWER, method="gradient")
    of_frames = explanation.media[0].maps.abs().sum((2, 3))
    assert (of_frames[:, 2] > 0).all() and not of_frames[:, [0, 1, 3]].any()
    for layer in session.model.model.vision_tower.encoder.layers:  # no patch sees another
        torch.nn.init.zeros_(layer.self_attn.out_proj.weight)
    maps = explain(session, "What is it?", make_video(), answer=ANSWER, method="gradient").media[0].maps
    assert (maps[:, 2, 1, 2] != 0).all()
    maps[:, 2, 1, 2] = 0
    assert not maps.any()


# Words


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_words(name):
    tokenizer = AutoTokenizer.from_pretrained(GOLDENS / "processing" / "tokenizers" / name)
    text = "A man plays the saxophone.\n\nHe says: “naïve”, 猫在叫 🎷 twice"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    words = _split_words(tokenizer, ids, 7)
    expected = f"A man plays the saxophone. He says: “naïve”, 猫 在 叫 🎷 twice {tokenizer.eos_token}"
    assert [word.text for word in words] == expected.split()
    assert [token for word in words for token in word.token_ids] == ids
    assert [p for word in words for p in word.positions] == list(range(7, 7 + len(ids)))


# Figures and pages


class Checker(HTMLParser):
    """Every tag is closed, and every picture lies in the page."""

    def __init__(self):
        super().__init__()
        self.open, self.count = [], {}

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ("meta", "input", "img", "line", "br"):
            self.open.append(tag)
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action"):
                assert value.startswith("data:image/")

    def handle_endtag(self, tag):
        if tag != "line":
            assert self.open.pop() == tag


@pytest.mark.parametrize("method", ["attention", "gradient"])
def test_page(make_session, method):
    session = make_session()
    question = "What <script>alert(1)</script> & is it?"
    explanation = explain(session, question, *MEDIA["heard"], make_image(), make_sound(), answer=ANSWER, method=method)
    page = explanation.to_html()
    checker = Checker()
    checker.feed(page)
    assert not checker.open and checker.count["script"] == 1 and checker.count["input"] == 4
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert all(uri.startswith("data:image/") for uri in re.findall(r"url\(([^)]*)\)", page))
    assert page.count("data:image/jpeg") == 4 + 1 + 2  # frames, the image, and both small in the table
    assert ("Attention is not causation" in page) == (method == "attention")
    for medium in explanation.media:
        assert f"{medium.title}: " in page and str(medium.num_tokens) in page
    assert len(page) < 300_000


def test_page_of_text_alone(make_session):
    explanation = explain(make_session(), "What is it?", answer=ANSWER)
    page = explanation.to_html()
    checker = Checker()
    checker.feed(page)
    assert not checker.open and "img" not in checker.count and "100.0 %" in page
    with pytest.raises(ValueError, match="no media to draw"):
        explanation.figure()


def test_figures(make_session, tmp_path):
    explanation = explain(make_session(), "What is it?", *MEDIA["several"], answer=ANSWER)
    plain, heat = explanation.figure(), explanation.figure(2)
    assert len(plain.axes) == 4 + 1  # and the bar of colours of the sound
    assert [axis.get_title(loc="left") for axis in heat.axes[:4]] == [
        f"{m.title}: {m.num_tokens} tokens; “circle” {explanation.describe_total(2, i)}"
        for i, m in enumerate(explanation.media)
    ]
    for figure, name in ((plain, "plain.png"), (heat, "heat.png")):
        figure.savefig(tmp_path / name)
    pictures = [np.asarray(Image.open(tmp_path / name).convert("RGB"), int) for name in ("plain.png", "heat.png")]
    assert np.abs(pictures[0] - pictures[1]).max(-1).mean() > 2
    with pytest.raises(ValueError, match="the words 0 to 3"):
        explanation.figure(4)


def open_page(browser, path: Path, width: int, with_script: bool):
    """A page, and what went wrong on it, kept up to date."""
    page = browser.new_page(viewport={"width": width, "height": 800}, java_script_enabled=with_script)
    wrong: list = []
    page.on("pageerror", lambda error: wrong.append(error))
    page.on("request", lambda request: request.url.startswith(("data:", "file:")) or wrong.append(request.url))
    page.goto(path.as_uri())
    return page, wrong


def test_page_in_a_browser(make_session, tmp_path):
    """A word that is clicked shows its maps, with JavaScript or without; phones need no scrolling to the side."""
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("There is no Chromium.")
    from playwright.sync_api import sync_playwright

    path = tmp_path / "page.html"
    explain(make_session(), "What is it?", *MEDIA["heard"], make_image(), answer=ANSWER).save(path)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for width, with_script in ((390, True), (1280, True), (390, False)):
            page, wrong = open_page(browser, path, width, with_script)
            heat, words = page.locator("figure .heat").nth(1), page.locator(".words label")
            shown = []
            for word in ("a", "circle"):
                words.get_by_text(word, exact=True).click()
                shown.append(heat.screenshot())
                assert page.locator(".total:visible").count() == 1
            assert shown[0] != shown[1]
            if with_script:
                words.get_by_text("a", exact=True).hover()
                assert heat.screenshot() == shown[0]
                page.locator("h1").hover()
                assert heat.screenshot() == shown[1]
                assert page.evaluate("document.documentElement.scrollWidth") == width
            page.locator("summary").click()
            assert page.locator("tr .strip:visible").count() == 4 * 3
            assert not wrong
            page.close()
        browser.close()


# Command line and documentation


def test_documentation(tmp_path, monkeypatch, capsys):
    """The snippets in their order, but for the checkpoint; the command is tested below."""
    page = (Path(__file__).parent.parent / "docs" / "explaining.md").read_text()
    shutil.copy(CLIP, tmp_path / "holiday.mp4")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Session, "ask", partialmethod(Session.ask, max_new_tokens=3))
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(code.replace("DAMO-NLP-SG/VideoLLaMA2.1-7B-AV", MODEL), names)
    assert {path.name for path in tmp_path.iterdir()} == {"holiday.mp4", "page.html", "seen.png", "first_word.png"}
    assert [word.text for word in names["explanation"].words] == ["A", "woman", "plays", "a", "guitar"]
    assert names["explanation"].layers == [0, 1]
    assert "by second of the track" in capsys.readouterr().out
    options = re.search(r"^videollama2 ask .* (--explain .*)$", page, flags=re.MULTILINE)
    assert options is not None and options[1] == "--explain page.html"


@pytest.mark.parametrize("method", ["attention", "gradient"])
def test_ask_explains(capsys, tmp_path, method):
    page = tmp_path / "page.html"
    arguments = ["ask", "What is it?", CLIP, "--model", MODEL, "--max-new-tokens", "3", "--no-audio"]
    code, plain, _ = run(capsys, *arguments)
    code, text, err = run(capsys, *arguments, "--explain", str(page), "--explain-by", method)
    assert code == 0 and text == plain and str(page) in err
    first = page.read_text()
    assert ("Attention is not causation" in first) == (method == "attention")
    code, out, _ = run(capsys, *arguments, "--explain", str(page), "--explain-by", method, "--json")
    assert code == 0 and json.loads(out)["text"] == plain.strip() and page.read_text() == first


def test_ask_refuses_before_it_loads(capsys, tmp_path):
    arguments = ["ask", "What?", CLIP, "--model", MODEL, "--explain"]
    code, out, err = run(capsys, *arguments, str(tmp_path / "none" / "page.html"))
    assert code == 2 and "There is no folder" in err and not out
    code, out, err = run(capsys, *arguments, str(tmp_path / "page.html"), "--explain-by", "rollout")
    assert code == 2 and "rollout" in err and not out
