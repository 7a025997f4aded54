"""Reading media with PyAV: exact frames of a video, exact samples of a sound track. Nothing else opens media files."""

import math
import numbers
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.video_utils import VideoMetadata

from .audio_decoding_videollama2 import (
    count_output_samples,
    cut_out,
    decode_audio,
    decode_head,
    decode_parts,
    find_audio_grid,
    frame_samples,
    plan_parts,
    resample,
    resample_parts,
    seek_parts,
)
from .media_files_videollama2 import (
    MediaError,
    MediaSource,
    NoAudioTrackError,
    fetch_media,
    name_source,
    open_media,
    sample_range,
)
from .video_reading_videollama2 import Transform, VideoReader, open_video


if TYPE_CHECKING:
    import av


@dataclass(frozen=True)
class VideoClip:
    """
    A video as a message names it: where it is, which part of it, and how many frames to take.

    `start` and `end` are seconds from the first frame; `num_frames` or `fps` (frames to take per second) override the
    processor's own setting. `None` leaves a choice to the processor. Raises as [`check_clip_options`].
    """

    source: MediaSource
    start: float | None = None
    end: float | None = None
    num_frames: int | None = None
    fps: float | None = None

    def __post_init__(self):
        check_clip_options(start=self.start, end=self.end, num_frames=self.num_frames, fps=self.fps)


def is_video_clip(video: Any) -> bool:
    """
    Whether `video` is a [`VideoClip`]. By name, not by class: a folder loaded as remote code holds its own copy of
    this module, and its processor takes the clips of the package too.
    """
    return type(video).__name__ == "VideoClip"


def check_clip_options(**options: Any) -> None:
    """
    Refuse options of a clip that mean nothing; `None` is always allowed.

    Args:
        options: Numbers by their name: `start` and `end` (seconds) are finite and not negative, `fps` is finite and
            positive, `num_frames` and `sampling_rate` (Hz) are positive integers.

    Raises:
        ValueError: An option is something else.
    """
    for name, value in options.items():
        if value is None:
            continue
        if name in ("start", "end"):
            kind, allowed = numbers.Real, "a finite number of seconds, 0 or more"
        elif name == "fps":
            kind, allowed = numbers.Real, "a finite number above 0"
        else:
            kind, allowed = numbers.Integral, "an integer above 0"
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < 0 or (value == 0 and name not in ("start", "end")):
            got = repr(value) if isinstance(value, (str, numbers.Real)) else f"a {type(value).__name__}"
            raise ValueError(f"{name} must be {allowed}, got {got}.")


def read_video_metadata(source: MediaSource, start: float | None = None, end: float | None = None) -> VideoMetadata:
    """
    Size and timing of a video.

    The number of frames is exact also where the container does not say it (MPEG, Ogg, Matroska): then packets are
    counted, or frames if a packet need not hold one. `fps` is the average rate of the container, as decord reports it;
    `duration` is in seconds; width and height are those on the screen, after rotation. A folder of images has 3 frames
    per second and a GIF 25, as in the original.

    Args:
        start, end: Part that is needed, in seconds from the first frame; what is described is the whole video.

    Raises:
        MediaError: There are no frames, or the video ends clearly before `end` and what its file announces (AVI,
            Matroska, fragmented MP4). Other MP4 files list their frames: all are counted, and [`read_frames`] says
            which of those asked for are missing.
    """
    with open_video(source) as video:
        return video.read_metadata(start, end)


def read_frames(
    source: MediaSource, indices: Sequence[int] | np.ndarray, transform: Transform | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """
    Read the frames with the given indices, exactly those that decoding the whole video would give.

    Only the groups of pictures that hold a frame asked for are decoded, and of those only the frames that others
    refer to. Groups are decoded in parallel, on `torch.get_num_threads()` threads.

    Args:
        source: The video, a folder of image files (in the order of their sorted names), or an animated GIF.
        indices: In the order in which a player shows the frames, from 0. Any order; a frame that is named twice is
            decoded once.
        transform: Called with every frame, a `uint8` tensor (height, width, 3), as soon as it is decoded, so that
            large frames need not be held together. May run in several threads at a time.

    Returns:
        The frames (RGB, turned as players turn them) or what `transform` makes of them, stacked in the order of
        `indices`: `uint8` (frames, height, width, 3). A list where the frames differ in size.

    Raises:
        IndexError: An index is not one of the video's frames.
        MediaError: The file is cut off or damaged, and frames that are asked for cannot be decoded.
    """
    with open_video(source) as video:
        return video.read_frames(indices, transform)


def has_audio(source: MediaSource) -> bool:
    """Whether the source has an audio track. False for a folder of images."""
    media = fetch_media(source)
    if isinstance(media, str) and os.path.isdir(media):
        return False
    with open_media(media) as container:
        return len(container.streams.audio) > 0


def read_audio_file(
    source: MediaSource, start: float | None = None, end: float | None = None
) -> tuple[np.ndarray, int]:
    """
    Read sound as it was recorded: all channels, at its own rate. Equal to libsndfile for PCM and FLAC.

    Args:
        start, end: Part to read, in seconds.

    Returns:
        The waveform, `float64` (channels, samples) in [-1, 1), and its sampling rate in Hz.

    Raises:
        NoAudioTrackError: The source has no audio track.
        MediaError: The track cannot be decoded, or it ends clearly before `end` and what its file announces.
    """
    name = name_source(source)
    with open_media(source) as container:
        stream = _audio_stream(container, name)
        rate = stream.codec_context.sample_rate
        first, last = sample_range(start, end, rate)
        frames = decode_audio(container, stream, name, None if last is None else last / rate)
        pieces = list(cut_out(map(frame_samples, frames), first, last))
        rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
    return np.concatenate(pieces, axis=1) if pieces else np.zeros((channels, 0)), rate


def read_audio_track(
    source: MediaSource,
    sampling_rate: int = 16000,
    start: float | None = None,
    end: float | None = None,
    select: Callable[[int], list[tuple[int, int]]] | None = None,
) -> np.ndarray:
    """
    Read the sound of a video: mixed down to mono and resampled, the samples that
    `ffmpeg -i source -ac 1 -ar 16000 -f s16le -` writes.

    Where it is sure to give the same samples, only what is asked for is decoded: of AAC tracks in MP4 files, unless
    their encoder replaced noise by a note that there was noise; see [`seek_parts`]. Other tracks are decoded from
    their beginning.

    Args:
        sampling_rate: In Hz.
        start, end: Part to read, in seconds from the first frame of the video (from the first sample where there is
            no video). Empty where the sound has ended before.
        select: Which windows of that part to read, as (first sample, sample after the last), given the number of its
            samples. They may overlap, and reach beyond the end, where there is nothing. Default: all of it.

    Returns:
        `float32` (samples,) in [-1, 1): 16-bit samples divided by 32768; windows follow each other.

    Raises:
        NoAudioTrackError: The source has no audio track.
        MediaError: The track cannot be decoded, or it ends clearly before `end` and what its file announces. What is
            not decoded is not checked.
    """
    media, name = fetch_media(source), name_source(source)
    pieces = None
    if select is not None or start:
        pieces = _read_windows(
            media, name, sampling_rate, start, end, select or (lambda num_samples: [(0, num_samples)])
        )
    if pieces is None:
        with open_media(media) as container:
            stream = _audio_stream(container, name)
            first, last = sample_range(start, end, sampling_rate, offset=_audio_offset(container, stream))
            frames = decode_audio(container, stream, name, None if last is None else last / sampling_rate)
            pieces = list(cut_out(resample(frames, sampling_rate), first, last))
        if select is not None:
            samples = np.concatenate([np.zeros(0, np.int16), *pieces])
            pieces = [samples[first:last] for first, last in select(len(samples))]
    return np.concatenate([np.zeros(0, np.int16), *pieces]).astype(np.float32) / 32768.0


def _read_windows(
    media: str | bytes,
    name: str,
    sampling_rate: int,
    start: float | None,
    end: float | None,
    select: Callable[[int], list[tuple[int, int]]],
) -> list[np.ndarray] | None:
    """Windows of a track, `int16` (samples,), without resampling what is between them, nor decoding it if possible;
    `None` where that is not sure to be exact."""
    with open_media(media) as container:
        stream = _audio_stream(container, name)
        grid = find_audio_grid(container, stream)
        if grid is None:
            return None
        num_samples = count_output_samples(grid, sampling_rate)
        first, last = sample_range(start, end, sampling_rate, offset=_audio_offset(container, stream))
        first, last = min(first, num_samples), num_samples if last is None else min(last, num_samples)
        windows = [(first + begin, min(first + end, last)) for begin, end in select(last - first)]
        parts = plan_parts(grid, sampling_rate, windows)
        if parts is None:
            return None
        head = decode_head(container, stream, grid, parts)
        if head is None:
            return None
        pieces = seek_parts(container, stream, grid, parts, head)
    if pieces is None:
        with open_media(media) as container:
            stream = _audio_stream(container, name)
            pieces = decode_parts(decode_audio(container, stream, name, None), grid, parts)
    return None if pieces is None else list(resample_parts(pieces, grid, parts, sampling_rate))


def _audio_stream(container: "av.container.InputContainer", name: str) -> "av.AudioStream":
    stream: Any = container.streams.best("audio")
    if stream is None:
        raise NoAudioTrackError(f"{name} has no audio track.")
    if stream.codec_context is None:
        raise MediaError(f"The audio track of {name} has a codec that FFmpeg does not know.")
    return stream


def _audio_offset(container: "av.container.InputContainer", stream: "av.AudioStream") -> float:
    """Seconds by which the sound begins after the first frame of the video."""
    starts = [
        track.start_time * track.time_base
        for track in (stream, container.streams.best("video"))
        if track is not None and track.start_time is not None and track.time_base is not None
    ]
    return float(starts[0] - starts[1]) if len(starts) == 2 else 0.0


__all__ = [
    "MediaError",
    "MediaSource",
    "NoAudioTrackError",
    "VideoClip",
    "VideoReader",
    "check_clip_options",
    "fetch_media",
    "has_audio",
    "is_video_clip",
    "name_source",
    "open_media",
    "open_video",
    "read_audio_file",
    "read_audio_track",
    "read_frames",
    "read_video_metadata",
    "sample_range",
]
