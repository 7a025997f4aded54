"""Media in messages: where they are, which part of them, and what is heard."""

import base64
import binascii
import dataclasses
from typing import Any

import numpy as np
import torch

from .media_videollama2 import VideoClip, fetch_media, has_audio
from .prompt_videollama2 import escape_placeholders
from .video_processing_videollama2 import make_flat_list_of_videos


@dataclasses.dataclass(frozen=True)
class SoundClip:
    """A sound as a message names it: where it is, and which part of it, in seconds."""

    source: Any
    start: float | None = None
    end: float | None = None


def prepare_messages(messages: list[dict[str, Any]], escape: bool = True) -> list[dict[str, Any]]:
    """
    Messages in whose typed text placeholder tokens are marked as text (if `escape`), and without the empty audio block
    that transformers wants behind a video whose sound is heard: the video block says that instead.
    """
    prepared = []
    for message in messages:
        if isinstance(message.get("content"), (list, tuple)):
            content = []
            for block in message["content"]:
                if block.get("type") is None:
                    raise ValueError(f"A content block needs a type (text, image, video or audio), got {block}.")
                if block["type"] == "text" and escape:
                    block = {**block, "text": escape_placeholders(block["text"])}
                elif (
                    block["type"] == "audio" and not _has_source(block) and content and content[-1]["type"] == "video"
                ):
                    content[-1] = {**content[-1], "load_audio_from_video": True}
                    continue
                content.append(block)
            message = {**message, "content": content}
        prepared.append(message)
    return prepared


def collect_media(
    conversations: list[list[dict[str, Any]]], load_audio_from_video: bool
) -> tuple[list[list], list[list[VideoClip]], list[SoundClip], list[int | None]]:
    """
    The media of conversations in reading order.

    Args:
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
                    images.append(_find_source(block))
                elif block["type"] == "video":
                    options = {name: block.get(name) for name in ("start", "end", "num_frames", "fps")}
                    videos.append(VideoClip(_find_source(block), **options))
                    heard = block.get("load_audio_from_video")
                    if load_audio_from_video if heard is None else heard:
                        indices.append(num_videos)
                    num_videos += 1
                elif block["type"] == "audio":
                    sounds.append(SoundClip(_find_source(block), block.get("start"), block.get("end")))
                    indices.append(None)
        batch_images.append(images)
        batch_videos.append(videos)
    return batch_images, batch_videos, sounds, indices


def _has_source(block: dict[str, Any]) -> bool:
    return any(block.get(key) is not None for key in (block["type"], "url", "path", "base64"))


def _find_source(block: dict[str, Any]) -> Any:
    """The medium of a content block, by the first of the keys that transformers uses."""
    for key in (block["type"], "url", "path"):
        if block.get(key) is not None:
            return block[key]
    if block.get("base64") is not None:
        try:
            return base64.b64decode(block["base64"], validate=True)
        except binascii.Error as error:
            raise ValueError(f"The base64 of a content block of type {block['type']} is broken: {error}.") from error
    raise ValueError(
        f"A content block of type {block['type']} needs one of the keys {block['type']}, url, path and base64, got "
        f"{sorted(block)}."
    )


def _is_clip(video: Any) -> bool:
    # By name, not by class: a folder loaded as remote code holds its own copy of the media module.
    return type(video).__name__ == "VideoClip"


def _is_in_memory(medium: Any) -> bool:
    return isinstance(medium, (list, tuple, np.ndarray, torch.Tensor))


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
        source = make_flat_list_of_videos(video.source)[0] if _is_clip(video) else video
        source = source if _is_in_memory(source) else fetch_media(source)
        fetched.append(dataclasses.replace(video, source=source) if _is_clip(video) else source)
    return fetched


def flat_sounds(audio: Any) -> list:
    """
    A flat list of sounds, from lists nested to any depth. An array of one or two dimensions is one sound, and so is a
    list of numbers.
    """
    if isinstance(audio, (list, tuple)) and not (audio and isinstance(audio[0], (float, int))):
        return [sound for item in audio for sound in flat_sounds(item)]
    if isinstance(audio, (np.ndarray, torch.Tensor)) and audio.ndim == 3:
        return list(audio)
    return [audio]


def load_sound(
    feature_extractor: Any, sound: Any, sampling_rate: int | None = None, audio_mode: str | None = None
) -> tuple[Any, int]:
    """Waveform and rate of a file, of a `SoundClip`, or of a waveform at `sampling_rate` (`None`: the extractor's)."""
    start = end = None
    if isinstance(sound, SoundClip):
        sound, start, end = sound.source, sound.start, sound.end
    if _is_in_memory(sound):
        return sound, sampling_rate or feature_extractor.sampling_rate
    return feature_extractor.load_audio_file(sound, start, end, audio_mode)


def load_track(
    feature_extractor: Any,
    video: Any,
    start: float | None = None,
    end: float | None = None,
    audio_mode: str | None = None,
) -> tuple[np.ndarray, int] | None:
    """
    Waveform and rate of the sound of a video, between the seconds where its frames are taken; `None` if it has no
    track. A track that cannot be decoded is an error.
    """
    if _is_clip(video):
        start = start if video.start is None else video.start
        end = end if video.end is None else video.end
        video = video.source
    if _is_in_memory(video) or not has_audio(video):
        return None
    return feature_extractor.load_video_audio(video, start, end, audio_mode), feature_extractor.sampling_rate


__all__ = ["SoundClip", "collect_media", "flat_sounds", "flat_videos", "load_sound", "load_track", "prepare_messages"]
