"""Videos, opened once: their metadata, and exact frames of them. Files, GIFs and folders of images."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from .frame_decoding_videollama2 import (
    FrameConverter,
    FrameTable,
    Run,
    decode_all,
    decode_indices,
    decode_packet,
    decode_runs,
    decode_timestamps,
    demux_packets,
    get_orientation,
    plan_runs,
    read_frame_table,
)
from .media_files_videollama2 import (
    MediaError,
    MediaSource,
    check_end,
    fetch_media,
    import_av,
    name_source,
    open_media,
    packet_end,
    sample_range,
)


if TYPE_CHECKING:
    import av

# Frame rates that the original assumes where a source has none of its own (videollama2/mm_utils.py, process_video).
FOLDER_FPS = 3.0
GIF_FPS = 25.0

# Called with every frame as soon as it is decoded.
Transform = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def open_video(source: MediaSource) -> Iterator["VideoReader | FolderReader"]:
    """
    Open a video to read its metadata and frames without opening it again; a context manager.

    Raises:
        FileNotFoundError: There is no such file.
        MediaError: There is no video track, or no image in a folder.
    """
    media, name = fetch_media(source), name_source(source)
    if isinstance(media, str) and os.path.isdir(media):
        yield FolderReader(media)
    else:
        with open_media(media) as container:
            yield VideoReader(media, name, container)


class VideoReader:
    """An open video; see [`open_video`]. Not to be used by several threads at a time."""

    def __init__(self, media: str | bytes, name: str, container: "av.container.InputContainer"):
        self.media = media
        self.name = name
        self.container = container
        self.stream = _video_stream(container, name)
        self.stream.thread_count = 1

    @cached_property
    def table(self) -> FrameTable | None:
        return read_frame_table(self.container, self.stream)

    def read_metadata(self, start: float | None = None, end: float | None = None) -> VideoMetadata:
        """See [`read_video_metadata`]."""
        container, stream, table = self.container, self.stream, self.table
        reached: int | None
        if table is None:
            num_frames, first, reached = self._decode_and_count()
        else:
            # Where the index was not enough, the container stands at its end.
            with nullcontext(container) if table.frames is None else open_media(self.media) as fresh:
                if table.frames is None:
                    fresh.seek(table.groups[0].timestamp, stream=stream)
                first = next(decode_all(fresh, _video_stream(fresh, self.name)), None)
            num_frames, reached = table.num_frames, table.end
        if reached is not None:
            _, last = sample_range(start, end, sampling_rate=1000)
            if last is None or float((reached - (stream.start_time or 0)) * (stream.time_base or 0)) < last / 1000:
                check_end(container, stream, self.name, float(reached * (stream.time_base or 0)))
        if first is None:
            raise MediaError(
                f"No frame of {self.name} can be decoded; the file is damaged or its codec is not supported."
            )
        transposed, _, _ = get_orientation(first)
        width, height = (first.height, first.width) if transposed else (first.width, first.height)
        is_gif = container.format.name == "gif"
        fps = GIF_FPS if is_gif else float(stream.average_rate or stream.guessed_rate or 0)
        duration = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
        if fps == 0:
            fps = num_frames / duration if duration else GIF_FPS
        if duration is None or is_gif:
            duration = num_frames / fps
        return VideoMetadata(num_frames, fps=fps, width=width, height=height, duration=duration, video_backend="pyav")

    def read_frames(
        self, indices: Sequence[int] | np.ndarray, transform: Transform | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """See [`read_frames`]."""
        wanted = _check_indices(indices, self.name)
        runs = self._plan(wanted)
        if runs is None:
            return _stack(dict(self._decode_and_find(wanted, transform)), indices)
        num_threads = torch.get_num_threads()
        num_workers = min(max(len(runs), 1), num_threads)
        parts = [runs[worker::num_workers] for worker in range(num_workers)]

        def decode(worker: int) -> dict[int, torch.Tensor]:
            # The open container decodes with one thread.
            reopen = worker > 0 or num_threads > num_workers
            with open_media(self.media) if reopen else nullcontext(self.container) as container:
                stream = _video_stream(container, self.name)
                if reopen:
                    stream.thread_count, stream.thread_type = num_threads // num_workers, "AUTO"
                return dict(_convert(decode_runs(container, stream, parts[worker]), transform))

        frames = {}
        if num_workers > 1:
            with ThreadPoolExecutor(num_workers) as pool:
                for found in pool.map(decode, range(num_workers)):
                    frames |= found
        else:
            frames = decode(0)
        missing = {timestamp: i for run in runs for timestamp, i in run.targets.items() if i not in frames}
        if missing:
            frames |= dict(self._decode_from_start(missing, transform))
        self._check_found(wanted, set(frames))
        return _stack(frames, indices)

    def iter_frames(
        self, indices: Sequence[int] | np.ndarray, transform: Transform | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """
        Read frames one at a time, as (index, frame), in the order in which they are decoded: that of the indices,
        unless the file is damaged. For videos of any length: only one frame is held. Otherwise as [`read_frames`].
        """
        wanted = _check_indices(indices, self.name)
        runs, found, to_tensor = self._plan(wanted), set(), FrameConverter()
        if runs is None:
            yield from self._decode_and_find(wanted, transform)
            return
        for number, run in enumerate(runs):
            for index, frame in _convert(decode_runs(self.container, self.stream, [run]), transform, to_tensor):
                found.add(index)
                yield index, frame
            if not found.issuperset(run.targets.values()):
                left = {time: i for r in runs[number:] for time, i in r.targets.items() if i not in found}
                for index, frame in self._decode_from_start(left, transform):
                    found.add(index)
                    yield index, frame
                break
        self._check_found(wanted, found)

    def _plan(self, wanted: set[int]) -> list[Run] | None:
        if self.table is None:
            return None
        _check_index(max(wanted), self.table.num_frames, self.name)
        return plan_runs(self.container, self.stream, self.table, wanted)

    def _decode_and_count(self) -> tuple[int, "av.VideoFrame | None", int]:
        """The number of frames, the first of them, and when the last packet ends."""
        num_frames, first, reached = 0, None, 0
        with open_media(self.media) as container:
            stream = _video_stream(container, self.name)
            # They are only counted, so need not look right.
            stream.codec_context.options = {"skip_loop_filter": "all", "skip_idct": "all"}
            for packet in chain(demux_packets(container, stream), [None]):
                reached = reached if packet is None else max(reached, packet_end(packet))
                for frame in decode_packet(stream, packet):
                    first = frame if first is None else first
                    num_frames += 1
        return num_frames, first, reached

    def _decode_and_find(self, wanted: set[int], transform: Transform | None) -> Iterator[tuple[int, torch.Tensor]]:
        """Frames by counting: of videos without a table."""
        last_found = -1
        with open_media(self.media) as container:
            stream = _video_stream(container, self.name)
            stream.thread_count = 1  # FFmpeg's Theora decoder is not exact with several
            for last_found, frame in _convert(decode_indices(container, stream, wanted), transform):
                yield last_found, frame
        if last_found < max(wanted):
            raise IndexError(f"Frame {max(wanted)} of {self.name} was asked for, but the video has fewer frames.")

    def _decode_from_start(
        self, targets: dict[int, int], transform: Transform | None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Frames that a seek has missed, or that need more than their group (intra refresh)."""
        with open_media(self.media) as container:
            stream = _video_stream(container, self.name)
            stream.thread_count, stream.thread_type = torch.get_num_threads(), "AUTO"
            yield from _convert(decode_timestamps(container, stream, targets), transform)

    def _check_found(self, wanted: set[int], found: set[int]):
        if len(found) < len(wanted) and self.table is not None:
            raise MediaError(
                f"{self.name} is cut off or damaged: only {len(found)} of the {len(wanted)} frames asked for can be "
                f"decoded (frame {min(wanted - found)} cannot; the file announces {self.table.num_frames} frames)."
            )


class FolderReader:
    """A folder of image files as a video; see [`open_video`]."""

    def __init__(self, folder: str):
        self.name = repr(folder)
        self.paths = _list_images(folder)

    def read_metadata(self, start: float | None = None, end: float | None = None) -> VideoMetadata:
        """See [`read_video_metadata`]."""
        with Image.open(self.paths[0]) as image:
            width, height = image.size
        num_frames = len(self.paths)
        duration = num_frames / FOLDER_FPS
        return VideoMetadata(num_frames, FOLDER_FPS, width, height, duration, video_backend="pil")

    def read_frames(
        self, indices: Sequence[int] | np.ndarray, transform: Transform | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """See [`read_frames`]."""
        return _stack(dict(self.iter_frames(indices, transform)), indices)

    def iter_frames(
        self, indices: Sequence[int] | np.ndarray, transform: Transform | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """See [`VideoReader.iter_frames`]."""
        wanted = _check_indices(indices, self.name)
        _check_index(max(wanted), len(self.paths), self.name)
        for index in sorted(wanted):
            try:
                with Image.open(self.paths[index]) as image:
                    frame = torch.from_numpy(np.array(image.convert("RGB")))
            except (OSError, SyntaxError) as error:
                raise MediaError(f"The image {self.paths[index]!r} cannot be read: {error}.") from error
            yield index, frame if transform is None else transform(frame)


def _convert(
    frames: Iterator[tuple[int, "av.VideoFrame"]], transform: Transform | None, to_tensor: FrameConverter | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    to_tensor = to_tensor or FrameConverter()
    for index, frame in frames:
        # Without a name, so that the pixels are not held while the next frame is decoded.
        yield index, to_tensor(frame) if transform is None else transform(to_tensor(frame))


def _stack(frames: dict[int, torch.Tensor], indices: Sequence[int] | np.ndarray) -> torch.Tensor | list[torch.Tensor]:
    result = [frames[int(index)] for index in indices]
    return torch.stack(result) if len({frame.shape for frame in result}) == 1 else result


def _list_images(folder: str) -> list[str]:
    suffixes = Image.registered_extensions()
    paths = [os.path.join(folder, file) for file in sorted(os.listdir(folder))]
    paths = [path for path in paths if os.path.splitext(path)[1].lower() in suffixes]
    if not paths:
        raise MediaError(f"The folder {folder!r} holds no image files; it cannot be read as the frames of a video.")
    return paths


def _video_stream(container: "av.container.InputContainer", name: str) -> "av.VideoStream":
    stream: Any = container.streams.best("video")
    if stream is None or stream.disposition & import_av().stream.Disposition.attached_pic:
        raise MediaError(f"{name} has no video track.")
    if stream.codec_context is None:
        raise MediaError(f"The video track of {name} has a codec that FFmpeg does not know.")
    return stream


def _check_indices(indices: Sequence[int] | np.ndarray, name: str) -> set[int]:
    wanted = {int(index) for index in indices}
    if not wanted:
        raise ValueError("`indices` is empty; name at least one frame.")
    if min(wanted) < 0:
        raise IndexError(f"Frame {min(wanted)} of {name} was asked for; frames are numbered from 0.")
    return wanted


def _check_index(index: int, num_frames: int, name: str):
    if index >= num_frames:
        raise IndexError(f"Frame {index} of {name} was asked for, but it has only the frames 0 to {num_frames - 1}.")
