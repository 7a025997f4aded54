"""
One process of a training run for test_training_distributed.py:

    torchrun --nproc-per-node=2 tests/training_worker.py FOLDER KIND...

Trains the model in FOLDER for a few steps, and writes the losses and what `save_model` saves under FOLDER/KIND.
"""

import json
import os
import sys
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForMultimodalLM, AutoProcessor
from transformers.distributed import DistributedConfig

from processing_utils import FRAMES, IMAGE, SOUND
from videollama2_hf.training import (
    VideoLlama2DataCollator,
    VideoLlama2Dataset,
    VideoLlama2Trainer,
    VideoLlama2TrainingArguments,
    prepare_for_training,
)
from videollama2_hf.training.samplers import EpochSampler


CONFIGURATIONS = Path(__file__).parent.parent / "src" / "videollama2_hf" / "training" / "configurations"
MEDIA = {"image": IMAGE, "video": FRAMES, "audio": SOUND}
# Two rows make a step, one for each process: what one process sees or hears, the other often does not.
STEPS = ["video", "", "", "audio", "image", "video audio", "", "", "image", "audio"]
TRAINABLE = ["language_model", "lm_head", "mm_projector", "mm_projector_a", "audio_tower"]


class InOrder(EpochSampler):
    def order(self, generator) -> list[int]:
        return list(range(self.num_rows))


def make_rows() -> list[dict]:
    rows = []
    for number, kinds in enumerate(STEPS):
        content = [{"type": kind, kind: MEDIA[kind]} for kind in kinds.split()]
        content.append({"type": "text", "text": f"What is number {number}?"})
        answer = "It is " + "very " * number + "good."
        rows.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    return rows


def run(folder: Path, kind: str) -> None:
    """
    Kinds: `plain`, `accumulated`, `checkpointed` (of one process); `ddp`; `fsdp2` (sharded by transformers while it
    loads); `accelerate_fsdp2` (sharded by accelerate as fsdp2.yaml says); `zero2` and `zero3` (DeepSpeed).
    """
    is_single = kind in ("plain", "accumulated", "checkpointed")
    per_step = 2 if is_single else 1
    arguments = VideoLlama2TrainingArguments(
        output_dir=str(folder / kind),
        per_device_train_batch_size=1 if kind == "accumulated" else per_step,
        gradient_accumulation_steps=2 if kind == "accumulated" else 1,
        activation_checkpointing=kind == "checkpointed",
        activation_checkpointing_kwargs={"use_reentrant": False} if kind == "checkpointed" else None,
        num_train_epochs=1,
        # Adam would turn rounding errors of gradients that are zero into whole steps.
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        deepspeed=str(CONFIGURATIONS / f"{kind}.json") if kind.startswith("zero") else None,
    )
    if kind.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed("gloo")
    if kind == "accelerate_fsdp2":
        set_environment()
    options = {"distributed_config": DistributedConfig(fsdp_size=2)} if kind == "fsdp2" else {}
    model = AutoModelForMultimodalLM.from_pretrained(folder / "model", dtype=torch.float32, **options)
    prepare_for_training(model, TRAINABLE)
    processor = AutoProcessor.from_pretrained(folder / "model")
    dataset = VideoLlama2Dataset(make_rows(), processor)
    trainer = VideoLlama2Trainer(
        model,
        arguments,
        train_dataset=dataset,
        data_collator=VideoLlama2DataCollator(processor),
        train_sampler=InOrder(len(dataset)),
    )
    if kind == "accelerate_fsdp2":
        shard_by_accelerate(trainer)
    trainer.train()
    if kind == "accelerate_fsdp2":
        shard_by_accelerate(trainer)  # accelerate has looked at the device again
    trainer.save_model()
    if arguments.process_index == 0:
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        (folder / kind / "log.json").write_text(json.dumps(log))


def set_environment() -> None:
    """What `accelerate launch --config_file fsdp2.yaml` sets; only the first process then reads the weights."""
    settings = yaml.safe_load((CONFIGURATIONS / "fsdp2.yaml").read_text())["fsdp_config"]
    names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    for name, value in settings.items():
        os.environ[names.get(name, name.upper())] = str(value).lower() if isinstance(value, bool) else str(value)


def shard_by_accelerate(trainer) -> None:
    """accelerate takes FSDP for what it is only on accelerators; the rest of it does run on CPUs."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    trainer.is_fsdp_enabled = True


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        run(Path(sys.argv[1]), name)
        print(name, "done", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
