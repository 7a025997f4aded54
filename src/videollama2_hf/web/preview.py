"""What a model sees and hears of a file, read with its own processor and drawn as HTML."""

import base64
import io
import math
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image

from ..captioning import find_kind
from ..drawing import to_pictures
from ..media_videollama2 import VideoClip, open_media, read_video_metadata
from ..messages_videollama2 import SoundClip, load_sound, load_track
from ..processing_videollama2 import VideoLlama2Processor


# Points of matplotlib's "magma", between which colours are interpolated.
_COLOURS = np.array([(0, 0, 4), (59, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191)])
_THUMBNAIL = 320  # longest side of a picture, in pixels
STEP = 0.1  # of the sliders, in seconds


def find_duration(path: str) -> float | None:
    """
    Seconds of a video or a sound, as whole steps of the sliders (at least one); `None` for an image, and where the
    file does not say it.

    Raises:
        ValueError: The file cannot be read.
    """
    kind, seconds = find_kind(path), None
    if kind == "video":
        seconds = read_video_metadata(path).duration
    elif kind == "audio":
        with open_media(path) as container:
            seconds = None if container.duration is None else container.duration / 1e6
    return None if seconds is None else max(math.floor(seconds / STEP), 1) * STEP


def make_block(path: str, start: float = 0.0, end: float = math.inf, duration: float | None = None) -> dict[str, Any]:
    """
    The content block of a file, or of its part between two seconds in any order, at least one step long.

    Args:
        duration: Of the file, from [`find_duration`]. Where it is not known the whole file is meant.
    """
    kind = str(find_kind(path))
    block: dict[str, Any] = {"type": kind, kind: path}
    if duration is None:
        return block
    start, end = sorted((start, end))
    start = min(start, max(duration - STEP, 0.0))
    block |= {"start": round(start, 1)} if start > 0 else {}
    return block | ({"end": round(max(end, start + STEP), 1)} if end < duration else {})


@dataclass
class Preview:
    """
    One medium as the model reads it.

    Args:
        kind: `"image"`, `"video"` or `"audio"`.
        num_tokens: How many tokens of the prompt it takes.
        pictures: Frames or the image: float32 (pictures, height, width, 3) in [0, 1], after resizing and padding.
        times: Seconds of the frames; empty where the video has no frame rate.
        waveform: What is heard, float (samples,) at `rate` Hz; `None` where nothing is.
        filter_banks: Of the waveform: float32 (time, mel bins), 100 a second.
        hears: Whether the model hears this kind of medium.
    """

    kind: str
    num_tokens: int
    pictures: np.ndarray | None = None
    times: tuple[float, ...] = ()
    waveform: np.ndarray | None = None
    rate: int = 0
    filter_banks: np.ndarray | None = None
    hears: bool = True


def read_preview(processor: VideoLlama2Processor, block: dict[str, Any]) -> Preview:
    """
    Raises:
        ValueError: The file cannot be read, the part lies behind its end, or the model does not take this kind.
    """
    messages = [{"role": "user", "content": [block]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    placeholders = [processor.image_token_id, processor.video_token_id, processor.audio_token_id]
    num_tokens = int(torch.isin(inputs["input_ids"], torch.tensor(placeholders)).sum())
    kind, start, end = block["type"], block.get("start"), block.get("end")
    preview = Preview(kind, num_tokens)
    extractor = processor.feature_extractor
    if kind == "image":
        preview.pictures = to_pictures(inputs["pixel_values"], processor.image_processor)
        return preview
    if kind == "video":
        preview.pictures = to_pictures(inputs["pixel_values_videos"][0], processor.video_processor)
        metadata = read_video_metadata(block["video"], start, end)
        if metadata.fps:
            indices = processor.video_processor.sample_frames(metadata, start=start, end=end)
            preview.times = tuple(float(index) / metadata.fps for index in indices)
        preview.hears = processor.has_audio and processor.load_audio_from_video
        sound = load_track(extractor, VideoClip(block["video"], start, end)) if preview.hears else None
    else:
        sound = load_sound(extractor, SoundClip(block["audio"], start, end))
    if sound is not None:
        waveform, preview.rate = sound
        waveform = waveform if waveform.ndim == 1 else waveform[0]
        preview.waveform = waveform[: round(extractor.chunk_length * preview.rate)]
        steps = max(round(100 * len(preview.waveform) / preview.rate), 1)
        preview.filter_banks = inputs["input_features"][0, :steps].numpy()
    return preview


def draw_preview(preview: Preview, texts: dict[str, str]) -> str:
    """HTML of a preview, complete in itself, with its words from `texts`."""
    parts = []
    if preview.pictures is not None:
        count, height, width = preview.pictures.shape[:3]
        title = texts["image" if preview.kind == "image" else "frames"].format(count=count, width=width, height=height)
        parts.append(f'<div class="seen-title">{escape(title)}</div><div class="seen-frames">')
        for number, picture in enumerate(preview.pictures):
            time = texts["second"].format(seconds=preview.times[number]) if preview.times else ""
            caption = f"<figcaption>{escape(time)}</figcaption>" if time else ""
            parts.append(f'<figure><img alt="{escape(time)}" src="{_jpeg(picture)}">{caption}</figure>')
        parts.append("</div>")
    if preview.waveform is not None and preview.filter_banks is not None:
        seconds = len(preview.waveform) / preview.rate
        parts.append(f'<div class="seen-title">{escape(texts["sound"].format(seconds=seconds))}</div>')
        parts.append(f'<div class="seen-sound">{_draw_waveform(preview.waveform)}')
        parts.append(f'<img alt="" src="{_draw_filter_banks(preview.filter_banks)}"><div class="seen-axis">')
        parts += [f"<span>{seconds * step / 4:.1f}</span>" for step in range(5)]
        parts.append("</div></div>")
    elif preview.kind == "video":
        parts.append(f'<div class="seen-title">{escape(texts["silent" if preview.hears else "deaf"])}</div>')
    parts.append(f'<div class="seen-note">{escape(texts["tokens"].format(count=preview.num_tokens))}</div>')
    return f'<div class="seen">{"".join(parts)}</div>'


def draw_problem(reason: str) -> str:
    """HTML of a message about a file that cannot be used."""
    return f'<div class="seen-problem" role="alert">{escape(reason)}</div>'


def draw_player(path: str) -> str:
    """HTML that plays a file which the page's server holds."""
    source = f'src="gradio_api/file={escape(quote(path))}"'
    kind = find_kind(path)
    if kind == "image" or path.lower().endswith(".gif"):
        return f'<img class="player" alt="" {source}>'
    if kind == "audio":
        return f'<audio class="player" controls preload="metadata" {source}></audio>'
    return f'<video class="player" controls playsinline preload="metadata" {source}></video>'


def _jpeg(picture: np.ndarray) -> str:
    image = Image.fromarray((picture * 255).round().astype(np.uint8))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return _data_uri(image, "JPEG")


def _data_uri(image: Image.Image, format: str) -> str:
    content = io.BytesIO()
    image.save(content, format)
    return f"data:image/{format.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def _draw_waveform(waveform: np.ndarray, num_columns: int = 400) -> str:
    """SVG of the loudest and the softest sample in each of some columns."""
    columns = np.array_split(waveform, min(num_columns, len(waveform)))
    loudest = max(float(np.abs(waveform).max()), 1e-3)
    top = [20 - 19 * float(column.max()) / loudest for column in columns]
    bottom = [20 - 19 * float(column.min()) / loudest for column in columns]
    points = [f"{x},{y:.1f}" for x, y in enumerate(top)] + [f"{x},{y:.1f}" for x, y in enumerate(bottom)][::-1]
    return (
        f'<svg viewBox="0 0 {max(len(columns) - 1, 1)} 40" preserveAspectRatio="none">'
        f'<polygon points="{" ".join(points)}"/></svg>'
    )


def _draw_filter_banks(features: np.ndarray) -> str:
    """Picture of filter banks (time, mel bins), low frequencies below; 14 nepers below the loudest are black."""
    values = np.clip((features.T[::-1] - features.max()) / 14 + 1, 0, 1) * (len(_COLOURS) - 1)
    points = np.arange(len(_COLOURS))
    colours = np.stack([np.interp(values, points, _COLOURS[:, channel]) for channel in range(3)], axis=-1)
    picture = Image.fromarray(colours.round().astype(np.uint8))
    return _data_uri(picture.resize((min(picture.width, 600), picture.height)), "PNG")


__all__ = [
    "STEP",
    "Preview",
    "draw_player",
    "draw_preview",
    "draw_problem",
    "find_duration",
    "make_block",
    "read_preview",
]
