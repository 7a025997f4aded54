"""Original checkpoints of Video-LLaVA with their two LanguageBind towers; the port: `video_llava_port`."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import CONFIG_NAME

from ..checkpoint_videollama2 import convert_original_config
from ..configuration_videollama2 import LanguageBindVisionConfig, VideoLlama2Config
from .languagebind import IMAGE_TOWER, TOWERS, VIDEO_TOWER, Tower, compare, describe, read_repository
from .sources import Dropped, Part, Source, fetch, find_named, keep_name, load_source_tokenizer, named, read_parts
from .tensors import ConversionError
from .video_llava_port import open_port


def open_video_llava_source(
    folder: Path,
    config_dict: dict[str, Any],
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    video_tower: str | Path | None = None,
) -> Source:
    """
    Reads what a checkpoint of Video-LLaVA consists of; weights are only listed.

    A tower whose weights lie in the checkpoint is taken from there, unless its repository is passed: then it is taken
    from the repository, which is what the original code does. A note says whether the two differ.

    Args:
        folder: The checkpoint's folder: the original's (full, a projector, LoRA), or one of transformers' port.
        config_dict: Its `config.json`.
        base: The language model that a projector or LoRA result goes with. `None`: what its configuration names.
        vision_tower: Folder or repository of `LanguageBind_Image`. `None`: what the configuration names.
        video_tower: The same of `LanguageBind_Video_merge`. With transformers' port: repairs it.

    Raises:
        ConversionError: It is none of these, or something that it needs is missing.
    """
    if config_dict.get("model_type") == "video_llava":
        return open_port(folder, config_dict, vision_tower, video_tower)
    if config_dict.get("mm_use_im_start_end"):
        raise ConversionError(
            f"{folder} puts tokens around its images (`mm_use_im_start_end`), which no released Video-LLaVA does and "
            "which is not supported here."
        )
    kind, parts, adapter, language_model_folder = read_parts(folder, config_dict, base, rename_original)
    notes: list[str] = []
    towers: dict[str, dict[str, Any]] = {}
    for tower, given in ((IMAGE_TOWER, vision_tower), (VIDEO_TOWER, video_tower)):
        name = config_dict.get(tower.config_key)
        if name is None:
            raise ConversionError(f"{CONFIG_NAME} of {folder} names no {tower.label} (`{tower.config_key}`).")
        towers[name] = _add_tower(tower, name, given, folder, parts, notes)
    if adapter is not None:
        changes = {name: low_rank for name, low_rank in adapter.changes.items() if "_tower." not in name}
        if len(changes) != len(adapter.changes):
            notes.append(
                f"LoRA points at {len(adapter.changes) - len(changes)} weights of the towers too. They do not train, "
                "and the original loads the towers after merging, so these changes are left out."
            )
            adapter.changes = changes
    tokenizer = load_source_tokenizer(language_model_folder, config_dict)
    try:
        config = VideoLlama2Config(**convert_original_config(config_dict, str(folder), tokenizer, towers))
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise ConversionError(str(error)) from None
    return Source(
        kind, folder, config_dict, config, parts, tokenizer, None, language_model_folder, adapter, notes=notes
    )


def rename_original(name: str) -> str | Dropped:
    """The name here of a tensor of the original."""
    for tower in TOWERS:
        if name.startswith(tower.original_prefix):
            name = tower.prefix + name.removeprefix(tower.original_prefix)
    return keep_name(name)


def original_name(name: str) -> str:
    """The original's name of a tensor here."""
    for tower in TOWERS:
        if name.startswith(tower.prefix):
            return tower.original_prefix + name.removeprefix(tower.prefix)
    return name


def _add_tower(
    tower: Tower, name: str, given: str | Path | None, folder: Path, parts: list[Part], notes: list[str]
) -> dict[str, Any]:
    """Adds a tower's weights to the parts unless they are there already, and returns its configuration."""
    embedded = {target: tensor for part in parts for target, tensor in named(part) if target.startswith(tower.prefix)}
    repository = _find_repository(tower, name, given, folder, bool(embedded))
    if repository is None:
        width = embedded[f"{tower.prefix}pre_layrnorm.weight"].shape[0]
        if width != LanguageBindVisionConfig().hidden_size:
            raise ConversionError(
                f"The weights of {folder} hold the {tower.label}, but not of the released size, and the {CONFIG_NAME} "
                f"of {name!r} was not found here or on the Hub. Pass the tower: {tower.option} PATH."
            )
        window = ", windows of 8 frames" if tower.has_time else ""
        notes.append(
            f"{CONFIG_NAME} of the {tower.label} {name!r} was not found here or on the Hub, so the released values "
            f"are used (gelu, 16 heads{window}). {tower.option} PATH reads it."
        )
        return {"model_type": LanguageBindVisionConfig.model_type, "add_time_attn": tower.has_time}
    part, config = read_repository(tower, repository)
    if not embedded:
        if not part.tensors:
            raise ConversionError(
                f"The {tower.label} {repository} holds no weights. Pass another: {tower.option} PATH."
            )
        parts.append(part)
    elif part.tensors:
        theirs = dict(named(part))
        difference = describe(compare(embedded, theirs), embedded, theirs)
        if given is not None:
            parts.insert(0, part)
            notes.append(
                f"The {tower.label} is that of {given}, as the original code loads it; the checkpoint's own copy "
                f"is {difference}."
            )
        elif difference != "equal":
            notes.append(
                f"The {tower.label} is the copy in the checkpoint. That of {name}, which the original code "
                f"loads instead, is {difference}; {tower.option} {repository} takes that one."
            )
    return config


def _find_repository(
    tower: Tower, name: str, given: str | Path | None, folder: Path, is_embedded: bool
) -> Path | None:
    """
    The folder of a tower: passed, found beside the checkpoint, or from the Hub. `None` if it is nowhere and only its
    configuration would be read from it.
    """
    if given is not None:
        return fetch(given)
    if is_embedded:
        beside = (candidate for candidate in (folder / name, folder.parent / name) if candidate.is_dir())
        return next(beside, None) or _fetch_config(name)
    try:
        return find_named(name, folder)
    except ConversionError as error:
        raise ConversionError(
            f"The weights do not hold the {tower.label} {name!r}. {error} Pass the tower: {tower.option} PATH."
        ) from None


def _fetch_config(name: str) -> Path | None:
    """The folder of `config.json` of a Hub repository, or `None`; unlike `cached_file`, fails fast without network."""
    try:
        folder = Path(snapshot_download(name, allow_patterns=[CONFIG_NAME]))
    except (OSError, ValueError):  # offline, no such repository, or a name that cannot be one
        return None
    return folder if (folder / CONFIG_NAME).is_file() else None
