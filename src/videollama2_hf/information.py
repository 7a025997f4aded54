"""What a checkpoint is and takes: parts, parameters, bytes, tokens, memory; weights are not loaded."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .configuration_videollama2 import VideoLlama2Config, get_num_audio_tokens
from .feature_extraction_videollama2 import VideoLlama2FeatureExtractor
from .inference_memory import TEXT_TOKENS, InferenceMemory, estimate_inference, get_num_mel_frames


_KINDS = {
    "converted": "converted, loads as it is",
    "full": "original layout",
    "projector": "original layout, a projector that goes with a base model",
    "lora": "original layout, LoRA that goes with a base model",
}
_FRAME_COUNTS = (8, 16, 32, 64)


@dataclass
class ModelInformation:
    """
    What a checkpoint is.

    Args:
        name: Folder or repository.
        kind: `"converted"`, `"full"`, `"projector"` or `"lora"`; see `conversion.sources.Source`.
        model_class: Class that loads it.
        parts: What it consists of, in words, by part.
        parameters: Their numbers by part.
        disk: Bytes of all tensors by dtype, of the base model too where one is needed; empty if that is not known.
        tokens: Tokens of an `"image"`, of a `"video"` by its number of frames, and of an `"audio"` window.
        chunk_length: Seconds of a window.
        memory: Bytes by precision; see [`estimate_inference`].
        memory_inputs: What these are for.
        notes: What else is to be known.
    """

    name: str
    kind: str
    model_class: str
    parts: dict[str, str]
    parameters: dict[str, int]
    disk: dict[str, int]
    tokens: dict[str, Any]
    chunk_length: float
    memory: dict[str, InferenceMemory]
    memory_inputs: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """All of it, for people."""
        lines = [f"{self.name}: {self.model_class} ({_KINDS[self.kind]})", ""]
        width = max(map(len, [*self.parts, *self.parameters]))
        lines += [f"{part:<{width}}  {text}" for part, text in self.parts.items()]
        lines += ["", f"{'parameters':<{width}}  {sum(self.parameters.values()):>15,}"]
        lines += [f"{part:<{width}}  {count:>15,}" for part, count in self.parameters.items()]
        if self.disk:
            dtypes = ", ".join(f"{dtype} {format_bytes(size)}" for dtype, size in self.disk.items())
            lines += ["", f"weights on disk: {format_bytes(sum(self.disk.values()))} ({dtypes})"]
        video = ", ".join(f"{count} ({frames} frames)" for frames, count in self.tokens["video"].items())
        lines += ["", f"tokens of an image: {self.tokens['image']}", f"tokens of a video: {video}"]
        if self.tokens["audio"]:
            lines.append(
                f"tokens of sound: {self.tokens['audio']}, whatever its length (one window of {self.chunk_length:g} s)"
            )
        inputs = self.memory_inputs
        is_small = all(memory.total < 2**30 for memory in self.memory.values())
        unit, name = (2**20, "MiB") if is_small else (2**30, "GiB")
        seen = f"a video of {inputs['num_frames']} frames" if inputs["num_frames"] else "no video"
        heard = "with sound" if inputs["hears"] else "without sound"
        lines += [
            "",
            f"memory for {inputs['batch_size']} at once, each {seen} {heard}, {inputs['num_text_tokens']} tokens of "
            f"text, {inputs['num_new_tokens']} new tokens:",
            f"{name:<10}{'weights':>9}{'cache':>9}{'activations':>13}{'total':>9}",
        ]
        for precision, memory in self.memory.items():
            sizes = zip((memory.weights, memory.cache, memory.activations, memory.total), (9, 9, 13, 9))
            lines.append(f"{precision:<10}" + "".join(f"{size / unit:>{width}.2f}" for size, width in sizes))
        return "\n".join(lines + [f"Note: {note}" for note in self.notes])


def describe_model(
    checkpoint: str | os.PathLike,
    revision: str | None = None,
    num_frames: int | None = None,
    seconds: float | None = None,
    num_new_tokens: int = 256,
    batch_size: int = 1,
) -> ModelInformation:
    """
    What a checkpoint is, how many tokens media take in it, and the memory for answering with it. Weights are not
    loaded, and not downloaded.

    Args:
        checkpoint: A folder, converted or in any layout that conversion takes, or a repository on the Hub that is
            converted or a whole model in the original layout.
        num_frames: Frames of the video that memory is counted for. `None`: as trained; 0: no video.
        seconds: Of sound. The model hears one window whatever they are; 0: no sound.
        num_new_tokens: Tokens of the answer.
        batch_size: Questions at once.

    Raises:
        ValueError, FileNotFoundError: It is no such checkpoint, or its base or tower is not on this machine.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        kind, config, disk, notes = _read_folder(folder)
    else:
        kind, config, disk, notes = _read_repository(str(checkpoint), revision)
    chunk_length = _read_chunk_length(folder) if kind == "converted" and folder.is_dir() else 30.0
    hears = config.audio_config is not None
    tokens: dict[str, Any] = {"image": config.num_visual_tokens("image"), "video": {}, "audio": 0}
    for frames in sorted({config.num_frames, *_FRAME_COUNTS} | ({num_frames} if num_frames else set())):
        tokens["video"][frames] = config.num_visual_tokens("video", frames)
    if hears:
        audio: Any = config.audio_config
        num_mel_frames = get_num_mel_frames(chunk_length)
        tokens["audio"] = get_num_audio_tokens(num_mel_frames, audio.num_mel_bins, audio.patch_size)
    inputs: dict[str, Any] = {
        "num_frames": config.num_frames if num_frames is None else num_frames,
        "hears": hears and seconds != 0,
        "num_new_tokens": num_new_tokens,
        "batch_size": batch_size,
        "num_text_tokens": TEXT_TOKENS,
    }
    from .conversion.plan import build_meta_model
    from .training.stages import count_parameters

    parameters = {part: count for part, (_, count) in count_parameters(build_meta_model(config)).items()}
    return ModelInformation(
        name=str(checkpoint),
        kind=kind,
        model_class="VideoLlama2ForConditionalGeneration",
        parts=_describe_parts(config),
        parameters=parameters,
        disk=disk,
        tokens=tokens,
        chunk_length=chunk_length,
        memory=estimate_inference(config, chunk_length=chunk_length, **inputs),
        memory_inputs=inputs,
        notes=notes,
    )


def _read_folder(folder: Path) -> tuple[str, VideoLlama2Config, dict[str, int], list[str]]:
    """Kind, configuration, bytes by dtype and notes of a checkpoint on this machine."""
    from .conversion.plan import build_plan
    from .conversion.sources import ADAPTER_CONFIG_FILE, open_source, read_config
    from .conversion.tensors import read_folder

    config_dict = read_config(folder)
    notes: list[str] = []
    if config_dict.get("model_type") == "videollama2":
        kind, config = "converted", VideoLlama2Config.from_pretrained(folder)
        tensors = list(read_folder(folder).values())
        if not tensors:
            notes.append("There are no weights in this folder.")
    else:
        if (folder / ADAPTER_CONFIG_FILE).is_file() or not read_folder(folder):
            _check_base(folder, config_dict)
        plan = build_plan(open_source(folder))
        kind, config, notes = plan.source.kind, plan.source.config, list(plan.source.notes)
        tensors = [planned.source for planned in plan.tensors]
        if kind != "full":
            notes.append("It is to be converted before it can be loaded: videollama2 convert.")
    disk: dict[str, int] = {}
    for tensor in tensors:
        disk[tensor.dtype] = disk.get(tensor.dtype, 0) + tensor.nbytes
    return kind, config, dict(sorted(disk.items(), key=lambda item: -item[1])), notes


def _check_base(folder: Path, config_dict: dict[str, Any]) -> None:
    """Refuses what conversion would download: the base model of a projector or of LoRA."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    from .conversion.lora import read_adapter
    from .conversion.sources import ADAPTER_CONFIG_FILE

    base = config_dict.get("_name_or_path")
    if not base and (folder / ADAPTER_CONFIG_FILE).is_file():
        base = read_adapter(folder).base
    if not base or any((place / base).is_dir() for place in (folder, folder.parent)):
        return  # conversion says what is missing
    try:
        snapshot_download(base, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        raise FileNotFoundError(
            f"{folder} is a part of a model that goes with the base {base!r}, which is not on this machine. Download "
            f"it first: hf download {base}"
        ) from None


def _read_repository(name: str, revision: str | None) -> tuple[str, VideoLlama2Config, dict[str, int], list[str]]:
    """The same of a repository on the Hub, of which only small files are fetched."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx
    from transformers import PreTrainedConfig

    from .checkpoint_videollama2 import is_original_config

    try:
        config_dict, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
        is_original = is_original_config(config_dict)
        if not is_original and config_dict.get("model_type") != "videollama2":
            raise ValueError(
                f"{name} has model_type {config_dict.get('model_type')!r}; it is no checkpoint of VideoLLaMA 2 or "
                "Video-LLaVA."
            )
        config = VideoLlama2Config.from_pretrained(name, revision=revision or "main")
    except OSError as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise FileNotFoundError(
            f"{name!r} is no file or folder here, and could not be read from the Hub ({reason}). Check the spelling, "
            "the network and your access."
        ) from None
    notes, disk = [], {}
    try:
        files = HfApi().model_info(name, revision=revision, files_metadata=True).siblings or []
        for suffix in (".safetensors", ".bin"):
            size = sum(file.size or 0 for file in files if file.rfilename.endswith(suffix))
            disk |= {f"{suffix} files": size} if size else {}
    except (OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError):
        notes.append("The size of its files is not known: the Hub cannot be reached.")
    return "full" if is_original else "converted", config, disk, notes


def _read_chunk_length(folder: Path) -> float:
    try:
        return VideoLlama2FeatureExtractor.from_pretrained(folder).chunk_length
    except OSError:  # a folder of a model without its processor
        return VideoLlama2FeatureExtractor().chunk_length


def _describe_parts(config: VideoLlama2Config) -> dict[str, str]:
    text: Any = config.text_config
    audio: Any = config.audio_config
    parts = {
        "language model": f"{text.model_type}, {text.num_hidden_layers} layers of {text.hidden_size}, vocabulary "
        f"{text.vocab_size}, context {getattr(text, 'max_position_embeddings', 'unknown')}"
    }
    towers: dict[str, Any] = {"image tower": config.vision_config, "video tower": config.video_config}
    if config.video_config is None:
        towers = {"vision tower": config.vision_config}
    for name, tower in towers.items():
        parts[name] = (
            f"{tower.model_type.removesuffix('_vision_model')}, {tower.num_hidden_layers} layers of "
            f"{tower.hidden_size}, {tower.image_size} x {tower.image_size} pixels in patches of {tower.patch_size}"
        )
    parts["connector"] = f"{config.connector_type}, {config.num_frames} frames as trained"
    if audio is not None:
        parts["audio tower"] = f"BEATs, {audio.num_hidden_layers} layers of {audio.hidden_size}"
        parts["audio connector"] = config.audio_connector_type
    return parts


def format_bytes(size: float) -> str:
    """`16.1 GB`: decimal units, as disks and the Hub have them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.2f} {unit}"


__all__ = ["ModelInformation", "describe_model", "format_bytes"]
