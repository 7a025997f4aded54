"""Media files: opening them, naming them in errors, the samples of a range of time, and whether a track is cut off."""

import base64
import io
import os
import re
import struct
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO
from urllib.request import url2pathname

from huggingface_hub import get_session
from huggingface_hub.utils import httpx


if TYPE_CHECKING:
    import av

# What every function here accepts: a path, an http(s) or `file:` URL, a `data:` URI, the bytes of a file, or a
# seekable binary file object. A video may also be a folder of image files, or an animated GIF.
MediaSource = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO

# FFmpeg tries these formats only. Left out on purpose: playlists and lists of files (hls, dash, concat, image
# patterns), with which a file from a stranger could make this process open other files or addresses, and text formats
# that FFmpeg would render as pictures.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,mpeg,mpegts,mpegvideo,ogg,asf,gif,apng,rm,wtv,dv,mxf,nut,"
    "swf,ivf,obu,h264,hevc,m4v,vc1,yuv4mpegpipe,wav,w64,aiff,au,caf,flac,mp3,aac,ac3,eac3,dts,amr,ape,wv,tta,dsf,voc"
)
# Headers that count the samples or frames of a track, and those whose duration of it FFmpeg passes on. Elsewhere the
# duration that FFmpeg gives is that of what it finds, or a guess from the size of the file.
_COUNTING_FORMATS = ("avi", "aiff", "caf")
_TIMING_FORMATS = ("flac", "au", "tta", "wv")


class MediaError(ValueError):
    """A source that is not media, lacks the track that is needed, or is damaged where it is read."""


class NoAudioTrackError(ValueError):
    """A source without any audio track: silent by intent, unlike a broken track, which is a [`MediaError`]."""


def import_av():
    """Import PyAV when the first file is opened, so that other uses of this package do not wait for it."""
    try:
        import av
        import av.stream
        import av.video.reformatter
    except ImportError as error:
        raise ImportError("Reading video and audio files needs PyAV: `pip install av`.") from error
    return av


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


def packet_end(packet: "av.Packet") -> int:
    """When the content of a packet ends, in the time base of its stream; 0 if the packet does not say."""
    timestamp = packet.dts if packet.pts is None else packet.pts
    return 0 if timestamp is None else timestamp + (packet.duration or 0)


def announced_end(
    container: "av.container.InputContainer", stream: "av.VideoStream | av.AudioStream", end: float
) -> float | None:
    """
    Where a track should end if it is cut off: the seconds that the file announces where that is clearly more than
    `end`, which was reached. `None` where all is there, and where the format announces nothing (MPEG, Ogg, GIF, raw
    streams, whatever was written to a pipe).

    Encoders' padding, edits and rounded headers make a difference of up to 5 % or half a second ordinary. Only MP4
    says for every packet whether it is there.
    """
    if container.format.name.startswith("mov") and any(e.pos + e.size > container.size for e in stream.index_entries):
        return float((stream.duration or 0) * (stream.time_base or 0))
    announced = _announced_duration(container, stream, end)
    return announced if announced is not None and announced - end > max(0.5, 0.05 * announced) else None


def _announced_duration(
    container: "av.container.InputContainer", stream: "av.VideoStream | av.AudioStream", end: float
) -> float | None:
    kind = container.format.name
    if kind in _COUNTING_FORMATS:
        # FFmpeg leaves 2 ** 30 in an AVI file that it cannot go back in. There, late sound counts what comes before it
        # too, so that only as much of it as there is video is sure.
        tracks = [stream, *container.streams.video[:1]] if kind == "avi" else [stream]
        return min((float(t.frames * (t.time_base or 0)) for t in tracks if 0 < t.frames < 2**30), default=None)
    # An MP3 file says how long it is in the header that LAME and FFmpeg write, and only there when it starts. An MP4
    # file that does not count its packets is in fragments, and may have an index of these.
    if (
        kind in _TIMING_FORMATS
        or (kind == "mp3" and stream.start_time)
        or (kind.startswith("mov") and stream.frames == 0)
    ):
        return float(stream.duration * (stream.time_base or 0)) if stream.duration else None
    if kind.startswith("matroska"):
        # The tag is of the track; a tool that cuts a file may leave it as it was.
        tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
        if tag is None or not container.duration:
            return None
        hours, minutes, seconds = map(float, tag.groups())
        return min(3600 * hours + 60 * minutes + seconds, container.duration / 1e6)
    if kind == "wav" and stream.codec_context.bit_rate:
        # FFmpeg corrects the size in the header to that of the file. 0 and the largest stand for an unknown one.
        if container.file is None:
            with open(container.name.removeprefix("file:"), "rb") as file:
                head = file.read(8)
        else:
            head = bytes(container.file.file.getbuffer()[:8])
        size = struct.unpack("<I", head[4:])[0] + 8
        if head[:4] == b"RIFF" and container.size < size < 0x7FFF0000:
            return end + (size - container.size) * 8 / stream.codec_context.bit_rate
    return None


def check_end(
    container: "av.container.InputContainer", stream: "av.VideoStream | av.AudioStream", name: str, reached: float
):
    announced = announced_end(container, stream, reached)
    if announced is not None:
        raise MediaError(
            f"{name} is cut off: its {stream.type} track ends after {reached:.1f} of the {announced:.1f} seconds that "
            "the file announces. Get the whole file again, or re-encode what is left, or pass an `end` before that."
        )
