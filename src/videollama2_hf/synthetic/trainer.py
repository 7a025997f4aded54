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
    """A [`VideoLlama2Trainer`] for batches of `WorldCollator`, in one or in several pieces."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if "pieces" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        *first, last = inputs["pieces"]
        with self.accelerator.no_sync(model):
            losses = [super(WorldTrainer, self).training_step(model, piece, num_items_in_batch) for piece in first]
        return sum(losses, super().training_step(model, last, num_items_in_batch))

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        config = self.model.config
        sizes = config.vision_config.image_size, config.audio_config.num_mel_bins
        inputs |= draw_media(inputs.pop("drawn"), *sizes, imitate_codecs=model.training)
        return super().compute_loss(model, inputs, *args, **kwargs)


__all__ = ["MetricsTrainer", "WorldTrainer"]
