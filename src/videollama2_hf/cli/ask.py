"""`videollama2 ask` and `videollama2 chat`."""

import json
import os
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..assets import EXAMPLE_CLIP, get_small_model


if TYPE_CHECKING:
    from ..session import Answer, Chat, Session

Model = Annotated[str, typer.Option("--model", "-m", help="Folder or Hub repository of the model.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, float16 or bfloat16; default: bfloat16 on a GPU, float32 on a CPU.")
]
Start = Annotated[float | None, typer.Option(help="Where to begin in videos and sounds, in seconds.")]
End = Annotated[float | None, typer.Option(help="Where to end, in seconds.")]
Frames = Annotated[int | None, typer.Option(help="Frames to look at; default: as trained.")]
NoAudio = Annotated[bool, typer.Option("--no-audio", help="Do not hear the sound of videos.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]


class ExplainBy(StrEnum):
    """[`videollama2_hf.explaining.Method`], as the command line lists it."""

    attention = "attention"
    gradient = "gradient"


def make_block(
    source: str,
    start: float | None = None,
    end: float | None = None,
    num_frames: int | None = None,
    hears: bool = True,
) -> dict[str, Any]:
    """
    The content block of a file, a folder of frames or a URL.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Its name does not say whether it is an image, a video or a sound.
    """
    from ..captioning import find_kind

    is_remote = source.startswith(("http://", "https://", "data:"))
    if not is_remote and not os.path.exists(source):
        raise FileNotFoundError(f"There is no file {source!r}.")
    kind = "image" if source.startswith("data:image/") else find_kind(source.partition("?")[0])
    if kind is None:
        raise ValueError(
            f"The name of {source!r} does not say what it is. Rename it to end in .mp4, .mkv, .webm, .jpg, .png, "
            ".wav, .mp3 or the like."
        )
    options: dict[str, Any] = {}
    if kind != "image":
        options |= {"start": start, "end": end}
    if kind == "video":
        options |= {"num_frames": num_frames, "load_audio_from_video": None if hears else False}
    return {"type": kind, kind: source} | {name: value for name, value in options.items() if value is not None}


def introduce_small_model(media: list[str]) -> str:
    """
    Says who will answer when no model is named, and returns its folder.

    Raises:
        FileNotFoundError: This copy of the package has no small model.
    """
    folder = get_small_model()
    about = f" about its own clip, {EXAMPLE_CLIP}" if media == [str(EXAMPLE_CLIP)] else ""
    typer.secho(
        f"No --model given: the small model that comes with the package answers{about}. It knows nothing but coloured "
        "shapes and simple sounds. A real checkpoint is one option away: --model DAMO-NLP-SG/VideoLLaMA2.1-7B-AV "
        "(17 GB), or any folder.",
        dim=True,
        err=True,
    )
    return folder


def load_session(model: str, revision: str | None, dtype: str | None) -> "Session":
    """The model, with what its loading prints kept off the screen."""
    from transformers.utils import logging

    from ..session import Session

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    return Session.from_pretrained(model, revision=revision, dtype=dtype)


def say(chat: "Chat", question: str, blocks: list[dict[str, Any]], max_new_tokens: int) -> "Answer":
    """Prints an answer as it is said."""
    stream = chat.stream(question, *blocks, max_new_tokens=max_new_tokens)
    started = False
    while True:
        try:
            piece = next(stream)
        except StopIteration as end:
            typer.echo("" if started else end.value.text)
            return end.value
        if not started:
            piece = piece.lstrip()
        started = started or bool(piece)
        typer.echo(piece, nl=False)


def ask(
    question: Annotated[str, typer.Argument(help="What you want to know.")] = "What do you see and hear?",
    media: Annotated[
        list[str] | None, typer.Argument(help="Videos, images, sounds, folders of frames, or URLs of them.")
    ] = None,
    model: Model = "",
    start: Start = None,
    end: End = None,
    frames: Frames = None,
    no_audio: NoAudio = False,
    max_new_tokens: MaxNewTokens = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer and its numbers as JSON.")] = False,
    explain: Annotated[
        Path | None, typer.Option(help="Write a page that shows where the model looked for each word of its answer.")
    ] = None,
    explain_by: Annotated[ExplainBy, typer.Option(help="How to find out where it looked.")] = ExplainBy.attention,
    revision: Revision = None,
    dtype: Dtype = None,
) -> None:
    """
    Ask one question about videos with their sound, images and sounds.

    Without `--model` the small model answers that comes with this package. It knows a world of coloured shapes that
    move, and sounds; without media it is asked about a clip of that world.

    **Examples**

        videollama2 ask "What moves, and in which direction?"
        videollama2 ask "Who is playing?" concert.mp4 --model converted
        videollama2 ask "What is said to happen?" talk.mp4 --start 60 --end 90 --frames 32 --model converted
        videollama2 ask "Which of the two is louder?" a.wav b.wav --json --model converted
        videollama2 ask "What moves?" --explain page.html
    """
    if explain is not None and not explain.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(explain.parent)!r} to write {explain.name} into.")
    media = media or ([] if model else [str(EXAMPLE_CLIP)])
    blocks = [make_block(source, start, end, frames, not no_audio) for source in media]
    session = load_session(model or introduce_small_model(media), revision, dtype)
    if as_json:
        answer = session.ask(question, *blocks, max_new_tokens=max_new_tokens)
        record = {"question": question, "media": media, "model": model or get_small_model(), **asdict(answer)}
        typer.echo(json.dumps(record, ensure_ascii=False))
    else:
        answer = say(session.chat(), question, blocks, max_new_tokens)
        if answer.finish_reason == "length":
            typer.echo(f"(cut off after {max_new_tokens} tokens; --max-new-tokens allows for more)", err=True)
    if explain is not None:
        from ..explaining import explain as explain_answer

        explain_answer(session, question, *blocks, answer=answer, method=explain_by.value).save(explain)
        typer.echo(f"(where it looked: {explain})", err=True)


def chat(
    media: Annotated[list[str] | None, typer.Argument(help="What the first question is about.")] = None,
    model: Model = "",
    frames: Frames = None,
    no_audio: NoAudio = False,
    max_new_tokens: MaxNewTokens = 512,
    revision: Revision = None,
    dtype: Dtype = None,
) -> None:
    """
    Talk about media in the terminal; what was seen and heard once is not read again.

    Lines are questions. `/add FILE [START END]` puts a medium before the next question, `/new` begins a new
    conversation, `/quit` (or Ctrl-D) ends. Ctrl-C stops an answer.

    **Example**

        videollama2 chat holiday.mp4 --model converted
    """
    pending = [make_block(source, num_frames=frames, hears=not no_audio) for source in media or []]
    session = load_session(model or introduce_small_model(media or []), revision, dtype)
    conversation = session.chat()
    while True:
        try:
            line = typer.prompt("you", prompt_suffix="> ", default="", show_default=False).strip()
        except typer.Abort:  # Ctrl-D or Ctrl-C at the prompt
            typer.echo("")
            return
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/new":
                conversation, pending = session.chat(), []
            elif command == "/add":
                pending.append(_parse_medium(rest, frames, not no_audio))
            elif command.startswith("/") and not Path(line).exists():
                raise ValueError(f"There is no command {command}; there are /add FILE [START END], /new and /quit.")
            elif line:
                say(conversation, line, pending, max_new_tokens)
                pending = []
        except (ValueError, OSError) as error:  # the conversation goes on
            typer.secho(str(error), fg=typer.colors.RED, err=True)
        except KeyboardInterrupt:
            typer.echo("\n(stopped)", err=True)


def _parse_medium(text: str, frames: int | None, hears: bool) -> dict[str, Any]:
    """`FILE`, or `FILE START END`; a file name may hold spaces."""
    path, *times = text.strip().rsplit(maxsplit=2) if not os.path.exists(text.strip()) else [text.strip()]
    try:
        start, end = (float(time) for time in times) if times else (None, None)
    except ValueError:
        path, start, end = text.strip(), None, None
    return make_block(path, start, end, frames, hears)


def check_model(model: str) -> str:
    if not model:
        raise ValueError("Say which model is to answer: --model FOLDER, or the name of a Hub repository.")
    return model
