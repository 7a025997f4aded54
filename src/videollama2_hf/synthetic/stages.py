"""
The small model's training: stage 0 for its three parts, the five published stages in their order, and drills for what
does not come among everything else.

Every stage is a folder below the output folder. It continues from its last checkpoint if it was stopped, and starts
from what the stages before it wrote: `python -m videollama2_hf.synthetic train --output DIR` runs them all.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .rows import DEFAULT_MIX, DRILLS, Row, draw_caption_row, draw_drill, draw_row


@dataclass(frozen=True)
class Stage:
    """
    One stage of the small model.

    Args:
        recipe: The published recipe that says what trains and how prompts look; `None` in stage 0 and the drills.
        mix: Weight of every medium among the rows.
        separate: Share of the rows whose questions do not see each other, so that no answer tells what is to be seen.
        captions_only: Whether rows are captions.
        drills: Skill -> share of the rows that ask for nothing else, see `draw_drill`; the others are drawn as ever.
        steps, batch_size, learning_rate, connector_learning_rate: Of this model: its parts begin from nothing, so its
            rates are higher than the published ones.
        trainable: Modules that train where there is no recipe.
    """

    steps: int
    batch_size: int
    learning_rate: float
    recipe: str | None = None
    connector_learning_rate: float | None = None
    mix: Mapping[str, float] = field(default_factory=dict)
    separate: float = 0.0
    captions_only: bool = False
    drills: Mapping[str, float] = field(default_factory=dict)
    trainable: tuple[str, ...] = ()


_FIRST = ("vision", "audio", "text")
_LANGUAGE_MODEL = ("language_model", "lm_head")
STAGES = {
    "vision": Stage(3000, 128, 1e-3),
    "audio": Stage(4000, 96, 1e-3),
    "text": Stage(2000, 128, 1.5e-3, mix={"text": 1.0}, separate=0.8, trainable=_LANGUAGE_MODEL),
    "1": Stage(
        400, 128, 2e-3, "videollama2_1_video_pretraining", mix={"video": 3.0, "image": 1.0}, captions_only=True
    ),
    "2": Stage(
        3000,
        128,
        8e-4,
        "videollama2_2_video_tuning",
        connector_learning_rate=1e-3,
        mix={"video": 5.0, "image": 2.0, "text": 1.0},
        separate=0.8,
    ),
    "3": Stage(300, 128, 2e-3, "videollama2_3_audio_pretraining", mix={"audio": 1.0}, captions_only=True),
    "4": Stage(
        1500, 128, 3e-4, "videollama2_4_audio_tuning", connector_learning_rate=1e-3, mix={"audio": 1.0}, separate=0.8
    ),
    "5": Stage(
        8000,
        128,
        5e-4,
        "videollama2_5_audio_visual_tuning",
        connector_learning_rate=8e-4,
        mix=DEFAULT_MIX,
        separate=0.8,
    ),
    # The language model alone: towers and connectors that train on a few scenes and sounds forget all others.
    "drills": Stage(
        1000,
        48,
        1e-3,
        mix=DEFAULT_MIX,
        separate=0.8,
        drills={"synchrony": 0.35, "time of event": 0.35},
        trainable=_LANGUAGE_MODEL,
    ),
}
MODEL_FOLDER = "model"
_SAVE_SECONDS = 150


def run_stage(
    name: str,
    output_dir: str | Path,
    steps: int | None = None,
    batch_size: int | None = None,
    minutes: float | None = None,
    num_workers: int = 0,
    seed: int = 0,
    cpu: bool = False,
    compile_layers: bool = False,
    start: str | Path | None = None,
    drills: Mapping[str, float] | None = None,
) -> bool:
    """
    Runs or continues one stage, under `torchrun` in several processes.

    Args:
        name: One of `STAGES`.
        output_dir: Folder of all stages; this one writes `output_dir/name`, at the end the model into `model` there.
        steps, batch_size: In place of the stage's own; the schedule follows from them, so a stage that is continued
            needs the same. The batch is that of all processes together.
        minutes: Stop after so many minutes with a checkpoint to continue from.
        num_workers: Processes that draw rows.
        cpu: Whether to leave an accelerator alone.
        compile_layers: Whether `torch.compile` makes the vision tower and the language model faster; on a CPU this
            needs a C++ compiler.
        start: Folder of the model to start from, in place of what the stage before wrote. Not for stage 0.
        drills: In place of the stage's own. For the stage of that name only.

    Returns:
        Whether the stage is finished.

    Raises:
        ValueError: There is no stage of that name, it takes no model to start from or no drills, there is no such
            skill, the shares of the drills are more than all rows, or the processes cannot share the batch evenly.
        FileNotFoundError: A stage before this one is not finished.
    """
    import torch
    from accelerate.utils import broadcast_object_list
    from transformers import TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    if name not in STAGES:
        raise ValueError(f"There is no stage {name!r}; choose one of {', '.join(STAGES)}.")
    root, stage = Path(output_dir), STAGES[name]
    if drills:
        _check_drills(name, drills)
        stage = replace(stage, drills=drills)
    if start is not None and name in _FIRST:
        raise ValueError(f"Stage {name} begins with new weights; a model to start from is for the stages after it.")
    if start is not None and not Path(start).is_dir():
        raise FileNotFoundError(f"{start} is missing; name the folder of a model to start from.")
    folder = root / name
    if (folder / MODEL_FOLDER).is_dir():
        return True
    steps, batch_size = steps or stage.steps, batch_size or stage.batch_size
    on_cpu = cpu or not torch.cuda.is_available()
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if batch_size % num_processes:
        raise ValueError(f"{num_processes} processes cannot share a batch of {batch_size} rows; choose a multiple.")
    torch.manual_seed(seed)

    class Clock(TrainerCallback):
        """Saves every few minutes, and stops when the time is up."""

        def on_train_begin(self, args, state, control, **kwargs):
            self.started = self.saved = time.monotonic()

        def on_step_end(self, args, state, control, **kwargs):
            now = time.monotonic()
            is_over = minutes is not None and now - self.started > 60 * minutes
            # All processes do what the first one's clock says.
            saves, is_over = broadcast_object_list([is_over or now - self.saved > _SAVE_SECONDS, is_over])
            if saves:
                self.saved, control.should_save = now, True
            control.should_training_stop = control.should_training_stop or is_over

        def on_log(self, args, state, control, logs=None, **kwargs):
            if not state.is_world_process_zero:
                return
            line = {"step": state.global_step, "seconds": round(time.monotonic() - self.started, 1), **(logs or {})}
            with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size // num_processes,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, round(0.03 * steps)),
        "weight_decay": 0.01,
        "adam_beta2": 0.98,
        "max_grad_norm": 1.0,
        "bf16": True,
        "tf32": None if on_cpu else True,
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and num_processes > 1 else None,
        "dataloader_num_workers": num_workers,
        "dataloader_persistent_workers": num_workers > 0,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "save_total_limit": 1,
        "logging_steps": 20,
        "report_to": [],
        "disable_tqdm": True,
        "seed": seed,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with TrainingArguments(**options).main_process_first(local=False):
        if start is None:
            _write_untrained(root)
    if name in ("vision", "audio"):
        trainer = _tower_trainer(name, root, steps * batch_size, seed, TrainingArguments(**options), Clock())
    else:
        trainer = _model_trainer(name, root, steps * batch_size, seed, options, Clock(), start, stage)
        if compile_layers:
            parts = trainer.model.model
            for layer in [*parts.vision_tower.encoder.layers, *parts.language_model.layers]:
                layer.compile(dynamic=True)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    if trainer.state.global_step < steps:
        return False
    if trainer.is_world_process_zero():
        model, processor = load_before(name, root, start)
        if name in ("vision", "audio"):
            tower = getattr(model.model, f"{name}_tower")
            tower.load_state_dict(trainer.model.tower.state_dict())
        else:
            model = trainer.model
        processor.save_pretrained(str(folder / MODEL_FOLDER))
        model.save_pretrained(str(folder / MODEL_FOLDER))
    trainer.accelerator.wait_for_everyone()
    return True


def _check_drills(name: str, drills: Mapping[str, float]) -> None:
    unknown = sorted(set(drills) - set(DRILLS))
    if unknown:
        raise ValueError(f"There is no skill {unknown[0]!r} to drill; choose from {', '.join(DRILLS)}.")
    if name != "drills":
        raise ValueError(f"Stage {name} has no drills; they are a stage of their own: drills.")
    if not (min(drills.values()) >= 0 and sum(drills.values()) < 1 + 1e-9):
        raise ValueError(f"Drills are shares of all rows, from 0 to 1 together; got {drills}.")


def _draw_row_or_drill(
    generator: np.random.Generator, drills: Mapping[str, float], draw: Callable[[np.random.Generator], Row]
) -> Row:
    shares = np.array([*drills.values(), max(0.0, 1 - sum(drills.values()))])
    chosen = generator.choice(len(shares), p=shares / shares.sum())
    return draw_drill(generator, list(drills)[chosen]) if chosen < len(drills) else draw(generator)


def load_before(name: str, root: Path, start: str | Path | None = None) -> tuple[Any, Any]:
    """
    The model that a stage starts from, in float32, and its processor: new weights for the parts of stage 0, those
    three parts in one for stage 1, and what the stage before wrote for the others; or the model of the folder `start`.

    Raises:
        FileNotFoundError: A stage before this one is not finished.
    """
    import torch

    from ..modeling_videollama2 import VideoLlama2ForConditionalGeneration
    from ..processing_videollama2 import VideoLlama2Processor

    def load(folder: str) -> Any:
        path = root / folder if folder == "untrained" else root / folder / MODEL_FOLDER
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is missing: stage {name} follows stage {folder}; run that one first.")
        return VideoLlama2ForConditionalGeneration.from_pretrained(str(path), dtype=torch.float32)

    if start is not None:
        processor = VideoLlama2Processor.from_pretrained(str(start))
        return VideoLlama2ForConditionalGeneration.from_pretrained(str(start), dtype=torch.float32), processor
    _write_untrained(root)
    processor = VideoLlama2Processor.from_pretrained(str(root / "untrained"))
    if name in _FIRST:
        return load("untrained"), processor
    if name == "1":
        model = load("text")
        for part in ("vision", "audio"):
            tower = getattr(load(part).model, f"{part}_tower")
            getattr(model.model, f"{part}_tower").load_state_dict(tower.state_dict())
        return model, processor
    return load(list(STAGES)[list(STAGES).index(name) - 1]), processor


def _write_untrained(root: Path) -> None:
    from .small_model import save_untrained

    untrained = root / "untrained"
    if not untrained.is_dir():  # in one move, for stages that start side by side
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            save_untrained(f"{folder}/untrained")
            with suppress(OSError):
                (Path(folder) / "untrained").rename(untrained)


def _tower_trainer(name: str, root: Path, num_clips: int, seed: int, arguments: Any, clock: Any) -> Any:
    from .pretraining import AudioPretraining, ClipDataset, VisionPretraining, collate_frames, collate_sounds
    from .trainer import MetricsTrainer
    from .world import SCENES

    model, _ = load_before(name, root)
    scenes = ("count", "count", "pair", "move", "collide", "change") if name == "vision" else SCENES
    data = ClipDataset(num_clips, seed + 1, scenes, beeps=0.25 if name == "audio" else 0.0)
    module: Any = AudioPretraining(model.model.audio_tower)
    collate: Any = collate_sounds
    if name == "vision":
        module = VisionPretraining(model.model.vision_tower, model.config.vision_feature_layer)
        collate = collate_frames
    return MetricsTrainer(model=module, args=arguments, train_dataset=data, data_collator=collate, callbacks=[clock])


def _model_trainer(
    name: str,
    root: Path,
    num_rows: int,
    seed: int,
    options: dict[str, Any],
    clock: Any,
    start: str | Path | None,
    stage: Stage,
) -> Any:
    from ..training import Recipe, VideoLlama2TrainingArguments, prepare_for_training
    from .dataset import RowTokenizer, WorldCollator, WorldDataset
    from .trainer import WorldTrainer

    model, processor = load_before(name, root, start)
    trainable, prompt_format = list(stage.trainable), "chat"
    if stage.recipe is not None:
        settings = [f"model={root}", f"output_dir={root}", "data=[{path: synthetic}]", "num_frames=8"]
        recipe = Recipe.from_yaml(stage.recipe, settings)
        trainable, prompt_format = recipe.trainable, recipe.prompt_format
        options = {
            **options,
            "lr_scheduler_type": recipe.lr_scheduler,
            "warmup_steps": max(1, round(recipe.warmup_ratio * options["max_steps"])),
        }
    prepare_for_training(model, trainable)
    if options["use_cpu"]:  # where the fused attention is slow backwards: a third of a step
        model.set_attn_implementation({"text_config": "eager"})
    # Questions that do not see each other cost little behind media that are read once.
    draw = partial(draw_row, mix=stage.mix, max_turns=12 if stage.separate else 8)
    if stage.captions_only:
        draw = partial(draw_caption_row, mix=stage.mix)
    if stage.drills:
        draw = partial(_draw_row_or_drill, drills=stage.drills, draw=draw)
    tokenize = RowTokenizer(processor.tokenizer, model.config, prompt_format)
    # Every stage draws rows that no other has seen.
    data = WorldDataset(tokenize, num_rows, seed * 100 + 10 + list(STAGES).index(name), draw, stage.separate)
    return WorldTrainer(
        model=model,
        args=VideoLlama2TrainingArguments(**options, connector_learning_rate=stage.connector_learning_rate),
        train_dataset=data,
        # A CPU is as fast on a few rows as on many, so it need not pad them to the longest.
        data_collator=WorldCollator(
            processor.tokenizer.pad_token_id, model.config.num_frames, pieces=4 if options["use_cpu"] else 1
        ),
        callbacks=[clock],
    )


__all__ = ["MODEL_FOLDER", "STAGES", "Stage", "load_before", "run_stage"]
