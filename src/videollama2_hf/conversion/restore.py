"""Back to the original's layout: the files of the checkpoint that a folder was converted from."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from .convert import LAYOUT_FILE, LEFT_OUT_FILE, ORIGINAL_FOLDER, check_space, progress_bar, published_folder
from .tensors import ConversionError, SafetensorsWriter, StoredTensor, read_file, read_folder


def restore_original(
    checkpoint: str | Path,
    output: str | Path,
    *,
    original: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """
    Writes a converted or fine-tuned model in the layout of the original code.

    The files are those of the checkpoint that was converted, byte for byte where a tensor is unchanged.

    Args:
        checkpoint: A folder that [`convert_checkpoint`] made, or a model that was loaded from one and saved again.
        output: The folder to be made.
        original: The converted folder that `checkpoint` comes from. `None`: itself.
        overwrite: Whether to replace `output`.

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
    layout = json.loads((small / LAYOUT_FILE).read_text(encoding="utf-8"))
    tensors = {_original_name(name): tensor for name, tensor in read_folder(checkpoint).items()}
    left_out = read_file(small / LEFT_OUT_FILE) if (small / LEFT_OUT_FILE).is_file() else {}
    files = {name: _collect(name, entry, tensors, left_out) for name, entry in layout["files"].items()}
    missing = [f"{name}: {key}" for name, content in files.items() for key, value in content.items() if value is None]
    if missing:
        raise ConversionError(
            f"{checkpoint} lacks {len(missing)} tensors of the original:\n"
            + "\n".join(f"  {item}" for item in missing)
        )
    total = sum(tensor.nbytes for content in files.values() for tensor in content.values())
    with published_folder(Path(output), "", overwrite=overwrite) as folder:
        check_space(folder, total)
        for path in sorted(small.rglob("*")):
            relative = path.relative_to(small)
            if path.is_file() and relative.as_posix() not in (LAYOUT_FILE, LEFT_OUT_FILE):
                (folder / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / relative)
        with progress_bar("restoring", total) as progress:
            for name, content in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                if name.endswith(".safetensors"):
                    _write_safetensors(folder / name, layout["files"][name]["header"], content, progress)
                else:
                    torch.save({key: tensor.load() for key, tensor in content.items()}, folder / name)
                    progress.update(sum(tensor.nbytes for tensor in content.values()))


def _original_name(name: str) -> str:
    """transformers leaves this part out when it saves a model that it did not load."""
    prefix = "model.vision_tower.vision_tower."
    if name.startswith(prefix) and not name.startswith(f"{prefix}vision_model."):
        return f"{prefix}vision_model.{name.removeprefix(prefix)}"
    return name


def _collect(
    filename: str, entry: dict[str, Any], tensors: dict[str, StoredTensor], left_out: dict[str, StoredTensor]
) -> dict[str, StoredTensor | None]:
    return {
        key: left_out.get(f"{filename}:{key}") if target is None else tensors.get(target)
        for key, target in entry["tensors"].items()
    }


def _write_safetensors(path: Path, raw_header: str, content: dict[str, StoredTensor], progress: Any) -> None:
    header = json.loads(raw_header)
    names = sorted(content, key=lambda name: header[name]["data_offsets"])
    as_before = all(
        (tensor.dtype, list(tensor.shape)) == (header[name]["dtype"], header[name]["shape"])
        for name, tensor in content.items()
    )
    entries = [(name, content[name].dtype, content[name].shape) for name in names]
    with SafetensorsWriter(path, entries, raw_header.encode() if as_before else None) as writer:
        for name in names:
            for chunk in content[name].chunks():
                writer.write(chunk)
                progress.update(len(chunk))
