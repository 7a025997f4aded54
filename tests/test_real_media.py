"""
Real media: clips as people have them go through the processor of a checkpoint and through towers, connectors and
features of the released models' widths; what is broken is refused with a sentence that says what is wrong.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

import videollama2_hf  # noqa: F401  # registers the classes
from real_media import REAL, VFR_KEPT, ffmpeg, make_clips
from videollama2_hf import VideoLlama2Config, VideoLlama2ForConditionalGeneration
from videollama2_hf.media_videollama2 import MediaError, NoAudioTrackError, read_frames
from videollama2_hf.processing_videollama2 import VideoLlama2Processor


CHECKPOINT = Path(__file__).parent / "goldens" / "qwen2_siglip_beats_av" / "checkpoint"
SIZE, NUM_FRAMES = 70, 8  # of this checkpoint: 5 x 5 patches
VISUAL_TOKENS, AUDIO_TOKENS = 4 * 2 * 2, 1496  # of stc_connector_v35, of 30 s
FLOOR = float(np.log(np.finfo(np.float32).eps))  # a filter bank of digital silence
BETWEEN_FRAMES = 0.03  # mean difference of the two most similar neighbours among the frames of the cartoon, of 2

BUNNIES = ["bunny.mov", "bunny.mp4", "bunny.mkv", "bunny.ts", "bunny.mpg", "bunny.avi", "bunny.ogv", "bunny.webm"]
DELAYED = ["bunny.ts", "bunny.mpg", "bunny.avi", "sax.mp2"]  # formats that keep what encoders put in front
SOUNDS = [
    *(f"sax.{suffix}" for suffix in ("wav", "mp3", "m4a", "ogg", "opus", "webm", "mp2", "flac", "aiff")),
    *("sax_24.wav", "sax_5.1.wav", "cantina.wav", "recording1.wav", "audio_sample.wav", "cover.mp3", "sound.m4a"),
    "bunny.mp4",
]
VIDEOS = [
    *(name for name in REAL if name.endswith((".mp4", ".avi", ".gif"))),
    *BUNNIES,
    *("bunny.gif", "vfr.mkv", "rotated90.mp4", "rotated180.mp4", "part.mov", "two_halves.mp4", "mute.mp4"),
    "silent.mp4",
]
IMAGES = [*(name for name in REAL if name.endswith((".jpg", ".png"))), "screenshot.gif"]


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> dict[str, Path]:
    return make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def processor() -> VideoLlama2Processor:
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def encode(processor, clips):
    """Model inputs of one question about one clip, by the clip's name or as an object."""
    cache = {}

    def encode(kind: str, clip, processor=processor, processor_kwargs=None, **options):
        key = repr((kind, clip, id(processor), processor_kwargs, options))
        if not isinstance(clip, str):
            return _encode(processor, kind, clip, processor_kwargs, **options)
        if key not in cache:
            cache[key] = _encode(processor, kind, str(clips[clip]), processor_kwargs, **options)
        return cache[key]

    return encode


def _encode(processor, kind: str, medium, processor_kwargs=None, **options):
    content = [{"type": kind, kind: medium, **options}, {"type": "text", "text": "What is this?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"return_metadata": True, **(processor_kwargs or {})},
    )


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().mean())


def sound_difference(a: torch.Tensor, b: torch.Tensor, seconds: float, shift: int = 0) -> float:
    """Mean difference of the filter banks of two sounds, of which the first is `shift` steps of 10 ms late."""
    steps = int(seconds * 100) - 5
    return difference(a[0, shift : steps + shift], b[0, :steps])


def count_placeholders(processor, inputs) -> tuple[int, int, int]:
    ids = (processor.image_token_id, processor.video_token_id, processor.audio_token_id)
    return tuple(int((inputs.input_ids == token_id).sum()) for token_id in ids)


# Everything that is media becomes model inputs


@pytest.mark.parametrize("name", VIDEOS)
def test_video(name, encode, processor):
    inputs = encode("video", name)
    assert count_placeholders(processor, inputs) == (0, VISUAL_TOKENS, AUDIO_TOKENS)
    pixels, sound = inputs.pixel_values_videos, inputs.input_features
    assert pixels.shape == (1, NUM_FRAMES, 3, SIZE, SIZE) and pixels.dtype == torch.float32
    assert sound.shape == (1, 2998, 128) and sound.dtype == torch.float32
    assert inputs.input_features_mask.shape == (1, 2998) and inputs.input_features_mask.all()
    assert pixels.isfinite().all() and pixels.abs().max() <= 1 and pixels.std() > 0.02  # not one colour
    assert sound.isfinite().all() and sound.min() >= FLOOR - 1e-4
    metadata = inputs.video_metadata[0]
    indices = metadata.frames_indices
    assert len(indices) == NUM_FRAMES and indices[0] >= 0 and indices[-1] < metadata.total_num_frames
    assert indices == sorted(set(indices))  # no clip here has so few frames that some are repeated


@pytest.mark.parametrize("name", SOUNDS)
def test_sound(name, encode, processor):
    inputs = encode("audio", name)
    assert count_placeholders(processor, inputs) == (0, 0, AUDIO_TOKENS)
    sound = inputs.input_features
    assert sound.shape == (1, 2998, 128) and sound.isfinite().all()
    assert sound[0, :95].mean() > -12  # something is heard in the first second


@pytest.mark.parametrize("name", IMAGES)
def test_image(name, encode, processor):
    inputs = encode("image", name)
    assert count_placeholders(processor, inputs) == (VISUAL_TOKENS, 0, 0)
    assert inputs.pixel_values.shape == (1, 3, SIZE, SIZE) and inputs.pixel_values.isfinite().all()
    assert inputs.pixel_values.std() > 0.02


# The same content gives the same inputs, whatever it comes in


@pytest.mark.parametrize("name", [*BUNNIES, "bunny.gif"])
def test_containers_show_the_same(name, encode):
    reference, inputs = encode("video", "bigbuckbunny.mp4"), encode("video", name)
    expected, metadata = reference.video_metadata[0], inputs.video_metadata[0]
    assert metadata.total_num_frames == expected.total_num_frames == 132 and metadata.fps == expected.fps == 25
    assert metadata.frames_indices == expected.frames_indices
    for frame, expected in zip(inputs.pixel_values_videos[0], reference.pixel_values_videos[0]):
        assert difference(frame, expected) < BETWEEN_FRAMES  # a GIF has 256 colours


@pytest.mark.parametrize("name", BUNNIES[1:])
def test_containers_sound_the_same(name, encode):
    reference, sound = encode("video", "bunny.mov").input_features, encode("video", name).input_features
    differences = [sound_difference(sound, reference, seconds=16, shift=shift) for shift in range(4)]
    if name in DELAYED:  # by up to 24 ms; half a step more or less is 0.6
        assert min(differences[:3]) < 0.75 and min(differences[:3]) < differences[3]
    else:
        assert differences[0] < 0.2 < differences[1]
    assert sound_difference(encode("video", "bigbuckbunny.mp4").input_features, reference, seconds=16) > 5


@pytest.mark.parametrize("name", [name for name in SOUNDS if name.startswith("sax") and name != "sax.wav"])
def test_sound_formats_sound_the_same(name, encode):
    reference, sound = encode("audio", "sax.wav").input_features, encode("audio", name).input_features
    if name.endswith((".flac", ".aiff", ".wav")):  # 5.1: the original hears the first channel
        assert torch.equal(sound, reference)
    else:
        shift = int(name in DELAYED)
        differences = [sound_difference(sound, reference, seconds=16, shift=shift) for shift in (shift, shift + 1)]
        assert differences[0] < 0.2 and differences[1] > 0.5
    assert sound_difference(encode("audio", "cantina.wav").input_features, reference, seconds=3) > 2


def test_surround_sound_is_mixed_as_ffmpeg_does(encode, processor, clips):
    samples = ffmpeg("-i bigbuckbunny.mp4 -ac 1 -ar 16000 -f s16le -", clips["bigbuckbunny.mp4"].parent)
    waveform = np.frombuffer(samples, np.int16).astype(np.float32) / 32768
    last_start = len(waveform) / 16000 - 2
    starts = [int(last_start * number / 8 * 16000) for number in range(8)]
    heard = np.concatenate([waveform[start : start + 32000] for start in starts])
    expected = processor.feature_extractor(heard, 16000, return_tensors="pt").input_features
    assert difference(encode("video", "bigbuckbunny.mp4").input_features, expected) < 0.01


def test_sound_of_a_video_as_a_sound(encode):
    """With and without the pictures: the same track, heard from its beginning to its end."""
    expected = encode("audio", "bunny.mov").input_features
    sound = encode("audio", "bunny.mp4").input_features
    assert torch.equal(sound, encode("audio", "sound.m4a").input_features)
    assert sound_difference(sound, expected, seconds=5.2) < 0.2
    assert sound[0, 540:].mean() < -15  # what fills the window


# Timing, orientation, parts


def test_variable_frame_rate(encode):
    """Frames are counted, not timed: the frame with a given number is the one that a player shows as that."""
    inputs = encode("video", "vfr.mkv")
    metadata = inputs.video_metadata[0]
    assert metadata.total_num_frames == len(VFR_KEPT)
    kept = [VFR_KEPT[index] for index in metadata.frames_indices]
    frames = list(read_frames(str(REAL["bigbuckbunny.mp4"]), kept).numpy())
    expected = encode("video", frames, load_audio_from_video=False).pixel_values_videos
    for frame, same in zip(inputs.pixel_values_videos[0], expected[0]):
        assert difference(frame, same) < BETWEEN_FRAMES


@pytest.mark.parametrize("name, turns", [("rotated90.mp4", 1), ("rotated180.mp4", 2)])
def test_rotation(name, turns, encode):
    upright, inputs = encode("video", "b.mp4"), encode("video", name)
    indices = upright.video_metadata[0].frames_indices
    frames = torch.rot90(read_frames(str(REAL["b.mp4"]), indices), turns, dims=(1, 2))
    assert torch.equal(
        inputs.pixel_values_videos, encode("video", frames, load_audio_from_video=False).pixel_values_videos
    )
    assert not torch.equal(inputs.pixel_values_videos, upright.pixel_values_videos)
    metadata = inputs.video_metadata[0]
    assert (metadata.height, metadata.width) == ((480, 270) if turns == 1 else (270, 480))


def test_part_of_a_video(encode):
    """A time window gives the frames and the sound of the clip that is cut there."""
    inputs, cut = encode("video", "bunny.mov", start=1.4, end=3.8), encode("video", "part.mov")
    assert [34 + index for index in cut.video_metadata[0].frames_indices] == inputs.video_metadata[0].frames_indices
    assert torch.equal(inputs.pixel_values_videos, cut.pixel_values_videos)
    assert sound_difference(inputs.input_features, cut.input_features, seconds=16) < 1e-4
    whole = encode("video", "bunny.mov")
    assert difference(inputs.pixel_values_videos, whole.pixel_values_videos) > BETWEEN_FRAMES
    assert sound_difference(whole.input_features, cut.input_features, seconds=16) > 0.5


@pytest.mark.parametrize("start, pictures, sound", [(0, "world.mp4", "sax.wav"), (3, "bikes.mp4", "cantina.wav")])
def test_start_and_end_pick_the_right_half(start, pictures, sound, encode):
    """Of a clip made of two others. Frames are one early, as the original's, and 25 where the Earth has 30."""
    inputs = encode("video", "two_halves.mp4", start=start + 0.1, end=start + 3)
    for clip in ("world.mp4", "bikes.mp4"):
        alike = encode("video", clip, start=0.1, end=3, load_audio_from_video=False)
        same = difference(inputs.pixel_values_videos, alike.pixel_values_videos) < 0.02
        assert same == (clip == pictures)
    for clip in ("sax.wav", "cantina.wav"):
        same = sound_difference(inputs.input_features, encode("audio", clip, start=0.1).input_features, 1.9) < 0.2
        assert same == (clip == sound)


# Silence


def test_silence(encode, processor):
    """A silent track, and a missing one under the policy of the original, are digital silence."""
    silence = encode("video", "silent.mp4").input_features
    torch.testing.assert_close(silence, torch.full_like(silence, FLOOR))
    for name in ("mute.mp4", "bikes.mp4", "bunny.gif"):
        assert torch.equal(encode("video", name).input_features, silence)
    assert torch.equal(
        encode("video", "mute.mp4").pixel_values_videos, encode("video", "silent.mp4").pixel_values_videos
    )


def test_missing_sound(encode, processor):
    inputs = encode("video", "mute.mp4", processor_kwargs={"missing_audio": "drop"})
    assert count_placeholders(processor, inputs) == (0, VISUAL_TOKENS, 0) and "input_features" not in inputs
    kept = encode("video", "silent.mp4", processor_kwargs={"missing_audio": "drop"})
    assert count_placeholders(processor, kept) == (0, VISUAL_TOKENS, AUDIO_TOKENS)
    with pytest.raises(ValueError, match="Video 0 has no audio track, and missing_audio is 'error'"):
        encode("video", "mute.mp4", processor_kwargs={"missing_audio": "error"})


# What is broken is refused


BROKEN = [
    ("video", "cut_off.mp4", MediaError, "is cut off: its audio track ends after 2.5 of the 5.3 seconds"),
    ("audio", "cut_off.mkv", MediaError, "is cut off: its audio track ends after 2.6 of the 5.3 seconds"),
    ("audio", "cut_off.wav", MediaError, "is cut off: its audio track ends after 9.6 of the 16.0 seconds"),
    ("audio", "cut_off.aiff", MediaError, "is cut off: its audio track ends after 9.6 of the 16.0 seconds"),
    ("audio", "cut_off.flac", MediaError, "is cut off: its audio track ends after 9.6 of the 16.0 seconds"),
    ("audio", "cut_off.mp3", MediaError, "is cut off: its audio track ends after 9.6 of the 16.0 seconds"),
    ("video", "cut_off.mov", MediaError, "it is cut off before its index"),
    ("audio", "cut_off.m4a", MediaError, "it is cut off before its index"),
    ("video", "broken_sound.mp4", MediaError, "The audio track of {} cannot be decoded; it is empty or damaged."),
    ("audio", "broken_sound.mp4", MediaError, "The audio track of {} cannot be decoded; it is empty or damaged."),
    ("audio", "mute.mp4", NoAudioTrackError, "{} has no audio track."),
    ("video", "sound.m4a", MediaError, "{} has no video track."),
    ("video", "sax.wav", MediaError, "{} has no video track."),
    ("video", "cover.mp3", MediaError, "{} has no video track."),
    ("video", "empty.mp4", MediaError, "{} is empty."),
    ("audio", "empty.wav", MediaError, "{} is empty."),
    ("image", "empty.jpg", MediaError, "{} is not an image that Pillow can read."),
    ("video", "text.mp4", MediaError, "{} is not a video or audio file that FFmpeg can read"),
    ("audio", "text.wav", MediaError, "{} is not a video or audio file that FFmpeg can read"),
    ("image", "text.jpg", MediaError, "{} is not an image that Pillow can read."),
    ("image", "bunny.mp4", MediaError, "{} is not an image that Pillow can read."),
    ("image", "cut_off.jpg", MediaError, "{} is cut off or damaged"),
    ("video", "missing.mp4", FileNotFoundError, "There is no media file {}."),
    ("audio", "missing.wav", FileNotFoundError, "There is no media file {}."),
    ("image", "missing.jpg", FileNotFoundError, "There is no image file {}"),
]


@pytest.mark.parametrize("kind, name, error, message", BROKEN, ids=[f"{kind}-{name}" for kind, name, *_ in BROKEN])
def test_broken(kind, name, error, message, processor, clips):
    path = str(clips["empty.mp4"].parent / name)
    with pytest.raises(error, match=re.escape(message.format(repr(path)))) as raised:
        _encode(processor, kind, path)
    assert type(raised.value) is error and path in str(raised.value) and "\n" not in str(raised.value)


def test_broken_pictures(processor, clips):
    """With the sound left out, so that the frames are what is missed."""
    path = str(clips["cut_off.mp4"])
    message = re.escape(f"{path!r} is cut off or damaged") + ": only [3-6] of the 8 frames asked for can be decoded"
    with pytest.raises(MediaError, match=message):
        _encode(processor, "video", path, load_audio_from_video=False)


@pytest.mark.parametrize("suffix, seconds", [("mkv", 2.7), ("webm", 2.7), ("avi", 2.5)])
def test_cut_off_before_what_the_file_announces(suffix, seconds, processor, clips):
    path = str(clips[f"cut_off.{suffix}"])
    message = f"{path!r} is cut off: its video track ends after {seconds} of the 5.3 seconds that the file announces."
    with pytest.raises(MediaError, match=re.escape(message)):
        _encode(processor, "video", path, load_audio_from_video=False)
    with pytest.raises(MediaError, match="is cut off: its audio track ends after"):
        _encode(processor, "video", path)


@pytest.mark.parametrize("suffix", ["ts", "mpg", "ogv", "gif"])
def test_cut_off_stream(suffix, encode):
    """Formats that do not say how long they are end where the file ends; what is there is right."""
    inputs = encode("video", f"cut_off.{suffix}", load_audio_from_video=False)
    metadata = inputs.video_metadata[0]
    assert 50 < metadata.total_num_frames < 80
    frames = list(read_frames(str(REAL["bigbuckbunny.mp4"]), metadata.frames_indices).numpy())
    expected = encode("video", frames, load_audio_from_video=False)
    for frame, same in zip(inputs.pixel_values_videos[0], expected.pixel_values_videos[0]):
        assert difference(frame, same) < BETWEEN_FRAMES
    if suffix != "gif":
        sound, whole = (encode("audio", name).input_features for name in (f"cut_off.{suffix}", f"bunny.{suffix}"))
        assert sound_difference(sound, whole, seconds=1.5) < 1e-3
        assert sound[0, 350:].mean() < -15


def test_cut_off_ogg(encode):
    sound, whole = (encode("audio", f"{name}.ogg").input_features for name in ("cut_off", "sax"))
    assert sound_difference(sound, whole, seconds=9) < 1e-3
    assert sound[0, 1100:].mean() < -15 < 10 < whole[0, 1100:1500].mean()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi"])
def test_part_before_the_cut(suffix, encode):
    """What is missing behind the end of the part that is asked for does not matter."""
    part, whole = (encode("video", f"{name}.{suffix}", end=2.0) for name in ("cut_off", "bunny"))
    assert part.video_metadata[0].frames_indices == whole.video_metadata[0].frames_indices
    assert torch.equal(part.pixel_values_videos, whole.pixel_values_videos)
    assert torch.equal(part.input_features, whole.input_features)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "aiff"])
def test_part_of_a_sound_before_the_cut(suffix, encode):
    part, whole = (encode("audio", f"{name}.{suffix}", end=9.4).input_features for name in ("cut_off", "sax"))
    assert torch.equal(part, whole)


def test_broken_sound_does_not_concern_a_deaf_question(processor, clips, encode):
    inputs = _encode(processor, "video", str(clips["broken_sound.mp4"]), load_audio_from_video=False)
    assert torch.equal(inputs.pixel_values_videos, encode("video", "bunny.mp4").pixel_values_videos)


def test_one_broken_clip_among_good_ones(processor, clips):
    content = [{"type": "video", "video": str(clips[name])} for name in ("b.mp4", "text.mp4", "bikes.mp4")]
    with pytest.raises(MediaError, match="text.mp4"):
        processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)


# Towers, connectors and features of the released models' widths, with fewer layers and random weights


QWEN2 = {"model_type": "qwen2", "vocab_size": 400, "num_hidden_layers": 1, "intermediate_size": 2048}
SIGLIP = {  # so400m-patch14-384
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "image_size": 384,
}
CLIP = {  # ViT-L/14-336
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "image_size": 336,
}
MODELS = {
    "videollama2.1-7b-av": {
        "text_config": QWEN2 | {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4},
        "vision_config": SIGLIP | {"num_hidden_layers": 2, "patch_size": 14},
        "audio_config": {"num_hidden_layers": 2},
        "connector_type": "stc_connector_v35",
        "num_frames": 16,
    },
    "videollama2-7b": {
        "text_config": QWEN2 | {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8},
        "vision_config": CLIP | {"num_hidden_layers": 2, "patch_size": 14},
        "connector_type": "stc_connector",
        "num_frames": 8,
    },
}
TOKENS = {"videollama2.1-7b-av": 1352, "videollama2-7b": 845}


@pytest.fixture(scope="module")
def wide(processor):
    """A model and its processor, one at a time: each takes 0.7 GB."""
    built = {}

    def build(name: str):
        if name not in built:
            built.clear()
            ids = ("image_token_id", "video_token_id", "audio_token_id")  # beyond the vocabulary, as the released
            config = VideoLlama2Config(
                **MODELS[name], connector_depth=1, **{token: getattr(processor, token) for token in ids}
            )
            torch.manual_seed(0)
            model = VideoLlama2ForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
            built[name] = model, VideoLlama2Processor.from_config(config, processor.tokenizer)
        return built[name]

    return build


@torch.no_grad()
def get_features(model, inputs) -> dict:
    names = ("pixel_values", "pixel_values_videos", "input_features", "input_features_mask")
    encoded = model.encode_media(**{name: inputs[name] for name in names if name in inputs})
    for modality, outputs in encoded.items():
        num_tokens = int((inputs.input_ids == getattr(model.config, f"{modality}_token_id")).sum())
        assert outputs.pooler_output.shape == (1, num_tokens, model.config.text_config.hidden_size)
        assert outputs.pooler_output.dtype == torch.bfloat16 and outputs.pooler_output.isfinite().all()
        spread = outputs.pooler_output.float().std(1).mean()  # between tokens: not the same answer everywhere
        assert spread > 0.01
    return encoded


def generate(model, inputs, encoded) -> torch.Tensor:
    names = ("input_ids", "attention_mask")
    ids = model.generate(
        **{name: inputs[name] for name in names}, mm_encoder_outputs=encoded, max_new_tokens=2, min_new_tokens=2
    )
    assert ids.shape[1] == inputs.input_ids.shape[1] + 2
    assert ids[0, -2:].max() < model.config.text_config.vocab_size
    return ids


@pytest.mark.parametrize("name", MODELS)
def test_real_width(name, wide, encode):
    model, processor = wide(name)
    inputs = encode("video", "bigbuckbunny.mp4", processor=processor)
    hears = model.config.audio_config is not None
    assert count_placeholders(processor, inputs) == (0, TOKENS[name], AUDIO_TOKENS if hears else 0)
    encoded = get_features(model, inputs)
    assert set(encoded) == ({"video", "audio"} if hears else {"video"})
    generate(model, inputs, encoded)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_real_width_tells_clips_apart(name, wide, encode):
    model, processor = wide(name)
    clips = {"video": ["bigbuckbunny.mp4", "world.mp4", "bikes.mp4"], "image": ["cheetah.jpg", "lion.jpg"]}
    if model.config.audio_config is not None:
        clips["audio"] = ["sax.wav", "cantina.wav"]
    for kind, names in clips.items():
        features = []
        for clip in [*names, names[0]]:
            inputs = encode(kind, clip, processor=processor)
            features.append(get_features(model, inputs)[kind].pooler_output.float())
            assert features[-1].shape[1] == (AUDIO_TOKENS if kind == "audio" else TOKENS[name])
        generate(model, inputs, get_features(model, inputs))
        assert torch.equal(features[0], features[-1])
        for index in range(1, len(names)):
            assert (features[index] - features[0]).norm() > 0.5 * features[0].norm()
