"""LoRA weights as PEFT saves them, and how they change the weights they point at."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .tensors import ConversionError, StoredTensor, read_file


_FACTOR = re.compile(r"^base_model\.model\.(.+)\.(lora_(?:embedding_)?)([AB])(?:\.default)?(?:\.weight)?$")
# Options of PEFT with which the merged weight is not the base's plus `scaling * B @ A`.
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "layer_replication", "use_qalora", "alora_invocation_tokens")
# Initializations that take their product out of the base's weights, so that the base alone is not what was trained on.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LowRank:
    """The change of one weight: `scaling * B @ A` (transposed for an embedding)."""

    a: StoredTensor
    b: StoredTensor
    scaling: float
    is_embedding: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.is_embedding else shape

    def merge(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The changed weight, computed in float32 and rounded once."""
        delta = self.scaling * (self.b.load().float() @ self.a.load().float())
        return (weight.float() + (delta.T if self.is_embedding else delta)).to(dtype)


@dataclass
class Adapter:
    """
    Args:
        path: The file of its weights.
        config: `adapter_config.json`.
        changes: By the name of the weight that is changed, as the original names it.
        full: Weights that PEFT saved whole.
    """

    path: Path
    config: dict[str, Any]
    changes: dict[str, LowRank]
    full: dict[str, StoredTensor]

    @property
    def base(self) -> str | None:
        return self.config.get("base_model_name_or_path")


def read_adapter(folder: Path) -> Adapter:
    """
    Reads `adapter_config.json` and the adapter's weights.

    Raises:
        ConversionError: It is not LoRA of the plain kind, or a factor lacks its partner.
    """
    config_path = folder / "adapter_config.json"
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{config_path} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ConversionError(f"{config_path} is not the configuration of an adapter (a JSON object).")
    unsupported = {name: config[name] for name in _UNSUPPORTED if config.get(name)}
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        unsupported["init_lora_weights"] = start
    if config.get("peft_type") != "LORA" or unsupported:
        raise ConversionError(
            f"{folder} holds a PEFT adapter of type {config.get('peft_type')} {unsupported or ''}; only plain LoRA is "
            "merged here. Merge it with PEFT (`merge_and_unload`) and convert the result."
        )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise ConversionError(f"{config_path} lacks the number `lora_alpha`, by which the change is scaled.")
    path = next(
        (folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()),
        None,
    )
    if path is None:
        raise ConversionError(f"{folder} has adapter_config.json but neither adapter_model.safetensors nor .bin.")
    factors: dict[str, dict[str, StoredTensor]] = {}
    embeddings, full = set(), {}
    for name, tensor in read_file(path).items():
        match = _FACTOR.match(name)
        if match:
            factors.setdefault(match[1], {})[match[3]] = tensor
            if match[2] == "lora_embedding_":
                embeddings.add(match[1])
        else:
            full[name.removeprefix("base_model.model.").replace(".modules_to_save", "")] = tensor
    alone = sorted(module for module, pair in factors.items() if len(pair) != 2)
    if alone:
        raise ConversionError(f"{path} holds only one of the two LoRA factors of {', '.join(alone[:5])}.")
    unequal = sorted(
        module
        for module, pair in factors.items()
        if len(pair["A"].shape) != 2 or len(pair["B"].shape) != 2 or pair["A"].shape[0] != pair["B"].shape[1]
    )
    if unequal:
        raise ConversionError(f"{path} holds LoRA factors of different ranks for {', '.join(unequal[:5])}.")
    changes = {
        f"{module}.weight": LowRank(pair["A"], pair["B"], _scaling(module, pair["A"], config), module in embeddings)
        for module, pair in factors.items()
    }
    return Adapter(path, config, changes, full)


def _scaling(module: str, a: StoredTensor, config: dict[str, Any]) -> float:
    patterns = (config.get("alpha_pattern") or {}).items()  # the first that fits counts, as in PEFT
    fitting = (value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", module))
    alpha = next(fitting, config["lora_alpha"])
    rank = a.shape[0]
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
