"""Rows of training data in every known format, as the messages that the processor takes."""

import mimetypes
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args


RowFormat = Literal["auto", "videollama2", "sharegpt", "messages"]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_KINDS = ("image", "video", "audio")
_PLACEHOLDER = re.compile("<(image|video|audio)>")
_REMOTE = re.compile("[A-Za-z][A-Za-z0-9+.-]+:")  # a URL or a `data:` URI, not the drive of a Windows path


def to_messages(
    row: Mapping[str, Any],
    format: RowFormat = "auto",
    media_root: str | os.PathLike | None = None,
    load_audio_from_video: bool | None = None,
) -> list[dict[str, Any]]:
    """
    One row as messages with typed content: perhaps a system message, then user and assistant in turn.

    - `"videollama2"`: `conversations` of `from` and `value`, media under `image`, `video` and `audio`, each a path or
      a list. Placeholders (`<image>`, `<video>`, `<audio>`) move to the front of their turn, as by
      `preprocess_multimodal` in the original's `train.py`.
    - `"sharegpt"`: the same, perhaps with a `system` text, and media also under `images`, `videos` and `audios`.
      Placeholders stay where they are. Video-LLaVA's data are of this kind. Of both kinds of `conversations`, a first
      turn of the assistant is dropped, as the originals do.
    - `"messages"`: `messages` of `role` and `content`. Media are in the content blocks, or under the keys above: then
      blocks without a source take them in turn, and so do placeholders in contents that are strings.
    - `"auto"`: `"messages"` where there are any; else `"videollama2"` for at most one medium under its keys, and
      `"sharegpt"` for anything else.

    A sample of a WebDataset shard is what its member `json` holds. A medium there is the name of a member, `"mp4"` or
    `"000001.mp4"`; if the JSON names none, the sample's media are taken in the order of their names.

    Args:
        row: A row of a file or a data set. A medium is what the processor takes, or the `{"bytes", "path"}` of
            `datasets`.
        format: See above.
        media_root: Folder that relative paths start from. `None`: the working directory.
        load_audio_from_video: Whether to hear videos of which neither the row (by a key of this name) nor the content
            block says so. `None` leaves it to the processor.

    Raises:
        ValueError: The row is in no known format, the roles do not take turns, an answer is empty, or there are not as
            many placeholders as media.
    """
    if format not in get_args(RowFormat):
        raise ValueError(f"Unknown format {format!r}; choose one of {', '.join(get_args(RowFormat))}.")
    if not isinstance(row, Mapping):
        raise ValueError(f"A row is an object with a dialogue, got a {type(row).__name__}.")
    members: dict[str, Any] = {}
    if "__key__" in row and isinstance(row.get("json"), Mapping):
        members = {name: value for name, value in row.items() if name != "json" and not name.startswith("__")}
        row = {"id": row["__key__"], **row["json"]}
    media = {kind: _listed(row.get(kind)) + _listed(row.get(f"{kind}s")) for kind in _KINDS}
    if members and not any(media.values()) and not any(True for _ in _blocks_with_media(row)):
        for name in sorted(name for name, value in members.items() if value is not None):
            kind = (mimetypes.guess_type(f"member.{name}")[0] or "").split("/")[0]
            if kind in _KINDS:
                media[kind].append(name)
    if format == "auto":
        format = _recognize(row, media)
    heard = row.get("load_audio_from_video")
    sources = _Sources(media, members, media_root, load_audio_from_video if heard is None else heard)

    messages = []
    for role, content in _read_turns(row, format):
        if isinstance(content, str):
            is_text = format == "messages" and not any(media.values())
            content = [_text(content)] if is_text else _split(content, to_front=format == "videollama2")
        messages.append({"role": role, "content": [sources.fill(block) for block in content]})
    sources.check_all_are_used()
    if format != "messages" and messages[0]["role"] == "assistant":  # both originals do so
        messages = messages[1:]
    _check_turns(messages)
    return messages


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _blocks_with_media(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for message in _listed(row.get("messages")):
        for block in message.get("content") or [] if isinstance(message, Mapping) else []:
            if isinstance(block, Mapping) and _source_key(block) is not None:
                yield block


def _source_key(block: Mapping[str, Any]) -> str | None:
    """The key of a content block that says where its medium is; `None` for text and for empty blocks."""
    if block.get("type") not in _KINDS:
        return None
    keys = (block["type"], "path", "url", "base64")
    return next((key for key in keys if block.get(key) is not None), None)


def _recognize(row: Mapping[str, Any], media: dict[str, list]) -> RowFormat:
    if row.get("messages") is not None:
        return "messages"
    if row.get("conversations") is None:
        raise ValueError(f"A row needs `conversations` or `messages`, got the keys {sorted(row)}.")
    plural = any(row.get(f"{kind}s") is not None for kind in _KINDS) or row.get("system") is not None
    return "sharegpt" if plural or sum(map(len, media.values())) > 1 else "videollama2"


def _read_turns(row: Mapping[str, Any], format: RowFormat) -> list[tuple[str, Any]]:
    """Role (in the words of chat templates) and content of every turn."""
    name, role_key, content_key = "conversations", "from", "value"
    if format == "messages":
        name, role_key, content_key = "messages", "role", "content"
    turns = row.get(name)
    if not isinstance(turns, (list, tuple)) or not turns:
        raise ValueError(f"`{name}` must be a list of at least two turns, got {_describe(turns)}.")
    read = [("system", row["system"])] if row.get("system") else []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or turn.get(role_key) is None or turn.get(content_key) is None:
            raise ValueError(f"Turn {number} of `{name}` needs the keys {role_key!r} and {content_key!r}.")
        role, content = turn[role_key], turn[content_key]
        if role not in _ROLES:
            raise ValueError(f"Turn {number} has the role {role!r}; choose one of {', '.join(_ROLES)}.")
        if not isinstance(content, str if format != "messages" else (str, list, tuple)):
            raise ValueError(f"The {content_key} of turn {number} must be text, got {_describe(content)}.")
        read.append((_ROLES[role], content))
    return read


def _split(text: str, to_front: bool) -> list[dict[str, Any]]:
    """Text with placeholders as content blocks. The chat template puts a line break behind media at the front."""
    pieces = _PLACEHOLDER.split(text)  # text, kind, text, ..., text
    if to_front and len(pieces) > 1:
        blocks = [{"type": kind} for kind in pieces[1::2]]
        rest = "".join(pieces[::2]).strip()
        return [*blocks, _text(rest)] if rest else blocks
    blocks = [_text(piece) if index % 2 == 0 else {"type": piece} for index, piece in enumerate(pieces)]
    return [block for block in blocks if block.get("text") != ""] or [_text("")]


def _describe(value: Any) -> str:
    return repr(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"


class _Sources:
    """The media of a row, handed out to its content blocks in reading order, each kind by itself."""

    def __init__(
        self,
        media: dict[str, list],
        members: dict[str, Any],
        root: str | os.PathLike | None,
        load_audio_from_video: bool | None,
    ):
        self.media, self.members, self.root = media, members, root
        self.load_audio_from_video = load_audio_from_video
        self.num_used = dict.fromkeys(media, 0)
        self.previous: str | None = None

    def fill(self, block: Any) -> Any:
        """A content block with its medium found. One that is malformed stays as it is, for the processor to refuse."""
        if not isinstance(block, Mapping):
            return block
        block = {key: value for key, value in block.items() if value is not None}
        kind, previous = block.get("type"), self.previous
        self.previous = kind
        if kind not in _KINDS:
            return block
        key = _source_key(block)
        if key is None:
            if kind == "audio" and previous == "video" and self.num_used["audio"] == len(self.media["audio"]):
                return block  # transformers' way to say that the video is heard
            number = self.num_used[kind]
            self.num_used[kind] += 1
            if number >= len(self.media[kind]):
                return block  # counted by `check_all_are_used`
            key, block[kind] = kind, self.media[kind][number]
        if key != "base64":
            block[key] = self._find(block[key])
        if kind == "video" and self.load_audio_from_video is not None:
            block.setdefault("load_audio_from_video", self.load_audio_from_video)
        return block

    def check_all_are_used(self) -> None:
        wrong = [
            f"{self.num_used[kind]} <{kind}> in the text, but {len(media)} under {kind!r}"
            for kind, media in self.media.items()
            if self.num_used[kind] != len(media)
        ]
        if wrong:
            raise ValueError(
                f"Placeholders and media differ in number: {'; '.join(wrong)}. Each medium needs one placeholder "
                "(text that is no placeholder can be written as `messages`)."
            )

    def _find(self, source: Any) -> Any:
        if isinstance(source, str) and self.members:
            names = [source, *(name for name in self.members if source.endswith(f".{name}"))]
            source = next((self.members[name] for name in names if self.members.get(name) is not None), source)
        if isinstance(source, Mapping) and (source.get("bytes") is not None or source.get("path") is not None):
            source = source["path"] if source.get("bytes") is None else source["bytes"]
        is_path = isinstance(source, os.PathLike) or (isinstance(source, str) and not _REMOTE.match(source))
        return os.path.join(self.root, source) if is_path and self.root is not None else source


def _check_turns(messages: list[dict[str, Any]]) -> None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] * (len(turns) // 2) or not turns:
        raise ValueError(
            f"After an optional system message, user and assistant must take turns and the assistant must end; got "
            f"{', '.join(roles) or 'no turn'}."
        )
    for number, message in enumerate(messages):
        texts = [block.get("text") for block in message["content"] if isinstance(block, Mapping)]
        if message["role"] == "assistant":
            if not any(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError(f"The answer in turn {number} is empty, so there is nothing to learn from it.")
            if any(isinstance(block, Mapping) and block.get("type") in _KINDS for block in message["content"]):
                raise ValueError(f"Turn {number} is of the assistant and holds a medium; only the user shows media.")


__all__ = ["RowFormat", "to_messages"]
