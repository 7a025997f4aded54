"""
Decoding some frames of an open video, exactly: which packets show which frames, and what must be decoded for them.

A *group* is a keyframe and the packets up to the next keyframe, in the order in which they are decoded. The *index* of
a frame counts frames in the order in which they are shown. *Timestamps* are in the time base of the stream.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils import logging

from .media_files_videollama2 import import_av, packet_end


if TYPE_CHECKING:
    import av

logger = logging.get_logger(__name__)

# Codecs of which a packet becomes one frame, or says that it does not (VP8), so that packets can be counted in place
# of frames. Others have packets without a frame (the placeholders of MPEG-4 in AVI) and are counted by decoding.
FRAME_PER_PACKET = (
    *("h264", "hevc", "vp8", "vp9", "av1", "mpeg1video", "mpeg2video", "mjpeg", "gif", "prores", "dnxhd"),
    *("ffv1", "huffyuv", "ffvhuff", "utvideo", "rawvideo", "png"),
)
# Decoders that can leave out frames that no other frame refers to, and be told so packet by packet.
SKIPPING_DECODERS = ("h264", "hevc", "vp8", "vp9", "mpeg1video", "mpeg2video")


@dataclass(frozen=True)
class Group:
    first_index: int  # of the frames that its packets show
    num_packets: int
    num_readable: int  # fewer than num_packets where the file is cut off
    timestamp: int  # to seek to the keyframe
    position: int  # byte offset of the keyframe, to recognise it after seeking


@dataclass(frozen=True)
class FrameTable:
    """
    Which packets show which frames: `frames` are (timestamp, number of the group to decode from), and the last packet
    ends at `end`. Both are `None` where only an index in decoding order was read; [`plan_runs`] then reads the packets
    of the groups that matter.
    """

    num_frames: int
    groups: list[Group]
    frames: list[tuple[int, int]] | None = None
    end: int | None = None


@dataclass(frozen=True)
class Run:
    """Frames to decode in one go from the start of a group: their indices by timestamp."""

    start: Group
    targets: dict[int, int]


def demux_packets(
    container: "av.container.InputContainer", stream: "av.VideoStream | av.AudioStream", start: Group | None = None
) -> Iterator["av.Packet"]:
    """
    Packets of one stream, up to the end of what can be read. After a seek to the group `start`: from its keyframe on,
    or none if the seek went past it.
    """
    av = import_av()
    for other in container.streams:
        if other.index != stream.index:
            other.discard = av.stream.Discard.all
    started = start is None
    with suppress(av.error.FFmpegError):
        for packet in container.demux(stream):
            if packet.size == 0:  # the end of the file; decoders are flushed by their callers
                continue
            if not started and start is not None:
                if packet.pos is None or packet.pos > start.position:
                    return
                started = packet.pos == start.position
            if started:
                yield packet


def decode_packet(stream: "av.VideoStream", packet: "av.Packet | None") -> list["av.VideoFrame"]:
    """Decode one packet, or what the decoder holds back (`None`). Damaged packets are passed over, as players do."""
    try:
        return stream.codec_context.decode(packet)
    except import_av().error.FFmpegError as error:
        logger.warning_once(
            f"The video {stream.container.name} is damaged ({error}); frames that depend on what is lost show errors."
        )
        return []


def decode_all(container: "av.container.InputContainer", stream: "av.VideoStream") -> Iterator["av.VideoFrame"]:
    """Decode every frame from the first packet on, in the order in which they are shown."""
    for packet in demux_packets(container, stream):
        yield from decode_packet(stream, packet)
    yield from decode_packet(stream, None)


def decode_indices(
    container: "av.container.InputContainer", stream: "av.VideoStream", indices: Collection[int]
) -> Iterator[tuple[int, "av.VideoFrame"]]:
    """Decode all frames up to the last of the given indices, by counting, and give those, as (index, frame)."""
    last = max(indices)
    for index, frame in enumerate(decode_all(container, stream)):
        if index in indices:
            yield index, frame
        if index == last:
            break


def decode_timestamps(
    container: "av.container.InputContainer", stream: "av.VideoStream", targets: dict[int, int]
) -> Iterator[tuple[int, "av.VideoFrame"]]:
    """Decode all frames from the first and give those with the given timestamps, as (index, frame)."""
    num_left = len(targets)
    for frame in decode_all(container, stream):
        if frame.pts in targets:
            yield targets[frame.pts], frame
            num_left -= 1
            if num_left == 0:
                break


def decode_runs(
    container: "av.container.InputContainer", stream: "av.VideoStream", runs: Collection[Run]
) -> Iterator[tuple[int, "av.VideoFrame"]]:
    """Decode the frames of runs, as (index, frame), and of the others only those that these depend on."""
    for run in runs:
        container.seek(run.start.timestamp, stream=stream)
        keyframe, is_clean, num_unread = None, False, len(run.targets)
        for packet in demux_packets(container, stream, run.start):
            if keyframe is None:
                # A decoder that does not show the keyframe itself (unless an edit list hides it) cannot start there:
                # it is one step of an intra refresh.
                keyframe, is_clean = packet.pts, packet.is_discard
            is_target = packet.pts in run.targets
            num_unread -= is_target
            if stream.codec_context.name in SKIPPING_DECODERS:
                stream.codec_context.skip_frame = "DEFAULT" if is_target else "NONREF"
            frames = decode_packet(stream, packet)
            if num_unread == 0:
                frames += decode_packet(stream, None)
            for frame in frames:
                is_clean = is_clean or frame.pts == keyframe
                if is_clean and frame.pts in run.targets and not frame.is_corrupt:
                    yield run.targets[frame.pts], frame
            if num_unread == 0:
                break


def read_frame_table(container: "av.container.InputContainer", stream: "av.VideoStream") -> FrameTable | None:
    """Find out which packets show which frames, without decoding. None where only decoding can tell."""
    if stream.codec.canonical_name not in FRAME_PER_PACKET or container.format.name == "avi":  # AVI has no timestamps
        return None
    entries = stream.index_entries
    has_index = container.format.name.startswith("mov") and 0 < len(entries) == stream.frames
    packets: Iterable[tuple]
    if has_index:
        # MP4 and MOV list every packet in the order of decoding, edit lists applied.
        size = container.size
        packets = ((e.timestamp, None, e.pos, e.is_keyframe, e.is_discard, e.pos + e.size <= size) for e in entries)
    else:
        packets, last_end = [], 0
        for packet in demux_packets(container, stream):
            position = -1 if packet.pos is None else packet.pos
            if packet.pts is None or (packet.is_keyframe and position < 0):
                return None
            last_end = max(last_end, packet_end(packet))
            is_hidden = packet.is_discard
            if stream.codec.canonical_name == "vp8":
                is_hidden = is_hidden or not bytes(packet)[0] & 0x10  # show_frame, section 9.1 of RFC 6386
            timestamp = packet.pts if packet.dts is None else packet.dts
            packets.append((timestamp, packet.pts, position, packet.is_keyframe, is_hidden, True))

    starts, num_frames, frames, keyframe = [], 0, [], 0
    for timestamp, shown_at, position, is_keyframe, is_hidden, is_readable in packets:
        if is_keyframe:
            starts.append([num_frames, 0, 0, timestamp, position])
            keyframe = shown_at
        elif not starts:
            return None
        starts[-1][1] += 1
        starts[-1][2] += is_readable
        if not is_hidden:
            num_frames += 1
            if not has_index:
                frames.append((shown_at, _first_group(shown_at, keyframe, len(starts) - 1)))
    if not starts or len(dict(frames)) < len(frames):
        return None
    groups = [Group(*start) for start in starts]
    return FrameTable(num_frames, groups) if has_index else FrameTable(num_frames, groups, sorted(frames), last_end)


def plan_runs(
    container: "av.container.InputContainer", stream: "av.VideoStream", table: FrameTable, indices: Collection[int]
) -> list[Run]:
    """Runs that decode the frames with the given indices, but for those missing from a file that is cut off."""
    targets: dict[int, dict[int, int]] = {}
    if table.frames is not None:
        for index in indices:
            timestamp, number = table.frames[index]
            targets.setdefault(number, {})[timestamp] = index
    else:
        first_indices = [group.first_index for group in table.groups]
        by_group: dict[int, list[int]] = {}
        for index in indices:
            by_group.setdefault(bisect_right(first_indices, index) - 1, []).append(index)
        for number, members in by_group.items():
            group = table.groups[number]
            keyframe, shown_at = _read_group(container, stream, group, max(members) - group.first_index)
            for index in members:
                if index - group.first_index < len(shown_at):
                    timestamp = shown_at[index - group.first_index]
                    targets.setdefault(_first_group(timestamp, keyframe, number), {})[timestamp] = index
    return [Run(table.groups[number], targets[number]) for number in sorted(targets)]


def _first_group(timestamp: int, keyframe: int, group: int) -> int:
    """Frames that are shown before the keyframe that they follow (open GOP) refer to the group before it as well."""
    return max(group - 1, 0) if timestamp < keyframe else group


def _read_group(
    container: "av.container.InputContainer", stream: "av.VideoStream", group: Group, last: int
) -> tuple[int, list[int]]:
    """
    Timestamp of a group's keyframe, and those of its frames in the order in which they are shown, up to frame number
    `last` of the group or as far as the file goes.
    """
    container.seek(group.timestamp, stream=stream)
    keyframe, num_settled = 0, 0
    shown_at: list[int] = []
    for count, packet in enumerate(demux_packets(container, stream, group), 1):
        if count > group.num_readable or packet.pts is None or packet.dts is None:
            break
        if count == 1:
            keyframe = packet.pts
        if not packet.is_discard:
            insort(shown_at, packet.pts)
        # No later packet is shown before it is decoded: the order of what is shown before this packet's decoding time
        # is settled, and with the last packet of the group that of all.
        num_settled = len(shown_at) if count == group.num_packets else bisect_left(shown_at, packet.dts)
        if num_settled > last or count == group.num_packets:
            break
    return keyframe, shown_at[:num_settled]


class FrameConverter:
    """Turns decoded frames of one video into `uint8` RGB tensors (height, width, 3), upright. One for each thread."""

    def __init__(self):
        self.reformatter = import_av().video.reformatter.VideoReformatter()
        self.orientation: tuple[bool, bool, bool] | None = None

    def __call__(self, frame: "av.VideoFrame") -> torch.Tensor:
        if self.orientation is None:  # of one frame only: PyAV keeps those that are asked until garbage is collected
            self.orientation = get_orientation(frame)
        rgb = torch.from_numpy(self.reformatter.reformat(frame, format="rgb24").to_ndarray())
        is_transposed, *flips = self.orientation
        if is_transposed:
            rgb = rgb.transpose(0, 1)
        reversed_dims = [dim for dim, is_reversed in enumerate(flips) if is_reversed]
        return (rgb.flip(reversed_dims) if reversed_dims else rgb).contiguous()  # flip copies, also along no dimension


def get_orientation(frame: "av.VideoFrame") -> tuple[bool, bool, bool]:
    """Whether a player swaps rows and columns of a frame, then reverses the rows, and the columns."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    # The matrix maps (x, y) to (a x + c y, b x + d y); rows (a, b, _), (c, d, _). Angles between the multiples of 90
    # degrees take the nearest.
    (a, b, _), (c, d, _), _ = np.frombuffer(bytes(matrix), np.int32).reshape(3, 3).tolist()
    return (True, b < 0, c < 0) if abs(b) > abs(a) else (False, d < 0, a < 0)
