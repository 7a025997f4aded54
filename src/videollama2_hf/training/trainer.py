"""transformers' Trainer with the original's parameter groups and orders of rows, and what one wants to watch."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from .samplers import EpochSampler
from .stages import get_optimizer_groups


logger = logging.get_logger(__name__)


@dataclass
class VideoLlama2TrainingArguments(TrainingArguments):
    """
    [`TrainingArguments`] for this package's data sets and collator.

    Args:
        connector_learning_rate (`float`, *optional*): Rate of `mm_projector` and `mm_projector_a`; `None` is
            `learning_rate`. The original's `mm_projector_lr`.
        sample_max_new_tokens (`int`): Longest answer to a sample at evaluation.
    """

    connector_learning_rate: float | None = field(default=None)
    sample_max_new_tokens: int = field(default=64)
    # Rows are whole; no column of them is unused.
    remove_unused_columns: bool = field(default=False)
    prediction_loss_only: bool = field(default=True)
    # A batch may lack a modality, so a part that trains may get no gradient in it.
    ddp_find_unused_parameters: bool | None = field(default=True)


class VideoLlama2Trainer(Trainer):
    """
    A [`Trainer`] that

    - groups parameters as the original, see [`get_optimizer_groups`];
    - takes the order of rows from an [`EpochSampler`], the same after a continued run;
    - logs `data_wait`, the share of the time that the step waited for data;
    - answers `samples` at every evaluation, into `samples.jsonl` in the output folder and TensorBoard;
    - trains on batches without a part that trains, and skips those without labels.

    Args:
        train_sampler: Order of the training rows. `None`: shuffled.
        samples: Rows of messages whose questions are answered at evaluation; the last answer of each is left out and
            logged beside the model's. Needs `processing_class`, the processor.
    """

    optimizer: Any  # Trainer sets it

    def __init__(
        self,
        *args: Any,
        train_sampler: EpochSampler | None = None,
        samples: Sequence[dict[str, Any]] = (),
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if samples and self.processing_class is None:
            raise ValueError("To answer samples pass the processor as `processing_class`.")
        self.train_sampler = train_sampler
        self.samples = list(samples)
        self._waited = 0.0
        self._last_log = time.perf_counter()
        self.add_callback(_StartEpoch(train_sampler))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            if {"params", "model", "optimizer_dict"} & set(options):
                raise ValueError(f"The optimizer {self.args.optim} makes its own parameter groups; choose another.")
            groups = get_optimizer_groups(
                model, self.args.learning_rate, self.args.weight_decay, self.args.connector_learning_rate
            )
            if not groups:
                raise ValueError("No parameter of the model trains; see `prepare_for_training`.")
            for group in groups:
                del group["names"]
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        return super()._get_train_sampler(train_dataset) if self.train_sampler is None else self.train_sampler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, torch.Tensor | int | None]:
        started = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self._waited += time.perf_counter() - started
        return batches

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            logs["data_wait"] = round(self._waited / max(now - self._last_log, 1e-9), 4)
            self._waited, self._last_log = 0.0, now
        super().log(logs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if torch.is_tensor(num_items_in_batch):  # without any label the mean would be 0 / 0
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if torch.is_grad_enabled() and not loss.requires_grad:
            # Nothing that trains took part, such as in a batch of text where a connector trains: a gradient of zero.
            parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
            loss = loss + parameter.flatten()[:0].sum().to(loss.dtype)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if self.samples:
            self._answer_samples()
        self._waited, self._last_log = 0.0, time.perf_counter()
        return metrics

    @torch.no_grad()
    def _answer_samples(self) -> None:
        """All processes generate, as sharded weights need; the first one writes."""
        answers = []
        self.model.eval()
        for row in self.samples:
            messages = row["messages"]
            last = max(
                (i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages)
            )
            inputs = self.processing_class.apply_chat_template(
                messages[:last], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            inputs = self._prepare_inputs(dict(inputs))
            with self.accelerator.autocast():
                output = self.model.generate(
                    **inputs, max_new_tokens=self.args.sample_max_new_tokens, do_sample=False, use_cache=True
                )
            answer = self.processing_class.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers.append(
                {
                    "step": self.state.global_step,
                    "question": _text_of(messages[last - 1]) if last else "",
                    "expected": _text_of(messages[last]) if last < len(messages) else None,
                    "answer": answer.strip(),
                }
            )
        if not self.is_world_process_zero():
            return
        with open(Path(self.args.output_dir) / "samples.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        text = "\n\n".join(f"**{a['question']}** {a['answer']} (expected: {a['expected']})" for a in answers)
        for callback in self.callback_handler.callbacks:
            if getattr(callback, "tb_writer", None) is not None:
                callback.tb_writer.add_text("samples", text, self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """
        Weights are saved under the original's names. Trainer's own method loads them by the names of the modules,
        finds none of them and goes on with the weights that the run started from, with only a warning.
        """
        target = self.model if model is None else model
        if self.is_fsdp_enabled or not isinstance(target, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # In the widest dtype; loading into the model's own parameters casts to theirs.
        saved = type(target).from_pretrained(resume_from_checkpoint, config=target.config, dtype=torch.float32)
        target.load_state_dict(saved.state_dict())


class _StartEpoch(TrainerCallback):
    """
    Tells the sampler which epoch begins; accelerate does not reach it below the two wrappers of a data loader that is
    sharded and skips batches.
    """

    def __init__(self, sampler: EpochSampler | None):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))


def _text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return " ".join(block["text"] if block["type"] == "text" else f"<{block['type']}>" for block in content)


__all__ = ["VideoLlama2Trainer", "VideoLlama2TrainingArguments"]
