"""
What a request for a chat completion asks: its fields checked, its messages in the form that a `Session` takes, its
media as bytes that were measured before anything decodes them.
"""

import io
from collections.abc import Callable, Collection
from typing import Any

from PIL import Image

from ..media_files_videollama2 import import_av
from ..media_videollama2 import check_clip_options, fetch_media, open_media
from .errors import RequestError
from .limits import Limits
from .remote import fetch_remote


# Fields of OpenAI's requests that say nothing about the answer.
_IGNORED = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "user",
)
# Fields that would change the answer in a way this server cannot, and the values with which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "stop": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
}
_NUMBERS = {"temperature": (0.0, 2.0), "top_p": (0.0, 1.0)}
_FIELDS = (
    "messages",
    "model",
    "stream",
    "seed",
    "max_tokens",
    "max_completion_tokens",
    "chat_template_kwargs",
    *_NUMBERS,
)
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Types of content parts: kind of medium, key of the source inside the part, options.
_VIDEO_OPTIONS = ("start", "end", "num_frames", "fps", "load_audio_from_video")
_PARTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "image_url": ("image", "url", ()),
    "video_url": ("video", "url", _VIDEO_OPTIONS),
    "audio_url": ("audio", "url", ("start", "end")),
    "input_audio": ("audio", "data", ("start", "end")),
}
# Pillow knows more; some of it runs other programs (PostScript).
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_MAX_PIXELS = 64_000_000  # of an image or a frame; 8k video has 33 million


def check_fields(body: dict[str, Any], model: str, limits: Limits) -> dict[str, Any]:
    """
    The fields of a request that say something about its answer, all known and within their range.

    Raises:
        RequestError: Names the field and what is allowed.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in _NEUTRAL:
            if not any(value == neutral for neutral in _NEUTRAL[name]):
                raise RequestError(f"{name}={_show(value)} is not supported by this server. Leave it out.", param=name)
        elif name not in _FIELDS and name not in _IGNORED:
            raise RequestError(
                f"There is no field {name!r}; this server takes {', '.join(sorted(_FIELDS))}.", param=name
            )
    if given.get("model", model) != model:
        raise RequestError(
            f"There is no model {_show(given['model'])} here; this server answers as {model!r}.",
            status=404,
            code="model_not_found",
            param="model",
        )
    if not isinstance(given.get("stream", False), bool):
        raise RequestError(f"stream must be true or false, got {_show(given['stream'])}.", param="stream")
    for name, (least, most) in _NUMBERS.items():
        value = given.get(name, most)
        if not _is_number(value) or not least <= value <= most:
            raise RequestError(f"{name} must be a number from {least} to {most}, got {_show(value)}.", param=name)
    if not isinstance(given.get("seed", 0), int) or not -(2**63) <= given.get("seed", 0) < 2**63:
        raise RequestError(f"seed must be an integer of 64 bits, got {_show(given['seed'])}.", param="seed")
    for name in ("max_tokens", "max_completion_tokens"):
        value = given.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limits.max_new_tokens:
            raise RequestError(
                f"{name} must be an integer from 1 to {limits.max_new_tokens}, got {_show(value)}.", param=name
            )
    return {name: value for name, value in given.items() if name in _FIELDS}


def read_messages(
    body: dict[str, Any],
    limits: Limits,
    allowed_hosts: Collection[str] = (),
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """
    The messages of a request, their media as bytes.

    Args:
        allowed_hosts: From where media may be downloaded.
        is_stopped: Whether the request has ended; asked while downloading.

    Raises:
        RequestError: A message is malformed, or a medium is of a place that is not allowed, too large, too long, or
            cannot be read.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of at least one message.", param="messages")
    defaults = _read_template_options(body.get("chat_template_kwargs"))
    read = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError("A message is an object with a role and a content.", param=where)
        role = _ROLES.get(message["role"])
        if role is None:
            raise RequestError(
                f"The roles are {', '.join(_ROLES)}, got {_show(message['role'])}.", param=f"{where}.role"
            )
        content = message.get("content")
        if message.get("tool_calls") or not isinstance(content, (str, list)):
            raise RequestError("A message needs a content, a string or a list of parts.", param=f"{where}.content")
        blocks = []
        # Text as a part, not as a string: there, a placeholder token that somebody typed is text.
        for index, part in enumerate([{"type": "text", "text": content}] if isinstance(content, str) else content):
            place = f"{where}.content[{index}]"
            try:
                blocks.append(_read_part(part, role, defaults, limits, allowed_hosts, is_stopped))
            except RequestError as error:
                error.param = error.param or place
                raise
            except ValueError as error:  # MediaError is one
                raise RequestError(str(error), param=place) from error
        read.append({"role": role, "content": blocks})
    return read


def _read_template_options(options: Any) -> dict[str, Any]:
    """What `chat_template_kwargs`, transformers' own field, says of every video that says nothing itself."""
    options = {} if options is None else options
    if not isinstance(options, dict) or any(name not in _VIDEO_OPTIONS[2:] for name in options):
        raise RequestError(
            f"chat_template_kwargs is an object that takes {', '.join(_VIDEO_OPTIONS[2:])}, got {_show(options)}.",
            param="chat_template_kwargs",
        )
    return options


def _read_part(
    part: Any,
    role: str,
    defaults: dict[str, Any],
    limits: Limits,
    allowed_hosts: Collection[str],
    is_stopped: Callable[[], bool],
) -> dict[str, Any]:
    """A part of a message as a content block."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind not in _PARTS or not isinstance(part.get(kind), dict):
        raise RequestError(
            'A part is {"type": "text", "text": ...}, or one of '
            + ", ".join(f'{{"type": "{name}", "{name}": {{"{key}": ...}}}}' for name, (_, key, _) in _PARTS.items())
            + f", got {_show(part)}."
        )
    if role != "user":
        raise RequestError(f"Media are in messages of the user, not of the {role}.")
    medium, key, names = _PARTS[kind]
    fields = {name: value for name, value in part[kind].items() if value is not None}
    options = {name: value for name, value in fields.items() if name in names}
    unknown = [name for name in fields if name not in (key, *names, "detail", "format")]
    if unknown or not isinstance(fields.get(key), str):
        allowed = ", ".join((key, *names))
        raise RequestError(f"{kind} takes {allowed}, of which {key} is a string; got {', '.join(map(_show, fields))}.")
    if medium == "video":
        says_frames = "num_frames" in options or "fps" in options
        frames = ("num_frames", "fps") if says_frames else ()
        options = {**{name: value for name, value in defaults.items() if name not in frames}, **options}
    hears = options.get("load_audio_from_video", True)
    check_clip_options(**{name: value for name, value in options.items() if name != "load_audio_from_video"})
    if options.get("num_frames", 1) > limits.max_frames:
        raise RequestError(f"num_frames may be up to {limits.max_frames} here, got {options['num_frames']}.")
    content = _fetch(fields[key], key, limits, allowed_hosts, is_stopped)
    if medium == "image":
        _check_image(content)
    else:
        _check_clip(content, medium, options, limits, hears is not False)
    return {"type": medium, medium: content, **options}


def _fetch(
    source: str, key: str, limits: Limits, allowed_hosts: Collection[str], is_stopped: Callable[[], bool]
) -> bytes:
    """The bytes of a medium: out of the request, or from a host that is allowed. Never a file of this machine."""
    if key == "data":
        source = f"data:audio/any;base64,{source}"
    if source.startswith("data:"):
        content = fetch_media(source)
    elif source.startswith(("http://", "https://")):
        content = fetch_remote(source, allowed_hosts, limits.max_upload_bytes, is_stopped)
    else:
        raise RequestError(
            f"{_show(source)} is neither a data: URI nor an http(s) URL. Files of the server are not read; send the "
            'bytes as "data:video/mp4;base64,...".',
            code="source_not_allowed",
        )
    if not isinstance(content, bytes) or not content:
        raise RequestError("The medium is empty.")
    return content


def _check_image(content: bytes) -> None:
    """Refuses an image of more pixels than any camera takes; whether it is one, its decoder says."""
    try:
        width, height = Image.open(io.BytesIO(content), formats=_IMAGE_FORMATS).size
    except Image.DecompressionBombError:
        width = height = _MAX_PIXELS
    except (OSError, SyntaxError) as error:
        raise RequestError(
            f"The image of {len(content)} bytes is none that this server reads ({', '.join(_IMAGE_FORMATS)})."
        ) from error
    _check_pixels(width, height)


def _check_pixels(width: int, height: int) -> None:
    if width * height > _MAX_PIXELS:
        raise RequestError(f"Images and frames may have up to {_MAX_PIXELS} pixels. Scale it down.")


def _check_clip(content: bytes, medium: str, options: dict[str, Any], limits: Limits, hears: bool) -> None:
    """Refuses a video or sound of which more than `max_clip_seconds` would be decoded; no header is trusted."""
    whole = _measure(content, hears)
    first, last = sorted((options.get("start", 0.0), options.get("end", max(whole, options.get("start", 0.0)))))
    seconds = min(last, whole) - min(first, whole)
    if seconds > limits.max_clip_seconds:
        raise RequestError(
            f"The {medium} is {seconds:.1f} seconds long; this server takes up to {limits.max_clip_seconds:g}. Send a "
            "part of it, or say which with start and end.",
            code="clip_too_long",
        )
    frames = options.get("fps", 0) * seconds
    if frames > limits.max_frames:
        raise RequestError(
            f"fps={options['fps']} makes {frames:.0f} frames of {seconds:.1f} seconds; up to {limits.max_frames} are "
            "allowed here."
        )


def _measure(content: bytes, hears: bool) -> float:
    """Seconds from the first packet to the end of the last, of the longest track."""
    ends: dict[int, float] = {}
    starts: dict[int, float] = {}
    lengths: dict[int, float] = {}  # of the packets together, for what has no timestamps
    with open_media(content) as container:
        for video in container.streams.video:
            if video.codec_context is not None:
                _check_pixels(video.codec_context.width, video.codec_context.height)
        streams = [*container.streams.video, *(container.streams.audio if hears else ())]
        try:
            for packet in container.demux(*streams) if streams else ():
                track, base = packet.stream_index, packet.time_base or 0
                time = packet.dts if packet.pts is None else packet.pts
                length = float((packet.duration or 0) * base)
                lengths[track] = lengths.get(track, 0.0) + length
                if time is not None:
                    starts[track] = min(starts.get(track, float(time * base)), float(time * base))
                    ends[track] = max(ends.get(track, float(time * base)), float(time * base) + length)
        except import_av().error.FFmpegError as error:
            raise RequestError(f"The media in {len(content)} bytes are damaged: {error.strerror}.") from error
    spans = [ends[track] - start for track, start in starts.items()]
    return max([*spans, *lengths.values()], default=0.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


__all__ = ["check_fields", "read_messages"]
