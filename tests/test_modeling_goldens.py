"""The whole model against recordings of the original: features, logits, loss and greedy tokens."""

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from golden_utils import Recording


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
