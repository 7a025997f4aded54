"""`videollama2 convert`."""

import re
from pathlib import Path
from typing import Annotated

import typer


_SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if match is None or match[2].upper() not in _SIZES or not float(match[1]):
        raise typer.BadParameter(f"{text!r} is not a size; write it as 5GB or 500MB.")
    return int(float(match[1]) * _SIZES[match[2].upper()])


def convert(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub repository of the original checkpoint.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder to be made.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model of a projector-only or LoRA checkpoint; default: what it names.")
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="The vision tower (of images), where the weights do not hold it.")
    ] = None,
    video_tower: Annotated[
        str | None,
        typer.Option(help="Video-LLaVA's tower of videos, where it is not found; repairs transformers' port."),
    ] = None,
    audio_tower: Annotated[
        Path | None, typer.Option(help="A file of BEATs to use, Microsoft's .pt or audio_tower.bin.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: every tensor keeps its own.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every tensor, run the result, write conversion_report.json.")
    ] = False,
    reference: Annotated[
        Path | None, typer.Option(help="Folder of the original code, to compare with layer by layer.")
    ] = None,
    reference_python: Annotated[
        str | None, typer.Option(help="The Python that can run the original code; default: this one.")
    ] = None,
    repository: Annotated[
        str | None, typer.Option("--push-to-hub", help="Hub repository to upload the result to.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and write nothing.")] = False,
    to_original: Annotated[
        bool, typer.Option("--to-original", help="The way back: write the layout of the original code.")
    ] = False,
    original: Annotated[
        Path | None,
        typer.Option(help="With --to-original, for a model that was trained: the folder it was trained from."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="With --to-original: a full checkpoint, whatever the source was.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted conversion.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output.")] = False,
) -> None:
    """
    Convert an original checkpoint to safetensors that transformers load, with proof.

    Takes full checkpoints, projectors ("Base") and LoRA results of VideoLLaMA 2 and Video-LLaVA.

    **Examples**

        videollama2 convert DAMO-NLP-SG/VideoLLaMA2.1-7B-AV --output converted --verify
        videollama2 convert my-lora-run --base mistralai/Mistral-7B-Instruct-v0.2 --output merged
        videollama2 convert fine-tuned --to-original --original converted --output for-the-original-code
    """
    from ..conversion import ConversionError, convert_checkpoint, push_to_hub, restore_original

    if output is None and not dry_run:
        raise ValueError("Say where the result is to be written: --output FOLDER.")
    size = parse_size(max_shard_size)
    only_there = {
        "--revision": revision, "--base": base, "--vision-tower": vision_tower, "--video-tower": video_tower,
        "--audio-tower": audio_tower, "--dtype": dtype, "--verify": verify, "--reference": reference,
        "--push-to-hub": repository, "--dry-run": dry_run,
    }  # fmt: skip
    only_back = {"--original": original, "--full": full}
    unused = [name for name, value in (only_there if to_original else only_back).items() if value]
    if unused:
        raise ValueError(f"{', '.join(unused)}: not used {'with' if to_original else 'without'} --to-original.")
    if private and repository is None:
        raise ValueError("--private is of the repository that --push-to-hub REPOSITORY makes; pass that too.")
    if to_original:
        assert output is not None
        restore_original(
            checkpoint, output, original=original, full=full, max_shard_size=size, resume=resume, overwrite=overwrite
        )
        typer.echo(f"Written: {output}")
        return
    plan = convert_checkpoint(
        checkpoint,
        output,
        revision=revision,
        base=base,
        vision_tower=vision_tower,
        video_tower=video_tower,
        audio_tower=audio_tower,
        dtype=dtype,
        max_shard_size=size,
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
        verify=verify,
        reference=reference,
        reference_python=reference_python,
    )
    if dry_run:
        typer.echo(plan.describe())
        return
    for note in plan.source.notes:
        typer.echo(f"Note: {note}")
    typer.echo(f"Written: {output} ({plan.nbytes / 1e9:.2f} GB, {len(plan.tensors)} tensors)")
    if repository is not None:
        assert output is not None
        try:
            address = push_to_hub(output, repository, private=private)
        except (ConversionError, ConnectionError) as error:
            hint = f"The conversion is complete; this uploads it: hf upload {repository} {output}"
            raise type(error)(f"{error} {hint}") from None
        typer.echo(f"Uploaded: {address}")
