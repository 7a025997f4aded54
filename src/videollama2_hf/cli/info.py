"""`videollama2 info`."""

import json
import os
import re
from dataclasses import asdict
from typing import Annotated, Any

import typer

from ..assets import SMALL_MODEL
from .ask import Revision


def info(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH_OR_MODEL", help="A checkpoint, or a video, an image, a sound, a folder of frames."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="For a file: the model that is to take it. [default: the small model]"),
    ] = None,
    frames: Annotated[int | None, typer.Option(min=0, help="Frames of a video; default: as trained.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="For a model: seconds of sound; 0 for none.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="For a model: tokens of the answer.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="For a model: questions at once.")] = 1,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """
    What is this checkpoint, or this file?

    Of a checkpoint: its parts, their parameters, bytes, how many tokens media take, and the memory for answering in
    bfloat16, 8 and 4 bits (weights, key-value cache, activations); no weights are loaded. Of a file: its tracks, and
    which frames and seconds of sound a model takes of it.

    **Examples**

        videollama2 info DAMO-NLP-SG/VideoLLaMA2.1-7B-AV --frames 32 --batch-size 4
        videollama2 info holiday.mp4 --model converted
    """
    from ..captioning import find_kind
    from ..information import describe_model
    from ..media_information import describe_medium

    is_checkpoint = os.path.isfile(os.path.join(source, "config.json"))
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and find_kind(source) is None
    if is_checkpoint or (is_name and not os.path.exists(source)):
        if model is not None:
            raise ValueError("--model is for files: which model is to take them. Leave it out for a checkpoint.")
        information: Any = describe_model(source, revision, frames, seconds, new_tokens, batch_size)
    else:
        processor = None
        if model is not None or SMALL_MODEL.is_dir():
            from ..processing_videollama2 import VideoLlama2Processor

            options = {"revision": revision} if revision else {}
            processor = VideoLlama2Processor.from_pretrained(model or SMALL_MODEL, **options)
        information = describe_medium(source, processor, frames or None)
        if processor is None:
            information.notes.append("Pass --model MODEL to see what a model takes of it.")
        else:
            information.taken["model"] = model or "the small model"
    typer.echo(json.dumps(asdict(information), ensure_ascii=False) if as_json else information.describe())
