"""What trains: parts by name and the original's parameter groups; one step from the original's training batches."""

import json
import re

import pytest
import torch
from transformers import AutoModelForMultimodalLM

import test_video_llava as video_llava
from golden_utils import GOLDENS, Recording
from test_modeling import collate, row
from tiny_models import make_model
from videollama2_hf import VideoLlama2ForConditionalGeneration
from videollama2_hf.training import (
    PARTS,
    count_parameters,
    get_optimizer_groups,
    get_trainable_parts,
    prepare_for_training,
)


# Branch of the original -> the checkpoint that its groups were recorded with.
RECORDED = {"training": "mistral_clip_stc_8f", "training_av": "qwen2_siglip_beats_av"}


def load(job: str):
    return AutoModelForMultimodalLM.from_pretrained(GOLDENS / job / "checkpoint", dtype=torch.float32)


def our_name(original: str) -> str:
    name = re.sub(r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1.", original)
    return re.sub(r"pos_conv\.0\.weight_([gv])$", r"pos_conv.0.\1", name)


@pytest.mark.parametrize("folder", RECORDED)
def test_optimizer_groups_are_the_originals(folder):
    model = load(RECORDED[folder])
    prepare_for_training(model, [part for part in get_trainable_parts(model) if part != "vision_tower"])
    recorded = json.loads((GOLDENS / folder / "optimizer_groups.json").read_text())
    assert set(recorded) == {"None", "2e-05"}
    for rate, groups in recorded.items():
        expected = {(g["lr"], g["weight_decay"]): {our_name(name) for name in g["params"]} for g in groups if g["n"]}
        ours = get_optimizer_groups(model, 1e-3, 0.1, None if rate == "None" else float(rate))
        assert {(g["lr"], g["weight_decay"]): set(g["names"]) for g in ours} == expected
        assert all(len(g["params"]) == len(g["names"]) for g in ours)
        # What the manifest counts.
        counts = json.loads((GOLDENS / folder / "manifest.json").read_text())["cases"]["optimizer_groups"][rate]
        assert {tuple(count) for count in counts if count[2]} == {
            (g["lr"], g["weight_decay"], len(g["params"])) for g in ours
        }


def test_norms_of_llama_do_not_decay():
    """Of the RMSNorms only Llama's is in the original's list."""
    exempt = {}
    for family in ("llama", "qwen2", "gemma2"):
        groups = get_optimizer_groups(make_model(family), 1e-3, 0.1)
        names = [name for group in groups if group["weight_decay"] == 0 for name in group["names"]]
        exempt[family] = any("input_layernorm" in name for name in names)
    assert exempt == {"llama": True, "qwen2": False, "gemma2": False}


@pytest.mark.parametrize("folder", RECORDED)
def test_table_of_what_trains(folder):
    model = load(RECORDED[folder])
    table = json.loads((GOLDENS / folder / "manifest.json").read_text())["trainable_table_initial_plus_frozen_vision"]
    # The original has the language model's parts side by side with the others.
    recorded = {
        "language_model"
        if name in ("model.embed_tokens", "model.layers", "model.norm")
        else name.split(".")[-1]: trains
        for name, trains in table.items()
    }
    prepare_for_training(model, [name for name, trains in recorded.items() if trains])
    assert get_trainable_parts(model) == recorded


# The originals' training batches, and the parts that a stage could train on them.
BATCHES = [
    (job, case)
    for job in ("mistral_clip_stc_8f", "mistral_clip_stp", "mixtral_clip_stc_8f", "qwen2_siglip_stcv35_16f")
    for case in ("video_train", "batch_train")
] + [("qwen2_siglip_beats_av", f"{case}_train") for case in ("mix_batch", "video_image_text_batch", "audio_batch")]


@pytest.mark.parametrize(
    ("job", "case"), [(job, case) for job, case in BATCHES if case in Recording(job).manifest["cases"]]
)
@pytest.mark.parametrize("trainable", [["mm_projector"], ["language_model", "lm_head"]])
def test_step_from_the_originals_batches(job, case, trainable):
    """The recorded loss while the frozen parts do not learn; a step against the gradient lowers it."""
    recording, model = Recording(job), load(job)
    if case == "audio_batch_train" and trainable == ["mm_projector"]:
        trainable = ["mm_projector_a"]
    model.train()
    prepare_for_training(model, trainable)
    inputs = recording.model_inputs(case, model.config)
    loss = model(**inputs).loss
    torch.testing.assert_close(loss.reshape(1), recording.outputs[f"{case}.loss"], atol=1e-5, rtol=0)
    loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all(name.removeprefix("model.").split(".")[0] in trainable for name in trained)
    optimizer = torch.optim.SGD(
        [{k: v for k, v in group.items() if k != "names"} for group in get_optimizer_groups(model, 1e-2)]
    )
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        assert model(**inputs).loss < loss


def test_step_from_video_llavas_batch():
    """Loss and gradients as recorded, with everything frozen that has no recorded gradient."""
    model = VideoLlama2ForConditionalGeneration.from_pretrained(video_llava.CHECKPOINT, dtype=torch.float32)
    prepare_for_training(model, ["lm_head", "mm_projector"]).train()
    recorded = video_llava.RECORDED
    media = [["image_a"], ["video_a"], ["video_a", "image_b"], []]
    ids, labels, mask = (recorded[f"train_batch.{name}"] for name in ("input_ids", "labels", "attention_mask"))
    rows = [video_llava.expand(ids[i][mask[i].bool()], None, media[i], model.config) for i in range(len(media))]
    loss = model(**video_llava.as_inputs(rows), labels=recorded["train_batch.merged_labels"].long()).loss
    torch.testing.assert_close(loss, recorded["train_batch.loss"], atol=1e-5, rtol=0)
    loss.backward()
    for name, parameter in (("lm_head", model.lm_head), ("mm_projector.0", model.model.mm_projector[0])):
        expected = recorded[f"train_batch.grad.{name}.weight"]
        torch.testing.assert_close(parameter.weight.grad, expected, atol=2e-6, rtol=1e-4)


def test_parts_by_name():
    model = prepare_for_training(make_model(), ["model.mm_projector_a", "language_model.layers.1"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("model.mm_projector_a.", "model.language_model.layers.1."))
    }
    parts = get_trainable_parts(model)
    assert parts["mm_projector_a"] and not parts["mm_projector"] and "language_model" not in parts
    counts = count_parameters(model)
    assert set(counts) <= set(PARTS) and counts["mm_projector"][0] == 0
    assert sum(total for _, total in counts.values()) == sum(p.numel() for p in model.parameters())


def test_the_order_of_names_does_not_matter():
    """In the original it does: each flag overrides those before it."""
    names = ["audio_tower", "lm_head", "mm_projector"]
    tables = [get_trainable_parts(prepare_for_training(make_model(), order)) for order in (names, names[::-1])]
    assert tables[0] == tables[1]


def test_tied_embeddings_train_under_both_names():
    for name in ("lm_head", "language_model.embed_tokens"):
        model = prepare_for_training(make_model("gemma2", tie_word_embeddings=True), [name])
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize(("names", "message"), [(["mm_proj"], "no part 'mm_proj'.*mm_projector"), ([], "Nothing is")])
def test_unknown_parts_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        prepare_for_training(make_model(), names)


def test_a_frozen_tower_does_not_skip_layers():
    """BEATs skips layers at random in training. Frozen (stage 3) it must not, trained (stage 4) it does."""
    inputs = collate([row("audio t", make_model().config)])["input_features"]

    def features(trainable):
        model = make_model()
        model.config.audio_config.layerdrop = 0.5
        prepare_for_training(model, trainable).train()
        with torch.no_grad():
            return [model.model.audio_tower(inputs).last_hidden_state for _ in range(8)]

    torch.manual_seed(0)
    frozen, trained = features(["mm_projector_a"]), features(["audio_tower"])
    assert all(torch.equal(frozen[0], other) for other in frozen)
    assert not all(torch.equal(trained[0], other) for other in trained)
