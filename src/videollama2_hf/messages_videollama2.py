"""Media in messages: where they are, which part of them, and what is heard."""

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .media_videollama2 import (
    VideoClip,
    check_clip_options,
    fetch_media,
    has_audio,
    is_video_clip,
    read_audio_file,
    sample_range,
)
from .prompt_videollama2 import escape_placeholders
from .video_processing_videollama2 import get_clip_source, make_flat_list_of_videos


# Keys of a content block besides its type and the one that says where the medium is.
_SOURCE_KEYS = ("url", "path", "base64")
_OPTIONS = {
    "text": (),
    "image": (),
    "video": ("start", "end", "num_frames", "fps", "load_audio_from_video"),
    "audio": ("start", "end", "sampling_rate"),
}


@dataclasses.dataclass(frozen=True)
class SoundClip:
    """
    A sound as a message names it: where it is, and which part of it, in seconds.

    `sampling_rate` is that of an array, in Hz; `None` leaves it to the processor. A file has its own.
    """

    source: Any
    start: float | None = None
    end: float | None = None
    sampling_rate: int | None = None

    def __post_init__(self):
        check_clip_options(start=self.start, end=self.end, sampling_rate=self.sampling_rate)


def check_conversations(conversation: Any) -> None:
    """
    Refuses what is neither a conversation nor a list of conversations; [`prepare_messages`] checks the contents.

    Raises:
        ValueError: There is no message, or one is no dict with a role and a content (or tool calls).
    """
    is_list = isinstance(conversation, (list, tuple)) and len(conversation) > 0
    for messages in conversation if is_list and isinstance(conversation[0], (list, tuple)) else [conversation]:
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError(f"A conversation is a list of at least one message, got {_describe(messages)}.")
        for message in messages:
            if not isinstance(message, Mapping):
                raise ValueError(f"A message is a dict with a role and a content, got {_describe(message)}.")
            if message.get("role") is None or (message.get("content") is None and message.get("tool_calls") is None):
                raise ValueError(f"A message needs a role and a content, got the keys {sorted(message)}.")


def prepare_messages(messages: list[dict[str, Any]], escape: bool = True) -> list[dict[str, Any]]:
    """
    Messages whose content blocks are checked and all of one form, as [`collect_media`] takes them.

    In typed text, placeholder tokens are marked as text (if `escape`). A medium is under the key of its type: an image
    as it was given, a `VideoClip` or a `SoundClip`. The empty audio block that transformers wants behind a video whose
    sound is heard is gone: the video block says that instead.

    Raises:
        ValueError: A block has no type, an option that its type does not have or of a wrong type or range, or not
            exactly one medium.
    """
    prepared = []
    for message in messages:
        if isinstance(message.get("content"), (list, tuple)):
            content: list[dict[str, Any]] = []
            for block in message["content"]:
                block = _check_keys(block)
                kind, is_empty = block["type"], len(block) == 1
                if kind == "text":
                    text = escape_placeholders(block["text"]) if escape else block["text"]
                    content.append({"type": "text", "text": text})
                elif kind == "audio" and is_empty and content and content[-1]["type"] == "video":
                    content[-1] = {**content[-1], "load_audio_from_video": True}
                else:
                    content.append(_read_medium(block))
            message = {**message, "content": content}
        elif not isinstance(message.get("content", ""), str):
            raise ValueError(
                f"The content of a message is a string or a list of blocks, got {_describe(message['content'])}."
            )
        prepared.append(message)
    return prepared


def _check_keys(block: Any) -> dict[str, Any]:
    """A block without the keys whose value is `None`: tables of messages have every key in every block."""
    if not isinstance(block, Mapping):
        raise ValueError(
            f'A content block is a dict such as {{"type": "text", "text": "..."}}, got {_describe(block)}. A message '
            "that is only text has a string as its content."
        )
    block = {key: value for key, value in block.items() if value is not None}
    kind = block.get("type")
    if kind is None:
        raise ValueError(
            f"A content block needs a type (text, image, video or audio), got one with the keys {sorted(block)}."
        )
    if not isinstance(kind, str) or kind not in _OPTIONS:
        raise ValueError(f"Content is text, image, video or audio, not {kind}.")
    allowed = (kind, *(_SOURCE_KEYS if kind != "text" else ()), *_OPTIONS[kind])
    unknown = [key for key in block if key != "type" and key not in allowed]
    if unknown:
        raise ValueError(
            f"A block of type {kind} has no option {' or '.join(map(str, unknown))}; it takes {', '.join(allowed)}."
        )
    if kind == "text" and not isinstance(block.get("text"), str):
        raise ValueError(f"A block of type text needs a string as its text, got {_describe(block.get('text'))}.")
    return block


def _read_medium(block: dict[str, Any]) -> dict[str, Any]:
    """A block of one medium, its options in a `VideoClip` or `SoundClip`."""
    kind, source = block["type"], _find_source(block)
    options = {name: value for name, value in block.items() if name in _OPTIONS[kind]}
    media = {"image": flat_images, "video": make_flat_list_of_videos, "audio": flat_sounds}[kind](source)
    if len(media) != 1:
        hint = " The rate of a waveform is the option sampling_rate." if kind == "audio" else ""
        raise ValueError(
            f"A block of type {kind} holds one {kind}, got {len(media)} in {_describe(source)}; write one block for "
            f"each.{hint}"
        )
    medium = media[0]
    if kind == "image":
        return {"type": kind, kind: medium}
    if kind == "audio":
        sound = dataclasses.replace(medium if isinstance(medium, SoundClip) else SoundClip(medium), **options)
        if "sampling_rate" in options and not _is_in_memory(sound.source):
            raise ValueError("The option sampling_rate is for waveforms; a sound file has its own. Leave it out.")
        return {"type": kind, kind: sound}
    heard = options.pop("load_audio_from_video", None)
    if not isinstance(heard, (bool, type(None))):
        raise ValueError(f"load_audio_from_video must be True or False, got {_describe(heard)}.")
    clip = dataclasses.replace(medium if is_video_clip(medium) else VideoClip(medium), **options)
    return {"type": kind, kind: clip, "load_audio_from_video": heard}


def _describe(value: Any) -> str:
    """What a value is, for error messages: never the numbers in it."""
    if isinstance(value, (str, bytes)):
        return repr(value) if len(value) <= 60 else f"{value[:60]!r}..."
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return f"an array of shape {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value) if isinstance(value, (int, float, type(None))) else f"a {type(value).__name__}"


def collect_media(
    conversations: list[list[dict[str, Any]]], load_audio_from_video: bool
) -> tuple[list[list], list[list[VideoClip]], list[SoundClip], list[int | None]]:
    """
    The media of conversations in reading order.

    Args:
        conversations: What [`prepare_messages`] gives.
        load_audio_from_video: Whether to hear a video whose block does not say.

    Returns:
        Images and videos of each conversation, all sounds that stand by themselves, and for every sound the number of
        the video whose sound it is, or `None` for one that stands by itself.
    """
    batch_images, batch_videos, sounds, num_videos = [], [], [], 0
    indices: list[int | None] = []
    for messages in conversations:
        images, videos = [], []
        for message in messages:
            content = message.get("content")
            for block in content if isinstance(content, list) else []:
                if block["type"] == "image":
                    images.append(block["image"])
                elif block["type"] == "video":
                    videos.append(block["video"])
                    heard = block["load_audio_from_video"]
                    if load_audio_from_video if heard is None else heard:
                        indices.append(num_videos)
                    num_videos += 1
                elif block["type"] == "audio":
                    sounds.append(block["audio"])
                    indices.append(None)
        batch_images.append(images)
        batch_videos.append(videos)
    return batch_images, batch_videos, sounds, indices


def _find_source(block: dict[str, Any]) -> Any:
    """What is under the one key of a content block that says where its medium is."""
    keys = [key for key in (block["type"], *_SOURCE_KEYS) if key in block]
    if len(keys) != 1:
        raise ValueError(
            f"A content block of type {block['type']} needs one of the keys {block['type']}, url, path and base64, "
            f"got {sorted(block)}."
        )
    if keys != ["base64"]:
        return block[keys[0]]
    try:
        return base64.b64decode(block["base64"], validate=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The base64 of a content block of type {block['type']} is broken: {error}.") from error


def check_audio_indices(indices: list[int | None], num_videos: int, num_sounds: int) -> None:
    """
    Refuses `audio_from_video_indices` that do not fit the videos and sounds they come with.

    Raises:
        ValueError: An index is of no video or there twice, or there are more or fewer entries than sounds.
    """
    videos = [index for index in indices if index is not None]
    if len(set(videos)) < len(videos) or not all(isinstance(i, int) and 0 <= i < num_videos for i in videos):
        raise ValueError(
            f"audio_from_video_indices names each of the {num_videos} videos (from 0) at most once, got {indices}."
        )
    if num_sounds not in (len(indices), indices.count(None)):
        raise ValueError(
            f"audio_from_video_indices has {len(indices)} entries, {indices.count(None)} of them None, but audio "
            f"holds {num_sounds} sounds; it takes one entry per sound, None for one that is of no video."
        )


def _is_in_memory(medium: Any) -> bool:
    return isinstance(medium, (list, tuple, np.ndarray, torch.Tensor))


def flat_images(images: Any) -> list:
    """
    A flat list of images, opened or not, from lists nested to any depth and arrays of any number of images.

    Raises:
        ValueError: An array is empty or has less than two dimensions.
    """
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flat_images(item)]
    if isinstance(images, (np.ndarray, torch.Tensor)):
        if images.ndim < 2 or 0 in images.shape:
            raise ValueError(
                "An array is an image (height, width), (height, width, 3) or (3, height, width), or a batch of them, "
                f"and not empty; got shape {tuple(images.shape)}."
            )
        return [images] if images.ndim < 4 else list(images.reshape(-1, *images.shape[-3:]))
    return [images]


def flat_videos(videos: Any) -> list:
    """
    A flat list of videos, from lists nested to any depth; an empty list stands for no video.

    Downloads, and reads file objects, since one source is opened for its frames and for its sound.
    """
    if isinstance(videos, (list, tuple)):
        videos = [video for video in videos if not (isinstance(video, (list, tuple)) and not video)]
        if not videos:
            return []
    fetched = []
    for video in make_flat_list_of_videos(videos):
        source = get_clip_source(video) if is_video_clip(video) else video
        source = source if _is_in_memory(source) else fetch_media(source)
        fetched.append(dataclasses.replace(video, source=source) if is_video_clip(video) else source)
    return fetched


def flat_sounds(audio: Any) -> list:
    """
    A flat list of sounds, from lists nested to any depth. An array of one or two dimensions is one sound, and so are a
    list of numbers and a row of a data set, `{"array": ..., "sampling_rate": ...}` or `{"bytes": ..., "path": ...}`.
    """
    if isinstance(audio, Mapping):
        if audio.get("array") is not None:
            return [SoundClip(audio["array"], sampling_rate=audio.get("sampling_rate"))]
        source = audio.get("path") if audio.get("bytes") is None else audio["bytes"]
        if source is None:
            raise ValueError(f"A sound in a dict needs an array, bytes or a path, got the keys {sorted(audio)}.")
        return [source]
    if isinstance(audio, (list, tuple)) and not (audio and all(isinstance(item, (float, int)) for item in audio)):
        return [sound for item in audio for sound in flat_sounds(item)]
    if isinstance(audio, (np.ndarray, torch.Tensor)) and audio.ndim == 3:
        return list(audio)
    return [audio]


def load_sound(
    feature_extractor: Any, sound: Any, sampling_rate: int | None = None, audio_mode: str | None = None
) -> tuple[Any, int]:
    """
    Waveform and rate of a file, of a `SoundClip`, or of a waveform at `sampling_rate` (`None`: the extractor's).

    Raises:
        ValueError: There is no sound in the part that is asked for, or an array is no waveform.
        MediaError: The file cannot be read.
    """
    clip = sound if isinstance(sound, SoundClip) else SoundClip(sound)
    if _is_in_memory(clip.source):
        rate = clip.sampling_rate or sampling_rate or feature_extractor.sampling_rate
        whole = np.asarray(clip.source) if isinstance(clip.source, (list, tuple)) else clip.source
        if whole.ndim not in (1, 2):
            raise ValueError(
                f"Waveforms must have the shape (samples,) or (channels, samples), got {tuple(whole.shape)}."
            )
        first, last = sample_range(clip.start, clip.end, rate)
        waveform = whole[..., first:last]
    else:
        waveform, rate = feature_extractor.load_audio_file(clip.source, clip.start, clip.end, audio_mode)
        whole = None
    if waveform.shape[-1] == 0:
        if whole is None:
            whole, rate = read_audio_file(clip.source)
        num_samples = whole.shape[-1]
        raise ValueError(
            f"There is no sound between start={clip.start} and end={clip.end}: it is {num_samples / rate:.2f} s long "
            f"({num_samples} samples at {rate} Hz)."
        )
    return waveform, rate


def load_track(
    feature_extractor: Any,
    video: Any,
    start: float | None = None,
    end: float | None = None,
    audio_mode: str | None = None,
) -> tuple[np.ndarray, int] | None:
    """
    Waveform and rate of the sound of a video, between the seconds where its frames are taken; `None` if it has no
    track, or one that ended before. A track that cannot be decoded is an error.
    """
    if is_video_clip(video):
        start = start if video.start is None else video.start
        end = end if video.end is None else video.end
        video = video.source
    if _is_in_memory(video) or not has_audio(video):
        return None
    waveform = feature_extractor.load_video_audio(video, start, end, audio_mode)
    return (waveform, feature_extractor.sampling_rate) if len(waveform) else None


__all__ = [
    "SoundClip",
    "check_audio_indices",
    "check_conversations",
    "collect_media",
    "flat_images",
    "flat_sounds",
    "flat_videos",
    "load_sound",
    "load_track",
    "prepare_messages",
]
