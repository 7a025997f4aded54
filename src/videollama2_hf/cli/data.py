"""`videollama2 data check` and `videollama2 data show`."""

from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(help="Check training data, and look at a row as the model sees it.", no_args_is_help=True)

_FILE = Annotated[str, typer.Argument(metavar="FILE", help="JSON, JSONL, Parquet, WebDataset shards, or a data set.")]
_ROOT = Annotated[str | None, typer.Option(help="Folder of the media. [default: that of FILE]", show_default=False)]
_FORMAT = Annotated[str, typer.Option(help="auto, videollama2, sharegpt or messages.")]
_LENGTH = Annotated[int | None, typer.Option(help="Longest row in tokens. [default: the model's]", show_default=False)]


@app.command()
def check(
    file: _FILE,
    media_root: _ROOT = None,
    format: _FORMAT = "auto",
    media: Annotated[bool, typer.Option("--media", help="Also decode all media.")] = False,
    model: Annotated[str | None, typer.Option(help="Model whose limits rows must keep.", show_default=False)] = None,
    max_length: _LENGTH = None,
) -> None:
    """Name every bad row and why. Ends with 1 if there are any."""
    from ..training.data import DataSource
    from ..training.inspection import DataReport, check_data

    report, num_printed = DataReport(), 0
    processor = None if model is None else _load_processor(model)
    source = DataSource(file, media_root=media_root, format=format)  # type: ignore[arg-type]  # checked per row
    for report in check_data(source, media, processor, max_length):
        for name, reason in report.bad[num_printed:]:
            typer.echo(f"{name}: {reason}")
        num_printed = len(report.bad)
    typer.echo(report.summary())
    if report.bad:
        raise typer.Exit(1)


@app.command()
def show(
    file: _FILE,
    model: Annotated[str, typer.Option(help="Model whose processor reads the row.")],
    row: Annotated[int, typer.Option(help="Number of the row, from 0.")] = 0,
    media_root: _ROOT = None,
    format: _FORMAT = "auto",
    prompt_format: Annotated[str, typer.Option(help="chat, plain or plain_audio.")] = "chat",
    max_length: _LENGTH = None,
    output: Annotated[
        Path | None, typer.Option(help="Draw frames and filter banks into this file.", show_default=False)
    ] = None,
) -> None:
    """Print the text of a row, what of it is learned, and its tokens; draw its media."""
    from rich.console import Console

    from ..training.data import DataSource, load_rows
    from ..training.encoding import RowEncoder
    from ..training.inspection import draw_media, render_table, render_text

    rows = load_rows(DataSource(file, media_root=media_root, format=format))  # type: ignore[arg-type]
    if not 0 <= row < len(rows):
        raise ValueError(f"There is no row {row} in {file}; it has the rows 0 to {len(rows) - 1}.")
    encode = RowEncoder(_load_processor(model), prompt_format=prompt_format, max_length=max_length)  # type: ignore[arg-type]
    messages = rows[row]["messages"]
    encoded = encode(messages)
    console = Console()
    console.print(render_table(encoded, encode.processor))
    console.print(render_text(encoded, encode.processor))
    learned = int((encoded["labels"] != -100).sum())
    console.print(f"{len(encoded['input_ids'])} tokens, {learned} of them learned (bold green).")
    if output is not None:
        draw_media(messages, encoded, encode.processor, output)
        console.print(f"Media drawn into {output}.")


def _load_processor(model: str):
    from transformers import AutoProcessor

    import videollama2_hf  # noqa: F401  # registers the processor

    return AutoProcessor.from_pretrained(model)
