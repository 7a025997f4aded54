"""Messages: what a content block may hold, what is refused and in which words, and which sound is heard."""

import dataclasses
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from transformers import AutoProcessor
from transformers.models.auto import image_processing_auto

from processing_utils import (
    AUDIO_TOKENS,
    FRAMES,
    GOLDENS,
    IMAGE,
    SOUND,
    block,
    encode,
    make_processor,
    user,
    write_media,
)
from videollama2_hf import VideoLlama2Config
from videollama2_hf.media_videollama2 import (
    MediaError,
    VideoClip,
    VideoReader,
    fetch_media,
    is_video_clip,
    read_video_metadata,
)
from videollama2_hf.messages_videollama2 import SoundClip, prepare_messages
from videollama2_hf.processing_videollama2 import VideoLlama2Processor


ORIGINAL = GOLDENS / "qwen2_siglip_beats_av" / "checkpoint"
VIDEO_LLAVA = GOLDENS / "video_llava" / "tiny-video-llava-7b"
ARRAY = np.asarray(IMAGE)
VIDEO = np.stack([np.asarray(frame) for frame in FRAMES])


@pytest.fixture(scope="module")
def hearing():
    return make_processor()


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


def features(processor, *blocks, **kwargs) -> torch.Tensor:
    return encode(processor, [user(*blocks)], **kwargs).input_features


# Blocks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (block("video", ["a.mp4", "b.mp4"]), r"type video holds one video, got 2 in a list of 2; write one block"),
        (block("video", VIDEO[None].repeat(2, 0)), r"one video, got 2 in an array of shape \(2, 8, 60, 80, 3\)"),
        (block("image", np.zeros((2, 9, 9, 3), np.uint8)), r"one image, got 2 in an array of shape \(2, 9, 9, 3\)"),
        (block("image", [IMAGE, IMAGE]), "one image, got 2 in a list of 2"),
        (block("image", np.zeros(5, np.uint8)), r"An array is an image .* got shape \(5,\)"),
        (block("video", np.zeros((5, 5), np.uint8)), r"An array of frames has 4 dimensions .* got shape \(5, 5\)"),
        (block("audio", [SOUND, SOUND]), "one audio, got 2 in a list of 2"),
        (block("audio", (SOUND, 16000)), "one audio, got 2 in a tuple of 2.* The rate of a waveform is the option"),
        (block("audio", (16000, SOUND)), "one audio, got 2 in a tuple of 2"),
        (block("audio", []), "one audio, got 0 in a list of 0"),
        (block("audio", np.zeros((2, 1, 160), np.float32)), r"got 2 in an array of shape \(2, 1, 160\)"),
        (block("video", nframes=4, strat=1), "no option nframes or strat; it takes video, url, path, base64, start,"),
        (block("image", start=1), "type image has no option start; it takes image, url, path, base64"),
        ({"type": "text", "text": "Hi", "url": "a"}, "type text has no option url; it takes text"),
        ({"type": "image", "image": IMAGE, "url": "a.png"}, "needs one of the keys image, url, path and base64"),
        ({"type": "text"}, "type text needs a string as its text, got None"),
        ({"type": "text", "text": None}, "type text needs a string as its text, got None"),
        ({"type": "text", "text": ["Hi"]}, "type text needs a string as its text, got a list of 1"),
        ({"type": "movie"}, "Content is text, image, video or audio, not movie"),
        ({"type": 5}, "Content is text, image, video or audio, not 5"),
        ({"image": ARRAY}, r"needs a type \(text, image, video or audio\), got one with the keys \['image'\]"),
        ({"type": "image", "base64": 5}, "base64 of a content block of type image is broken"),
        ({"type": "audio", "audio": {"sampling_rate": 8}}, r"array, bytes or a path, got the keys \['sampling_rate'"),
    ],
)
def test_blocks_that_are_refused(content, message, hearing):
    for tokenize in (False, True):
        with pytest.raises(ValueError, match=message) as error:
            hearing.apply_chat_template([user(content)], tokenize=tokenize, return_dict=tokenize)
        assert len(str(error.value)) < 260


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": "8"}, "num_frames must be an integer above 0, got '8'"),
        ({"num_frames": 0}, "num_frames must be an integer above 0, got 0"),
        ({"num_frames": 4.0}, "num_frames must be an integer above 0, got 4.0"),
        ({"num_frames": True}, "num_frames must be an integer above 0, got True"),
        ({"num_frames": [8]}, "num_frames must be an integer above 0, got a list"),
        ({"fps": 0}, "fps must be a finite number above 0, got 0"),
        ({"fps": float("inf")}, "fps must be a finite number above 0, got inf"),
        ({"start": "1"}, "start must be a finite number of seconds, 0 or more, got '1'"),
        ({"start": float("nan")}, "start must be a finite number of seconds, 0 or more, got nan"),
        ({"end": float("inf")}, "end must be a finite number of seconds, 0 or more, got inf"),
        ({"end": -1}, "end must be a finite number of seconds, 0 or more, got -1"),
    ],
)
def test_options_of_a_video(options, message, hearing, media):
    for call in (
        lambda: encode(hearing, [user(block("video", media["loud"], **options))]),
        lambda: hearing(text="<video>", videos=VideoClip(media["loud"], **options)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_options_of_other_types(hearing, media):
    for value, got in (("yes", "'yes'"), (1, "1"), ([True], "a list of 1")):
        with pytest.raises(ValueError, match=f"load_audio_from_video must be True or False, got {got}"):
            encode(hearing, [user(block("video", load_audio_from_video=value))])
    for value in ("16000", 0, -8000, 16000.5):
        with pytest.raises(ValueError, match="sampling_rate must be an integer above 0, got"):
            encode(hearing, [user(block("audio", sampling_rate=value))])
    with pytest.raises(ValueError, match="start must be a finite number of seconds"):
        encode(hearing, [user(block("audio", start="1"))])
    with pytest.raises(ValueError, match="sampling_rate is for waveforms; a sound file has its own"):
        encode(hearing, [user(block("audio", media["sound"], sampling_rate=16000))])


def test_numbers_of_numpy_are_numbers(hearing, media):
    options = {"start": np.float32(1), "end": np.int64(2), "num_frames": np.int64(2)}
    one, other = (
        encode(hearing, [user(block("video", media["silent"], **kwargs))], load_audio_from_video=False)
        for kwargs in (options, {name: value.item() for name, value in options.items()})
    )
    assert torch.equal(one.pixel_values_videos, other.pixel_values_videos)


def test_keys_without_a_value_do_not_count(hearing):
    """A table of messages has every key in every block."""
    keys = ("text", "image", "video", "audio", "url", "start", "nframes")
    content = [block("image"), {"type": "text", "text": "Hi"}, block("audio")]
    filled = [{**dict.fromkeys(keys), **item} for item in content]
    one, other = (encode(hearing, [{"role": "user", "content": blocks}]) for blocks in (content, filled))
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    # One medium in a list or in a batch of one is one medium.
    single = [block("image", [ARRAY[None]]), {"type": "text", "text": "Hi"}, block("audio", [SOUND])]
    other = encode(hearing, [{"role": "user", "content": single}])
    assert torch.equal(one.pixel_values, other.pixel_values) and torch.equal(one.input_features, other.input_features)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "A conversation is a list of at least one message, got a list of 0"),
        ([[]], "A conversation is a list of at least one message, got a list of 0"),
        ("What?", "A conversation is a list of at least one message, got 'What"),
        ({"role": "user", "content": "Hi"}, "A conversation is a list of at least one message, got a dict"),
        (["What?"], "A message is a dict with a role and a content, got 'What"),
        ([{"content": "Hi"}], r"A message needs a role and a content, got the keys \['content'\]"),
        ([{"role": "user"}], r"A message needs a role and a content, got the keys \['role'\]"),
        ([{"role": "user", "content": None}], "A message needs a role and a content"),
        ([{"role": "user", "content": 5}], "The content of a message is a string or a list of blocks, got 5"),
        ([{"role": "user", "content": {"type": "text"}}], "a string or a list of blocks, got a dict"),
        ([{"role": "user", "content": ["hi"]}], "A content block is a dict such as .*, got 'hi'. A message that is"),
    ],
)
def test_conversations_that_are_refused(conversation, message, hearing):
    with pytest.raises(ValueError, match=message):
        hearing.apply_chat_template(conversation)


def test_messages_with_tool_calls_need_no_content(hearing):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert hearing.apply_chat_template(
        [user("Hi"), call], chat_template="{% for m in messages %}{{ m.role }} {% endfor %}"
    ) == ("user assistant ")


def test_messages_stay_as_they_were(hearing):
    messages = [user(block("video"), {"type": "audio"}, "a <video> tag", block("audio", start=0.1))]
    before = [dict(item) for item in messages[0]["content"]]
    encode(hearing, messages)
    assert [list(item) for item in messages[0]["content"]] == [list(item) for item in before]
    assert messages[0]["content"][2] == before[2]


# Sounds


def test_part_and_rate_of_a_waveform(hearing, media):
    extractor = hearing.feature_extractor
    long = np.sin(np.arange(24000) ** 1.2 / 90).astype(np.float32)
    for options, first, last, rate in (
        ({"start": 0.5}, 8000, None, 16000),
        ({"end": 0.25}, 0, 4000, 16000),
        ({"start": 0.5, "end": 1.0, "sampling_rate": 8000}, 4000, 8000, 8000),
        ({"sampling_rate": 8000}, 0, None, 8000),
    ):
        expected = extractor(long[first:last], rate, return_tensors="pt").input_features
        stereo = np.stack([long, 0 * long])
        for waveform in (long, torch.from_numpy(long), stereo):
            assert torch.equal(features(hearing, block("audio", waveform, **options)), expected)
        expected = extractor(long[first:last].astype(np.float64), rate, return_tensors="pt").input_features
        assert torch.equal(features(hearing, block("audio", long.tolist(), **options)), expected)
    # The rate of the call is that of arrays whose blocks do not say.
    mixed = encode(
        hearing,
        [user(block("audio", long), block("audio", long, sampling_rate=8000))],
        processor_kwargs={"sampling_rate": 12000},
    )
    expected = extractor([long, long], [12000, 8000], return_tensors="pt").input_features
    assert torch.equal(mixed.input_features, expected)


def test_rows_of_data_sets(hearing, media):
    array = SOUND.astype(np.float64)
    expected = features(hearing, block("audio", array, sampling_rate=8000, start=0.5))
    row = {"array": array, "sampling_rate": 8000, "path": "elsewhere.wav"}
    assert torch.equal(features(hearing, block("audio", row, start=0.5)), expected)
    expected = hearing(text="<audio>", audio=array, sampling_rate=8000, return_tensors="pt").input_features
    assert torch.equal(hearing(text="<audio>", audio=row, return_tensors="pt").input_features, expected)
    # Not decoded.
    expected = features(hearing, block("audio", media["sound"]))
    content = Path(media["sound"]).read_bytes()
    for row in ({"path": media["sound"], "bytes": None}, {"path": None, "bytes": content}, {"path": media["sound"]}):
        assert torch.equal(features(hearing, block("audio", row)), expected)


def test_sound_that_is_not_there(hearing, media):
    for mode in ("reference", "full"):
        for source in (SOUND, media["sound"]):
            with pytest.raises(
                ValueError,
                match=r"no sound between start=2 and end=None: it is 1.00 s long \(16000 samples at 16000 Hz\)",
            ):
                features(
                    hearing,
                    block("audio", source, start=2),
                    processor_kwargs={"audio_kwargs": {"audio_mode": mode}},
                )
    with pytest.raises(ValueError, match="no sound between start=None and end=0"):
        features(hearing, block("audio", end=0))
    for empty in (np.zeros(0, np.float32), np.zeros((2, 0), np.float32), torch.zeros(0)):
        with pytest.raises(ValueError, match=r"it is 0.00 s long \(0 samples at 16000 Hz\)"):
            features(hearing, block("audio", empty))
        with pytest.raises(ValueError, match=r"it is 0.00 s long \(0 samples at 16000 Hz\)"):
            hearing(text="<audio>", audio=empty)


def test_a_track_that_ended_before_is_missing(hearing, media, tmp_path):
    """The sound lasts 3 s, the video 6."""
    path = str(tmp_path / "short_sound.mkv")
    with av.open(media["loud"]) as source, av.open(path, "w") as target:
        sound = target.add_stream("pcm_s16le", rate=16000, layout="mono")
        video = target.add_stream("mpeg4", rate=10, width=96, height=64, pix_fmt="yuv420p")
        for index in range(60):
            picture = np.full((64, 96, 3), 4 * index, np.uint8)
            target.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        target.mux(video.encode())
        for frame in source.decode(audio=0):
            frame.pts = None
            samples = av.AudioResampler(format="s16", layout="mono", rate=16000).resample(frame)
            target.mux([packet for piece in samples for packet in sound.encode(piece)])
        target.mux(sound.encode())
    late = block("video", path, start=4.0, end=5.0)
    silence = hearing.feature_extractor(hearing.feature_extractor.silent_waveform(), 16000, return_tensors="pt")
    assert torch.equal(features(hearing, late), silence.input_features)
    assert not torch.equal(features(hearing, block("video", path, start=1.0, end=2.0)), silence.input_features)
    dropped = encode(hearing, [user(late)], processor_kwargs={"missing_audio": "drop"})
    assert "input_features" not in dropped and hearing.audio_token_id not in dropped.input_ids[0]
    with pytest.raises(ValueError, match="Video 0 has no audio track, .* ends before the part that is taken"):
        encode(hearing, [user(late)], processor_kwargs={"missing_audio": "error"})


@pytest.mark.parametrize(
    ("indices", "num_sounds", "message"),
    [
        ([5], 0, r"names each of the 1 videos \(from 0\) at most once, got \[5\]"),
        ([-1], 0, "at most once"),
        ([0, 0], 0, "at most once"),
        (["0"], 0, "at most once"),
        ([None], 0, "has 1 entries, 1 of them None, but audio holds 0 sounds"),
        ([0], 2, "has 1 entries, 0 of them None, but audio holds 2 sounds"),
        ([None, 0, None], 1, "has 3 entries, 2 of them None, but audio holds 1 sounds"),
    ],
)
def test_indices_of_videos_that_are_heard(indices, num_sounds, message, hearing, media):
    with pytest.raises(ValueError, match=message):
        hearing(
            text="<video>" + "<audio>" * indices.count(None),
            videos=[media["loud"]],
            audio=[SOUND] * num_sounds or None,
            audio_from_video_indices=indices,
            load_audio_from_video=True,
        )


def test_file_urls_and_home(media, tmp_path):
    path = tmp_path / "a clip, 100%.mp4"
    path.write_bytes(Path(media["loud"]).read_bytes())
    for url in (path.as_uri(), path.as_uri().replace("file:///", "file://localhost/")):
        assert "%20" in url and fetch_media(url) == str(path)
        assert read_video_metadata(url) == read_video_metadata(path)
    for url in ("file://elsewhere/a.mp4", "file://a.mp4"):
        with pytest.raises(MediaError, match=f"{url} is not a file of this machine; local ones begin with file:///"):
            fetch_media(url)
    with pytest.raises(FileNotFoundError, match=r"no media file '~/a.mp4'. `~` is not expanded; pass os.path.expand"):
        read_video_metadata("~/a.mp4")
    with pytest.raises(FileNotFoundError, match=r"no media file 'a.mp4'\.$"):
        read_video_metadata("a.mp4")


# Arguments of a call


def test_arrays_of_wrong_ranks(hearing):
    for kwargs, message in (
        ({"images": np.zeros(7)}, r"An array is an image .* got shape \(7,\)"),
        ({"images": np.zeros((0, 9, 3))}, r"An array is an image .* and not empty; got shape \(0, 9, 3\)"),
        ({"images": [torch.zeros(7)]}, r"An array is an image .* got shape \(7,\)"),
        ({"videos": np.zeros((2, 2))}, r"An array of frames has 4 dimensions .* got shape \(2, 2\)"),
        ({"videos": np.zeros(7)}, r"An array of frames has 4 dimensions .* got shape \(7,\)"),
        ({"videos": np.zeros((1, 1, 1, 4, 4, 3))}, "An array of frames has 4 dimensions"),
        ({"audio": np.zeros(())}, r"Waveforms must have the shape \(samples,\) or \(channels, samples\), got \(\)"),
        ({"audio": np.zeros((1, 1, 1, 4))}, r"got \(1, 1, 1, 4\)"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            hearing(**kwargs)
        assert len(str(error.value)) < 260
    with pytest.raises(ValueError, match="A VideoClip is one video, but its source holds 2"):
        hearing(text="<video>", videos=VideoClip(["a.mp4", "b.mp4"]))
    assert len(hearing(images=np.stack([ARRAY, ARRAY])).pixel_values) == 2


def test_assistant_masks_need_a_dict(hearing):
    messages = [user("Hi"), {"role": "assistant", "content": "Yes"}]
    for options in ({"tokenize": True}, {"tokenize": False}):
        with pytest.raises(ValueError, match="return_assistant_tokens_mask=True needs tokenize=True and return_dict"):
            hearing.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)


def test_a_rendered_prompt_is_one_to_process(hearing):
    """A placeholder token that somebody typed is marked in the prompt, so that it stays text in a second step."""
    messages = [user(block("image"), "What does <video> mean?")]
    prompt = hearing.apply_chat_template(messages, add_generation_prompt=True)
    assert "What does \ufdd0video> mean?" in prompt and "<video>" not in prompt
    ids = hearing(text=prompt, images=IMAGE, return_tensors="pt").input_ids
    assert torch.equal(ids, encode(hearing, messages).input_ids)
    assert "What does <video> mean?" in hearing.decode(ids[0])


# Loading and saving


def test_options_of_parts_when_loading(tmp_path):
    """Each goes to every part that has it, from an original checkpoint and from a saved folder alike."""
    VideoLlama2Processor.from_pretrained(ORIGINAL).save_pretrained(tmp_path)
    for folder in (ORIGINAL, tmp_path):
        for auto_class in (VideoLlama2Processor, AutoProcessor):
            processor = auto_class.from_pretrained(
                folder,
                num_frames=4,
                audio_mode="full",
                exact=True,
                padding_side="right",
                truncation_side="left",
                missing_audio_policy="drop",
                trust_remote_code=False,
            )
            assert processor.video_processor.num_frames == 4 and processor.feature_extractor.audio_mode == "full"
            assert processor.image_processor.exact and processor.video_processor.exact
            assert (processor.tokenizer.padding_side, processor.tokenizer.truncation_side) == ("right", "left")
            assert processor.missing_audio_policy == "drop"
    plain = VideoLlama2Processor.from_pretrained(ORIGINAL)
    assert plain.tokenizer.padding_side == "left" and not plain.image_processor.exact
    with pytest.raises(TypeError, match="No part of the processor has the option exakt or nframes; check"):
        VideoLlama2Processor.from_pretrained(ORIGINAL, nframes=4, exakt=True, exact=True)
    with pytest.raises(ValueError, match="Unknown audio_mode 'all'"):
        VideoLlama2Processor.from_pretrained(ORIGINAL, audio_mode="all")


def test_whether_videos_are_heard_is_saved(tmp_path, media):
    processor = make_processor()
    assert processor.load_audio_from_video and not make_processor(has_audio=False).load_audio_from_video
    processor.load_audio_from_video = False
    processor.save_pretrained(tmp_path)
    loaded = VideoLlama2Processor.from_pretrained(tmp_path)
    assert loaded.load_audio_from_video is False and loaded.has_audio
    assert "input_features" not in encode(loaded, [user(block("video", media["loud"]))])
    assert "input_features" in encode(loaded, [user(block("video", media["loud"]))], load_audio_from_video=True)


def load_original(folder: Path) -> tuple[VideoLlama2Processor, VideoLlama2Config]:
    return VideoLlama2Processor.from_pretrained(folder), VideoLlama2Config.from_pretrained(folder)


def test_mel_bins_of_the_configuration():
    processor, config = load_original(ORIGINAL)
    config.audio_config.num_mel_bins = 64
    processor = VideoLlama2Processor.from_config(config, processor.tokenizer)
    inputs = encode(processor, [user(block("audio"))])
    assert inputs.input_features.shape == (1, 2998, 64)
    assert (inputs.input_ids == processor.audio_token_id).sum() == AUDIO_TOKENS // 2
    assert processor._get_num_multimodal_tokens(audio_lengths=[5]).num_audio_tokens == [AUDIO_TOKENS // 2]


def test_windows_of_the_video_tower(tmp_path, media, monkeypatch):
    """Video-LLaVA's tower takes 8 frames at a time, which is said before any frame is decoded."""
    processor, config = load_original(VIDEO_LLAVA)
    window = processor.video_processor.temporal_window
    assert window == config.video_config.num_frames == 8
    processor.save_pretrained(tmp_path)
    loaded = VideoLlama2Processor.from_pretrained(tmp_path)
    assert loaded.video_processor.temporal_window == 8
    assert len(encode(loaded, [user(block("video", media["silent"], num_frames=16))]).pixel_values_videos[0]) == 16
    monkeypatch.setattr(VideoReader, "read_frames", lambda *args, **kwargs: pytest.fail("decoded"))
    for options, count in (({"num_frames": 4}, 4), ({"fps": 2}, 6)):
        with pytest.raises(
            ValueError, match=f"windows of 8 frames, but this video gives {count} frames. Choose num_frames=8 or"
        ):
            encode(loaded, [user(block("video", media["silent"], **options))])
    with pytest.raises(ValueError, match="this video gives 5 frames"):
        loaded(text="<video>", videos=VIDEO[:5], do_sample_frames=False)
    assert make_processor().video_processor.temporal_window is None


def test_loading_a_saved_processor_warns_of_nothing(tmp_path, monkeypatch):
    """Not of a backend that is missing, of which transformers warns once in a process."""
    warnings = []
    monkeypatch.setattr(image_processing_auto.logger, "warning_once", warnings.append)
    processor = make_processor()
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path).image_processor) is type(processor.image_processor)
    assert not warnings


def test_clips_of_a_copy_of_the_module():
    """Remote code has classes of its own."""
    Copy = dataclasses.make_dataclass("VideoClip", ["source", "start", "end", "num_frames", "fps"])
    assert is_video_clip(Copy("a.mp4", 1, None, None, None)) and not is_video_clip(SoundClip("a.wav"))
    (message,) = prepare_messages([user(block("video", Copy("a.mp4", 1, None, None, None), num_frames=4))])
    clip = message["content"][0]["video"]
    assert (clip.source, clip.start, clip.num_frames) == ("a.mp4", 1, 4)
