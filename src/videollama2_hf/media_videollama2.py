"""Reading media with PyAV: exact frames of a video, exact samples of a sound track. Nothing else opens media files."""

import base64
import io
import math
import numbers
import os
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.request import url2pathname

import numpy as np
import torch
from huggingface_hub import get_session
from huggingface_hub.utils import httpx
from PIL import Image
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from .frame_decoding_videollama2 import (
    FrameConverter,
    announced_end,
    decode_all,
    decode_indices,
    decode_runs,
    decode_timestamps,
    demux_packets,
    get_orientation,
    import_av,
    packet_end,
    plan_runs,
    read_frame_table,
)


if TYPE_CHECKING:
    import av

logger = logging.get_logger(__name__)

# What every function here accepts: a path, an http(s) or `file:` URL, a `data:` URI, the bytes of a file, or a
# seekable binary file object. A video may also be a folder of image files, or an animated GIF.
MediaSource = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO

# Frame rates that the original assumes where a source has none of its own (videollama2/mm_utils.py, process_video).
FOLDER_FPS = 3.0
GIF_FPS = 25.0

# FFmpeg tries these formats only. Left out on purpose: playlists and lists of files (hls, dash, concat, image
# patterns), with which a file from a stranger could make this process open other files or addresses, and text formats
# that FFmpeg would render as pictures.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,mpeg,mpegts,mpegvideo,ogg,asf,gif,apng,rm,wtv,dv,mxf,nut,"
    "swf,ivf,obu,h264,hevc,m4v,vc1,yuv4mpegpipe,wav,w64,aiff,au,caf,flac,mp3,aac,ac3,eac3,dts,amr,ape,wv,tta,dsf,voc"
)
# Zero and full scale of integer samples, as libsndfile maps them to [-1, 1).
_SAMPLE_SCALES = {"u8": (128, 2**7), "s16": (0, 2**15), "s32": (0, 2**31), "s64": (0, 2**63)}


class MediaError(ValueError):
    """A source that is not media, lacks the track that is needed, or is damaged where it is read."""


class NoAudioTrackError(ValueError):
    """A source without any audio track: silent by intent, unlike a broken track, which is a [`MediaError`]."""


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


def fetch_media(source: MediaSource) -> str | bytes:
    """
    Turn a source into a local path or the bytes of a file: downloads a URL, decodes a `data:` URI, takes the path out
    of a `file:` URL, reads a file object (and puts its position back).

    Every function here does this by itself; call it first when one source is read more than once.

    Raises:
        MediaError: The download fails, the `data:` URI is malformed, or the `file:` URL is of another host.
        TypeError: The source is of another type.
    """
    if isinstance(source, str):
        if source.startswith(("http://", "https://")):
            try:
                return get_session().get(source, follow_redirects=True, timeout=30).raise_for_status().content
            except (httpx.HTTPError, OSError) as error:
                raise MediaError(f"Could not download {source}: {error}") from error
        if source.startswith("data:"):
            header, comma, payload = source.partition(",")
            try:
                if not comma:
                    raise ValueError("it has no comma")
                if header.endswith(";base64"):
                    return base64.b64decode(payload, validate=True)
                return urllib.parse.unquote_to_bytes(payload)
            except ValueError as error:
                raise MediaError(f"The data: URI {source[:40]}... cannot be decoded: {error}.") from error
        if source.startswith("file://"):
            host, slash, path = source.removeprefix("file://").partition("/")
            if host not in ("", "localhost") or not slash:
                raise MediaError(f"{source} is not a file of this machine; local ones begin with file:///.")
            return url2pathname(slash + path)
        return source
    if isinstance(source, os.PathLike):
        return os.fsdecode(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if hasattr(source, "read") and hasattr(source, "seek"):
        position = source.tell()
        source.seek(0)
        content = source.read()
        source.seek(position)
        if isinstance(content, bytes):
            return content
        raise TypeError(f"{name_source(source)} is open as text; open it in binary mode ('rb').")
    raise TypeError(
        f"Cannot read media from {type(source).__name__}; pass a path, an http(s) or file: URL, a data: URI, bytes or "
        "a seekable binary file object."
    )


@contextmanager
def open_media(source: MediaSource) -> Iterator["av.container.InputContainer"]:
    """
    Open a source with PyAV; a context manager.

    Raises:
        FileNotFoundError: There is no such file.
        MediaError: The source is a folder, empty, or not (complete) media.
    """
    av = import_av()
    media, name = fetch_media(source), name_source(source)
    if isinstance(media, str):
        if os.path.isdir(media):
            raise MediaError(f"{name} is a folder; only video frames can be read from a folder (of image files).")
        if not os.path.exists(media):
            hint = " `~` is not expanded; pass os.path.expanduser(path)." if media.startswith("~") else ""
            raise FileNotFoundError(f"There is no media file {name}.{hint}")
    if (os.path.getsize(media) if isinstance(media, str) else len(media)) == 0:
        raise MediaError(f"{name} is empty.")
    # The prefix keeps FFmpeg from taking a path such as "12:30.mp4" for the protocol "12".
    file = f"file:{media}" if isinstance(media, str) else io.BytesIO(media)
    # Until PyAV 19 a title in another encoding than UTF-8 was an error unless told otherwise.
    leniency = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:
        container = av.open(file, options={"format_whitelist": _FORMATS}, **leniency)
    except av.error.FFmpegError as error:
        raise MediaError(
            f"{name} is not a video or audio file that FFmpeg can read, or it is cut off before its index "
            f"({error.strerror})."
        ) from error
    with container:
        yield container


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
    media, name = fetch_media(source), name_source(source)
    if isinstance(media, str) and os.path.isdir(media):
        paths = _list_images(media)
        with Image.open(paths[0]) as image:
            width, height = image.size
        return VideoMetadata(
            len(paths),
            fps=FOLDER_FPS,
            width=width,
            height=height,
            duration=len(paths) / FOLDER_FPS,
            video_backend="pil",
        )
    with open_media(media) as container:
        stream = _video_stream(container, name)
        table = read_frame_table(container, stream)
        fps = GIF_FPS if container.format.name == "gif" else float(stream.average_rate or stream.guessed_rate or 0)
        duration = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
    if table is None or table.frames is not None:
        _check_video_end(media, name, sample_range(start, end, sampling_rate=1000)[1])
    with open_media(media) as container:
        frames = decode_all(container, _video_stream(container, name))
        first = next(frames, None)
        if first is None:
            raise MediaError(f"No frame of {name} can be decoded; the file is damaged or its codec is not supported.")
        transposed, _, _ = get_orientation(first)
        width, height = (first.height, first.width) if transposed else (first.width, first.height)
        num_frames = 1 + sum(1 for _ in frames) if table is None else table.num_frames
    if fps == 0:
        fps = num_frames / duration if duration else GIF_FPS
    if duration is None or container.format.name == "gif":
        duration = num_frames / fps
    return VideoMetadata(num_frames, fps=fps, width=width, height=height, duration=duration, video_backend="pyav")


def read_frames(
    source: MediaSource,
    indices: Sequence[int] | np.ndarray,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
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
    media, name = fetch_media(source), name_source(source)
    indices = [int(index) for index in indices]
    if not indices:
        raise ValueError("`indices` is empty; name at least one frame.")
    if min(indices) < 0:
        raise IndexError(f"Frame {min(indices)} of {name} was asked for; frames are numbered from 0.")
    transform = transform or (lambda frame: frame)
    if isinstance(media, str) and os.path.isdir(media):
        frames = _read_images(media, set(indices), transform)
    else:
        frames = _read_video(media, name, set(indices), transform)
    result = [frames[index] for index in indices]
    return torch.stack(result) if len({frame.shape for frame in result}) == 1 else result


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
        frames = _decode_audio(container, stream, name, None if last is None else last / rate)
        pieces = list(_cut_out(map(_frame_samples, frames), first, last))
        rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
    return np.concatenate(pieces, axis=1) if pieces else np.zeros((channels, 0)), rate


def read_audio_track(
    source: MediaSource, sampling_rate: int = 16000, start: float | None = None, end: float | None = None
) -> np.ndarray:
    """
    Read the sound of a video: mixed down to mono and resampled, the samples that
    `ffmpeg -i source -ac 1 -ar 16000 -f s16le -` writes.

    The track is decoded from its beginning up to `end`. Seeking would be faster but not exact: AAC decoders fill noise
    bands from a random generator that runs on from the first packet.

    Args:
        sampling_rate: In Hz.
        start, end: Part to read, in seconds from the first frame of the video (from the first sample where there is
            no video). Empty where the sound has ended before.

    Returns:
        `float32` (samples,) in [-1, 1): 16-bit samples divided by 32768.

    Raises:
        NoAudioTrackError: The source has no audio track.
        MediaError: The track cannot be decoded, or it ends clearly before `end` and what its file announces.
    """
    name = name_source(source)
    with open_media(source) as container:
        stream = _audio_stream(container, name)
        first, last = sample_range(start, end, sampling_rate, offset=_audio_offset(container, stream))
        frames = _decode_audio(container, stream, name, None if last is None else last / sampling_rate)
        pieces = list(_cut_out(_resample(frames, sampling_rate), first, last))
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.int16)
    return samples.astype(np.float32) / 32768.0


# Frames


def _read_video(
    media: str | bytes, name: str, wanted: set[int], transform: Callable[[torch.Tensor], torch.Tensor]
) -> dict[int, torch.Tensor]:
    with open_media(media) as container:
        stream = _video_stream(container, name)
        table = read_frame_table(container, stream)
        if table is not None:
            _check_index(max(wanted), table.num_frames, name)
            runs = plan_runs(container, stream, table, wanted)

    def convert(decode: Callable, targets: Any, num_threads: int = 1) -> dict[int, torch.Tensor]:
        to_tensor = FrameConverter()
        with open_media(media) as container:
            stream = _video_stream(container, name)
            stream.thread_count, stream.thread_type = num_threads, "AUTO"
            return {index: transform(to_tensor(frame)) for index, frame in decode(container, stream, targets)}

    if table is None:
        frames = convert(decode_indices, wanted)  # one thread: FFmpeg's Theora decoder is not exact with several
        if max(wanted) not in frames:
            raise IndexError(f"Frame {max(wanted)} of {name} was asked for, but the video has fewer frames.")
        return frames

    num_threads = torch.get_num_threads()
    num_workers = min(len(runs), num_threads)
    if num_workers > 1:
        parts = [runs[worker::num_workers] for worker in range(num_workers)]
        with ThreadPoolExecutor(num_workers) as pool:
            results = pool.map(lambda part: convert(decode_runs, part, num_threads // num_workers), parts)
            frames = {index: frame for result in results for index, frame in result.items()}
    else:
        frames = convert(decode_runs, runs, num_threads)
    # A seek may have missed, and frames may need more than their group (intra refresh): decode from the beginning.
    missing = {timestamp: i for run in runs for timestamp, i in run.targets.items() if i not in frames}
    if missing:
        frames |= convert(decode_timestamps, missing, num_threads)
    if len(frames) < len(wanted):
        raise MediaError(
            f"{name} is cut off or damaged: only {len(frames)} of the {len(wanted)} frames asked for can be decoded "
            f"(frame {min(wanted - set(frames))} cannot; the file announces {table.num_frames} frames)."
        )
    return frames


def _list_images(folder: str) -> list[str]:
    suffixes = Image.registered_extensions()
    paths = [os.path.join(folder, file) for file in sorted(os.listdir(folder))]
    paths = [path for path in paths if os.path.splitext(path)[1].lower() in suffixes]
    if not paths:
        raise MediaError(f"The folder {folder!r} holds no image files; it cannot be read as the frames of a video.")
    return paths


def _read_images(
    folder: str, wanted: set[int], transform: Callable[[torch.Tensor], torch.Tensor]
) -> dict[int, torch.Tensor]:
    paths = _list_images(folder)
    _check_index(max(wanted), len(paths), repr(folder))
    frames = {}
    for index in wanted:
        try:
            with Image.open(paths[index]) as image:
                frames[index] = transform(torch.from_numpy(np.array(image.convert("RGB"))))
        except (OSError, SyntaxError) as error:
            raise MediaError(f"The image {paths[index]!r} cannot be read: {error}.") from error
    return frames


def _video_stream(container: "av.container.InputContainer", name: str) -> "av.VideoStream":
    stream: Any = container.streams.best("video")
    if stream is None or stream.disposition & import_av().stream.Disposition.attached_pic:
        raise MediaError(f"{name} has no video track.")
    if stream.codec_context is None:
        raise MediaError(f"The video track of {name} has a codec that FFmpeg does not know.")
    return stream


def _check_video_end(media: str | bytes, name: str, last: int | None):
    """Refuse a video that is cut off, unless it lasts for `last` milliseconds."""
    with open_media(media) as container:
        stream = _video_stream(container, name)
        begin = float((stream.start_time or 0) * (stream.time_base or 0))
        reached = max(map(packet_end, demux_packets(container, stream)), default=0.0)
        if last is None or reached - begin < last / 1000:
            _check_end(container, stream, name, reached)


def _check_end(
    container: "av.container.InputContainer", stream: "av.VideoStream | av.AudioStream", name: str, reached: float
):
    announced = announced_end(container, stream, reached)
    if announced is not None:
        raise MediaError(
            f"{name} is cut off: its {stream.type} track ends after {reached:.1f} of the {announced:.1f} seconds that "
            "the file announces. Get the whole file again, or re-encode what is left, or pass an `end` before that."
        )


def _check_index(index: int, num_frames: int, name: str):
    if index >= num_frames:
        raise IndexError(f"Frame {index} of {name} was asked for, but it has only the frames 0 to {num_frames - 1}.")


# Sound


def _audio_stream(container: "av.container.InputContainer", name: str) -> "av.AudioStream":
    stream: Any = container.streams.best("audio")
    if stream is None:
        raise NoAudioTrackError(f"{name} has no audio track.")
    if stream.codec_context is None:
        raise MediaError(f"The audio track of {name} has a codec that FFmpeg does not know.")
    return stream


def _decode_audio(
    container: "av.container.InputContainer", stream: "av.AudioStream", name: str, end: float | None
) -> Iterator["av.AudioFrame"]:
    """Decode a track, without what an encoder appended to fill its last packet; it must last for `end` seconds, or as
    long as its file announces."""
    av = import_av()
    # MP4 says how long a track is, in samples; the frame that reaches beyond that is padded.
    left = stream.duration
    if not container.format.name.startswith("mov") or stream.time_base != Fraction(
        1, stream.codec_context.sample_rate
    ):
        left = None
    num_packets, num_broken, num_samples, reached = 0, 0, 0, 0.0
    for packet in chain(demux_packets(container, stream), [None]):  # None: what the decoder holds back
        num_packets += 1
        if packet is not None:
            reached = max(reached, packet_end(packet))
        try:
            frames = stream.codec_context.decode(packet)
        except av.error.FFmpegError:
            num_broken += 1
            continue
        for frame in frames:
            if left is not None:
                if left == 0:  # PyAV has no empty frames
                    break
                frame = _shorten(frame, left)
                left -= frame.samples
            num_samples += frame.samples
            yield frame
    if num_samples == 0:
        raise MediaError(f"The audio track of {name} cannot be decoded; it is empty or damaged.")
    seconds = num_samples / stream.codec_context.sample_rate
    if end is None or seconds < end:
        _check_end(container, stream, name, max(seconds, reached))
    if num_broken:
        logger.warning(f"{num_broken} of {num_packets} packets of the audio of {name} are damaged and were left out.")


def _shorten(frame: "av.AudioFrame", num_samples: int) -> "av.AudioFrame":
    """A frame without the samples beyond the first `num_samples`."""
    if frame.samples <= num_samples:
        return frame
    size = num_samples if frame.format.is_planar else num_samples * frame.layout.nb_channels
    samples: Any = np.ascontiguousarray(frame.to_ndarray()[:, :size])
    shortened = type(frame).from_ndarray(samples, format=frame.format.name, layout=frame.layout.name)
    shortened.sample_rate = frame.sample_rate
    return shortened


def _resample(frames: Iterator["av.AudioFrame"], sampling_rate: int) -> Iterator[np.ndarray]:
    """Mix down to mono and resample: pieces of `int16` (samples,)."""
    av = import_av()
    resampler: Any = None
    setup = None
    for frame in frames:
        if setup != (frame.format.name, frame.layout.name, frame.sample_rate):  # may change within a broadcast
            if resampler is not None:
                yield from (piece.to_ndarray()[0] for piece in resampler.resample(None))
            setup = (frame.format.name, frame.layout.name, frame.sample_rate)
            # 16-bit, not float: only for integers does the downmix keep the sum of the channels below full scale.
            resampler = av.AudioResampler(format="s16", layout="mono", rate=sampling_rate, frame_size=sampling_rate)
        frame.pts = None  # samples follow each other without regard to gaps in the timestamps, as in ffmpeg
        yield from (piece.to_ndarray()[0] for piece in resampler.resample(frame))
    if resampler is not None:
        yield from (piece.to_ndarray()[0] for piece in resampler.resample(None))


def _cut_out(pieces: Iterable[np.ndarray], first: int, last: int | None) -> Iterator[np.ndarray]:
    """Samples `first` to `last` of a sound that comes in pieces (..., samples)."""
    position = 0
    for piece in pieces:
        begin, position = position, position + piece.shape[-1]
        if position > first:
            yield piece[..., max(first - begin, 0) : None if last is None else last - begin]
        if last is not None and position >= last:
            break


def _frame_samples(frame: "av.AudioFrame") -> np.ndarray:
    """Samples of a frame as `float64` (channels, samples) in [-1, 1)."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    zero, full_scale = _SAMPLE_SCALES.get(frame.format.packed.name, (0, 1))
    return (samples.astype(np.float64) - zero) / full_scale


def _audio_offset(container: "av.container.InputContainer", stream: "av.AudioStream") -> float:
    """Seconds by which the sound begins after the first frame of the video."""
    starts = [
        track.start_time * track.time_base
        for track in (stream, container.streams.best("video"))
        if track is not None and track.start_time is not None and track.time_base is not None
    ]
    return float(starts[0] - starts[1]) if len(starts) == 2 else 0.0


def sample_range(
    start: float | None, end: float | None, sampling_rate: int, offset: float = 0.0
) -> tuple[int, int | None]:
    """
    First sample of a part of a sound and the sample after it, with the original's rules for odd ranges
    (`process_video`); see [`read_audio_track`]. `offset`: seconds by which the sound begins after second 0.
    """
    if start is not None and end is not None:
        start, end = sorted((max(start, 0.0), max(end, 0.0)))
        if start == end:
            end = start + 1
    first = 0 if start is None else max(round((start - offset) * sampling_rate), 0)
    return first, None if end is None else max(round((end - offset) * sampling_rate), first)


def name_source(source: MediaSource) -> str:
    """What to call a source in an error message."""
    if isinstance(source, str) and source.startswith("data:"):
        return f"the data: URI ({len(source)} characters)"
    if isinstance(source, (str, os.PathLike)):
        path = os.fsdecode(source)
        return repr(path if len(path) <= 300 else path[:300] + "...")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"the media in memory ({len(source)} bytes)"
    return repr(source.name) if hasattr(source, "name") else f"the {type(source).__name__} object"


__all__ = [
    "MediaError",
    "MediaSource",
    "NoAudioTrackError",
    "VideoClip",
    "check_clip_options",
    "fetch_media",
    "has_audio",
    "is_video_clip",
    "name_source",
    "open_media",
    "read_audio_file",
    "read_audio_track",
    "read_frames",
    "read_video_metadata",
    "sample_range",
]
