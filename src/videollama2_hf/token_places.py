"""
Where tokens come from: which frames and regions a visual token stands for, and which seconds and bands of a sound an
audio token does.

A token stands at the place that its connector's (or patch embedding's) window covers. What it holds is not only from
there: inside one frame the vision tower lets every patch see every other, Video-LLaVA's also the frames of one window,
and BEATs lets every token hear the whole sound. Only this is exact: without attention over time, a visual token holds
nothing of frames that its window does not cover.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from .configuration_videollama2 import CONNECTOR_SAMPLERS, VideoLlama2Config, get_connector_output_size
from .drawing import frame_times, to_pictures
from .feature_extraction_videollama2 import (
    VideoLlama2FeatureExtractor,
    full_clip_windows,
    reference_clip_windows,
    resample_fourier,
)
from .generation_videollama2 import MODEL_INPUTS
from .media_videollama2 import has_audio, read_audio_track, sample_range
from .messages_videollama2 import prepare_messages
from .processing_videollama2 import VideoLlama2Processor


FRAME_SHIFT = 0.01  # seconds between two filter banks
MAX_COLUMNS = 1200  # of a spectrogram
INPUT_NAMES = tuple(MODEL_INPUTS.values())


def get_token_windows(
    connector_type: str, num_frames: int, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    What the tokens of a connector stand for, along each axis by itself: (tokens, frames), (tokens, rows of patches),
    (tokens, columns of patches), float32.

    The share of a token at time `t`, row `r` and column `c` that frame `f` and patch `(i, j)` have is the product
    `time[t, f] * vertical[r, i] * horizontal[c, j]`; a token's shares are equal over what its window covers and add up
    to 1, or to 0 where the window covers nothing but padding.

    Args:
        connector_type: One of the names in `ConnectorType`.
        num_frames: Frames that enter the connector.
        rows, columns: The vision tower's patch grid.
    """
    size = get_connector_output_size(connector_type, num_frames, rows, columns)
    if connector_type not in CONNECTOR_SAMPLERS:  # a token for every patch, of every frame or of their mean
        time = torch.eye(num_frames) if size[0] == num_frames else torch.full((1, num_frames), 1 / num_frames)
        return time, torch.eye(rows), torch.eye(columns)
    kernel, padding = CONNECTOR_SAMPLERS[connector_type]
    axes = []
    for tokens, cells, width in zip(size, (num_frames, rows, columns), kernel):
        first = torch.arange(tokens)[:, None] * width - padding
        cell = torch.arange(cells)
        covered = ((cell >= first) & (cell < first + width)).float()
        axes.append(covered / covered.sum(1, keepdim=True).clamp(min=1))
    return axes[0], axes[1], axes[2]


@dataclass
class SeenFrames:
    """
    An image, or the frames of a video, and where its tokens stand in them.

    Args:
        title: `"image 1"`, `"video 2"`, ...: its number among the media of its kind.
        kind: `"image"` or `"video"`.
        span: Its first token in the prompt, and the token after its last.
        pictures: What the model sees: float32 (frames, height, width, 3) in [0, 1]; one frame of an image.
        times: When each frame is shown.
        start, end: The part of the video that frames were taken from.
        is_seconds: Whether times are seconds; numbers of frames if the frame rate is not known.
        token_grid: Tokens over time, rows and columns.
        patch_grid: Rows and columns of patches.
        num_class_tokens: Tokens in front of every frame's, that stand for the whole frame.
        windows: What [`get_token_windows`] gives; for an image summed over the frames it is repeated to.
        extent: Which part of the height and width patches cover, from the upper left corner.
        frames_mixed: Frames that the vision tower's attention over time mixes; 1 where it has none.
        maps: float32 (words, frames, rows, columns) of patches.
    """

    title: str
    kind: Literal["image", "video"]
    span: tuple[int, int]
    pictures: np.ndarray
    times: list[float]
    start: float
    end: float
    is_seconds: bool
    token_grid: tuple[int, int, int]
    patch_grid: tuple[int, int]
    num_class_tokens: int
    windows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    extent: float
    frames_mixed: int
    maps: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def num_tokens(self) -> int:
        return self.span[1] - self.span[0]

    def place(self, weights: torch.Tensor) -> torch.Tensor:
        """
        Weights of its tokens, (words, tokens), spread over what they stand for: (words, frames, rows, columns). Those
        of tokens that stand for padding are in no place.
        """
        time, rows, columns = self.token_grid
        weights = weights.unflatten(1, (time, self.num_class_tokens + rows * columns))
        patches = weights[:, :, self.num_class_tokens :].unflatten(2, (rows, columns))
        maps = torch.einsum("wtrc,tf,ri,cj->wfij", patches, *self.windows)
        of_frames = torch.einsum("wtk,tf->wf", weights[:, :, : self.num_class_tokens], self.windows[0])
        return maps + of_frames[:, :, None, None] / (self.patch_grid[0] * self.patch_grid[1])

    def pool(self, values: torch.Tensor) -> torch.Tensor:
        """Values of its pixels, (words, frames, 3, height, width), summed by patch: (words, frames, rows, columns)."""
        rows, columns = self.patch_grid
        size = round(values.shape[-2] * self.extent) // rows
        values = values[..., : rows * size, : columns * size].sum(2)
        return values.unflatten(3, (columns, size)).unflatten(2, (rows, size)).sum((3, 5))

    def unseen_frames(self) -> list[int]:
        """Frames that no token stands for: the last of an odd number, where the connector takes them in pairs."""
        return [int(frame) for frame in (self.windows[0].sum(0) == 0).nonzero()]


def see_frames(
    config: VideoLlama2Config,
    kind: Literal["image", "video"],
    title: str,
    first_token: int,
    num_tokens: int,
    pictures: np.ndarray,
    times: list[float],
    part: tuple[float, float],
    is_seconds: bool,
) -> SeenFrames:
    """Describes the frames that became `num_tokens` tokens from `first_token` on; see [`SeenFrames`]."""
    tower: Any = config.tower_config(kind)
    height, width = pictures.shape[1:3]
    rows, columns = height // tower.patch_size, width // tower.patch_size
    num_frames = config.image_num_frames if kind == "image" else len(pictures)
    grid = get_connector_output_size(config.connector_type, num_frames, rows, columns)
    time, vertical, horizontal = get_token_windows(config.connector_type, num_frames, rows, columns)
    return SeenFrames(
        title=title,
        kind=kind,
        span=(first_token, first_token + num_tokens),
        pictures=pictures,
        times=times,
        start=part[0],
        end=part[1],
        is_seconds=is_seconds,
        token_grid=grid,
        patch_grid=(rows, columns),
        num_class_tokens=num_tokens // grid[0] - grid[1] * grid[2],
        windows=(time.sum(1, keepdim=True) if kind == "image" else time, vertical, horizontal),
        extent=rows * tower.patch_size / height,
        frames_mixed=tower.num_frames if kind == "video" and getattr(tower, "add_time_attn", False) else 1,
    )


@dataclass(frozen=True)
class HeardPart:
    """Seconds `start` to `end` of a sound, which the model hears from second `at` of its window on."""

    at: float
    start: float
    end: float


@dataclass
class HeardSound:
    """
    A sound, what of it the model hears, and where its tokens stand in it.

    The model hears one window of fixed length: parts of the sound one behind the other, then silence.

    Args:
        title: `"audio 1"`, or `"sound of video 1"`.
        span: Its first token in the prompt, and the token after its last.
        features: The window: filter banks, float32 (time, mel bins).
        seconds: How long the window is.
        parts: What is heard; none of a video without a sound track, which is heard as silence.
        start, end: The part of the sound, in seconds, that was asked for.
        spectrogram: Filter banks of that part, heard or not: float32 (columns, mel bins).
        grid: Tokens over time (steps) and over mel bins (bands, from the lowest).
        step_seconds: How long a step is.
        maps: float32 (words, steps, bands).
    """

    title: str
    span: tuple[int, int]
    features: np.ndarray
    seconds: float
    parts: list[HeardPart]
    start: float
    end: float
    spectrogram: np.ndarray
    grid: tuple[int, int]
    step_seconds: float
    maps: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def num_tokens(self) -> int:
        return self.span[1] - self.span[0]

    def place(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights of its tokens, (words, tokens), by what they stand for: (words, steps, bands)."""
        return weights.unflatten(1, self.grid)

    def pool(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the filter banks, (words, time, mel bins), added up by token: (words, steps, bands)."""
        steps, bands = self.grid
        size = values.shape[2] // bands
        return values[:, : steps * size].unflatten(2, (bands, size)).unflatten(1, (steps, size)).sum((2, 4))

    def maps_of_sound(self) -> torch.Tensor:
        """
        The maps by second of the sound instead of second of the window: (words, columns, bands), columns of equal
        length from `start` to `end`. What belongs to silence behind the parts is left out; a second that is heard
        twice has what both have.
        """
        number = max(1, min(MAX_COLUMNS, round((self.end - self.start) / self.step_seconds)))
        length = (self.end - self.start) / number
        moved = torch.zeros(self.grid[0], number)
        for part in self.parts:
            # In seconds of the window: the steps, and the columns as far as this part fills them.
            steps = torch.arange(self.grid[0] + 1) * self.step_seconds
            edges = self.start + torch.arange(number + 1) * length
            columns = (edges.clamp(part.start, part.end) - part.start) + part.at
            overlap = torch.minimum(steps[1:, None], columns[1:]) - torch.maximum(steps[:-1, None], columns[:-1])
            moved += overlap.clamp(min=0) / self.step_seconds
        return torch.einsum("wsb,sc->wcb", self.maps, moved)

    def fills_window(self) -> bool:
        """Whether the window is the sound as it is: one part of it, and no silence behind."""
        return len(self.parts) == 1 and self.parts[0].end - self.parts[0].start >= self.seconds - self.step_seconds


def hear_sound(
    extractor: VideoLlama2FeatureExtractor,
    clip: Any,
    of_video: bool,
    title: str,
    first_token: int,
    num_tokens: int,
    features: np.ndarray,
    patch_size: int,
) -> HeardSound:
    """
    Describes a sound that became `num_tokens` tokens from `first_token` on; see [`HeardSound`].

    Args:
        clip: A `SoundClip`, or the `VideoClip` whose sound it is.
        of_video: Which of them.
        features: What the extractor made of it: (time, mel bins).
        patch_size: Filter banks and mel bins of a token.
    """
    bands = extractor.feature_size // patch_size
    waveform = _read_part(extractor, clip)
    rate, window = extractor.sampling_rate, extractor.chunk_length
    num_samples = len(waveform)
    if extractor.audio_mode == "full":
        windows = full_clip_windows(num_samples, rate, extractor.num_clips, window)
    elif of_video:
        windows = reference_clip_windows(num_samples, rate, extractor.num_clips, extractor.clip_duration)
    else:
        windows = [(0, num_samples)]
    start = sample_range(clip.start, clip.end, rate)[0] / rate
    parts, at = [], 0.0
    for first, last in windows:
        last = min(last, num_samples, first + round((window - at) * rate))
        if last > first:
            parts.append(HeardPart(at, start + first / rate, start + last / rate))
            at += (last - first) / rate
    return HeardSound(
        title=title,
        span=(first_token, first_token + num_tokens),
        features=features,
        seconds=window,
        parts=parts,
        start=start,
        end=start + max(num_samples, 1) / rate,
        spectrogram=_compute_spectrogram(extractor, waveform),
        grid=(num_tokens // bands, bands),
        step_seconds=patch_size * FRAME_SHIFT,
    )


def _read_part(extractor: VideoLlama2FeatureExtractor, clip: Any) -> np.ndarray:
    """All of a sound between its `start` and `end`, (samples,) at the extractor's rate; empty where there is none."""
    source, rate = clip.source, extractor.sampling_rate
    if isinstance(source, (list, tuple, np.ndarray, torch.Tensor)):
        if not hasattr(clip, "sampling_rate"):  # frames of a video, which have no sound
            return np.zeros(0, np.float32)
        own_rate = clip.sampling_rate or rate
        first, last = sample_range(clip.start, clip.end, own_rate)
        waveform = np.asarray(source, np.float64)
        waveform = (waveform if waveform.ndim == 1 else waveform[0])[first:last]
        return resample_fourier(waveform, round(len(waveform) * rate / own_rate)).astype(np.float32)
    if not has_audio(source):
        return np.zeros(0, np.float32)
    return read_audio_track(source, rate, clip.start, clip.end)


def _compute_spectrogram(extractor: VideoLlama2FeatureExtractor, waveform: np.ndarray) -> np.ndarray:
    """Filter banks of a sound of any length, (columns, mel bins): means over time where there would be too many."""
    rate = extractor.sampling_rate
    block = 60 * rate
    pieces = []
    for first in range(0, max(len(waveform), 1), block):
        piece = waveform[first : first + block]
        features = extractor._filter_banks(np.pad(piece, (0, max(0, rate // 20 - len(piece)))))
        share = min(1.0, MAX_COLUMNS * len(piece) / max(len(waveform), 1) / len(features))
        columns = max(1, round(share * len(features)))
        pieces.append(torch.nn.functional.adaptive_avg_pool1d(torch.from_numpy(features).T, columns).T)
    return torch.cat(pieces).numpy()


def describe_media(
    config: VideoLlama2Config, processor: VideoLlama2Processor, messages: list[dict[str, Any]], inputs: dict[str, Any]
) -> Iterator[SeenFrames | HeardSound]:
    """
    The media of a prompt in the order of their tokens.

    Args:
        config: The model's configuration.
        messages: One message of the user.
        inputs: What the processor made of it, with `video_metadata` and `text_replacement_offsets`.
    """
    ids = inputs["input_ids"][0].tolist()
    tensors = {name: iter(inputs.get(name, ())) for name in (*INPUT_NAMES, "video_metadata")}
    blocks = [block for block in prepare_messages(messages)[0]["content"] if block["type"] != "text"]
    position, numbers = 0, {"image": 0, "video": 0, "audio": 0}
    for block, replaced in zip(blocks, inputs["text_replacement_offsets"][0], strict=True):
        kind = block["type"]
        numbers[kind] += 1
        title = f"{kind} {numbers[kind]}"
        counts = {name: replaced["replacement"].count(getattr(processor, f"{name}_token")) for name in numbers}
        position = ids.index(getattr(processor, f"{kind}_token_id"), position)
        if kind == "image":
            pictures = to_pictures(next(tensors["pixel_values"])[None], processor.image_processor)
            where = pictures, [0.0], (0.0, 0.0), False
            yield see_frames(config, kind, title, position, counts[kind], *where)
        elif kind == "video":
            pictures = to_pictures(next(tensors["pixel_values_videos"]), processor.video_processor)
            times, end, is_seconds = frame_times(next(tensors["video_metadata"]), len(pictures))
            clip = block["video"]
            part = (min(clip.start or 0.0, times[0]), max(min(clip.end or end, end), times[-1]))
            yield see_frames(config, kind, title, position, counts[kind], pictures, times, part, is_seconds)
        if kind != "image" and counts["audio"]:
            first = position + (counts["video"] if kind == "video" else 0)
            yield hear_sound(
                processor.feature_extractor,
                block[kind],
                kind == "video",
                f"sound of {title}" if kind == "video" else title,
                first,
                counts["audio"],
                next(tensors["input_features"]).float().numpy(),
                processor.audio_patch_size,
            )
        position += sum(counts.values())


__all__ = [
    "INPUT_NAMES",
    "HeardPart",
    "HeardSound",
    "SeenFrames",
    "describe_media",
    "get_token_windows",
    "hear_sound",
    "see_frames",
]
