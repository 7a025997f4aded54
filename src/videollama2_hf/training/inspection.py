"""Looking at training data: which rows are bad and why, and one row as the model sees it."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..drawing import draw_filter_banks, draw_frames, draw_image, frame_times, make_figure, to_pictures
from ..feature_extraction_videollama2 import VideoLlama2FeatureExtractor
from ..image_processing_videollama2 import VideoLlama2ImageProcessor
from ..media_videollama2 import MediaError, NoAudioTrackError
from ..messages_videollama2 import load_sound, load_track, prepare_messages
from ..processing_videollama2 import VideoLlama2Processor
from ..video_processing_videollama2 import VideoLlama2VideoProcessor
from .data import DataSource, RawRow, open_rows
from .encoding import RowEncoder


if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

SUPERVISED_STYLE, OTHER_STYLE, MEDIA_STYLE = "bold green", "dim", "cyan"


@dataclass
class DataReport:
    """What a check found: how many rows and media there are, and the bad rows as `(name of the row, reason)`."""

    num_rows: int = 0
    num_media: Counter[str] = field(default_factory=Counter)
    max_tokens: int | None = None
    bad: list[tuple[str, str]] = field(default_factory=list)

    def summary(self) -> str:
        media = ", ".join(f"{self.num_media[kind]} {kind}" for kind in ("image", "video", "audio"))
        longest = "" if self.max_tokens is None else f"; the longest row has {self.max_tokens} tokens"
        return f"{self.num_rows} rows with {media}{longest}. {len(self.bad) or 'No'} bad rows."


def check_data(
    source: DataSource,
    read_media: bool = False,
    processor: VideoLlama2Processor | None = None,
    max_length: int | None = None,
) -> Iterator[DataReport]:
    """
    Checks every row of a source: its JSON, roles, answers and placeholders, and that its files are there.

    Args:
        source: The rows.
        read_media: Whether to decode the media too, as training would.
        processor: The model's processor: then rows that are too long are bad too, and sounds if it does not hear.
        max_length: Longest row in tokens; `None`: what the model takes.

    Yields:
        After every row the same report, so that progress can be shown.

    Raises:
        ValueError, FileNotFoundError: The file as a whole cannot be read.
    """
    encode = None if processor is None else RowEncoder(processor, max_length=max_length)
    report = DataReport()
    stored = open_rows(source, streaming=True)
    is_numbered = isinstance(stored, Sequence)
    for number, content in enumerate(range(len(stored)) if is_numbered else stored):
        report.num_rows += 1
        try:  # a line that is not JSON does not end the check
            row = RawRow(source, number, stored[number] if is_numbered else content)
        except ValueError as error:
            report.bad.append((f"Row {number} of {source.name}", str(error)))
        else:
            report.bad += [(row.describe(), fault) for fault in _find_faults(row, report, read_media, encode)]
        yield report


def _find_faults(row: RawRow, report: DataReport, read_media: bool, encode: RowEncoder | None) -> Iterator[str]:
    prefix = f"{row.describe()}: "
    try:
        messages = row.read()["messages"]
        blocks = [block for message in prepare_messages(messages) for block in message["content"]]
    except (ValueError, TypeError) as error:
        yield str(error).removeprefix(prefix)
        return
    blocks = [block for block in blocks if block["type"] != "text"]
    report.num_media.update(block["type"] for block in blocks)
    missing = [path for path in map(_get_path, blocks) if path is not None and not os.path.exists(path)]
    for path in missing:
        yield f"There is no file {path}."
    if encode is not None:
        if not encode.processor.has_audio and any(block["type"] == "audio" for block in blocks):
            yield "The model does not hear, so it takes no sounds."
        elif not missing:
            try:
                length = encode.num_tokens(messages, cut=False)
            except (ValueError, OSError) as error:
                yield str(error)
                return
            report.max_tokens = max(length, report.max_tokens or 0)
            if encode.max_length is not None and length > encode.max_length:
                yield f"It has {length} tokens, more than the {encode.max_length} that are taken."
    if read_media and not missing:
        for block in blocks:
            try:
                _read(block, None if encode is None else encode.processor)
            except (MediaError, NoAudioTrackError, OSError, ValueError) as error:
                yield str(error)


def _get_path(block: dict[str, Any]) -> str | None:
    """The file that a medium is in, if it is in one."""
    medium = block[block["type"]]
    source = getattr(medium, "source", medium)
    is_path = isinstance(source, os.PathLike) or (isinstance(source, str) and "://" not in source[:16])
    return os.fspath(source) if is_path and not str(source).startswith("data:") else None


def _read(block: dict[str, Any], processor: VideoLlama2Processor | None) -> None:
    """Decodes what training decodes of a medium; without a processor, with the defaults."""
    medium = block[block["type"]]
    extractor = VideoLlama2FeatureExtractor() if processor is None else processor.feature_extractor
    if block["type"] == "image":
        (VideoLlama2ImageProcessor() if processor is None else processor.image_processor).fetch_images([medium])
    elif block["type"] == "audio":
        load_sound(extractor, medium)
    else:
        (VideoLlama2VideoProcessor(size={"shortest_edge": 32}) if processor is None else processor.video_processor)(
            [medium]
        )
        if block["load_audio_from_video"] is not False and (processor is None or processor.has_audio):
            load_track(extractor, medium)


# One row as the model sees it


@dataclass
class TokenRun:
    """Tokens that follow one another: all text and all (or none) of them learned, or all of one medium."""

    start: int
    ids: list[int]
    is_supervised: bool
    medium: str | None


def split_runs(encoded: dict[str, Any], processor: VideoLlama2Processor) -> list[TokenRun]:
    """The tokens of a row that [`RowEncoder`] gave, in runs."""
    kinds = {processor.image_token_id: "image", processor.video_token_id: "video", processor.audio_token_id: "audio"}
    runs: list[TokenRun] = []
    for position, (token, label) in enumerate(zip(encoded["input_ids"].tolist(), encoded["labels"].tolist())):
        medium, is_supervised = kinds.get(token), label != -100
        if not runs or (runs[-1].medium, runs[-1].is_supervised) != (medium, is_supervised):
            runs.append(TokenRun(position, [], is_supervised, medium))
        runs[-1].ids.append(token)
    return runs


def render_text(encoded: dict[str, Any], processor: VideoLlama2Processor) -> "Text":
    """The row's text for a terminal: what is learned stands out, line breaks in it are visible, media are numbers."""
    from rich.text import Text

    text = Text()
    for run in split_runs(encoded, processor):
        if run.medium is not None:
            text.append(f"[{len(run.ids)} x <{run.medium}>]", MEDIA_STYLE)
        elif run.is_supervised:
            text.append(processor.tokenizer.decode(run.ids).replace("\n", "⏎\n"), SUPERVISED_STYLE)
        else:
            text.append(processor.tokenizer.decode(run.ids), OTHER_STYLE)
    return text


def render_table(encoded: dict[str, Any], processor: VideoLlama2Processor) -> "Table":
    """Position, id, token and label of every token of the text; one line for every run of a medium's tokens."""
    from rich.table import Table
    from rich.text import Text

    table = Table("position", "id", "token", "label")
    for run in split_runs(encoded, processor):
        if run.medium is not None:
            end = run.start + len(run.ids) - 1
            table.add_row(f"{run.start}-{end}", str(run.ids[0]), f"<{run.medium}>", "-100", style=MEDIA_STYLE)
            continue
        for offset, token in enumerate(run.ids):
            written = Text(repr(processor.tokenizer.decode([token]))[1:-1])
            label = str(token) if run.is_supervised else "-100"
            style = SUPERVISED_STYLE if run.is_supervised else OTHER_STYLE
            table.add_row(str(run.start + offset), str(token), written, label, style=style)
    return table


def draw_media(
    messages: list[dict[str, Any]], encoded: dict[str, Any], processor: VideoLlama2Processor, path: str | os.PathLike
) -> None:
    """
    Draws a row's media as they enter the model, one above the other: images, the frames of videos over a line of time,
    and the filter banks of sounds.

    Args:
        messages: The row.
        encoded: What [`RowEncoder`] made of it.
        processor: The model's processor.
        path: Where the picture goes; its suffix says which format.

    Raises:
        ValueError: The row has no media.
        ImportError: matplotlib is not installed.
    """
    content = [block for message in prepare_messages(messages) for block in message["content"]]
    panels = _plan_panels(content, encoded, processor)
    if not panels:
        raise ValueError("The row has no media to draw.")
    figure, axes = make_figure([2.6 if kind == "video" else 2.2 for kind, *_ in panels])
    for axis, (kind, title, *values) in zip(axes, panels):
        axis.set_title(title, loc="left", fontsize=10)
        draw: Any = {"image": draw_image, "video": draw_frames, "audio": draw_filter_banks}[kind]
        draw(axis, *values)
    figure.savefig(path)


def _plan_panels(content: list[dict], encoded: dict[str, Any], processor: VideoLlama2Processor) -> list[tuple]:
    """Kind, title and what to draw of every panel, in reading order."""
    media = {name: iter(encoded.get(name, [])) for name in ("pixel_values", "pixel_values_videos", "input_features")}
    encoder = RowEncoder(processor)
    seconds = processor.feature_extractor.chunk_length
    numbers: Counter[str] = Counter()
    panels: list[tuple] = []
    for block in content:
        kind = block["type"]
        if kind == "text":
            continue
        numbers[kind] += 1
        title = f"{kind} {numbers[kind]}"
        if kind == "image":
            panels.append((kind, title, to_pictures(next(media["pixel_values"])[None], processor.image_processor)[0]))
        elif kind == "audio":
            panels.append((kind, title, next(media["input_features"]).float().numpy(), seconds))
        else:
            metadata = processor.video_processor([block["video"]], return_metadata=True)["video_metadata"][0]
            pictures = to_pictures(next(media["pixel_values_videos"]), processor.video_processor)
            panels.append((kind, f"{title}, {len(pictures)} frames", pictures, *frame_times(metadata, len(pictures))))
            if encoder.is_heard(block):
                panels.append(("audio", f"sound of {title}", next(media["input_features"]).float().numpy(), seconds))
    return panels


__all__ = ["DataReport", "check_data", "draw_media", "render_table", "render_text", "split_runs"]
