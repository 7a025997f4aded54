"""Original checkpoints to convert: copies of recorded ones, and larger random ones."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from golden_utils import GOLDENS
from videollama2_hf import VideoLlama2Config
from videollama2_hf.checkpoint_videollama2 import convert_original_config
from videollama2_hf.conversion.plan import expected_tensors


RECORDED = GOLDENS / "mistral_clip_stc_8f" / "checkpoint"


def copy_checkpoint(recorded: Path, folder: Path) -> Path:
    """A copy of a recorded checkpoint that a test may damage."""
    return Path(shutil.copytree(recorded, folder))


def edit_json(path: Path, **changes) -> None:
    """Changes keys of a JSON file; `None` takes one away."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def random_checkpoint(folder: Path, **changes) -> Path:
    """The recorded checkpoint with other sizes in its `config.json`, and random weights in three bfloat16 files."""
    ignored = shutil.ignore_patterns("*.safetensors", "*.index.json")
    shutil.copytree(RECORDED, folder, ignore=ignored)
    edit_json(folder / "config.json", **changes)
    config_dict = json.loads((folder / "config.json").read_text())
    shapes = expected_tensors(VideoLlama2Config(**convert_original_config(config_dict, str(folder))))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    weight_map = {}
    for number in range(3):
        filename = f"model-{number + 1:05d}-of-00003.safetensors"
        shard = dict(list(tensors.items())[number::3])
        save_file(shard, folder / filename, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, filename)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in the folder, and the target of every link."""
    result = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            result[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_symlink():
            result[f"{path.relative_to(folder)} links to"] = os.readlink(path)
    return result
