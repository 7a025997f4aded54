"""Original checkpoints to safetensors that transformers load, written tensor by tensor and published in one step."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import constants
from tqdm import tqdm
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..modeling_videollama2 import AUTO_MAP
from ..processing_videollama2 import VideoLlama2Processor
from .model_card import write_model_card
from .plan import Plan, PlannedTensor, build_meta_model, build_plan
from .reference import check_original_code
from .report import bytes_to_verify, prove
from .sources import open_source
from .tensors import (
    DTYPES,
    ConversionError,
    SafetensorsWriter,
    StoredTensor,
    as_bytes,
    is_finite,
    read_safetensors_header,
)


ORIGINAL_FOLDER = "original"
LANGUAGE_MODEL_FOLDER = "language_model"  # in `original/`, where it is not the checkpoint's own
LAYOUT_FILE = "layout.json"
LEFT_OUT_FILE = "left_out_tensors.safetensors"
DEFAULT_SHARD_SIZE = 5 * 10**9  # bytes

_PLAN_FILE, _LOCK_FILE = ".plan.json", ".lock"
_SMALL_SUFFIXES = (".json", ".model", ".txt", ".jinja")
_TRAINING_FILES = ("all_results.json", "train_results.json", "trainer_state.json", "training_args.json")
_LARGEST_SMALL_FILE = 50 * 2**20  # bytes
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path | None,
    *,
    revision: str | None = None,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    audio_tower: str | Path | None = None,
    video_tower: str | Path | None = None,
    dtype: str | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    reference: str | Path | None = None,
    reference_python: str | None = None,
) -> Plan:
    """
    Converts an original checkpoint of VideoLLaMA 2 or Video-LLaVA, or one of transformers' port of the latter.

    Args:
        checkpoint: Folder or Hub repository; see [`open_source`] for this and the next arguments.
        output: The folder to be made. It appears when everything in it is complete.
        dtype: Dtype of the weights, as PyTorch names it; `None`: each tensor keeps its own, byte for byte.
        max_shard_size: Largest size of a weight file, in bytes.
        resume: Whether to go on with a conversion that was interrupted.
        overwrite: Whether to replace `output`, and what an interrupted conversion left.
        dry_run: Whether only to plan; nothing is written and `output` may be `None`.
        verify: Whether to read everything back, try the model and write the report, see [`prove`].
        reference: A copy of the original code to compare with, layer by layer; verifies too.
        reference_python: The interpreter of an environment with the original's requirements.

    Returns:
        What was done (or would be) with every tensor.

    Raises:
        ConversionError: The checkpoint is not what it should be; nothing is left behind.
        FileExistsError: `output` is there already.
        OSError: It could not be written; `resume` goes on.
        VerificationError: A check did not hold; nothing is published.
    """
    plan = build_plan(open_source(checkpoint, revision, base, vision_tower, audio_tower, video_tower), dtype)
    if dry_run:
        return plan
    if output is None:
        raise ConversionError("A conversion needs an `output` folder.")
    write_checkpoint(
        plan,
        Path(output),
        max_shard_size=max_shard_size,
        resume=resume,
        overwrite=overwrite,
        verify=verify,
        reference=reference,
        reference_python=reference_python,
    )
    return plan


def write_checkpoint(
    plan: Plan,
    output: Path,
    *,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    reference: str | Path | None = None,
    reference_python: str | None = None,
) -> None:
    """Carries a plan out; see [`convert_checkpoint`]."""
    if reference is not None:
        check_original_code(Path(reference), reference_python)
    shards = plan.shards(max_shard_size)
    fingerprint = _fingerprint(plan, max_shard_size)
    folders = {plan.source.folder, plan.source.language_model_folder}
    files = {tensor.file for part in plan.source.parts for tensor in part.tensors.values()}
    check_apart(output, folders, files | ({Path(reference)} if reference is not None else set()))
    with published_folder(output, fingerprint, resume=resume, overwrite=overwrite) as folder:
        names = shard_names(len(shards))
        done = {name for name in names if (folder / name).is_file()}
        size = sum(tensor.nbytes for shard, name in zip(shards, names) if name not in done for tensor in shard)
        check_space(folder, size)
        not_finite: list[str] = []
        with progress_bar("converting", plan.nbytes) as progress:
            for name, shard in zip(names, shards):
                if name in done:
                    progress.update(sum(tensor.nbytes for tensor in shard))
                    continue
                entries = [(tensor.target, tensor.dtype, tensor.shape) for tensor in shard]
                with SafetensorsWriter(folder / name, entries) as writer:
                    for tensor in shard:
                        if not _write_tensor(tensor, writer, progress):
                            not_finite.append(tensor.source.name)
                            writer.keep = False  # else `resume` would take the file for checked
        if not_finite:
            raise ConversionError(
                f"{plan.source.folder} holds values that are not finite (NaN or infinite, perhaps after the change of "
                f"dtype) in {len(not_finite)} tensors:\n" + "\n".join(f"  {name}" for name in not_finite)
            )
        if len(shards) > 1:
            weight_map = {tensor.target: name for name, shard in zip(names, shards) for tensor in shard}
            index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        _write_model_files(plan, folder)
        _write_original(plan, folder)
        report = None
        if verify or reference is not None:
            with progress_bar("verifying", bytes_to_verify(plan)) as progress:
                report = prove(plan, folder, progress, reference, reference_python)
        write_model_card(plan, folder, output.name, report)


def shard_names(count: int) -> list[str]:
    """File names of a checkpoint in that many files."""
    if count == 1:
        return [SAFE_WEIGHTS_NAME]
    stem = SAFE_WEIGHTS_NAME.removesuffix(".safetensors")
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _write_tensor(tensor: PlannedTensor, writer: SafetensorsWriter, progress: tqdm) -> bool:
    """Whether all values were finite."""
    finite = True
    if tensor.is_copy:
        left = tensor.nbytes
        for chunk in tensor.source.chunks():
            chunk = chunk[:left]
            finite = finite and is_finite(chunk, tensor.dtype)
            writer.write(chunk)
            progress.update(len(chunk))
            left -= len(chunk)
            if not left:
                break
        return finite
    values = tensor.source.load()[: tensor.rows]
    if tensor.change is not None:
        values = tensor.change.merge(values, DTYPES[tensor.dtype])
    data = as_bytes(values.to(DTYPES[tensor.dtype]))
    finite = is_finite(data, tensor.dtype)
    writer.write(data)
    progress.update(len(data))
    return finite


def _write_model_files(plan: Plan, folder: Path) -> None:
    """Everything beside the weights that loading needs: configurations, tokenizer, processor, code."""
    source = plan.source
    config = source.config
    config.architectures = ["VideoLlama2ForConditionalGeneration"]
    config.auto_map = dict(AUTO_MAP)
    config.dtype = plan.dtype
    custom_object_save(build_meta_model(config), folder, config=config)
    config.save_pretrained(folder)
    processor = VideoLlama2Processor.from_config(config, source.tokenizer, source.vision_preprocessor)
    processor.save_pretrained(folder)
    generation_config = source.language_model_folder / GENERATION_CONFIG_NAME
    if source.generation_config is not None:
        content = json.dumps(source.generation_config, indent=2, sort_keys=True) + "\n"
        (folder / GENERATION_CONFIG_NAME).write_text(content, encoding="utf-8")
    elif generation_config.is_file():  # kept word for word, a repetition penalty included
        shutil.copyfile(generation_config, folder / GENERATION_CONFIG_NAME)


def _write_original(plan: Plan, folder: Path) -> None:
    """`original/`: the small files of the source and the layout of its weights, from which it can be written again."""
    source, target = plan.source, folder / ORIGINAL_FOLDER
    shutil.rmtree(target, ignore_errors=True)
    _copy_small_files(source.folder, target, source.config_dict.get("mm_vision_tower"))
    if source.language_model_folder != source.folder:
        _copy_small_files(source.language_model_folder, target / LANGUAGE_MODEL_FOLDER)
    if source.adapter is not None:  # merging cannot be undone
        shutil.copyfile(source.adapter.path, target / source.adapter.path.name)
    if source.one_way is not None:
        layout = {"kind": source.kind, "one_way": source.one_way, "files": {}}
        (target / LAYOUT_FILE).write_text(json.dumps(layout, indent=1) + "\n")
        return
    where = {id(tensor.source): tensor.target for tensor in plan.tensors}
    where |= {id(item.source): item.same_as for item in plan.left_out if item.same_as is not None}
    files: dict[str, dict[str, Any]] = {}
    kept: dict[str, StoredTensor] = {}
    for part in source.parts:
        for name, tensor in part.tensors.items():
            if part.folder != source.folder or not tensor.file.is_relative_to(source.folder):
                continue
            filename = tensor.file.relative_to(source.folder).as_posix()
            entry = files.setdefault(filename, {"tensors": {}})
            if id(tensor) in where:
                entry["tensors"][name] = where[id(tensor)]
                rows = source.rows.get(where[id(tensor)])
                if rows is not None:
                    kept[f"{filename}:{name}"] = tensor.after(rows)
            else:
                entry["tensors"][name] = None
                kept[f"{filename}:{name}"] = tensor
    for filename, entry in files.items():
        if filename.endswith(".safetensors"):
            entry["header"] = read_safetensors_header(source.folder / filename)[0].decode()
    if kept:
        entries = [(name, tensor.dtype, tensor.shape) for name, tensor in kept.items()]
        with SafetensorsWriter(target / LEFT_OUT_FILE, entries) as writer:
            for tensor in kept.values():
                for chunk in tensor.chunks():
                    writer.write(chunk)
    layout = {"kind": source.kind, "files": files}
    (target / LAYOUT_FILE).write_text(json.dumps(layout, indent=1) + "\n")


def _copy_small_files(folder: Path, target: Path, tower: str | None = None) -> None:
    """Configurations and tokenizers, also of a vision tower in a folder below, and nothing of training's logs."""
    target.mkdir(parents=True, exist_ok=True)
    paths = [*folder.iterdir()]
    if tower and (folder / tower).is_dir() and (folder / tower).resolve().is_relative_to(folder.resolve()):
        paths += (folder / tower).iterdir()
    for path in sorted(paths):
        is_small = path.suffix in _SMALL_SUFFIXES and path.is_file() and path.stat().st_size <= _LARGEST_SMALL_FILE
        if is_small and path.name not in _TRAINING_FILES and not path.name.startswith("."):
            relative = path.relative_to(folder)
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)


def _fingerprint(plan: Plan, max_shard_size: int) -> str:
    """Changes with anything that the weights depend on."""
    files = sorted({tensor.source.file for tensor in plan.tensors})
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    content = json.dumps([plan.to_dict()["tensors"], stats, max_shard_size])
    return hashlib.sha256(content.encode()).hexdigest()


def check_apart(output: Path, folders: set[Path], places: set[Path]) -> None:
    """
    Raises:
        ConversionError: The output is one of these folders or lies in it, or one of them or of the other places that
            are read lies in the output, so that writing or overwriting it would change a source.
    """
    output = output.resolve()
    written = (output, _partial(output), _replaced(output))
    overlapping = [folder for folder in folders if output.is_relative_to(folder.resolve())]
    overlapping += [
        place for place in folders | places for target in written if place.resolve().is_relative_to(target)
    ]
    if overlapping:
        raise ConversionError(f"The output {output} and the source {overlapping[0]} overlap. Choose another --output.")


def check_space(folder: Path, size: int) -> None:
    """
    Raises:
        OSError: There is not enough space for that many bytes.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            f"The disk of {folder} has {free / 1e9:.1f} GB left, {size / 1e9:.1f} GB are needed. Make space or choose "
            "another --output."
        )


def progress_bar(title: str, total: int) -> tqdm:
    """Bytes, speed and time left; silent where the output is no terminal or progress bars are switched off."""
    disable = True if constants.HF_HUB_DISABLE_PROGRESS_BARS else None
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, unit_divisor=1000, disable=disable)


@contextmanager
def published_folder(
    output: Path, fingerprint: str, *, resume: bool = False, overwrite: bool = False
) -> Iterator[Path]:
    """
    A temporary folder beside `output` that takes its name when the block ends well. What an interruption leaves can be
    resumed if the fingerprint is still the same; an input error leaves nothing.
    """
    output = output.resolve()  # behind a link: there is the place that was meant
    if output.is_file():
        raise FileExistsError(f"{output} is a file. Choose a folder as --output.")
    if output.exists() and not overwrite and any(output.iterdir()):
        raise FileExistsError(f"{output} is there already. Choose another --output, or replace it with --overwrite.")
    folder = _partial(output)
    if folder.exists() and not (resume or overwrite):
        raise FileExistsError(
            f"A conversion to {output} was interrupted or is running ({folder}). Go on with --resume, or begin again "
            "with --overwrite."
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / _LOCK_FILE, timeout=0)
        lock.acquire()
    except Timeout:
        raise FileExistsError(f"Another process is converting to {output} now. Wait for it to end.") from None
    try:
        plan_file = folder / _PLAN_FILE
        if (overwrite and not resume) or not plan_file.is_file():  # without it, what is there may be anything
            _clear(folder)
        elif plan_file.read_text() != fingerprint:
            raise ConversionError(
                f"The conversion in {folder} was of other files or options. Begin again with --overwrite."
            )
        plan_file.write_text(fingerprint)
        try:
            yield folder
        except (ValueError, KeyError):
            _clear(folder)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            message = f"{error.strerror}: {output} is not complete. Make space and go on with --resume."
            raise OSError(message) from error
        _sync(folder)
        replaced = _replaced(output)
        if overwrite and output.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(output, replaced)
        os.rename(folder, output)  # fails where another process has made a folder with something in it
        for name in (_PLAN_FILE, _LOCK_FILE):  # only now, so that an interruption before can be resumed
            (output / name).unlink(missing_ok=True)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        lock.release()


def _partial(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


def _replaced(output: Path) -> Path:
    """Where what is overwritten lies for the moment in which neither it nor the new one has its name."""
    return output.with_name(f".{output.name}.replaced")


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK_FILE:
            path.unlink()


def _sync(folder: Path) -> None:
    """Waits until all files are on the disk, so that a complete folder is what its name says after a power cut too."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
