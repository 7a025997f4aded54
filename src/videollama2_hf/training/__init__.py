"""
Training: from data on disk to a checkpoint that `from_pretrained` loads, by the published recipes.

Names are imported when they are first used, so that importing this package needs none of PEFT, datasets or accelerate.
"""

from importlib import import_module
from typing import Any


_MODULE_OF = {
    # rows of training data, as model inputs, as batches
    "DataSource": "data",
    "RowEncoder": "encoding",
    "VideoLlama2DataCollator": "collator",
    "VideoLlama2Dataset": "dataset",
    "VideoLlama2IterableDataset": "dataset",
    "load_rows": "data",
    "to_messages": "conversations",
    # what frozen towers make of the rows, kept
    "FeatureCache": "feature_cache",
    # which parts train
    "PARTS": "stages",
    "count_parameters": "stages",
    "get_optimizer_groups": "stages",
    "get_trainable_parts": "stages",
    "prepare_for_training": "stages",
    # adapters
    "add_lora": "lora",
    "get_connector_names": "lora",
    "get_lora_config": "lora",
    "get_lora_target_modules": "lora",
    "get_quantization_config": "lora",
    "merge_adapter": "lora",
    # the order of rows
    "LengthGroupedSampler": "samplers",
    "ModalityLengthGroupedSampler": "samplers",
    "ModalityMixSampler": "samplers",
    "get_row_modality": "samplers",
    "get_signed_word_count": "samplers",
    # what the first stages start from
    "add_audio_tower": "assemble",
    "assemble_model": "assemble",
    # recipes, and running them
    "Recipe": "recipe",
    "VideoLlama2Trainer": "trainer",
    "VideoLlama2TrainingArguments": "trainer",
    "estimate_memory": "estimate",
    "train": "run",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
