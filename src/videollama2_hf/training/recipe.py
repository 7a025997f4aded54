"""A training recipe: everything that a run needs to know, as a dataclass and as YAML."""

import os
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .data import DataSource


RECIPES = Path(__file__).parent / "recipes"

T = TypeVar("T")


@dataclass
class LoraRecipe:
    """
    Adapters on the language model; what `trainable` names trains whole beside them.

    Args:
        r, alpha, dropout: Rank, scale (`alpha / r`) and dropout of the adapters.
        quantize: Bits that the language model is held in (QLoRA): 4 (NF4, double quantisation) or 8. `None`: as it is.
    """

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05
    quantize: Literal[4, 8] | None = None


@dataclass
class Evaluation:
    """
    Loss on rows that are not trained, and answers to some of them.

    Args:
        data: Sources of the rows.
        steps: Optimizer steps between two evaluations.
        batch_size: Rows per device. `None`: as in training.
        num_samples: Rows whose questions are answered and logged, from the start of the data.
        max_new_tokens: Longest such answer, in tokens.
    """

    data: list[DataSource]
    steps: int = 500
    batch_size: int | None = None
    num_samples: int = 4
    max_new_tokens: int = 64


@dataclass
class Recipe:
    """
    One stage of training.

    Args:
        model: Folder or Hub name of the model to start from.
        output_dir: Folder for checkpoints, logs and at the end the model and its processor.
        data: Where the rows come from, see [`DataSource`]; a path alone will do.
        trainable: Modules that train, see [`prepare_for_training`]; with `lora` those that train whole.
        lora: Adapters in place of training the language model.
        learning_rate: Peak rate.
        connector_learning_rate: Peak rate of `mm_projector` and `mm_projector_a`. `None`: the same.
        global_batch_size: Rows per optimizer step over all devices; accumulation follows from it.
        per_device_batch_size: Rows that one device takes at once.
        epochs, max_steps: Length of the run; `max_steps` wins where it is given.
        warmup_ratio: Share of the steps in which the rate rises.
        lr_scheduler: A name that transformers knows.
        weight_decay, max_grad_norm: Of AdamW, and where gradients are clipped.
        max_length: Longest row in tokens, media included. `None`: what the model takes.
        max_text_length: Longest row with every medium counted as one token, as the originals cut.
        prompt_format: `"chat"`, or `"plain"` and `"plain_audio"` of the first pretraining stages.
        num_frames: Frames per video. `None`: the model's.
        aspect_ratio: `"pad"` pads images and frames to a square first; `"none"` does not.
        missing_audio: What is heard of a video without sound: `"silence"`, `"drop"` or `"error"`.
        unreadable_media: `"stop"`, or `"skip"` (logged and counted).
        feature_cache: A folder for the features of frozen towers: every medium is encoded once, before training, and
            the towers do not run in it; see [`FeatureCache`]. `None`: towers run in every step.
        streaming: Whether to read the rows in the order of their files, without holding them; needs `max_steps`.
        sampler: `"random"`, `"length"` (similar lengths together, media counted) or `"modality_length"` (the
            original's grouping).
        modality_mix: Rows of each modality per mixture, such as `{audio_visual: 2, video: 1, audio: 1}`; in place of
            `sampler`.
        packing: Whether the rows of a batch are put into one without padding; for stages of short rows.
        eval: Loss and answers on other rows.
        bf16, tf32: Precision on GPUs. What trains is held in float32 and computed in bfloat16.
        gradient_checkpointing: Whether activations are computed again in the backward pass to save memory.
        attn_implementation: Attention of the model. `None`: transformers' choice.
        logging_steps, save_steps, save_total_limit: Optimizer steps between two lines of the log and two checkpoints,
            and checkpoints that are kept.
        num_workers: Processes per device that read media.
        deepspeed: A DeepSpeed configuration file, where none comes from `accelerate launch`.
        seed: Of weights that are new, of the order of rows and of dropout.
    """

    model: str
    output_dir: str
    data: list[DataSource]
    learning_rate: float
    global_batch_size: int
    trainable: list[str] = field(default_factory=list)
    lora: LoraRecipe | None = None
    connector_learning_rate: float | None = None
    per_device_batch_size: int = 1
    epochs: float = 1.0
    max_steps: int | None = None
    warmup_ratio: float = 0.03
    lr_scheduler: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int | None = None
    max_text_length: int | None = None
    prompt_format: Literal["chat", "plain", "plain_audio"] = "chat"
    num_frames: int | None = None
    aspect_ratio: Literal["pad", "none"] = "none"
    missing_audio: Literal["silence", "drop", "error"] = "silence"
    unreadable_media: Literal["stop", "skip"] = "stop"
    feature_cache: str | None = None
    streaming: bool = False
    sampler: Literal["random", "length", "modality_length"] = "random"
    modality_mix: dict[str, int] | None = None
    packing: bool = False
    eval: Evaluation | None = None
    bf16: bool = True
    tf32: bool = True
    gradient_checkpointing: bool = True
    attn_implementation: str | None = None
    logging_steps: int = 1
    save_steps: int = 500
    save_total_limit: int = 1
    num_workers: int = 4
    deepspeed: str | None = None
    seed: int = 42

    def __post_init__(self):
        for name in ("global_batch_size", "per_device_batch_size", "logging_steps", "save_steps", "save_total_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio is a share of the steps, from 0 to below 1, got {self.warmup_ratio}.")
        if not self.data:
            raise ValueError("data names no source; give at least one `path`.")
        if not self.trainable and self.lora is None:
            raise ValueError("Nothing is trained; name modules under `trainable`, or give `lora`.")
        if self.lora is not None and any(name.split(".")[0] == "language_model" for name in self.trainable):
            raise ValueError("With `lora` the language model trains through its adapters; take it out of `trainable`.")
        if self.modality_mix is not None and self.sampler != "random":
            raise ValueError(f"modality_mix sets the order of rows itself; leave out sampler: {self.sampler}.")
        if self.streaming and (self.max_steps is None or self.modality_mix or self.sampler != "random"):
            raise ValueError("With streaming the number of rows is not known: give max_steps, and no sampler or mix.")

    def accumulation_steps(self, world_size: int) -> int:
        """
        Batches that are accumulated for one optimizer step on every one of `world_size` devices.

        Raises:
            ValueError: The global batch is no whole number of them.
        """
        at_once = self.per_device_batch_size * world_size
        if self.global_batch_size % at_once != 0:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} cannot be made of {self.per_device_batch_size} rows on "
                f"{world_size} device(s); choose a multiple of {at_once}, or another per_device_batch_size."
            )
        return self.global_batch_size // at_once

    def check_model(self) -> None:
        """
        Raises:
            FileNotFoundError: `model` is a path, and there is no such folder.
        """
        is_path = os.path.isabs(self.model) or self.model.startswith(".") or self.model.count("/") > 1
        if is_path and not os.path.isdir(self.model):
            raise FileNotFoundError(f"There is no model folder {self.model}; give a folder or a name on the Hub.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """
        Raises:
            ValueError: A key is missing, unknown, or has a value of the wrong kind; the message names it.
        """
        return _build(cls, values, "")

    @classmethod
    def from_yaml(cls, path: str | os.PathLike, overrides: list[str] | None = None) -> "Recipe":
        """
        Args:
            path: A YAML file, or the name of a recipe that ships with this package.
            overrides: `key=value` with a value in YAML, and dots for what lies deeper (`lora.r=8`, `data.0.path=x`).

        Raises:
            FileNotFoundError: There is neither such a file nor such a recipe.
            ValueError: As `from_dict`, or the file is no YAML mapping.
        """
        values = _load_yaml(path)
        for override in overrides or []:
            _override(values, override)
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save_yaml(self, path: str | os.PathLike) -> None:
        import yaml  # type: ignore[import-untyped]

        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


def list_recipes() -> list[str]:
    """Names of the recipes that ship with this package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _load_yaml(path: str | os.PathLike) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    file = Path(path)
    if not file.is_file():
        file = RECIPES / f"{path}.yaml"
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no recipe {str(path)!r}: it is neither a file nor one of {', '.join(list_recipes())}."
        )
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold `key: value` lines, got {type(values).__name__}.")
    return values


def _override(values: Any, override: str) -> None:
    import yaml  # type: ignore[import-untyped]

    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"An override is key=value, got {override!r}.")
    *parents, last = key.split(".")
    for parent in parents:
        if isinstance(values, list) and parent.isdigit() and int(parent) < len(values):
            values = values[int(parent)]
        elif isinstance(values, dict):
            if values.get(parent) is None:
                values[parent] = {}
            values = values[parent]
        else:
            raise ValueError(f"The recipe has nothing at {parent!r} to set {key} in.")
    value = yaml.safe_load(text)
    if isinstance(values, list):
        if not last.isdigit() or int(last) >= len(values):
            raise ValueError(f"The recipe has nothing at {key!r}; the list has {len(values)} entries.")
        values[int(last)] = value
    elif isinstance(values, dict):
        values[last] = value
    else:
        raise ValueError(f"The recipe has nothing at {key!r} to set.")


def _build(cls: type[T], values: Any, where: str) -> T:
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'A recipe'} must be a mapping of keys, got {values!r}.")
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]  # a dataclass
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in names:
            close = get_close_matches(str(name), names, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"it may have {', '.join(names)}."
            raise ValueError(f"The recipe has an unknown key {prefix}{name}; {hint}")
    missing = [
        f"{prefix}{f.name}"
        for f in fields(cls)  # type: ignore[arg-type]
        if f.default is MISSING and f.default_factory is MISSING and values.get(f.name) is None
    ]
    if missing:
        raise ValueError(f"The recipe does not say {', '.join(missing)}; write it in the file or set it (key=value).")
    hints = get_type_hints(cls)
    return cls(**{name: _convert(value, hints[name], f"{prefix}{name}") for name, value in values.items()})


def _convert(value: Any, hint: Any, where: str) -> Any:
    """A value of YAML as its field's type, or one clear error."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and type(None) in arguments:
            return None
        inner = [argument for argument in arguments if argument is not type(None)]
        return _convert(value, inner[0], where)
    if hint is Any:
        return value
    if hint is DataSource and isinstance(value, str):
        value = {"path": value}
    if is_dataclass(hint):
        return _build(hint, value, where)  # type: ignore[arg-type]
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
        raise ValueError(f"{where} must be {' or '.join(map(str, arguments))}, got {value!r}.")
    if origin is list:
        if arguments[0] is DataSource and isinstance(value, (str, dict)):
            value = [value]
        if isinstance(value, list):
            return [_convert(item, arguments[0], f"{where}.{i}") for i, item in enumerate(value)]
        raise ValueError(f"{where} must be a list, got {value!r}.")
    if origin is dict:
        if isinstance(value, dict):
            return {key: _convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
        raise ValueError(f"{where} must be a mapping, got {value!r}.")
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except ValueError:
            pass
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    kind = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}[hint.__name__]
    raise ValueError(f"{where} must be {kind}, got {value!r}.")


__all__ = ["DataSource", "Evaluation", "LoraRecipe", "Recipe", "list_recipes"]
