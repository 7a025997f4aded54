"""The whole model against recordings of the original: features, logits, loss and greedy tokens."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForMultimodalLM

from golden_utils import Recording
from videollama2_hf.checkpoint_videollama2 import infer_audio_config, read_tensor_shapes


JOBS = [
    "mistral_clip_stc_8f",
    "mistral_clip_stp",
    "mixtral_clip_stc_8f",
    "qwen2_siglip_stcv35_16f",
    "qwen2_siglip_beats_av",
]
RECORDINGS = {job: Recording(job) for job in JOBS}
LOGITS = [
    (job, case)
    for job, recording in RECORDINGS.items()
    for case in recording.manifest["cases"]
    if f"{case}.logits" in recording.outputs and f"{case}.input_ids" in recording.inputs
]
GENERATED = [(job, case) for job, case in LOGITS if f"{case}.generated_ids" in RECORDINGS[job].outputs]


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def models(request):
    return {
        job: AutoModelForMultimodalLM.from_pretrained(
            recording.folder / "checkpoint", dtype=torch.float32, attn_implementation=request.param
        ).eval()
        for job, recording in RECORDINGS.items()
    }


@pytest.mark.parametrize("job", JOBS)
def test_original_checkpoint_loads_whole(job):
    model, info = AutoModelForMultimodalLM.from_pretrained(
        RECORDINGS[job].folder / "checkpoint", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert type(model).__name__ == "VideoLlama2ForConditionalGeneration"


@pytest.mark.parametrize("job", JOBS)
def test_saved_again_it_has_the_original_keys_and_bytes(job, tmp_path):
    """But for the equal copies of BEATs' table; so what is trained here runs in the original code."""
    folder = RECORDINGS[job].folder / "checkpoint"
    AutoModelForMultimodalLM.from_pretrained(folder, dtype="auto").save_pretrained(tmp_path)
    original, saved = {}, {}
    for path in folder.glob("model*.safetensors"):
        original |= load_file(path)
    for path in tmp_path.glob("model*.safetensors"):
        saved |= load_file(path)
    copies = {key for key in original if "relative_attention_bias" in key and ".layers.0." not in key}
    assert set(saved) == set(original) - copies
    for key, value in saved.items():
        assert torch.equal(value, original[key].to(value.dtype)), key


@pytest.mark.parametrize(("job", "case"), LOGITS)
def test_logits_and_loss(models, job, case):
    recording, model = RECORDINGS[job], models[job]
    inputs = recording.model_inputs(case, model.config)
    with torch.no_grad():
        outputs = model(**inputs)
    expected = recording.outputs[f"{case}.logits"]
    valid = inputs["attention_mask"].bool()
    tail = recording.manifest["cases"][case].get("logits_tail")
    logits = outputs.logits if tail is None else outputs.logits[:, -tail:]
    valid = valid if tail is None else valid[:, -tail:]
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits[valid], expected[valid], atol=1e-4, rtol=0)
    if f"{case}.loss" in recording.outputs:
        torch.testing.assert_close(outputs.loss.reshape(1), recording.outputs[f"{case}.loss"], atol=1e-5, rtol=0)
    if f"{case}.spliced_labels" in recording.outputs:
        assert torch.equal(inputs["labels"], recording.outputs[f"{case}.spliced_labels"].long())


@pytest.mark.parametrize(("job", "case"), GENERATED)
def test_greedy_tokens(models, job, case):
    recording, model = RECORDINGS[job], models[job]
    inputs = recording.model_inputs(case, model.config, with_labels=False)
    generated = model.generate(**inputs, max_new_tokens=16, do_sample=False, repetition_penalty=1.0)
    new_ids = generated[:, inputs["input_ids"].shape[1] :]
    expected = recording.outputs[f"{case}.generated_ids"].long()
    assert torch.equal(new_ids[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("job", JOBS)
def test_features(models, job):
    recording, model = RECORDINGS[job], models[job]
    checked = 0
    for name, expected in recording.outputs.items():
        medium, _, kind = name.partition(".")
        if kind not in ("vision_features", "connector", "projector_a"):
            continue
        with torch.no_grad():
            if kind == "projector_a":
                outputs = model.get_audio_features(recording.medium(medium))
            elif medium.startswith("image"):
                outputs = model.get_image_features(recording.medium("image"))
            elif medium == "batch_two_videos":
                videos = torch.stack([recording.medium("video_a"), recording.medium("video_b")])
                outputs = model.get_video_features(videos)
            else:
                outputs = model.get_video_features(recording.medium(medium)[None])
        features = outputs.last_hidden_state if kind == "vision_features" else outputs.pooler_output
        torch.testing.assert_close(features.reshape(expected.shape), expected, atol=2e-5, rtol=1e-5)
        checked += 1
    assert checked >= 2


MM_INFER = [
    (job, case)
    for job, recording in RECORDINGS.items()
    for case, content in recording.manifest["cases"].items()
    if content.get("kind") == "mm_infer"
]


@pytest.mark.parametrize(("job", "case"), MM_INFER)
def test_answers_of_mm_infer(models, job, case):
    """
    The original's own inference function: greedy, but with the checkpoint's repetition penalty, which counts what was
    generated and not the prompt.
    """
    recording, model = RECORDINGS[job], models[job]
    content = recording.manifest["cases"][case]
    va = "{video:video_a,audio:audio_0}" if case == "mm_infer_va" else "video_a"
    medium = {"video": va, "image": "image", "audio": "audio_1"}.get(content["modal"])
    recording.inputs[f"{case}.input_ids"] = torch.tensor([content["input_ids"]])
    content["images"] = [[medium, content["modal"]]] if medium else None
    inputs = recording.model_inputs(case, model.config)
    generated = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert generated[0, inputs["input_ids"].shape[1] :].tolist() == content["output_ids"]


def test_image_on_a_model_that_hears(models):
    """The original sends it to BEATs and crashes (fault 1); its recording was made with the audio tower taken out."""
    job, case = "qwen2_siglip_beats_av", "image_with_audio_tower_removed"
    recording, model = RECORDINGS[job], models[job]
    recording.manifest["cases"][case] = {"images": [["image", "image"]]}
    inputs = recording.model_inputs(case, model.config)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        logits = model(**inputs).logits
    torch.testing.assert_close(features, recording.outputs[f"{case}.connector"], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(logits, recording.outputs[f"{case}.logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("shards", [1, 3])
def test_original_checkpoint_in_pickle_files_loads_too(tmp_path, shards):
    """`pytorch_model.bin`, in one file or in shards, as older releases have it."""
    folder = RECORDINGS["mistral_clip_stc_8f"].folder / "checkpoint"
    for path in folder.iterdir():
        if not path.name.startswith("model"):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    weights = {}
    for path in sorted(folder.glob("model*.safetensors")):
        weights |= load_file(path)
    names = (
        [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
        if shards > 1
        else ["pytorch_model.bin"]
    )
    where = {key: names[i % shards] for i, key in enumerate(weights)}
    for name in names:
        torch.save({key: weights[key] for key in weights if where[key] == name}, tmp_path / name)
    if shards > 1:
        index = {"metadata": {}, "weight_map": where}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    loaded, info = AutoModelForMultimodalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = AutoModelForMultimodalLM.from_pretrained(folder)
    for (name, value), (_, other) in zip(loaded.state_dict().items(), expected.state_dict().items()):
        assert torch.equal(value, other), name


def test_audio_tower_sizes_are_read_from_pickle_files_too(tmp_path):
    folder = RECORDINGS["qwen2_siglip_beats_av"].folder / "checkpoint"
    weights = {}
    for path in sorted(folder.glob("model*.safetensors")):
        weights |= load_file(path)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert infer_audio_config(read_tensor_shapes(str(tmp_path))) == infer_audio_config(read_tensor_shapes(str(folder)))


def test_checkpoint_without_its_towers_files_names_what_is_missing(tmp_path):
    folder = RECORDINGS["mistral_clip_stc_8f"].folder / "checkpoint"
    config = json.loads((folder / "config.json").read_text())
    config["mm_vision_tower"] = str(tmp_path / "nowhere" / "clip-tiny")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match="nowhere/clip-tiny.*found neither under"):
        AutoModelForMultimodalLM.from_pretrained(tmp_path)
    config["mm_vision_tower"] = "dinov2"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'dinov2'.*'clip' or 'siglip'"):
        AutoModelForMultimodalLM.from_pretrained(tmp_path)


def test_released_towers_need_no_download(tmp_path, monkeypatch):
    """The towers that the released checkpoints name are known by their numbers."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = json.loads((RECORDINGS["mistral_clip_stc_8f"].folder / "checkpoint" / "config.json").read_text())
    for tower, tokens in (("openai/clip-vit-large-patch14-336", 845), ("google/siglip-so400m-patch14-384", 980)):
        config["mm_vision_tower"] = tower
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert AutoConfig.from_pretrained(tmp_path).num_visual_tokens("video", 8) == tokens
