"""Looking at training data: which rows are bad and why, and one row as the model sees it."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..feature_extraction_videollama2 import VideoLlama2FeatureExtractor
from ..image_processing_videollama2 import VideoLlama2ImageProcessor
from ..media_videollama2 import MediaError, NoAudioTrackError
from ..messages_videollama2 import load_sound, load_track, prepare_messages
from ..processing_videollama2 import VideoLlama2Processor
from ..video_processing_videollama2 import VideoLlama2VideoProcessor
from .data import DataSource, RawRow, open_rows
from .encoding import RowEncoder


if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib: pip install videollama2-hf[train].") from error
    content = [block for message in prepare_messages(messages) for block in message["content"]]
    panels = _plan_panels(content, encoded, processor)
    if not panels:
        raise ValueError("The row has no media to draw.")
    heights = [2.6 if kind == "video" else 2.2 for kind, *_ in panels]
    figure = Figure(figsize=(12, sum(heights) + 0.6 * len(panels)), layout="constrained", dpi=100)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (kind, title, *values) in zip(axes, panels):
        axis.set_title(title, loc="left", fontsize=10)
        draw: Any = {"image": _draw_image, "video": _draw_frames, "audio": _draw_filter_banks}[kind]
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
            panels.append((kind, title, _to_pictures(next(media["pixel_values"])[None], processor.image_processor)[0]))
        elif kind == "audio":
            panels.append((kind, title, next(media["input_features"]), seconds))
        else:
            metadata = processor.video_processor([block["video"]], return_metadata=True)["video_metadata"][0]
            pictures = _to_pictures(next(media["pixel_values_videos"]), processor.video_processor)
            panels.append((kind, f"{title}, {len(pictures)} frames", pictures, metadata))
            if encoder.is_heard(block):
                panels.append(("audio", f"sound of {title}", next(media["input_features"]), seconds))
    return panels


def _to_pictures(pixels: torch.Tensor, part: Any) -> Any:
    """Normalised pixels (frames, 3, H, W) as pictures (frames, H, W, 3) in [0, 1]."""
    mean, std = (torch.tensor(list(values)).view(3, 1, 1) for values in (part.image_mean, part.image_std))
    return (pixels.float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _draw_image(axis: "Axes", picture: Any) -> None:
    axis.imshow(picture)
    axis.set_anchor("W")
    axis.set_axis_off()


def _draw_frames(axis: "Axes", pictures: Any, metadata: Any) -> None:
    """Frames side by side, each tied to its second on a line of time below."""
    from matplotlib.ticker import MaxNLocator

    total, has_rate = metadata.total_num_frames, metadata.fps is not None
    indices = metadata.frames_indices or range(len(pictures))
    times = [index / metadata.fps if has_rate else index for index in indices]
    end = total / metadata.fps if has_rate else total
    number, (height, width) = len(pictures), pictures.shape[1:3]
    tall = height / width
    for place, (picture, time) in enumerate(zip(pictures, times)):
        axis.imshow(picture, extent=(place + 0.03, place + 0.97, 0, 0.94 * tall), aspect="auto")
        on_line = time / end * number
        axis.plot([place + 0.5, on_line], [0, -0.35 * tall], color="0.6", linewidth=0.8)
        axis.plot(on_line, -0.35 * tall, "o", color="C3", markersize=3)
    axis.plot([0, number], [-0.35 * tall] * 2, color="black", linewidth=1)
    ticks = [time for time in MaxNLocator(8).tick_values(0, end) if 0 <= time <= end]
    axis.set_xticks([time / end * number for time in ticks], [f"{time:.3g}" for time in ticks])
    axis.set(xlim=(0, number), ylim=(-0.42 * tall, tall), yticks=[], xlabel="seconds" if has_rate else "frames")
    axis.set_aspect("equal")
    for side in ("top", "left", "right", "bottom"):
        axis.spines[side].set_visible(False)


def _draw_filter_banks(axis: "Axes", features: torch.Tensor, seconds: float) -> None:
    values = features.float().T.numpy()
    floor = -16.0  # silence: the logarithm of the smallest energy that `kaldi.fbank` takes
    image = axis.imshow(
        values,
        origin="lower",
        aspect="auto",
        extent=(0, seconds, 0, len(values)),
        cmap="magma",
        vmin=floor,
        vmax=max(float(values.max()), 0.0),
    )
    axis.set(xlabel="seconds of the window that the model hears", ylabel="mel bin")
    axis.figure.colorbar(image, ax=axis, pad=0.01, label="log energy")


__all__ = ["DataReport", "check_data", "draw_media", "render_table", "render_text", "split_runs"]
