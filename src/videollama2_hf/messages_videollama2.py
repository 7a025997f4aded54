"""Media in messages: where they are, which part of them, and whose sound is heard."""

import base64
import binascii
import dataclasses
from typing import Any

import numpy as np
import torch

from .media_videollama2 import VideoClip, fetch_media
from .prompt_videollama2 import escape_placeholders
from .video_processing_videollama2 import make_flat_list_of_videos


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
) -> tuple[list[list], list[list[VideoClip]], list, list[int | None]]:
    """
    The media of conversations in reading order.

    Args:
        load_audio_from_video: Whether to hear a video whose block does not say.

    Returns:
        Images and videos of each conversation, all sounds that stand by themselves, and for every sound the number of
        the video whose sound it is, or `None` for one that stands by itself.
    """
    batch_images, batch_videos, sounds, indices, num_videos = [], [], [], [], 0
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
                    sounds.append(_find_source(block))
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


def is_clip(video: Any) -> bool:
    """Whether a video is a `VideoClip`: by name, as a folder loaded as remote code has its own copy of the class."""
    return type(video).__name__ == "VideoClip"


def is_in_memory(video: Any) -> bool:
    """Whether a video is given by its frames, so that it has no sound."""
    return isinstance(video, (list, tuple, np.ndarray, torch.Tensor))


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
        source = make_flat_list_of_videos(video.source)[0] if is_clip(video) else video
        source = source if is_in_memory(source) else fetch_media(source)
        fetched.append(dataclasses.replace(video, source=source) if is_clip(video) else source)
    return fetched


__all__ = ["collect_media", "flat_videos", "is_clip", "is_in_memory", "prepare_messages"]
