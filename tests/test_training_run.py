"""Whole runs: every recipe to a folder that loads, continued runs, accumulation, checkpointing, what is logged."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor, Trainer, TrainingArguments

from golden_utils import GOLDENS
from training_utils import make_folder, write_rows
from videollama2_hf import VideoLlama2ForConditionalGeneration
from videollama2_hf.cli import main
from videollama2_hf.conversion import convert_checkpoint, restore_original
from videollama2_hf.training import (
    Recipe,
    VideoLlama2DataCollator,
    VideoLlama2Dataset,
    prepare_for_training,
    train,
)
from videollama2_hf.training.recipe import list_recipes
from videollama2_hf.training.run import find_last_checkpoint


VIDEO_LLAVA = GOLDENS / "video_llava" / "tiny-video-llava-7b"
KINDS = {"1": "v i", "2": "v i t", "3": "a", "4": "a t", "5": "va va v a"}
SMALL = {
    "bf16": False,
    "gradient_checkpointing": False,
    "num_workers": 0,
    "save_steps": 100,
    "learning_rate": 1e-3,
    "global_batch_size": 4,
    "per_device_batch_size": 4,
    "max_steps": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    make_folder(folder / "model")
    write_rows(folder / "data", kinds="va v a i t")
    return folder


def make_recipe(folder: Path, output_dir: Path, name: str | None = None, **changes) -> Recipe:
    """A recipe of a few small steps, or the published one of that name with its sizes cut down."""
    values = {"trainable": ["language_model", "lm_head", "mm_projector", "mm_projector_a"], "seed": 7}
    if name is not None:
        values = Recipe.from_yaml(name, ["model=x", "output_dir=x", "data=x"]).to_dict()
        values["num_frames"] = values["num_frames"] and 4
    needed = {
        "model": str(folder / "model"),
        "output_dir": str(output_dir),
        "data": str(folder / "data" / "rows.json"),
    }
    return Recipe.from_dict({**values, **SMALL, **needed, **changes})


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_runs_to_a_folder_that_loads(folder, tmp_path, name):
    changes = {}
    if name.startswith("video_llava"):
        changes["model"] = str(VIDEO_LLAVA)
    if "qlora" in name:  # in 16 bits here; what would be quantised is in test_training_lora.py
        changes["lora"] = {"r": 4, "alpha": 8}
    stage = name.removeprefix("videollama2_").removeprefix("video_llava_")[0]
    data = write_rows(folder / "data", f"stage_{stage}.json", KINDS[stage])
    recipe = make_recipe(folder, tmp_path, name, data=str(data), **changes)
    trainer = train(recipe)
    assert len(losses(trainer)) == 2 and all(torch.isfinite(torch.tensor(losses(trainer))))

    loaded = tmp_path / "merged" if recipe.lora else tmp_path
    model, info = AutoModelForMultimodalLM.from_pretrained(loaded, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(loaded)
    assert not processor.image_processor.do_pad_to_square  # the originals pad in training only
    started = VideoLlama2ForConditionalGeneration.from_pretrained(recipe.model, dtype=torch.float32).state_dict()
    changed = {
        name.removeprefix("model.").split(".")[0]
        for name, value in model.state_dict().items()
        if not torch.equal(value, started[name])
    }
    assert changed == set(recipe.trainable) | ({"language_model"} if recipe.lora else set())
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe


def test_what_a_worker_cannot_read_is_one_sentence(folder, tmp_path, capsys):
    data = tmp_path / "rows.json"
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    data.write_text(json.dumps([{"image": "nowhere.png", "conversations": turns}] * 4))
    make_recipe(folder, tmp_path / "run", data=str(data), num_workers=1).save_yaml(tmp_path / "recipe.yaml")
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(tmp_path / "recipe.yaml")])
    assert stopped.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Error" in line]
    assert "nowhere.png" in line and "Traceback" not in line


def test_accumulation_and_checkpointing_change_nothing(folder, tmp_path):
    runs = {
        "plain": {},
        "accumulated": {"per_device_batch_size": 1},
        "checkpointed": {"gradient_checkpointing": True},
        "workers": {"num_workers": 2},
    }
    curves = {}
    for name, changes in runs.items():
        recipe = make_recipe(folder, tmp_path / name, max_steps=3, aspect_ratio="pad", **changes)
        curves[name] = torch.tensor(losses(train(recipe)), dtype=torch.float64)
    assert curves["plain"][0] - curves["plain"][-1] > 0.01
    for name, curve in curves.items():
        torch.testing.assert_close(
            curve, curves["plain"], atol=1e-6, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert torch.equal(curves["workers"], curves["plain"])


def test_a_killed_run_goes_on_with_the_same_losses(folder, tmp_path):
    """Bit for bit: weights, optimizer, order of rows, and the layers that BEATs skips at random."""
    changes = {"max_steps": 6, "save_steps": 1, "modality_mix": None, "epochs": 3, "global_batch_size": 4}
    trainable = ["language_model", "mm_projector_a", "audio_tower"]
    expected = losses(train(make_recipe(folder, tmp_path / "whole", trainable=trainable, **changes)))

    output_dir = tmp_path / "killed"
    recipe = make_recipe(folder, output_dir, trainable=trainable, **changes)
    recipe.save_yaml(tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "videollama2_hf.training", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last = random.randint(1, 4)
    while not (output_dir / f"checkpoint-{last}" / "trainer_state.json").exists():
        assert process.poll() is None, "The run ended by itself."
        time.sleep(0.002)
    time.sleep(random.random() * 0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    with pytest.raises(FileExistsError, match="holds a run already"):
        train(recipe)
    trainer = train(recipe, resume=True)
    assert losses(trainer) == expected
    assert trainer.state.global_step == 6


def test_checkpoints_that_are_not_whole_are_left_out(tmp_path):
    assert find_last_checkpoint(tmp_path / "nowhere") is None
    for step, state in ((2, "{}"), (10, "{}"), (12, '{"best'), (13, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_lora_goes_on_too(folder, tmp_path):
    lora = {"trainable": ["mm_projector"], "lora": {"r": 4, "alpha": 8, "dropout": 0.1}}
    expected = losses(train(make_recipe(folder, tmp_path / "whole", max_steps=4, **lora)))
    train(make_recipe(folder, tmp_path / "parts", max_steps=4, save_steps=2, save_total_limit=2, **lora))
    for path in (tmp_path / "parts" / "checkpoint-4").iterdir():
        path.unlink()
    trainer = train(make_recipe(folder, tmp_path / "parts", max_steps=4, **lora), resume=True)
    assert losses(trainer) == expected


def test_evaluation_answers_samples_and_everything_is_logged(folder, tmp_path, capsys):
    rows = str(write_rows(folder / "data", "held_out.json", "va t", repeat=1))
    evaluation = {"data": rows, "steps": 1, "num_samples": 2, "max_new_tokens": 3}
    changes = {"sampler": "length", "bf16": True, "global_batch_size": 8, "max_steps": 1}
    history = train(make_recipe(folder, tmp_path, eval=evaluation, **changes)).state.log_history
    assert all(0 <= entry["data_wait"] <= 1 for entry in history if "loss" in entry)
    assert len([entry for entry in history if "eval_loss" in entry]) == 1
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1, 1]
    assert samples[0]["question"] == "<video> What is seen and heard, 0?"
    assert samples[0]["expected"] == "A square that grows brighter, a tone." and isinstance(samples[0]["answer"], str)
    assert list((tmp_path / "runs").rglob("events*"))
    printed = capsys.readouterr().out
    assert "Batch of 8 = 4 rows x 1 device(s) x 2 accumulated" in printed and "frozen" in printed
    # Under bf16 the model is saved in bfloat16.
    assert AutoModelForMultimodalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_batches_in_which_nothing_trains(folder, tmp_path):
    """A batch of text where a connector trains has no gradient; the run goes on."""
    data = write_rows(folder / "data", "text.json", "t", repeat=8)
    trainer = train(make_recipe(folder, tmp_path, data=str(data), trainable=["mm_projector"]))
    assert len(losses(trainer)) == 2 and all(loss > 0 for loss in losses(trainer))


def test_streamed_rows(folder, tmp_path):
    trainer = train(make_recipe(folder, tmp_path, streaming=True, global_batch_size=2, per_device_batch_size=2))
    assert len(losses(trainer)) == 2


def test_the_plain_trainer_trains_the_same(folder, tmp_path):
    """Data set, collator and `prepare_for_training` are all that transformers' own Trainer needs."""
    parts = ["mm_projector", "mm_projector_a"]
    ours = losses(train(make_recipe(folder, tmp_path / "ours", trainable=parts, warmup_ratio=0)))
    model = AutoModelForMultimodalLM.from_pretrained(folder / "model", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder / "model")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "plain"),
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        logging_steps=1,
        report_to="none",
        seed=7,
        use_cpu=True,
    )
    dataset = VideoLlama2Dataset(str(folder / "data" / "rows.json"), processor)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(7)).tolist()
    trainer = Trainer(
        model=prepare_for_training(model, parts),
        args=arguments,
        train_dataset=torch.utils.data.Subset(dataset, order),
        data_collator=VideoLlama2DataCollator(processor),
    )
    trainer.train()
    assert losses(trainer) == pytest.approx(ours, abs=1e-6)


def test_wrong_mixtures_are_told_before_anything_runs(folder, tmp_path):
    recipe = make_recipe(folder, tmp_path, modality_mix={"audio_visual": 2, "video": 1, "audio": 1})
    with pytest.raises(ValueError, match="Row 4 is 'text', but the mixture is 2 audio_visual : 1 video : 1 audio"):
        train(recipe)


def test_from_kept_features_the_losses_are_the_same(folder, tmp_path, monkeypatch):
    """The frozen towers run before training only, and not at all when the features are there already."""
    frozen = {"trainable": ["mm_projector", "mm_projector_a"], "learning_rate": 1e-3}
    plain = train(make_recipe(folder, tmp_path / "plain", **frozen))
    cached = {**frozen, "feature_cache": str(tmp_path / "features")}
    first = train(make_recipe(folder, tmp_path / "first", **cached))
    assert losses(first) == pytest.approx(losses(plain), rel=1e-4)
    monkeypatch.setattr(VideoLlama2ForConditionalGeneration, "get_video_features", None)
    again = train(make_recipe(folder, tmp_path / "again", **cached))
    assert losses(again) == losses(first)


def test_features_of_a_tower_that_trains_are_not_kept(folder, tmp_path):
    recipe = make_recipe(folder, tmp_path / "run", trainable=["audio_tower"], feature_cache=str(tmp_path / "features"))
    with pytest.raises(ValueError, match="audio_tower"):
        train(recipe)


def test_what_lora_trained_goes_back_to_the_original_layout(folder, tmp_path):
    """From a converted original through LoRA and its merge to files of the original code."""
    source = GOLDENS / "qwen2_siglip_beats_av" / "checkpoint"
    convert_checkpoint(source, tmp_path / "converted")
    recipe = make_recipe(
        folder,
        tmp_path / "tuned",
        "videollama2_2_video_tuning_lora",
        model=str(tmp_path / "converted"),
        data=str(write_rows(folder / "data", "videos.json", kinds="v i")),
        num_frames=None,
        max_text_length=None,
    )
    train(recipe)
    merged = AutoModelForMultimodalLM.from_pretrained(tmp_path / "tuned" / "merged")
    restore_original(tmp_path / "tuned" / "merged", tmp_path / "original", original=tmp_path / "converted")
    names = {path.name for path in (tmp_path / "original").iterdir()}
    assert {path.name for path in source.glob("*.safetensors")} <= names
    restored, info = AutoModelForMultimodalLM.from_pretrained(tmp_path / "original", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    before = AutoModelForMultimodalLM.from_pretrained(source, dtype=merged.dtype).state_dict()
    for name, value in restored.state_dict().items():
        assert torch.equal(value, merged.state_dict()[name]), name
    trained = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert any("self_attn.q_proj" in name for name in trained) and any("mm_projector." in name for name in trained)
    assert not any("tower" in name or "mm_projector_a" in name for name in trained)
