"""
Decoding sound: a whole track, or parts of it without the rest where that is exact.

*Samples* are those of the track, at its own rate; *output samples* are those after resampling.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, groupby, pairwise
from math import ceil, gcd
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils import logging

from .frame_decoding_videollama2 import demux_packets
from .media_files_videollama2 import MediaError, check_end, import_av, packet_end


if TYPE_CHECKING:
    import av

logger = logging.get_logger(__name__)

# Zero and full scale of integer samples, as libsndfile maps them to [-1, 1).
_SAMPLE_SCALES = {"u8": (128, 2**7), "s16": (0, 2**15), "s32": (0, 2**31), "s64": (0, 2**63)}
# Samples that are resampled at a time: one packet at a time takes twice as long, and this much stays in the cache.
_BATCH_SIZE = 2**15
# Packets that are decoded before a part to fill the memory of the decoder, which is one packet; see `seek_parts`.
_LEAD_INS = (3, 6)
# Up to here, swresample keeps to the exact ratio of two rates (it has 1024 phases).
_MAX_OUTPUT_PERIOD = 1000


@dataclass(frozen=True)
class AudioGrid:
    """
    A track that can be decoded from any packet on, of which every packet gives the same number of samples: AAC-LC in
    MP4. `timestamps` are those of its packets and `origin` that of sample 0, in samples; `rate` is in Hz.
    """

    timestamps: range
    origin: int
    num_samples: int
    rate: int
    layout: str


@dataclass(frozen=True)
class AudioPart:
    """Samples `begin` to `end`, and which of the output samples that they give are asked for."""

    begin: int
    end: int
    window: slice


def decode_audio(
    container: "av.container.InputContainer", stream: "av.AudioStream", name: str, end: float | None
) -> Iterator["av.AudioFrame"]:
    """
    Decode a track, without what an encoder appended to fill its last packet.

    Raises:
        MediaError: Nothing can be decoded, or the track lasts neither for `end` seconds nor as long as its file
            announces.
    """
    av = import_av()
    # MP4 says how long a track is, in samples; the frame that reaches beyond that is padded.
    left = stream.duration if _counts_samples(container, stream) else None
    num_packets, num_broken, num_samples, ticks = 0, 0, 0, 0
    for packet in chain(demux_packets(container, stream), [None]):  # None: what the decoder holds back
        num_packets += 1
        if packet is not None:
            ticks = max(ticks, packet_end(packet))
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
        check_end(container, stream, name, max(seconds, float(ticks * (stream.time_base or 0))))
    if num_broken:
        logger.warning(f"{num_broken} of {num_packets} packets of the audio of {name} are damaged and were left out.")


def resample(frames: Iterable["av.AudioFrame"], sampling_rate: int) -> Iterator[np.ndarray]:
    """Mix down to mono and resample: pieces of `int16` (output samples,)."""
    av = import_av()
    # The format may change within a broadcast.
    for _, alike in groupby(frames, lambda frame: (frame.format.name, frame.layout.name, frame.sample_rate)):
        # 16-bit, not float: only for integers does the downmix keep the sum of the channels below full scale.
        resampler: Any = av.AudioResampler(format="s16", layout="mono", rate=sampling_rate)
        batch: Any = av.AudioFifo()
        for frame in chain(alike, [None]):
            if frame is not None:
                frame.pts = None  # samples follow each other without regard to gaps in the timestamps, as in ffmpeg
                batch.write(frame)
            if batch.samples >= _BATCH_SIZE or (frame is None and batch.samples):
                yield from (piece.to_ndarray()[0] for piece in resampler.resample(batch.read()))
        yield from (piece.to_ndarray()[0] for piece in resampler.resample(None))


def find_audio_grid(container: "av.container.InputContainer", stream: "av.AudioStream") -> AudioGrid | None:
    """Where the samples of a track are according to its container; `None` where that does not say."""
    entries, codec = stream.index_entries, stream.codec_context
    is_listed = _counts_samples(container, stream) and 8 < len(entries) == stream.frames
    if not is_listed or codec.name != "aac" or codec.profile != "LC":
        return None
    listed = [(entry.timestamp, entry.pos + entry.size) for entry in entries]
    first, step = listed[0][0], listed[1][0] - listed[0][0]
    timestamps = range(first, first + step * len(listed), step or 1)
    if [timestamp for timestamp, _ in listed] != list(timestamps) or max(end for _, end in listed) > container.size:
        return None
    return AudioGrid(timestamps, stream.start_time or 0, stream.duration or 0, codec.sample_rate, codec.layout.name)


def decode_head(
    container: "av.container.InputContainer", stream: "av.AudioStream", grid: AudioGrid, parts: Sequence[AudioPart]
) -> list[Any] | None:
    """
    The first frames of a track that has just been opened: those of the parts that begin too early for a lead-in.
    `None` where these or the last frames are not where the container says.
    """
    ends = [last for first, last in (_packet_range(grid, part) for part in parts) if first < max(_LEAD_INS)]
    head = _decode_packets(container, stream, grid.timestamps[: max(ends, default=4)])
    tail = _decode_packets(container, stream, grid.timestamps[-4:])
    if not head or not tail or head[0].pts != grid.origin:
        return None
    return head if tail[-1].pts + tail[-1].samples >= grid.origin + grid.num_samples else None


def plan_parts(grid: AudioGrid, sampling_rate: int, windows: Sequence[tuple[int, int]]) -> list[AudioPart] | None:
    """
    The parts that give windows, (first output sample, the one after the last). `None` where decoding everything is not
    slower, or the resampler's grid is too coarse to begin within the track.
    """
    period, output_period = _periods(grid, sampling_rate)
    if output_period > _MAX_OUTPUT_PERIOD:
        return None
    margin = ceil(_margin(grid, sampling_rate) / period)
    parts = []
    for first, last in windows:
        start = max(first // output_period - margin, 0)
        end = min((ceil(last / output_period) + margin) * period, grid.num_samples)
        window = slice(first - start * output_period, last - start * output_period)
        parts.append(AudioPart(start * period, end, window))
    return parts if 2 * len(_LEAD_INS) * sum(part.end - part.begin for part in parts) < grid.num_samples else None


def count_output_samples(grid: AudioGrid, sampling_rate: int) -> int:
    """How many output samples the whole track gives."""
    period, output_period = _periods(grid, sampling_rate)
    skipped = max((grid.num_samples - 4 * _margin(grid, sampling_rate)) // period, 0)
    silence = np.zeros((1, grid.num_samples - skipped * period), np.float32)
    frame = _make_frame(silence, grid.rate, "mono")
    return skipped * output_period + sum(map(len, resample([frame], sampling_rate)))


def seek_parts(
    container: "av.container.InputContainer",
    stream: "av.AudioStream",
    grid: AudioGrid,
    parts: Sequence[AudioPart],
    head: Sequence[Any],
) -> list[np.ndarray] | None:
    """
    The samples of parts, as [`decode_parts`] gives them, without decoding what is between them; `None` where that is
    not sure. `head` is what [`decode_head`] gives.

    What an AAC-LC decoder gives depends on the packet before, and on a random generator that runs on from the first
    packet of the track, for bands that the encoder has replaced by noise. So every part is decoded twice, from two
    packets before it, which leaves the generator in two states: a part that comes out the same has no such bands, and
    comes out as in the whole track.
    """
    pieces = []
    for part in parts:
        first, last = _packet_range(grid, part)
        if first < max(_LEAD_INS):
            versions = [_cut_parts(head, grid, [part])] * 2
        else:
            starts = (first - lead_in for lead_in in _LEAD_INS)
            frames = [_decode_packets(container, stream, grid.timestamps[start:last]) for start in starts]
            versions = [_cut_parts(version, grid, [part]) for version in frames]
        if versions[0] is None or versions[1] is None or not np.array_equal(versions[0][0], versions[1][0]):
            return None
        pieces += versions[0]
    return pieces


def decode_parts(
    frames: Iterable["av.AudioFrame"], grid: AudioGrid, parts: Sequence[AudioPart]
) -> list[np.ndarray] | None:
    """The samples of parts, `float32` (channels, samples), among all frames of a track; `None` if one is missing."""
    is_needed = np.zeros(len(grid.timestamps) + 1, bool)
    for part in parts:
        is_needed[slice(*_packet_range(grid, part))] = True
    kept, position, end = [], grid.origin, grid.origin + max(part.end for part in parts)
    for frame in frames:
        if frame.pts != position:
            return None
        if is_needed[(position - grid.timestamps.start) // grid.timestamps.step]:
            kept.append(frame)
        position += frame.samples
        if position >= end:
            break
    return _cut_parts(kept, grid, parts)


def resample_parts(
    pieces: Sequence[np.ndarray], grid: AudioGrid, parts: Sequence[AudioPart], sampling_rate: int
) -> Iterator[np.ndarray]:
    """The windows of parts, `int16` (output samples,), from the samples of these parts."""
    for piece, part in zip(pieces, parts):
        yield np.concatenate(list(resample([_make_frame(piece, grid.rate, grid.layout)], sampling_rate)))[part.window]


def cut_out(pieces: Iterable[np.ndarray], first: int, last: int | None) -> Iterator[np.ndarray]:
    """Samples `first` to `last` of a sound that comes in pieces (..., samples)."""
    position = 0
    for piece in pieces:
        begin, position = position, position + piece.shape[-1]
        if position > first:
            yield piece[..., max(first - begin, 0) : None if last is None else last - begin]
        if last is not None and position >= last:
            break


def frame_samples(frame: "av.AudioFrame") -> np.ndarray:
    """Samples of a frame as `float64` (channels, samples) in [-1, 1)."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    zero, full_scale = _SAMPLE_SCALES.get(frame.format.packed.name, (0, 1))
    return (samples.astype(np.float64) - zero) / full_scale


def _counts_samples(container: "av.container.InputContainer", stream: "av.AudioStream") -> bool:
    """Whether the container gives times in samples, as MP4 does."""
    is_mov = container.format.name.startswith("mov")
    return is_mov and stream.time_base == Fraction(1, stream.codec_context.sample_rate)


def _shorten(frame: "av.AudioFrame", num_samples: int) -> "av.AudioFrame":
    """A frame without the samples beyond the first `num_samples`."""
    if frame.samples <= num_samples:
        return frame
    size = num_samples if frame.format.is_planar else num_samples * frame.layout.nb_channels
    samples: Any = np.ascontiguousarray(frame.to_ndarray()[:, :size])
    shortened = type(frame).from_ndarray(samples, format=frame.format.name, layout=frame.layout.name)
    shortened.sample_rate, shortened.pts = frame.sample_rate, frame.pts
    return shortened


def _make_frame(samples: np.ndarray, rate: int, layout: str) -> "av.AudioFrame":
    frame = import_av().AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
    frame.sample_rate = rate
    return frame


def _periods(grid: AudioGrid, sampling_rate: int) -> tuple[int, int]:
    """Samples and output samples after which the resampler is at the same point between two samples again."""
    divisor = gcd(grid.rate, sampling_rate)
    return grid.rate // divisor, sampling_rate // divisor


def _margin(grid: AudioGrid, sampling_rate: int) -> int:
    """Samples before and behind an output sample that are more than enough to compute it (swresample takes 16)."""
    return 128 * ceil(max(grid.rate / sampling_rate, 1))


def _packet_range(grid: AudioGrid, part: AudioPart) -> tuple[int, int]:
    """Number of the packet in which a part begins, and of the one after its last."""
    offset = grid.origin - grid.timestamps.start
    return (part.begin + offset) // grid.timestamps.step, (part.end - 1 + offset) // grid.timestamps.step + 1


def _decode_packets(
    container: "av.container.InputContainer", stream: "av.AudioStream", timestamps: range
) -> list[Any]:
    """Frames of the packets with the given timestamps; none if they do not follow each other or one is damaged."""
    frames: list[Any] = []
    try:
        container.seek(timestamps[0], stream=stream)
        for packet in demux_packets(container, stream):
            if packet.pts is None or packet.pts > timestamps[-1]:
                break
            if packet.pts >= timestamps[0]:
                frames += stream.codec_context.decode(packet)
    except import_av().error.FFmpegError:
        return []
    return frames if all(a.pts + a.samples == b.pts for a, b in pairwise(frames)) else []


def _cut_parts(frames: Sequence[Any], grid: AudioGrid, parts: Sequence[AudioPart]) -> list[np.ndarray] | None:
    """The samples of parts out of the frames that hold them; `None` if one is missing or of another format."""
    pieces = []
    for part in parts:
        begin, end = grid.origin + part.begin, grid.origin + part.end
        held = [frame for frame in frames if frame.pts < end and frame.pts + frame.samples > begin]
        formats = {(frame.format.name, frame.layout.name, frame.sample_rate) for frame in held}
        if formats != {("fltp", grid.layout, grid.rate)} or sum(frame.samples for frame in held) < end - begin:
            return None
        begin -= held[0].pts
        piece = np.concatenate([frame.to_ndarray() for frame in held], axis=1)[:, max(begin, 0) : end - held[0].pts]
        if begin < 0 or piece.shape[1] != part.end - part.begin:
            return None
        pieces.append(piece)
    return pieces
