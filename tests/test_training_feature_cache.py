"""Features of frozen towers on disk: the same training without the towers, and caches that are not the model's."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor, Trainer

from processing_utils import GOLDENS, SOUND, write_media
from videollama2_hf.training import (
    FeatureCache,
    VideoLlama2DataCollator,
    VideoLlama2Dataset,
    VideoLlama2IterableDataset,
    VideoLlama2Trainer,
    VideoLlama2TrainingArguments,
    prepare_for_training,
)


CHECKPOINT = GOLDENS / "qwen2_siglip_beats_av" / "checkpoint"
CONNECTORS = ["mm_projector", "mm_projector_a"]


def load_model(trainable=CONNECTORS):
    model = AutoModelForMultimodalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return prepare_for_training(model, trainable)


def load_processor(**options):
    return AutoProcessor.from_pretrained(CHECKPOINT, **{"chunk_length": 2, "num_frames": 4, **options})


def row(question: str, *blocks: dict) -> dict:
    content = [*blocks, {"type": "text", "text": question}]
    answer = [{"type": "text", "text": f"It is {question.lower()}"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def rows(files):
    heard = {"type": "video", "path": files["loud"], "load_audio_from_video": True}
    seen = {**heard, "load_audio_from_video": False}
    return [
        row("What?", {"type": "image", "path": files["image"]}),
        row("Where?", heard),
        row("Why?", seen),  # the frames of the row before
        row("Which?", {"type": "audio", "path": files["sound"]}),
        row("Who?"),
        row("When?", {**heard, "start": 1.0, "end": 2.0}, {"type": "image", "path": files["image"]}),
        row("How?", {"type": "video", "path": files["silent"], "load_audio_from_video": True}),
        row("Whose?", {"type": "audio", "audio": SOUND, "sampling_rate": 16000}),
        row("Long?", {**seen, "num_frames": 6}),
    ]


NUM_MEDIA = 1 + 2 + 0 + 1 + 0 + 2 + 2 + 1 + 1  # frames and sound of a video are two


@pytest.fixture(scope="module")
def built(rows, tmp_path_factory):
    """A cache of all rows."""
    folder = tmp_path_factory.mktemp("features") / "cache"
    dataset = VideoLlama2Dataset(rows, load_processor())
    cache = FeatureCache(folder, load_model(), dataset.encode.processor)
    assert cache.build(dataset, num_workers=1, show_progress=False) == NUM_MEDIA
    return folder


def forbid_towers(model):
    def refuse(*args, **kwargs):
        raise AssertionError("a tower ran")

    for name in ("get_image_features", "get_video_features", "get_audio_features"):
        setattr(model.model, name, refuse)
    for tower in (model.model.vision_tower, model.model.audio_tower):
        tower.forward = refuse


def train(model, dataset, folder, batch_size: int, trainer_class=VideoLlama2Trainer, **options):
    trainer = trainer_class(
        model,
        VideoLlama2TrainingArguments(
            str(folder),
            max_steps=4,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-3,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=1,
            **options,
        ),
        train_dataset=dataset,
        data_collator=VideoLlama2DataCollator(load_processor()),
    )
    trainer.train()
    losses = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor(losses), {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_training_is_the_same(rows, built, tmp_path, batch_size):
    """Bit for bit where a batch is one row, so that the towers see in it what they saw for the cache."""
    plain = VideoLlama2Dataset(rows, load_processor())
    losses, weights = train(load_model(), plain, tmp_path, batch_size)
    model = load_model()
    cached = FeatureCache(built, model, plain.encode.processor).attach(plain)
    forbid_towers(model)
    cached_losses, cached_weights = train(model, cached, tmp_path, batch_size, dataloader_num_workers=1)
    assert len(losses) == 4 and losses.isfinite().all()
    tolerance = {"rtol": 0, "atol": 0} if batch_size == 1 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(cached_losses, losses, **tolerance)
    assert weights.keys() == cached_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(cached_weights[name], weight, **tolerance)


def test_rows_keep_their_text_and_their_length(rows, built):
    plain = VideoLlama2Dataset(rows, load_processor(), max_text_length=34)
    cached = FeatureCache(built, load_model(), plain.encode.processor).attach(plain)
    cached = pickle.loads(pickle.dumps(cached))  # what the workers get: no model in it
    assert cached.encode.processor.cache.model is None
    for index in range(len(rows)):
        expected, found = plain[index], cached[index]
        assert torch.equal(found["input_ids"], expected["input_ids"])
        assert torch.equal(found["labels"], expected["labels"])
        assert not {"pixel_values", "pixel_values_videos", "input_features"} & set(found)
        assert cached.num_tokens(index) == plain.num_tokens(index)


def test_what_is_there_is_not_encoded_again(rows, files, built, tmp_path):
    model = load_model()
    renamed = shutil.copy(files["loud"], tmp_path / "another name.mp4")
    dataset = VideoLlama2IterableDataset([*rows, row("New?", {"type": "video", "path": renamed})], load_processor())
    cache = FeatureCache(built, model, dataset.encode.processor)
    expected = [row_inputs["mm_encoder_outputs"] for row_inputs in cache.attach(dataset)]
    forbid_towers(model)
    assert cache.build(dataset, show_progress=False) == 0
    assert torch.equal(expected[-1]["video"][0], expected[1]["video"][0])


def test_an_interrupted_build_is_continued(rows, tmp_path, monkeypatch):
    model = load_model()
    dataset = VideoLlama2Dataset(rows, load_processor())
    cache = FeatureCache(tmp_path, model, dataset.encode.processor)
    real, calls = model.model.get_video_features, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(model.model, "get_video_features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.build(dataset, show_progress=False)
    monkeypatch.undo()
    written = len(list(tmp_path.glob("*/*.safetensors")))
    assert 0 < written < NUM_MEDIA
    cache = FeatureCache(tmp_path, model, dataset.encode.processor)
    assert cache.build(dataset, show_progress=False) == NUM_MEDIA - written
    assert not list(tmp_path.rglob("*.new"))


def test_a_cache_of_something_else_is_refused(rows, built):
    model, processor = load_model(), load_processor()
    with torch.no_grad():
        model.model.audio_tower.layer_norm.bias += 1e-3
    with pytest.raises(ValueError, match="made with another audio_tower.weights.*Delete the folder"):
        FeatureCache(built, model, processor)
    with pytest.raises(ValueError, match=r"another video_processor.num_frames \(4 there, 8 here\)"):
        FeatureCache(built, load_model(), load_processor(num_frames=8))
    model = load_model()
    model.config.vision_feature_layer = -3
    with pytest.raises(ValueError, match=r"another config.vision_feature_layer \(-2 there, -3 here\)"):
        FeatureCache(built, model, processor)
    with pytest.raises(ValueError, match="The audio_tower trains"):
        FeatureCache(built, load_model(["mm_projector_a", "audio_tower"]), processor)
    processor.video_processor.flip_probability = 0.5
    with pytest.raises(ValueError, match="video_processor flips at random"):
        FeatureCache(built, load_model(), processor)


def test_a_file_that_changed_is_noticed(files, tmp_path):
    path = shutil.copy(files["sound"], tmp_path / "sound.wav")
    dataset = VideoLlama2Dataset([row("What?", {"type": "audio", "path": path})], load_processor())
    cache = FeatureCache(tmp_path / "cache", load_model(), dataset.encode.processor)
    assert cache.build(dataset, show_progress=False) == 1
    attached = cache.attach(dataset)
    before = attached[0]["mm_encoder_outputs"]["audio"][0]
    os.utime(path, (1, 1))  # another date, the same content
    assert torch.equal(attached[0]["mm_encoder_outputs"]["audio"][0], before)
    content = bytearray(Path(path).read_bytes())
    content[2000:3000] = np.random.default_rng(0).integers(0, 255, 1000, np.uint8).tobytes()
    Path(path).write_bytes(content)
    with pytest.raises(ValueError, match="Row 0 .*sound.wav is not in the feature cache .*has changed.*Build"):
        attached[0]
    assert cache.build(dataset, show_progress=False) == 1
    assert not torch.equal(attached[0]["mm_encoder_outputs"]["audio"][0], before)


def test_media_that_cannot_be_read(files, tmp_path):
    heard = {"type": "video", "path": files["broken"], "load_audio_from_video": True}
    data = [row("What?", heard), row("What?", {"type": "image", "path": "nowhere.png"}), row("Why?")]
    processor = load_processor()
    strict = VideoLlama2Dataset(data[:1], processor)
    cache = FeatureCache(tmp_path, load_model(), strict.encode.processor)
    with pytest.raises(ValueError, match="Row 0 .*broken.mp4"):
        cache.build(strict, show_progress=False)
    dataset = VideoLlama2Dataset(data, processor, on_unreadable="skip")
    cache.build(dataset, show_progress=False)
    attached = cache.attach(dataset)
    assert [len(item["input_ids"]) for item in attached.__getitems__([0, 1, 2])] == [len(attached[2]["input_ids"])]
    assert attached.skipped == [0, 1]


def test_silent_videos_without_tokens(files, tmp_path):
    processor = load_processor(missing_audio_policy="drop")
    data = [row("What?", {"type": "video", "path": files["silent"], "load_audio_from_video": True})]
    dataset = VideoLlama2Dataset(data, processor)
    cache = FeatureCache(tmp_path, load_model(), dataset.encode.processor)
    cache.build(dataset, show_progress=False)
    found = cache.attach(dataset)[0]
    assert set(found["mm_encoder_outputs"]) == {"video"}
    assert torch.equal(found["input_ids"], dataset[0]["input_ids"])


def test_a_plain_trainer_takes_the_features(rows, built, tmp_path):
    dataset = VideoLlama2Dataset(rows, load_processor())
    model = load_model()
    cached = FeatureCache(built, model, dataset.encode.processor).attach(dataset)
    forbid_towers(model)
    losses, _ = train(model, cached, tmp_path, 3, Trainer)
    assert losses.isfinite().all()
