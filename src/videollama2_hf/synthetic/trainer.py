"""Trainers that draw pictures and sound on the device that trains."""

from typing import Any

import torch
from transformers import Trainer

from ..training import VideoLlama2Trainer
from .dataset import draw_media


class MetricsTrainer(Trainer):
    """A [`Trainer`] for modules that return `loss` and single numbers to watch, whose means it logs."""

    _sums: dict[str, torch.Tensor]
    _count = 0

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        numbers = {name: value.detach().nan_to_num() for name, value in outputs.items() if name != "loss"}
        if self._count == 0:
            self._sums = dict.fromkeys(numbers, 0)  # type: ignore[arg-type]
        self._sums = {name: self._sums[name] + value for name, value in numbers.items()}
        self._count += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._count and "loss" in logs:
            logs |= {name: round(float(value) / self._count, 4) for name, value in self._sums.items()}
            self._count = 0
        super().log(logs, *args, **kwargs)


class WorldTrainer(VideoLlama2Trainer):
    """A [`VideoLlama2Trainer`] for batches of `WorldCollator`."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        side = model.config.vision_config.image_size
        inputs |= draw_media(inputs.pop("drawn"), side, imitate_codecs=model.training)
        return super().compute_loss(model, inputs, *args, **kwargs)


__all__ = ["MetricsTrainer", "WorldTrainer"]
