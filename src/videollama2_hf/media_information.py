"""What a media file holds, and what a model takes of it: frames, seconds of sound, tokens."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.video_utils import VideoMetadata

from .captioning import find_kind
from .feature_extraction_videollama2 import VideoLlama2FeatureExtractor, full_clip_windows, reference_clip_windows
from .image_processing_videollama2 import load_image
from .information import format_bytes
from .media_files_videollama2 import import_av
from .media_videollama2 import MediaError, fetch_media, open_media, read_audio_track, read_video_metadata
from .processing_videollama2 import VideoLlama2Processor


_IN_WORDS = {
    "codec": "{}",
    "size": "{0[0]} x {0[1]}",
    "duration": "{:.2f} s",
    "num_frames": "{} frames",
    "fps": "{:.4g} frames per second",
    "sampling_rate": "{} Hz",
    "channels": "{} channels",
}


@dataclass
class MediumInformation:
    """
    What a media file holds, and what a model takes of it.

    Args:
        name: Path or URL.
        kind: `"image"`, `"video"` or `"audio"`.
        size: Bytes of the file; `None` of folders and URLs.
        format: Of the container.
        streams: A dict for each: `type`, `codec`, and `size` (width, height), `fps`, `num_frames`, `duration` or
            `sampling_rate`, `channels`, `duration`.
        taken: By a model: `model`, `frames` (their numbers), `times` (seconds), `windows` of sound (start, end) in
            seconds, and `tokens` by modality; empty without one.
        notes: What else is to be known.
    """

    name: str
    kind: str
    size: int | None
    format: str
    streams: list[dict[str, Any]]
    taken: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """All of it, for people."""
        size = "" if self.size is None else f", {format_bytes(self.size)}"
        lines = [f"{self.name}: {self.kind} ({self.format}{size})", ""]
        for stream in self.streams:
            values = [text.format(stream[name]) for name, text in _IN_WORDS.items() if name in stream]
            lines.append(f"{stream['type']}: {', '.join(values)}")
        if self.kind == "video" and not any(stream["type"] == "audio" for stream in self.streams):
            lines.append("no sound")
        if self.taken:
            lines += ["", f"{self.taken.get('model', 'the model')} takes of it:"]
            if self.taken["frames"]:
                times = ", ".join(f"{time:.2f}" for time in self.taken["times"])
                lines.append(f"{len(self.taken['frames'])} frames, at {times} s")
            if self.taken["windows"]:
                windows = ", ".join(f"{start:.2f} to {end:.2f}" for start, end in self.taken["windows"])
                lines.append(f"sound from {windows} s")
            counts = " + ".join(f"{count} ({name})" for name, count in self.taken["tokens"].items())
            lines.append(f"{sum(self.taken['tokens'].values())} tokens: {counts}")
        return "\n".join(lines + [f"Note: {note}" for note in self.notes])


def describe_medium(
    source: str | os.PathLike, processor: VideoLlama2Processor | None = None, num_frames: int | None = None
) -> MediumInformation:
    """
    What a file holds, and what a processor takes of it.

    Args:
        source: A file, a URL, or a folder of frames.
        processor: The model's. `None`: only the file.
        num_frames: In place of the processor's own number.

    Raises:
        FileNotFoundError: There is no such file.
        MediaError: It is no media file, or is damaged where it is read.
    """
    name = os.fspath(source)
    kind = find_kind(name.partition("?")[0])
    media: str | bytes | None
    size = os.path.getsize(name) if os.path.isfile(name) else None
    if kind == "image":
        image = load_image(name)
        stream = {"type": "image", "codec": image.mode, "size": [image.width, image.height]}
        information = MediumInformation(name, kind, size, Path(name.partition("?")[0]).suffix.lstrip("."), [stream])
        media = None
    else:
        media = fetch_media(name)  # a URL once
        format, streams = _read_streams(media, name)
        kinds = {stream["type"] for stream in streams}
        information = MediumInformation(name, "video" if "video" in kinds else "audio", size, format, streams)
    if processor is not None:
        _add_taken(information, media, processor, num_frames)
    return information


def _read_streams(media: str | bytes, name: str) -> tuple[str, list[dict[str, Any]]]:
    """Format of the container and the tracks that are read of it: the best of video and of sound."""
    if isinstance(media, str) and os.path.isdir(media):
        return "folder of frames", [_describe_video(media, "images")]
    streams: list[dict[str, Any]] = []
    with open_media(media) as container:
        format = container.format.long_name
        video: Any = container.streams.best("video")
        audio: Any = container.streams.best("audio")
        if video is not None and not video.disposition & import_av().stream.Disposition.attached_pic:
            streams.append(_describe_video(media, _codec(video)))
        if audio is not None:
            duration = audio.duration * audio.time_base if audio.duration else (container.duration or 0) / 1e6
            context = audio.codec_context
            stream = {"type": "audio", "codec": _codec(audio), "duration": float(duration)}
            streams.append(stream | {"sampling_rate": context.sample_rate, "channels": context.channels})
    if not streams:
        raise MediaError(f"{name} has neither a video nor an audio track.")
    return format, streams


def _describe_video(media: str | bytes, codec: str) -> dict[str, Any]:
    metadata = read_video_metadata(media)
    return {
        "type": "video",
        "codec": codec,
        "size": [metadata.width, metadata.height],
        "duration": metadata.duration,
        "fps": metadata.fps,
        "num_frames": metadata.total_num_frames,
    }


def _codec(stream: Any) -> str:
    return "unknown to FFmpeg" if stream.codec_context is None else stream.codec_context.name


def _add_taken(
    information: MediumInformation,
    media: str | bytes | None,
    processor: VideoLlama2Processor,
    num_frames: int | None,
) -> None:
    """What a processor takes, with the processor's own sampling."""
    streams = {stream["type"]: stream for stream in information.streams}
    taken: dict[str, Any] = {"frames": [], "times": [], "windows": [], "tokens": {}}
    count = processor._get_num_multimodal_tokens
    if information.kind == "image":
        taken["tokens"]["image"] = count(image_sizes=[(1, 1)]).num_image_tokens[0]
    if "video" in streams:
        video = streams["video"]
        metadata = VideoMetadata(video["num_frames"], fps=video["fps"])
        indices = processor.video_processor.sample_frames(metadata, num_frames=num_frames)
        taken["frames"] = indices.tolist()
        taken["times"] = [index / video["fps"] for index in taken["frames"]]
        taken["tokens"]["video"] = count(video_sizes=[(len(indices), 1, 1)]).num_video_tokens[0]
        hears = processor.has_audio and processor.load_audio_from_video
    else:
        hears = processor.has_audio
    if "audio" in streams and not hears:
        information.notes.append("This model does not hear; the sound is left out.")
    if information.kind != "image" and hears:
        policy = processor.missing_audio_policy
        if "audio" in streams:
            assert media is not None
            taken["windows"] = _find_windows(media, processor.feature_extractor, "video" in streams)
        elif policy == "silence":
            information.notes.append("There is no sound track: it is heard as silence, as in training.")
        else:
            information.notes.append(f"There is no sound track; the processor's missing_audio is {policy!r}.")
        if "audio" in streams or policy == "silence":
            taken["tokens"]["audio"] = count(audio_lengths=[0]).num_audio_tokens[0]
    information.taken = taken


def _find_windows(
    media: str | bytes, extractor: VideoLlama2FeatureExtractor, is_video: bool
) -> list[tuple[float, float]]:
    """Seconds of the track that are heard, as `VideoLlama2FeatureExtractor` chooses them."""
    counted: list[int] = []

    def note(num_samples: int) -> list[tuple[int, int]]:
        counted.append(num_samples)
        return [(0, 1)]

    rate = extractor.sampling_rate
    read_audio_track(media, rate, select=note)
    if extractor.audio_mode == "full":
        windows = full_clip_windows(counted[-1], rate, extractor.num_clips, extractor.chunk_length)
    elif is_video:
        windows = reference_clip_windows(counted[-1], rate, extractor.num_clips, extractor.clip_duration)
    else:
        windows = [(0, round(extractor.chunk_length * rate))]
    return [(start / rate, min(end, counted[-1]) / rate) for start, end in windows]


__all__ = ["MediumInformation", "describe_medium"]
