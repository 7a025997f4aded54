"""What the features of a medium depend on: its content, the tower and the settings of the processor, as hashes."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..media_videollama2 import fetch_media
from ..processing_videollama2 import VideoLlama2Processor


# Raise it when towers or processors come to give other features than before.
_FORMAT = 1
_TOWERS = ("vision_tower", "video_tower", "audio_tower")
_PROCESSORS = ("image_processor", "video_processor", "feature_extractor")
_NOT_SETTINGS = ("transformers_version", "architectures", "_name_or_path", "dtype", "auto_map", "processor_class")


class FileDigests:
    """
    Hashes of the contents of media. Those of files are kept in a folder, to be used again as long as neither size nor
    time of change are others.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.known: dict[str, tuple[int, int, str]] = {}  # size in bytes, time in nanoseconds, hash
        for path in sorted(folder.glob("files-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                name, size, modified, digest = json.loads(line)
                self.known[name] = (size, modified, digest)

    def save(self, rank: int) -> None:
        lines = "".join(json.dumps([path, *values]) + "\n" for path, values in self.known.items())
        replace_file(self.folder / f"files-{rank}.jsonl", lambda new: new.write_text(lines, encoding="utf-8"))

    def __call__(self, source: Any) -> str:
        """
        Hash of the content of a medium: a file, bytes, an array, a picture, or a list or folder of them. For a URL it
        is that of the address.

        Raises:
            OSError: There is no such file.
        """
        if isinstance(source, (list, tuple)):
            return _hash(*(item if isinstance(item, (int, float)) else self(item) for item in source))
        if isinstance(source, Image.Image):
            return _hash(source.mode, source.size, source.tobytes())
        if isinstance(source, (np.ndarray, torch.Tensor)):
            values = np.ascontiguousarray(source)
            return _hash(str(values.dtype), values.shape, values.tobytes())
        if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
            return _hash(source)
        source = fetch_media(source)
        if not isinstance(source, (str, os.PathLike)):
            return _hash(bytes(source))
        if os.path.isdir(source):
            return _hash(*(self(os.path.join(source, name)) for name in sorted(os.listdir(source))))
        path, status = os.path.abspath(source), os.stat(source)
        size, modified, digest = self.known.get(path, (None, None, ""))
        if (size, modified) != (status.st_size, status.st_mtime_ns):
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self.known[path] = (status.st_size, status.st_mtime_ns, digest)
        return digest


def check_is_constant(model: Any, processor: VideoLlama2Processor) -> None:
    """
    Raises:
        ValueError: The same medium would not always have the same features.
    """
    for name in _TOWERS:
        tower = getattr(model, name)
        for parameter in tower.parameters() if tower is not None else ():
            if parameter.requires_grad:
                raise ValueError(
                    f"The {name} trains, so its features change from step to step. Freeze it (see "
                    "prepare_for_training), or train without a feature cache."
                )
            if hasattr(parameter, "ds_id") or hasattr(parameter, "placements"):
                raise ValueError(
                    f"The weights of the {name} are sharded (ZeRO-3 or FSDP), so it cannot be told whether the "
                    "features are its own. Open the cache before the model is sharded, or use ZeRO-2."
                )
    for name in _PROCESSORS:
        if getattr(getattr(processor, name), "flip_probability", None):
            raise ValueError(f"The {name} flips at random, which a feature cache would fix; set flip_probability=0.")


def get_fingerprint(model: Any, processor: VideoLlama2Processor) -> dict[str, Any]:
    """What features depend on besides the media, as it is read back from JSON."""
    config = model.config
    fingerprint: dict[str, Any] = {"format": _FORMAT}
    for name in _TOWERS:
        tower = getattr(model.model, name)
        if tower is not None:
            fingerprint[name] = {"weights": _hash_weights(tower), "config": _settings(tower.config.to_diff_dict())}
    fingerprint["config"] = {
        name: getattr(config, name)
        for name in ("vision_feature_layer", "vision_feature_select_strategy", "video_feature_select_strategy")
    }
    for name in _PROCESSORS:
        part = getattr(processor, name)
        if part is not None:
            fingerprint[name] = _settings(part.to_dict())
    return json.loads(json.dumps(fingerprint, default=str))


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in _NOT_SETTINGS}


def _hash_weights(tower: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, values in tower.state_dict().items():
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def find_difference(found: Any, expected: Any, name: str = "") -> str | None:
    """What differs between two fingerprints, as a dotted name with its values where they are short."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            different = find_difference(found.get(key), expected.get(key), f"{name}.{key}" if name else key)
            if different is not None:
                return different
        return None
    if found == expected:
        return None
    values = f" ({found!r} there, {expected!r} here)"
    return name + (values if len(values) < 60 else "")


def _hash(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file as a whole or not at all."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    write(new)
    os.replace(new, path)


__all__ = ["FileDigests", "check_is_constant", "find_difference", "get_fingerprint", "replace_file"]
