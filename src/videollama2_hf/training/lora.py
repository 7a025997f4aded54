"""
LoRA and QLoRA through PEFT: adapters on the language model, connectors trained whole.

The original names its targets by bare suffixes (`q_proj`, `fc1`, ...), which also hit the towers, and on the
audio-visual branch puts adapters into BEATs. The targets here are one pattern that only matches inside the language
model.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..modeling_videollama2 import VideoLlama2ForConditionalGeneration
from ..processing_videollama2 import VideoLlama2Processor
from .stages import CONNECTOR_NAME, PARTS, get_part_names, keep_frozen_towers_in_evaluation_mode


if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import BitsAndBytesConfig

INSTALL_HINT = "needs peft; `pip install videollama2-hf[train]`."


def get_lora_target_names(model: nn.Module) -> list[str]:
    """
    Names of the linear layers inside the language model's blocks, as the original's `find_all_linear_names` without
    the towers: `q_proj`, `k_proj`, ..., or `qkv_proj`, ... of Phi-3. The language modelling head is none of them.

    The experts of Mixtral are no linear layers in transformers (one tensor holds all of them), so its adapters are on
    attention alone.
    """
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and "language_model" in name.split(".")
        }
    )


def get_lora_target_modules(model: nn.Module) -> str:
    """
    Targets for `peft.LoraConfig`: a pattern for the full path of every linear layer of the language model, and of
    nothing else.

    Raises:
        ValueError: The model has no language model under that name.
    """
    names = get_lora_target_names(model)
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no linear layer inside a `language_model`; pass a "
            "VideoLlama2ForConditionalGeneration."
        )
    return rf"(?:.*\.)?language_model\.(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"


def get_connector_names(model: nn.Module) -> list[str]:
    """Those of `mm_projector` and `mm_projector_a` that the model has."""
    return [part for part in get_part_names(model) if part.startswith(CONNECTOR_NAME)]


def get_lora_config(
    model: nn.Module,
    r: int = 128,
    lora_alpha: int = 256,
    lora_dropout: float = 0.05,
    modules_to_save: Sequence[str] | None = None,
    **kwargs: Any,
) -> "LoraConfig":
    """
    `peft.LoraConfig` of the published LoRA recipes.

    Args:
        modules_to_save: Parts that train whole and are saved with the adapter. `None`: the connectors.
        kwargs: Whatever else `LoraConfig` takes (`use_rslora`, `use_dora`, ...).
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(f"LoRA {INSTALL_HINT}") from error

    names = get_connector_names(model) if modules_to_save is None else list(modules_to_save)
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=get_lora_target_modules(model),
        modules_to_save=names,
        task_type="CAUSAL_LM",
        **kwargs,
    )


def add_lora(model: nn.Module, lora_config: "LoraConfig") -> "PeftModel":
    """
    Adds the adapter and freezes the rest; frozen towers stay in evaluation mode, see [`prepare_for_training`].
    """
    from peft import get_peft_model

    adapted: Any = get_peft_model(model, lora_config)
    keep_frozen_towers_in_evaluation_mode(adapted)
    return adapted


def get_quantization_config(bits: int = 4, compute_dtype: torch.dtype = torch.bfloat16) -> "BitsAndBytesConfig":
    """
    What QLoRA loads the model with (`quantization_config`): the language model in 4-bit NF4 with double quantisation
    (8 bits: LLM.int8()); towers, connectors and the language modelling head keep their precision.

    Args:
        bits: 4 or 8.
    """
    from transformers import BitsAndBytesConfig

    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits!r}.")
    # transformers matches names from their start.
    skipped = [rf"(?:model\.)?{part}" for part in PARTS if part != "language_model"]
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=skipped,
    )


def merge_adapter(
    adapter: str | os.PathLike,
    output_dir: str | os.PathLike,
    base: str | os.PathLike | None = None,
    dtype: str | torch.dtype = "auto",
) -> Path:
    """
    Merges an adapter folder into its base and saves model and processor, ready for `from_pretrained`.

    Args:
        adapter: Folder with `adapter_config.json`.
        base: The model that the adapter was trained on. `None`: the one that the adapter names.
        dtype: Of the merged weights; `"auto"` is the base's.

    Returns:
        `output_dir`.

    Raises:
        FileNotFoundError: The folder holds no adapter.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ImportError(f"Merging an adapter {INSTALL_HINT}") from error

    if not (Path(adapter) / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{adapter} holds no adapter_config.json; pass the folder that training wrote.")
    base = base or PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    model = VideoLlama2ForConditionalGeneration.from_pretrained(base, dtype=dtype)
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(output_dir)
    has_processor = any(
        (Path(adapter) / name).is_file() for name in ("processor_config.json", "tokenizer_config.json")
    )
    VideoLlama2Processor.from_pretrained(str(adapter) if has_processor else base).save_pretrained(output_dir)
    return Path(output_dir)


__all__ = [
    "add_lora",
    "get_connector_names",
    "get_lora_config",
    "get_lora_target_modules",
    "get_lora_target_names",
    "get_quantization_config",
    "merge_adapter",
]
