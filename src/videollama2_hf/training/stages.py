"""
What a stage trains: parts of the model named by module, and the optimizer's parameter groups.

The original says what trains by flags whose order matters (`tune_mm_mlp_adapter_a`, `tune_adapter_llm`,
`freeze_backbone`, `tune_audio_tower`: each overrides the ones before it). Here the names are the whole statement.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn


# The parts of `VideoLlama2ForConditionalGeneration` that published stages name.
PARTS = ("language_model", "lm_head", "mm_projector", "mm_projector_a", "vision_tower", "video_tower", "audio_tower")
# What their names share, as in the original's `mm_projector_lr`.
CONNECTOR_NAME = "mm_projector"


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names without `model.` in front; tied parameters under each of their names."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name.removeprefix("model."), parameter


def _belongs_to(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def get_part_names(model: nn.Module) -> list[str]:
    """Those of `PARTS` that a model has."""
    names = [name for name, _ in _named_parameters(model)]
    return [part for part in PARTS if any(_belongs_to(name, part) for name in names)]


def prepare_for_training(model: nn.Module, trainable: Sequence[str]) -> nn.Module:
    """
    Freezes a model but for the named parts, in place, and returns it.

    Frozen towers stay in evaluation mode whatever `model.train()` says, so that their features do not change from step
    to step (the original's frozen BEATs skips layers at random) and can be encoded once and reused.

    Args:
        model: A [`VideoLlama2ForConditionalGeneration`].
        trainable: Module paths, `model.` in front is optional: the parts in `PARTS`, or parts of them
            (`"language_model.layers.31"`). With tied embeddings `"lm_head"` and `"language_model.embed_tokens"` are
            one tensor.

    Raises:
        ValueError: A name is not a part of the model, or there is none.
    """
    parts = [name.removeprefix("model.") for name in trainable]
    if not parts:
        raise ValueError(f"Nothing is trained; name one or more of {', '.join(get_part_names(model))}.")
    parameters = list(_named_parameters(model))
    for part in parts:
        if not any(_belongs_to(name, part) for name, _ in parameters):
            raise ValueError(
                f"The model has no part {part!r} to train; it has {', '.join(get_part_names(model))}, and the modules "
                "inside them."
            )
    for _, parameter in parameters:
        parameter.requires_grad_(False)
    for name, parameter in parameters:
        if any(_belongs_to(name, part) for part in parts):
            parameter.requires_grad_(True)
    return keep_frozen_towers_in_evaluation_mode(model)


def keep_frozen_towers_in_evaluation_mode(model: nn.Module) -> nn.Module:
    """Towers of which nothing trains ignore `model.train()`; see [`prepare_for_training`]."""
    for name, module in model.named_modules():
        if name.endswith("_tower") and not any(parameter.requires_grad for parameter in module.parameters()):
            module.register_forward_pre_hook(_evaluate)
    return model


def _evaluate(module: nn.Module, args: Any) -> None:
    if module.training and not any(parameter.requires_grad for parameter in module.parameters()):
        module.eval()


def get_trainable_parts(model: nn.Module) -> dict[str, bool]:
    """Per part, whether all of it trains; a part of which something trains and something does not is left out."""
    flags: dict[str, set[bool]] = {}
    for name, parameter in _named_parameters(model):
        part = next((part for part in PARTS if _belongs_to(name, part)), name)
        flags.setdefault(part, set()).add(parameter.requires_grad)
    return {part: values.pop() for part, values in flags.items() if len(values) == 1}


def get_decay_parameter_names(model: nn.Module) -> set[str]:
    """
    Names of the parameters that weight decay holds for, by the original's rule (`videollama2_trainer.py`): all but
    biases (whatever has "bias" in its name, BEATs' table of position biases included) and the norms among
    `nn.LayerNorm` and Llama's RMSNorm. The RMSNorms of the other language models do decay.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norms = {
        f"{module_name}.{name}" if module_name else name
        for module_name, module in model.named_modules()
        if isinstance(module, (nn.LayerNorm, LlamaRMSNorm))
        for name, _ in module.named_parameters(recurse=False)
    }
    return {name for name, _ in model.named_parameters() if "bias" not in name and name not in norms}


def get_optimizer_groups(
    model: nn.Module, learning_rate: float, weight_decay: float = 0.0, connector_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """
    Parameter groups for a torch optimizer, as the original's: {decay, no decay} x {the rest, connectors}.

    Args:
        connector_learning_rate: Rate of `mm_projector` and `mm_projector_a`. `None`: that of the rest, and two groups
            in place of four.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `names` (of the parameters); none of them is empty.
    """
    decays = get_decay_parameter_names(model)
    groups: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_connector = connector_learning_rate is not None and CONNECTOR_NAME in name
            groups.setdefault((is_connector, name not in decays), []).append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in members],
            "names": [name for name, _ in members],
            "lr": connector_learning_rate if is_connector else learning_rate,
            "weight_decay": 0.0 if is_exempt else weight_decay,
        }
        for (is_connector, is_exempt), members in sorted(groups.items())
    ]


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """
    Per part of the model: (trainable, all) parameters. Tied ones count once, where they first stand, and the copy that
    PEFT keeps of a part that trains whole does not count.
    """
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        part = next((part for part in PARTS if part in name.split(".")), "other")
        trainable, total = counts.get(part, (0, 0))
        size = _num_elements(parameter)
        counts[part] = (trainable + size * parameter.requires_grad, total + size)
    return counts


def _num_elements(parameter: torch.Tensor) -> int:
    # ZeRO-3 leaves an empty tensor in place of a parameter that lies on other devices.
    return int(getattr(parameter, "ds_numel", parameter.numel()))


__all__ = [
    "PARTS",
    "count_parameters",
    "get_decay_parameter_names",
    "get_optimizer_groups",
    "get_part_names",
    "get_trainable_parts",
    "prepare_for_training",
]
