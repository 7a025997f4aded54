"""What an original checkpoint consists of: which files hold which of its weights, under which names."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    StrictDataclassError,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from ..checkpoint_videollama2 import (
    ORIGINAL_MODEL_TYPES,
    convert_original_config,
    is_original_config,
    load_original_image_processor_config,
    load_original_tokenizer,
)
from ..configuration_videollama2 import VideoLlama2Config
from .lora import Adapter, read_adapter
from .tensors import (
    ConversionError,
    StoredTensor,
    find_weight_files,
    from_state_dict,
    load_pickle,
    read_file,
    read_folder,
)


# Files of a repository that a conversion can need; the rest (optimizer states, videos) is not downloaded.
_DOWNLOADED = ["*.json", "*.model", "*.txt", "*.safetensors", "*.bin", "*.pt", "*.jinja"]
PROJECTOR_FILE, AUDIO_PROJECTOR_FILE, AUDIO_TOWER_FILE = "mm_projector.bin", "mm_projector_a.bin", "audio_tower.bin"
NON_LORA_FILE, ADAPTER_CONFIG_FILE = "non_lora_trainables.bin", "adapter_config.json"

BUFFER = "a buffer that old versions of transformers saved; it is computed"
TEXT_HALF = "the text half of the tower's repository"


@dataclass(frozen=True)
class Dropped:
    """A tensor that is left out on purpose."""

    reason: str


@dataclass
class Part:
    """
    The weights from one place.

    Args:
        label: What it is, for people.
        folder: Where it lies; the way back writes what lies in the checkpoint's folder.
        tensors: What is in its files.
        rename: The name in the converted checkpoint, or why there is none.
    """

    label: str
    folder: Path
    tensors: dict[str, StoredTensor]
    rename: Callable[[str], str | Dropped]


@dataclass
class Source:
    """
    An original checkpoint, ready to be planned.

    Args:
        kind: `"full"`, `"projector"` (Base), or `"lora"`.
        folder: The checkpoint's folder.
        config_dict: Its `config.json`.
        config: The same as this package's configuration.
        parts: Its weights; where several hold a tensor, the first one counts.
        tokenizer: The language model's tokenizer with the placeholder tokens.
        vision_preprocessor: `preprocessor_config.json` of the vision tower.
        language_model_folder: Where tokenizer and generation configuration were read.
        adapter: LoRA weights to be merged.
        rows: Tensors of which only the first rows are taken.
        generation_config: To be written instead of the language model's `generation_config.json`, where that does not
            fit the converted model.
        one_way: Why there is no way back to the source's layout; `None`: there is.
        notes: What a reader of the result should know.
    """

    kind: str
    folder: Path
    config_dict: dict[str, Any]
    config: VideoLlama2Config
    parts: list[Part]
    tokenizer: PreTrainedTokenizerBase
    vision_preprocessor: dict[str, Any] | None
    language_model_folder: Path
    adapter: Adapter | None = None
    rows: dict[str, int] = field(default_factory=dict)
    generation_config: dict[str, Any] | None = None
    one_way: str | None = None
    notes: list[str] = field(default_factory=list)


def fetch(name: str | Path, revision: str | None = None) -> Path:
    """
    The folder of a checkpoint: itself, or the downloaded repository of that name.

    Raises:
        ConversionError: There is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise ConversionError(f"{name} is a file; pass the folder it lies in.")
    try:
        files = _list_files(str(name), revision)
        has_safetensors = any(re.fullmatch(r"model.*\.safetensors(\.index\.json)?", file) for file in files)
        skipped = ["consolidated*", *(["pytorch_model*"] if has_safetensors else [])]  # the same weights once more
        return Path(
            snapshot_download(str(name), revision=revision, allow_patterns=_DOWNLOADED, ignore_patterns=skipped)
        )
    except HFValidationError:
        raise ConversionError(f"There is no folder {name}, and it is not the name of a Hub repository.") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConversionError(
            f"{name} is no folder here and could not be downloaded from the Hub ({reason}). Check the spelling, the "
            "network and your access, or pass a folder."
        ) from None


def _list_files(name: str, revision: str | None) -> list[str]:
    """Files of a repository; none where it is only in the cache."""
    try:
        return HfApi().list_repo_files(name, revision=revision)
    except (OfflineModeIsEnabled, *HfHubHTTPError.__bases__):
        return []


def find_named(reference: str, folder: Path) -> Path:
    """The folder of something that a `config.json` refers to, by a path relative to it or to its parent, or a name."""
    for candidate in (folder / reference, folder.parent / reference):
        if candidate.is_dir():
            return candidate
    return fetch(reference)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint; an intermediate one (`checkpoint-N`) may have it in the folder above."""
    for candidate in (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,):
        path = candidate / CONFIG_NAME
        if path.is_file():
            try:
                config_dict = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConversionError(f"{path} is not JSON: {error}.") from None
            if isinstance(config_dict, dict):
                return config_dict
    raise ConversionError(f"{folder} has no {CONFIG_NAME}, so it is not a checkpoint of VideoLLaMA 2 or Video-LLaVA.")


def open_source(
    checkpoint: str | Path,
    revision: str | None = None,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    audio_tower: str | Path | None = None,
    video_tower: str | Path | None = None,
) -> Source:
    """
    Reads what an original checkpoint of VideoLLaMA 2 or Video-LLaVA consists of; weights are only listed.

    Args:
        checkpoint: Folder or Hub repository: a full checkpoint, a projector ("Base"), a LoRA result, or an
            intermediate `checkpoint-N`.
        revision: Branch, tag or commit of the repository.
        base: The language model (or full checkpoint) that a projector or LoRA result goes with. `None`: what its
            configuration names.
        vision_tower: Folder or repository of the vision tower. `None`: what the configuration names; needed only where
            the weights do not hold the tower. For Video-LLaVA see [`open_video_llava_source`].
        audio_tower: A file of BEATs, Microsoft's `.pt` or the original's `audio_tower.bin`, to be used instead of what
            lies in the checkpoint.
        video_tower: Video-LLaVA's tower of videos; see [`open_video_llava_source`].

    Raises:
        ConversionError: It is none of these, or something that it needs is missing.
    """
    folder = fetch(checkpoint, revision)
    config_dict = read_config(folder)
    if is_video_llava(config_dict):
        from .video_llava import open_video_llava_source  # here, because that module builds on this one

        if audio_tower is not None:
            raise ConversionError(f"{folder} is Video-LLaVA, which does not hear; leave --audio-tower out.")
        return open_video_llava_source(folder, config_dict, base, vision_tower, video_tower)
    if video_tower is not None:
        raise ConversionError(f"{folder} is not Video-LLaVA, so it has no --video-tower; use --vision-tower.")
    _check_model_type(config_dict, folder)
    if not isinstance(config_dict.get("mm_vision_tower"), str):
        raise ConversionError(f"{CONFIG_NAME} of {folder} names no vision tower (`mm_vision_tower`).")
    kind, parts, adapter, language_model_folder = read_parts(folder, config_dict, base)

    notes: list[str] = []
    if kind == "lora" and not (folder / NON_LORA_FILE).is_file():
        notes.append(f"There is no {NON_LORA_FILE} beside the adapter: connectors and towers are the base's.")
    if kind == "lora" and find_weight_files(folder)[0]:
        notes.append(f"{folder.name} holds whole weights beside the adapter; the adapter is merged into its base.")
    audio = config_dict.get("mm_audio_tower") is not None or audio_tower is not None
    audio_overrides: dict[str, Any] = {}
    if audio:
        config_dict = {**config_dict, "mm_audio_tower": config_dict.get("mm_audio_tower") or str(audio_tower)}
        for name in (AUDIO_TOWER_FILE, AUDIO_PROJECTOR_FILE):
            if (folder / name).is_file():
                parts.append(Part(name, folder, read_file(folder / name), keep_name))
        if audio_tower is not None:
            part, audio_overrides = read_audio_tower(Path(audio_tower))
            parts.insert(0, part)

    towers = {}
    if vision_tower is not None:
        towers[config_dict["mm_vision_tower"]] = str(vision_tower)
    if not _has(parts, "model.vision_tower."):
        parts.append(_vision_tower_part(config_dict, folder, vision_tower))

    shapes = {target: tensor.shape for part in reversed(parts) for target, tensor in named(part)}
    tokenizer = load_source_tokenizer(language_model_folder, config_dict)
    try:
        arguments = convert_original_config(config_dict, str(folder), tokenizer, towers, shapes)
        preprocessor = load_original_image_processor_config(config_dict, str(folder), towers)
        if audio and not arguments["audio_config"]:
            raise ConversionError(
                f"The configuration of {folder} names an audio tower, but its weights are nowhere: neither in the "
                f"checkpoint nor in {AUDIO_TOWER_FILE}. Pass them: --audio-tower FILE."
            )
        arguments.get("audio_config", {}).update(audio_overrides)
        config = VideoLlama2Config(**arguments)
    except (OSError, KeyError, ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
        if isinstance(error, ConversionError):
            raise
        message = f"{CONFIG_NAME} of {folder} lacks {error}" if isinstance(error, KeyError) else str(error)
        if isinstance(error, ArithmeticError):  # no attention heads, for example
            message = f"{CONFIG_NAME} of {folder} is not valid: {error}"
        if isinstance(error, StrictDataclassError):  # its last line says what is wrong
            message = f"{CONFIG_NAME} of {folder} is not valid: {message.splitlines()[-1].strip().split(': ', 1)[-1]}"
        raise ConversionError(message) from None
    return Source(
        kind, folder, config_dict, config, parts, tokenizer, preprocessor, language_model_folder, adapter, notes=notes
    )


def is_video_llava(config_dict: dict[str, Any]) -> bool:
    """Whether a `config.json` is that of Video-LLaVA, the original's or that of transformers' own port."""
    return config_dict.get("model_type") == "video_llava" or "mm_video_tower" in config_dict


def _check_model_type(config_dict: dict[str, Any], folder: Path) -> None:
    model_type = config_dict.get("model_type")
    if isinstance(model_type, str) and is_original_config(config_dict):
        return
    if model_type == "videollama2":
        raise ConversionError(f"{folder} is converted already; transformers loads it as it is.")
    known = ", ".join(sorted(name for name in ORIGINAL_MODEL_TYPES if name != "llava"))
    raise ConversionError(
        f"{folder} has model_type {model_type!r}, which is not an original checkpoint of VideoLLaMA 2 ({known})."
    )


def load_source_tokenizer(folder: Path, config_dict: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        return load_original_tokenizer(str(folder), config_dict)
    except Exception as error:  # the tokenizers library raises nothing more precise
        reason = str(error).strip().split("\n")[0]
        raise ConversionError(f"The tokenizer in {folder} cannot be read: {reason}") from None


def keep_name(name: str) -> str | Dropped:
    """VideoLLaMA 2's own keys are kept, but for buffers."""
    if name.endswith((".position_ids", ".rotary_emb.inv_freq")):
        return Dropped(BUFFER)
    return complete_name(name)


def complete_name(name: str) -> str:
    """transformers leaves `vision_model.` out of the vision tower's keys if it saves a model that it did not load."""
    prefix = "model.vision_tower.vision_tower."
    if name.startswith(prefix) and not name.startswith(f"{prefix}vision_model."):
        return f"{prefix}vision_model.{name.removeprefix(prefix)}"
    return name


def _strip_peft(name: str) -> str:
    # The original strips "base_model." and then one "model." (`load_pretrained_model`).
    return name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.") else name


def _strip_tower(name: str) -> str | Dropped:
    """Names in the repository of a CLIP or SigLIP model."""
    dropped = keep_name(name)
    if isinstance(dropped, Dropped):
        return dropped
    if name.startswith(("text_model.", "text_projection.", "visual_projection.")) or name.startswith("logit_"):
        return Dropped(TEXT_HALF)
    return f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}"


def read_parts(
    folder: Path,
    config_dict: dict[str, Any],
    base: str | Path | None,
    rename: Callable[[str], str | Dropped] = keep_name,
) -> tuple[str, list[Part], Adapter | None, Path]:
    """
    The weights of a checkpoint and of its base: their kind, their parts, LoRA to be merged, and the folder of the
    language model. See [`Source`]; `rename` is that of every [`Part`].
    """
    adapter, parts = None, []
    is_lora = (folder / ADAPTER_CONFIG_FILE).is_file()
    weights = {} if is_lora else read_folder(folder)
    if is_lora:
        kind, adapter = "lora", read_adapter(folder)
        trained = folder / NON_LORA_FILE
        if trained.is_file():
            label = f"trained beside LoRA ({NON_LORA_FILE})"
            parts.append(Part(label, folder, read_file(trained), lambda name: rename(_strip_peft(name))))
        if adapter.full:
            parts.append(Part("whole modules saved by PEFT", folder, adapter.full, rename))
    elif weights:
        return "full", [Part("checkpoint", folder, weights, rename)], None, folder
    elif (projector := find_projector(folder)) is not None:
        kind = "projector"
        parts.append(Part(f"projector ({projector.name})", folder, read_file(projector), rename))
    else:
        raise ConversionError(
            f"{folder} holds no weights that are known: neither model*.safetensors or pytorch_model*.bin (a full "
            f"checkpoint), nor {PROJECTOR_FILE} (a Base checkpoint), nor {ADAPTER_CONFIG_FILE} (LoRA)."
        )

    base = base or config_dict.get("_name_or_path") or (adapter.base if adapter is not None else None)
    if not base:
        raise ConversionError(f"{folder} is a part of a model and does not name its base. Pass it: --base PATH.")
    try:
        base_folder = find_named(str(base), folder)
    except ConversionError as error:
        what = "a LoRA adapter" if kind == "lora" else "only a projector"
        raise ConversionError(
            f"{folder} holds {what} and needs its base model. {error} Pass the base: --base PATH."
        ) from None
    tensors = read_folder(base_folder)
    if not tensors:
        raise ConversionError(f"The base {base_folder} holds no weights. Pass another: --base PATH.")
    parts.append(Part("base", base_folder, tensors, rename))
    return kind, parts, adapter, base_folder


def named(part: Part) -> Iterable[tuple[str, StoredTensor]]:
    """The tensors of a part that are kept, by their names in the converted checkpoint."""
    for name, tensor in part.tensors.items():
        target = part.rename(name)
        if not isinstance(target, Dropped):
            yield target, tensor


def _has(parts: list[Part], prefix: str) -> bool:
    return any(target.startswith(prefix) for part in parts for target, _ in named(part))


def find_projector(folder: Path) -> Path | None:
    """`mm_projector.bin`; that of an intermediate checkpoint may lie in `<parent>/mm_projector/checkpoint-N.bin`."""
    beside = folder.parent / "mm_projector" / f"{folder.name}.bin"
    return next((path for path in (folder / PROJECTOR_FILE, beside) if path.is_file()), None)


def _vision_tower_part(config_dict: dict[str, Any], folder: Path, vision_tower: str | Path | None) -> Part:
    name = config_dict["mm_vision_tower"]
    try:
        tower = fetch(vision_tower) if vision_tower is not None else find_named(name, folder)
        tensors = read_folder(tower)
    except ConversionError as error:
        raise ConversionError(
            f"The weights do not hold the vision tower {name!r}. {error} Pass the tower: --vision-tower PATH."
        ) from None
    if not tensors:
        raise ConversionError(f"The vision tower {tower} holds no weights. Pass another: --vision-tower PATH.")
    return Part("vision tower", tower, tensors, _strip_tower)


def read_audio_tower(path: Path) -> tuple[Part, dict[str, Any]]:
    """BEATs from Microsoft's `.pt` (`cfg` and `model`) or the original's `audio_tower.bin`; and what `cfg` adds."""
    if not path.is_file():
        raise ConversionError(f"There is no file {path}; --audio-tower takes a file of BEATs.")
    content = load_pickle(path)
    if isinstance(content, dict) and set(content) >= {"cfg", "model"}:
        cfg = content["cfg"]
        unsupported = {
            name: cfg[name]
            for name, value in (("layer_norm_first", False), ("deep_norm", True), ("activation_fn", "gelu"))
            if cfg.get(name, value) != value
        }
        if unsupported:
            raise ConversionError(f"{path} is a BEATs with {unsupported}, which VideoLLaMA 2 does not use.")
        tensors = from_state_dict(content["model"], path)
        overrides = {"max_distance": cfg["max_distance"]} if "max_distance" in cfg else {}
        # Not a file of the checkpoint, even if it lies there: the way back could not write its `cfg`.
        return Part(f"BEATs ({path.name})", path, tensors, lambda name: f"model.audio_tower.{name}"), overrides
    return Part(f"audio tower ({path.name})", path.parent, from_state_dict(content, path), keep_name), {}
