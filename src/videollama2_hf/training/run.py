"""One stage from its recipe to a folder that `from_pretrained` loads."""

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import is_tensorboard_available, set_seed
from transformers.distributed.fsdp import is_fsdp_enabled
from transformers.utils import is_torch_tf32_available, logging

from ..modeling_videollama2 import VideoLlama2ForConditionalGeneration
from ..processing_videollama2 import VideoLlama2Processor
from .collator import VideoLlama2DataCollator
from .data import load_rows
from .dataset import VideoLlama2Dataset, VideoLlama2IterableDataset
from .feature_cache import FeatureCache
from .lora import add_lora, get_lora_config, get_quantization_config
from .recipe import Recipe
from .samplers import (
    EpochSampler,
    LengthGroupedSampler,
    ModalityLengthGroupedSampler,
    ModalityMixSampler,
    get_row_modality,
    get_signed_word_count,
)
from .stages import count_parameters, prepare_for_training
from .trainer import VideoLlama2Trainer, VideoLlama2TrainingArguments


logger = logging.get_logger(__name__)

_SHUFFLE_BUFFER = 1000  # rows of a stream, without their media


def train(recipe: Recipe, resume: bool = False) -> VideoLlama2Trainer:
    """
    Runs a recipe, alone or under `accelerate launch` or `torchrun`.

    `recipe.output_dir` then holds the model and its processor (with LoRA the adapter and, in `merged`, the model it
    makes), the recipe, the samples that were answered, TensorBoard's files and the last checkpoint.

    Args:
        resume: Whether to go on from the last whole checkpoint in `recipe.output_dir`, if there is one.

    Returns:
        The trainer, with the model in `model` and the log in `state.log_history`.

    Raises:
        FileExistsError: The folder holds a run already and `resume` is not set.
        ValueError: The recipe does not fit the model, the data or the devices.
    """
    checkpoint = find_last_checkpoint(recipe.output_dir)
    if not resume and (checkpoint or (Path(recipe.output_dir) / "config.json").exists()):
        raise FileExistsError(f"{recipe.output_dir} holds a run already; resume it, or choose another output_dir.")
    recipe.check_model()
    set_seed(recipe.seed)
    arguments = make_training_arguments(recipe)  # before the model: ZeRO-3 shards while it loads
    processor, reading_processor = load_processors(recipe)
    encoding: dict[str, Any] = {
        "prompt_format": recipe.prompt_format,
        "max_length": recipe.max_length,
        "max_text_length": recipe.max_text_length,
    }
    reading: dict[str, Any] = {"on_unreadable": recipe.unreadable_media, "seed": recipe.seed, **encoding}
    dataset: Any
    if recipe.streaming:
        dataset = VideoLlama2IterableDataset(recipe.data, reading_processor, shuffle_buffer=_SHUFFLE_BUFFER, **reading)
    else:
        dataset = VideoLlama2Dataset(recipe.data, reading_processor, **reading)
    eval_dataset, samples = None, []
    if recipe.eval is not None:
        eval_rows: Any = load_rows(recipe.eval.data)
        eval_dataset = VideoLlama2Dataset(eval_rows, reading_processor, **reading)
        samples = [eval_rows[i] for i in range(min(recipe.eval.num_samples, len(eval_rows)))]
    train_sampler = make_sampler(recipe, dataset, arguments)

    model = load_model(recipe, is_sharded=is_sharded(arguments))
    if arguments.process_index == 0:
        print(describe_run(recipe, model, arguments), flush=True)
    if recipe.feature_cache is not None:
        cache = FeatureCache(recipe.feature_cache, model, reading_processor)
        for part in (dataset, eval_dataset) if eval_dataset is not None else (dataset,):
            cache.build(part, recipe.num_workers)
        dataset, eval_dataset = cache.attach(dataset), eval_dataset and cache.attach(eval_dataset)

    trainer = VideoLlama2Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=VideoLlama2DataCollator(reading_processor, packing=recipe.packing, **encoding),
        processing_class=processor,
        train_sampler=train_sampler,
        samples=samples,
    )
    if arguments.process_index == 0:
        os.makedirs(recipe.output_dir, exist_ok=True)
        recipe.save_yaml(Path(recipe.output_dir) / "recipe.yaml")
    trainer.train(resume_from_checkpoint=checkpoint)
    skipped = dataset.num_skipped if recipe.streaming else len(dataset.skipped)
    if skipped:
        logger.warning(f"{skipped} rows were skipped because they could not be read; the log names them.")
    save_trained(trainer, recipe)
    return trainer


def find_last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    The newest whole checkpoint of a run. One that was being written when the run was killed has no state yet, or half
    of it.
    """
    folder = Path(output_dir)
    numbers = [int(match[1]) for path in folder.glob("checkpoint-*") if (match := re.search(r"-(\d+)$", path.name))]
    for number in sorted(numbers, reverse=True):
        path = folder / f"checkpoint-{number}"
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning(f"{path} is not whole and is left out.")
            continue
        return str(path)
    return None


def make_training_arguments(recipe: Recipe) -> VideoLlama2TrainingArguments:
    """A recipe in transformers' terms; the number of devices, which accumulation depends on, is known after that."""
    evaluation = recipe.eval
    arguments = VideoLlama2TrainingArguments(
        output_dir=recipe.output_dir,
        learning_rate=recipe.learning_rate,
        connector_learning_rate=recipe.connector_learning_rate,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        per_device_train_batch_size=recipe.per_device_batch_size,
        gradient_accumulation_steps=recipe.accumulation_steps(int(os.environ.get("WORLD_SIZE", "1"))),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        warmup_steps=recipe.warmup_ratio,
        lr_scheduler_type=recipe.lr_scheduler,
        bf16=recipe.bf16,
        tf32=recipe.tf32 if is_torch_tf32_available() else None,
        activation_checkpointing=recipe.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
        logging_steps=recipe.logging_steps,
        save_steps=recipe.save_steps,
        save_total_limit=recipe.save_total_limit,
        eval_strategy="no" if evaluation is None else "steps",
        eval_steps=None if evaluation is None else evaluation.steps,
        per_device_eval_batch_size=(evaluation and evaluation.batch_size) or recipe.per_device_batch_size,
        sample_max_new_tokens=64 if evaluation is None else evaluation.max_new_tokens,
        dataloader_num_workers=recipe.num_workers,
        dataloader_persistent_workers=recipe.num_workers > 0,
        deepspeed=recipe.deepspeed,
        report_to="tensorboard" if is_tensorboard_available() else "none",
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=not torch.accelerator.is_available(),
    )
    arguments.gradient_accumulation_steps = recipe.accumulation_steps(arguments.world_size * max(1, arguments.n_gpu))
    return arguments


def is_sharded(arguments: VideoLlama2TrainingArguments) -> bool:
    """Whether DeepSpeed or FSDP holds the weights, and decides on their dtype."""
    return arguments.deepspeed_plugin is not None or is_fsdp_enabled()


def load_processors(recipe: Recipe) -> tuple[VideoLlama2Processor, VideoLlama2Processor]:
    """
    The processor that is saved with the model, and the one that reads the training rows. They differ in what the
    originals do in training only: padding to a square, and what a silent video is heard as.
    """
    processor = VideoLlama2Processor.from_pretrained(recipe.model)
    if recipe.num_frames is not None:
        processor.video_processor.num_frames = recipe.num_frames
        if processor.image_num_frames != 1:
            processor.image_num_frames = recipe.num_frames
    reading = copy.deepcopy(processor)
    reading.missing_audio_policy = recipe.missing_audio
    for part in (reading.image_processor, reading.video_processor):
        part.do_pad_to_square = recipe.aspect_ratio == "pad"
    return processor, reading


def load_model(recipe: Recipe, is_sharded: bool = False) -> nn.Module:
    """
    The model of a recipe, with what trains in float32 and, under bf16, what is frozen in bfloat16.

    Args:
        is_sharded: Whether DeepSpeed or FSDP will hold the weights; they want one dtype.
    """
    dtype = torch.float32
    if recipe.bf16 and (recipe.lora is not None or is_sharded):
        dtype = torch.bfloat16
    options: dict[str, Any] = {}
    if recipe.attn_implementation is not None:
        options["attn_implementation"] = recipe.attn_implementation
    if recipe.lora is not None and recipe.lora.quantize is not None:
        options["quantization_config"] = get_quantization_config(recipe.lora.quantize, compute_dtype=dtype)
    model: Any = VideoLlama2ForConditionalGeneration.from_pretrained(recipe.model, dtype=dtype, **options)
    if recipe.num_frames is not None:
        model.config.num_frames = recipe.num_frames
    if recipe.lora is not None:
        lora_config = get_lora_config(
            model,
            r=recipe.lora.r,
            lora_alpha=recipe.lora.alpha,
            lora_dropout=recipe.lora.dropout,
            modules_to_save=recipe.trainable,
        )
        model = add_lora(model, lora_config)
    else:
        prepare_for_training(model, recipe.trainable)
    if recipe.bf16 and not is_sharded:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
            elif parameter.is_floating_point():
                parameter.data = parameter.data.bfloat16()
    return model


def make_sampler(
    recipe: Recipe, dataset: VideoLlama2Dataset | VideoLlama2IterableDataset, arguments: VideoLlama2TrainingArguments
) -> EpochSampler | None:
    """The order of rows that a recipe asks for; `None` for streams, whose order is their own."""
    if isinstance(dataset, VideoLlama2IterableDataset):
        return None
    rows: Any = dataset.rows
    batch_size = recipe.per_device_batch_size
    if recipe.modality_mix is not None:
        hears_videos = dataset.encode.processor.load_audio_from_video
        modalities = [get_row_modality(row, hears_videos) for row in rows]
        return ModalityMixSampler(modalities, recipe.modality_mix, batch_size, recipe.seed)
    if recipe.sampler == "length":
        lengths = [dataset.num_tokens(i) for i in range(len(dataset))]
        return LengthGroupedSampler(lengths, recipe.global_batch_size, recipe.seed)
    if recipe.sampler == "modality_length":
        world_size = arguments.world_size * arguments.gradient_accumulation_steps
        return ModalityLengthGroupedSampler(
            [get_signed_word_count(row) for row in rows], batch_size, world_size, recipe.seed
        )
    return EpochSampler(len(rows), recipe.seed)


def save_trained(trainer: VideoLlama2Trainer, recipe: Recipe) -> None:
    """
    Saves model and processor, whole also where the weights were sharded. Under bf16 a model is saved in bfloat16; with
    LoRA the adapter is saved, and beside it the merged model where the weights allow for it.
    """
    model: Any = trainer.model
    whole = not is_sharded(trainer.args)
    if recipe.lora is None:
        if recipe.bf16 and whole:
            model.to(torch.bfloat16)
        trainer.save_model()
        return
    trainer.save_model()
    if whole and recipe.lora.quantize is None and trainer.is_world_process_zero():
        merged = copy.deepcopy(model).merge_and_unload()
        if recipe.bf16:
            merged.to(torch.bfloat16)
        merged.save_pretrained(Path(recipe.output_dir) / "merged")
        trainer.processing_class.save_pretrained(Path(recipe.output_dir) / "merged")


def describe_run(recipe: Recipe, model: nn.Module, arguments: VideoLlama2TrainingArguments) -> str:
    """What trains, and how the global batch comes about, in a few lines."""
    lines = []
    for part, (trainable, total) in count_parameters(model).items():
        what = "trains" if trainable == total else "frozen" if not trainable else f"{trainable / 1e6:.2f} M train"
        lines.append(f"  {part:<16} {total / 1e6:>10.2f} M  {what}")
    devices = arguments.world_size * max(1, arguments.n_gpu)
    lines.append(
        f"Batch of {recipe.global_batch_size} = {recipe.per_device_batch_size} rows x {devices} device(s) x "
        f"{arguments.gradient_accumulation_steps} accumulated"
    )
    return "\n".join(lines)


__all__ = ["describe_run", "find_last_checkpoint", "load_model", "load_processors", "train"]
