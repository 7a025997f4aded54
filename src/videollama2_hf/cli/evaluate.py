"""`videollama2 eval`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .ask import Dtype, Frames, NoAudio, Revision, load_session


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository of the model.")],
    data: Annotated[str, typer.Argument(help="JSON, JSONL, Parquet, WebDataset shards, or a data set.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .jsonl file for every answer; one that is there is gone on with."),
    ] = None,
    group_by: Annotated[
        str | None, typer.Option(help="Column of the data that the table is grouped by. [default: skills, if any]")
    ] = None,
    history: Annotated[
        str, typer.Option(help="What stands before later questions of a row: answers (its own), reference or none.")
    ] = "answers",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are asked at once.")] = 8,
    on_unreadable: Annotated[str, typer.Option(help="Rows whose media cannot be read: skip or stop.")] = "skip",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many rows, from the first.")] = None,
    media_root: Annotated[str | None, typer.Option(help="Folder of the media; default: that of the data.")] = None,
    format: Annotated[str, typer.Option(help="auto, videollama2, sharegpt or messages.")] = "auto",
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "test",
    frames: Frames = None,
    no_audio: NoAudio = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
    revision: Revision = None,
    dtype: Dtype = None,
) -> None:
    """
    Ask a model the questions of a data file, and count the right answers.

    The data are rows as for training (the answers in them are the references), or rows of `question`, `answer` and
    perhaps `options`. With --output a run that was interrupted goes on when the same command is given again. Rows that
    cannot be read are listed at the end, and the exit code is 1.

    **Examples**

        videollama2 eval converted test.jsonl --output results.jsonl
        videollama2 eval converted mvbench.json --group-by task_type --media-root videos --frames 16
    """
    from ..evaluation import evaluate as evaluate_data
    from ..training.data import DataSource, load_rows

    if output is not None and output.suffix != ".jsonl":
        raise ValueError(f"--output must be a .jsonl file, got {str(output)!r}.")
    rows = load_rows(DataSource(data, media_root=media_root, format=format, split=split))  # type: ignore[arg-type]
    options = {"num_frames": frames, "load_audio_from_video": False if no_audio else None}
    report = evaluate_data(
        load_session(model, revision, dtype),
        rows,
        output,
        group_by,
        history,  # type: ignore[arg-type]  # checked there
        batch_size,
        on_unreadable,  # type: ignore[arg-type]
        {name: value for name, value in options.items() if value is not None},
        limit,
        max_new_tokens=max_new_tokens,
    )
    typer.echo(json.dumps(report.to_dict(), ensure_ascii=False) if as_json else report.describe())
    for name, reason in report.failed.items():
        typer.secho(f"{name}: {reason}", fg=typer.colors.RED, err=True)
    if report.failed:
        raise typer.Exit(1)
