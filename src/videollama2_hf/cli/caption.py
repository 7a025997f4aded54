"""`videollama2 caption`."""

from pathlib import Path
from typing import Annotated

import typer

from .ask import Dtype, Frames, MaxNewTokens, Model, NoAudio, Revision, check_model, load_session


def caption(
    media: Annotated[
        list[str], typer.Argument(help="Files, folders, patterns, or lists of paths (.txt, .jsonl, .parquet).")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A .jsonl or .parquet file; one that is there is gone on with.")
    ],
    model: Model = "",
    question: Annotated[str, typer.Option(help="What is asked about each.")] = "Describe this in detail.",
    batch_size: Annotated[int, typer.Option(min=1, help="Files that are answered at once.")] = 4,
    frames: Frames = None,
    no_audio: NoAudio = False,
    max_new_tokens: MaxNewTokens = 512,
    revision: Revision = None,
    dtype: Dtype = None,
) -> None:
    """
    Ask the same question about many files, and write the answers as lines of JSON.

    A run that was interrupted goes on when the same command is given again. Files that cannot be read are listed at
    the end, and the exit code is 1.

    **Examples**

        videollama2 caption clips --output captions.jsonl --model converted
        videollama2 caption "clips/**/*.mp4" --question "Is there a dog?" --output dogs.jsonl --model converted
    """
    from ..captioning import caption as caption_files
    from ..captioning import list_media

    check_model(model)
    if output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--output must be a .jsonl or a .parquet file, got {str(output)!r}.")
    paths = [path for source in media for path in list_media(source)]
    options = {"num_frames": frames, "load_audio_from_video": False if no_audio else None}
    report = caption_files(
        load_session(model, revision, dtype),
        paths,
        output,
        question,
        batch_size,
        {name: value for name, value in options.items() if value is not None},
        max_new_tokens=max_new_tokens,
    )
    before = f", {report.num_before} were there before" if report.num_before else ""
    typer.echo(f"{report.num_answered} of {len(paths)} answered{before}: {output}")
    if report.num_answered:
        rate, waiting = report.num_answered / report.seconds, report.waiting_seconds / report.seconds
        typer.echo(f"{rate:.2f} files per second; the language model waited for media {waiting:.0%} of the time.")
    for path, reason in report.failed.items():
        typer.secho(f"{path}: {reason}", fg=typer.colors.RED, err=True)
    if report.failed:
        raise typer.Exit(1)
