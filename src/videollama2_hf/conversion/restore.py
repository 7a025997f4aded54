"""Back to the original's layout: the files of the checkpoint that a folder was converted from."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME

from .convert import (
    DEFAULT_SHARD_SIZE,
    LANGUAGE_MODEL_FOLDER,
    LAYOUT_FILE,
    LEFT_OUT_FILE,
    ORIGINAL_FOLDER,
    check_apart,
    check_space,
    progress_bar,
    published_folder,
    shard_names,
)
from .plan import group_by_size
from .sources import complete_name, is_video_llava, read_config
from .tensors import DTYPES, ConversionError, SafetensorsWriter, StoredTensor, read_file, read_folder
from .video_llava import original_name


def restore_original(
    checkpoint: str | Path,
    output: str | Path,
    *,
    original: str | Path | None = None,
    full: bool = False,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """
    Writes a converted or fine-tuned model in the layout of the original code.

    A converted folder becomes the files that it was made from, byte for byte. A model that was trained since becomes
    a full checkpoint: in the same files if they held all of it, else in new ones.

    Args:
        checkpoint: A folder that [`convert_checkpoint`] made, or a model that was loaded from one and saved again.
        output: The folder to be made.
        original: The converted folder that the trained model `checkpoint` comes from. `None`: it was not trained.
        full: Whether to write a full checkpoint where the source held only a part of the model.
        max_shard_size: Largest size of a new weight file, in bytes.
        resume: Whether to go on with one that was interrupted.
        overwrite: Whether to replace `output`, and what an interrupted one left.

    Raises:
        ConversionError: It is not known what the original looked like, or a tensor of it is missing.
        FileExistsError: `output` is there already.
    """
    checkpoint = Path(checkpoint)
    small = Path(original or checkpoint) / ORIGINAL_FOLDER
    if not (small / LAYOUT_FILE).is_file():
        raise ConversionError(
            f"{small} does not say what the original looked like. Pass the folder that this model was fine-tuned "
            "from, as `videollama2 convert` made it: --original PATH."
        )
    layout = _read_layout(small / LAYOUT_FILE)
    if "one_way" in layout:
        raise ConversionError(layout["one_way"])
    tensors = {complete_name(name): tensor for name, tensor in read_folder(checkpoint).items()}
    left_out = read_file(small / LEFT_OUT_FILE) if (small / LEFT_OUT_FILE).is_file() else {}
    written = {target for entry in layout["files"].values() for target in entry["tensors"].values()}
    # A full checkpoint may have left a tower to another repository; trained, it has no place in the same files.
    full = (full or original is not None) and (layout["kind"] != "full" or not written.issuperset(tensors))
    if full:
        rename = original_name if is_video_llava(read_config(small)) else str
        layout = _full_layout(read_folder(Path(original or checkpoint)), layout, rename, max_shard_size)
    files = {name: _collect(name, entry, tensors, left_out) for name, entry in layout["files"].items()}
    missing = [f"{name}: {key}" for name, content in files.items() for key, value in content.items() if value is None]
    if missing:
        raise ConversionError(
            f"{checkpoint} lacks {len(missing)} tensors of the original:\n"
            + "\n".join(f"  {item}" for item in missing)
        )
    contents: dict[str, dict[str, StoredTensor]] = files  # type: ignore[assignment]  # none is missing
    total = sum(tensor.nbytes for content in contents.values() for tensor in content.values())
    folders = {checkpoint, small.parent}
    check_apart(Path(output), folders, folders)
    with published_folder(Path(output), _fingerprint(contents), resume=resume, overwrite=overwrite) as folder:
        check_space(folder, total)
        _copy_originals(small, folder, full)
        with progress_bar("restoring", total) as progress:
            for name, content in contents.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                if (folder / name).is_file():  # whole, from before the interruption
                    progress.update(sum(tensor.nbytes for tensor in content.values()))
                elif name.endswith(".safetensors"):
                    _write_safetensors(folder / name, layout["files"][name].get("header"), content, progress)
                else:
                    temporary = folder / f"{name}.part"
                    with open(temporary, "wb") as file:
                        torch.save({key: tensor.load() for key, tensor in content.items()}, file)
                        file.flush()
                        os.fsync(file.fileno())
                    temporary.replace(folder / name)
                    progress.update(sum(tensor.nbytes for tensor in content.values()))
        if full and len(contents) > 1:
            weight_map = {key: name for name, content in contents.items() for key in content}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _read_layout(path: Path) -> dict[str, Any]:
    """
    Raises:
        ConversionError: It is not what a conversion writes, or names files that lie elsewhere.
    """
    try:
        layout = json.loads(path.read_text(encoding="utf-8"))
        names = [
            name for name, entry in layout["files"].items() if layout["kind"] and dict(entry["tensors"]) is not None
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConversionError(
            f"{path} is not the layout of an original checkpoint. Convert the original again."
        ) from None
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise ConversionError(f"{path} names {outside}, which are not files of its own folder. It was not followed.")
    return layout


def _fingerprint(contents: dict[str, dict[str, StoredTensor]]) -> str:
    """Changes with the files that are written and with those that are read."""
    read = sorted({tensor.file for content in contents.values() for tensor in content.values()})
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in read]
    written = {name: list(content) for name, content in contents.items()}
    return hashlib.sha256(json.dumps([stats, written]).encode()).hexdigest()


def _full_layout(
    tensors: dict[str, StoredTensor], layout: dict[str, Any], rename: Callable[[str], str], max_shard_size: int
) -> dict[str, Any]:
    """The files of a full checkpoint, with what the source had several times (BEATs' table)."""
    names = {key: target for entry in layout["files"].values() for key, target in entry["tensors"].items() if target}
    names |= {rename(name): name for name in map(complete_name, tensors)}
    names = {key: target for key, target in names.items() if not key.startswith("base_model.")}
    sizes = {key: tensors[target].nbytes for key, target in names.items()}
    groups = group_by_size(sizes.items(), max_shard_size)
    return {
        "kind": "full",
        "files": dict(zip(shard_names(len(groups)), ({"tensors": {k: names[k] for k in group}} for group in groups))),
    }


def _copy_originals(small: Path, folder: Path, full: bool) -> None:
    """The small files, and adapters; for a full checkpoint with its own tokenizer and a configuration that says so."""
    for path in sorted(small.rglob("*")):
        relative = path.relative_to(small)
        if not path.is_file() or relative.as_posix() in (LAYOUT_FILE, LEFT_OUT_FILE):
            continue
        if full and relative.name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):  # of files that are not written
            continue
        if relative.parts[0] == LANGUAGE_MODEL_FOLDER:
            if not full or relative.name == CONFIG_NAME:
                continue
            relative = relative.relative_to(LANGUAGE_MODEL_FOLDER)
        elif full and relative.name.startswith("adapter_"):
            continue
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / relative)
    if full:
        path = folder / CONFIG_NAME
        # The original takes a folder whose configuration says this for a projector without a language model.
        config_dict = json.loads(path.read_text(encoding="utf-8")) | {"tune_mm_mlp_adapter": False}
        path.write_text(json.dumps(config_dict, indent=2) + "\n")


def _collect(
    filename: str, entry: dict[str, Any], tensors: dict[str, StoredTensor], left_out: dict[str, StoredTensor]
) -> dict[str, StoredTensor | None]:
    content: dict[str, StoredTensor | None] = {}
    for key, target in entry["tensors"].items():
        rest = left_out.get(f"{filename}:{key}")
        tensor = content[key] = rest if target is None else tensors.get(target)
        if target is not None and tensor is not None and rest is not None:  # rows that were cut off
            rows = torch.cat([tensor.load(), rest.load().to(DTYPES[tensor.dtype])])
            content[key] = StoredTensor(key, rest.file, tensor.dtype, tuple(rows.shape), values=rows)
    return content


def _write_safetensors(path: Path, raw_header: str | None, content: dict[str, StoredTensor], progress: tqdm) -> None:
    """With the header of the original file where it still holds."""
    names = list(content)
    if raw_header is not None:
        header = json.loads(raw_header)
        names.sort(key=lambda name: header[name]["data_offsets"])
        if any(
            (tensor.dtype, list(tensor.shape)) != (header[name]["dtype"], header[name]["shape"])
            for name, tensor in content.items()
        ):
            raw_header = None
    entries = [(name, content[name].dtype, content[name].shape) for name in names]
    with SafetensorsWriter(path, entries, raw_header.encode() if raw_header is not None else None) as writer:
        for name in names:
            for chunk in content[name].chunks():
                writer.write(chunk)
                progress.update(len(chunk))
