"""The two towers of Video-LLaVA, in its checkpoints and in LanguageBind's repositories."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..configuration_videollama2 import LanguageBindVisionConfig
from .sources import TEXT_HALF, Dropped, Part, keep_name, read_config
from .tensors import DTYPES, ConversionError, StoredTensor, read_folder


class Tower(NamedTuple):
    """
    One of the two towers.

    Args:
        label: What it is, for people.
        option: The option of the command line that passes it.
        config_key: What names it in the original's `config.json`.
        model_type: What LanguageBind's `config.json` calls its model.
        original_prefix: Its keys in the original's checkpoints.
        prefix: Its keys here.
        has_time: Whether it is released with attention over time.
    """

    label: str
    option: str
    config_key: str
    model_type: str
    original_prefix: str
    prefix: str
    has_time: bool


IMAGE_TOWER = Tower(
    label="image tower",
    option="--vision-tower",
    config_key="mm_image_tower",
    model_type="LanguageBindImage",
    original_prefix="model.image_tower.image_tower.",
    prefix="model.vision_tower.vision_tower.vision_model.",
    has_time=False,
)
VIDEO_TOWER = Tower(
    label="video tower",
    option="--video-tower",
    config_key="mm_video_tower",
    model_type="LanguageBindVideo",
    original_prefix="model.video_tower.video_tower.",
    prefix="model.video_tower.",
    has_time=True,
)
TOWERS = (IMAGE_TOWER, VIDEO_TOWER)


def read_repository(tower: Tower, repository: Path) -> tuple[Part, dict[str, Any]]:
    """
    The weights of a tower in a folder of LanguageBind (none if only its configuration is there), and the arguments of
    [`LanguageBindVisionConfig`].

    Raises:
        ConversionError: It is a folder of something else.
    """
    config_dict = read_config(repository)
    model_type = config_dict.get("model_type")
    if model_type != tower.model_type:
        other = [f"LanguageBind's {other.label}" for other in TOWERS if other.model_type == model_type]
        raise ConversionError(
            f"{repository} is not LanguageBind's {tower.label} ({tower.model_type}) but "
            f"{other[0] if other else f'of model_type {model_type!r}'}. Pass another: {tower.option} PATH."
        )
    names = set(LanguageBindVisionConfig.default_config_fields()) - {"dtype", "transformers_version", "model_type"}
    config = {key: value for key, value in config_dict.get("vision_config", {}).items() if key in names}
    part = Part(f"LanguageBind's {tower.label}", repository, read_folder(repository), _rename_tower(tower))
    return part, {"model_type": LanguageBindVisionConfig.model_type, **config}


def _rename_tower(tower: Tower) -> Callable[[str], str | Dropped]:
    """Names in LanguageBind's repositories."""

    def rename(name: str) -> str | Dropped:
        if not name.startswith("vision_model."):
            is_text = name.startswith(("text_model.", "text_projection.", "visual_projection.", "logit_scale"))
            return Dropped(TEXT_HALF) if is_text else name
        return keep_name(tower.prefix + name.removeprefix("vision_model."))

    return rename


def relative_difference(first: StoredTensor, second: StoredTensor) -> float:
    """Norm of the difference by the norm of the second, after rounding to the coarser of the two dtypes."""
    if first.shape != second.shape:
        return float("inf")
    dtypes = [DTYPES[tensor.dtype] for tensor in (first, second)]
    coarser = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    a, b = (tensor.load().to(coarser) for tensor in (first, second))
    if torch.equal(a, b):
        return 0.0
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12))


def compare(ours: dict[str, StoredTensor], theirs: dict[str, StoredTensor]) -> dict[str, float]:
    """The relative difference of every tensor of ours that is not the same there; infinite if it is not there."""
    differences = {
        name: relative_difference(tensor, theirs[name]) if name in theirs else float("inf")
        for name, tensor in ours.items()
    }
    return {name: difference for name, difference in differences.items() if difference}


def describe(differences: dict[str, float], ours: dict[str, StoredTensor], theirs: dict[str, StoredTensor]) -> str:
    """The result of a comparison in words, for a note."""
    if differences:
        worst = max(differences, key=differences.__getitem__)
        return f"different in {len(differences)} of {len(ours)} tensors (by {differences[worst]:.2g} of {worst})"
    same_dtype = all(tensor.dtype == theirs[name].dtype for name, tensor in ours.items())
    return "equal" if same_dtype else "equal, but for rounding to another dtype"
