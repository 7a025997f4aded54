"""Conversion of every recorded checkpoint: its logits and tokens after it, its bytes after the way back."""

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

from golden_utils import GOLDENS, Recording
from test_modeling import collate, row
from test_original_checkpoints import write_original
from tiny_models import FAMILIES, make_model
from videollama2_hf.configuration_videollama2 import ConnectorType
from videollama2_hf.conversion import ConversionError, build_plan, convert_checkpoint, open_source, restore_original
from videollama2_hf.conversion.sources import complete_name, fetch
from videollama2_hf.conversion.tensors import as_bytes, read_folder


CHECKPOINTS = {
    "mistral_clip_stc_8f": "checkpoint",
    "mistral_clip_stp": "checkpoint",
    "mixtral_clip_stc_8f": "checkpoint",
    "qwen2_siglip_stcv35_16f": "checkpoint",
    "qwen2_siglip_beats_av": "checkpoint",
    "base_projector_only": "checkpoint",
    "lora": "checkpoint-lora",
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder: as it is, but a PyTorch file tensor by tensor."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".bin":
            for key, tensor in torch.load(path, weights_only=True).items():
                files[f"{name}:{key}"] = bytes(as_bytes(tensor)) + str(tensor.dtype).encode()
        else:
            files[name] = path.read_bytes()
    return files


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Converted folders by name of the recording, made once."""
    root = tmp_path_factory.mktemp("converted")

    def convert(name: str) -> Path:
        if not (root / name).exists():
            dtype = "float32" if name == "lora" else None  # recorded with the merged weights in float32
            convert_checkpoint(GOLDENS / name / CHECKPOINTS[name], root / name, dtype=dtype, verify=True)
        return root / name

    return convert


@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_converted_checkpoint_answers_as_the_original(converted, name):
    recording = Recording(name)
    model, info = AutoModelForMultimodalLM.from_pretrained(
        converted(name), dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    model.eval()
    logits = generated = 0
    for case, content in recording.manifest["cases"].items():
        if f"{case}.logits" in recording.outputs and "removed" not in case:
            inputs = recording.model_inputs(case, model.config)
            if name == "lora":
                # Its weights magnify rounding: the recording lies 5e-4 from float64, and this model 3e-4, because the
                # features differ by 7e-6. So the features are compared, and the rest runs from the recorded ones.
                inputs = give_recorded_features(model, recording, inputs)
            with torch.no_grad():
                outputs = model(**inputs)
            tail = slice(-content["logits_tail"] if content.get("logits_tail") else None, None)
            valid = inputs["attention_mask"].bool()[:, tail]
            expected = recording.outputs[f"{case}.logits"]
            torch.testing.assert_close(outputs.logits[:, tail][valid], expected[valid], atol=1e-4, rtol=0)
            if f"{case}.loss" in recording.outputs:
                expected = recording.outputs[f"{case}.loss"]
                torch.testing.assert_close(outputs.loss.reshape(1), expected, atol=1e-5, rtol=0)
            logits += 1
        if f"{case}.generated_ids" in recording.outputs:
            inputs = recording.model_inputs(case, model.config, with_labels=False)
            ids = model.generate(**inputs, max_new_tokens=16, do_sample=False, repetition_penalty=1.0)
            expected = recording.outputs[f"{case}.generated_ids"].long()
            assert torch.equal(ids[:, inputs["input_ids"].shape[1] :][:, : expected.shape[1]], expected)
            generated += 1
    assert logits >= 2 and generated >= 1


def give_recorded_features(model, recording, inputs):
    """The same inputs with the recorded features in place of the media, after a comparison."""
    modality, medium = ("video", "video_a") if "pixel_values_videos" in inputs else ("image", "image")
    pixels = inputs.pop("pixel_values_videos" if modality == "video" else "pixel_values")
    with torch.no_grad():  # in float64, from which the recording lies 7e-6; another rounding may add to that
        features = getattr(model.double(), f"get_{modality}_features")(pixels.double())
    model.float()
    expected = recording.outputs[f"{medium}.connector"]
    torch.testing.assert_close(features.pooler_output, expected.double(), atol=1e-5, rtol=0)
    features.pooler_output = expected
    return {**inputs, "mm_encoder_outputs": {modality: features}}


def test_merged_weights_are_those_of_the_original(converted):
    recording, merged = Recording("lora"), load_file(converted("lora") / "model.safetensors")
    names = [name for name in recording.outputs if name.startswith("merged.")]
    for name in names:
        expected = recording.outputs[name]
        torch.testing.assert_close(merged[f"model.{name[7:]}.weight"], expected, atol=1e-6, rtol=0)
    assert len(names) == 2


def assert_same_files(folder: Path, source: Path) -> None:
    before, after = contents(source), contents(folder)
    tower_weights = {key for key in before if key.startswith("vision/") and key.endswith(".safetensors")}
    assert set(after) == set(before) - tower_weights  # the tower's repository is not part of the checkpoint
    for key in after:
        assert after[key] == before[key], key


@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_the_way_back_gives_the_same_files(converted, tmp_path, name):
    folder, source = converted(name), GOLDENS / name / CHECKPOINTS[name]
    if name == "lora":
        folder = tmp_path / "bfloat16"
        convert_checkpoint(source, folder)
    restore_original(folder, tmp_path / "back")
    assert_same_files(tmp_path / "back", source)


@pytest.mark.parametrize("name", ["qwen2_siglip_beats_av", "base_projector_only", "lora"])
def test_a_trained_model_becomes_a_full_original(converted, tmp_path, name):
    """With every copy of BEATs' table, and not under a configuration that asks for a base."""
    model = AutoModelForMultimodalLM.from_pretrained(converted(name), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "trained")
    restore_original(tmp_path / "trained", tmp_path / "original", original=converted(name), max_shard_size=300_000)
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    assert config["model_type"].startswith("videollama2_") and not config["tune_mm_mlp_adapter"]
    tables = [key for key in read_folder(tmp_path / "original") if "relative_attention_bias" in key]
    assert len(tables) == (2 if "av" in name else 0)
    if name == "qwen2_siglip_beats_av":
        for path in (GOLDENS / name / "checkpoint").glob("*.safetensors"):
            assert (tmp_path / "original" / path.name).is_file()
    AutoProcessor.from_pretrained(tmp_path / "original")
    restored, info = AutoModelForMultimodalLM.from_pretrained(
        tmp_path / "original", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    for key, value in restored.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_a_tower_from_elsewhere_comes_back_trained(tmp_path):
    """The checkpoint's own files have no place for it, and it must not be lost; nor is BEATs' file one of them."""
    source = GOLDENS / "qwen2_siglip_beats_av"
    deaf = tmp_path / "deaf"
    shutil.copytree(source / "checkpoint", deaf, ignore=shutil.ignore_patterns("model*"))
    tensors = {name: tensor.load() for name, tensor in read_folder(source / "checkpoint").items()}
    kept = {name: tensor for name, tensor in tensors.items() if "audio_tower" not in name}
    save_file(kept, deaf / "model.safetensors")
    shutil.copy(source / "BEATs_tiny.pt", deaf)
    convert_checkpoint(deaf, tmp_path / "converted", audio_tower=deaf / "BEATs_tiny.pt")
    restore_original(tmp_path / "converted", tmp_path / "back")
    assert set(read_folder(tmp_path / "back")) == set(kept) and not (tmp_path / "back" / "BEATs_tiny.pt").exists()
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "trained")
    restore_original(tmp_path / "trained", tmp_path / "original", original=tmp_path / "converted")
    convert_checkpoint(tmp_path / "original", tmp_path / "again")
    expected, found = read_folder(tmp_path / "trained"), read_folder(tmp_path / "again")
    assert set(found) == set(read_folder(tmp_path / "converted"))
    for name, tensor in expected.items():
        assert tensor.equals(found[complete_name(name)]), name


def test_a_full_original_has_no_index_of_other_files(tmp_path):
    """The base's index is among the small files that are kept."""
    lora = GOLDENS / "lora"
    shutil.copytree(lora / "base_llm_mistral", tmp_path / "base")
    (tmp_path / "base" / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    convert_checkpoint(lora / "checkpoint-lora", tmp_path / "merged", base=tmp_path / "base")
    restore_original(tmp_path / "merged", tmp_path / "full", full=True)
    assert not list((tmp_path / "full").glob("*.index.json"))


def test_two_names_of_one_tensor_must_agree(tmp_path):
    """transformers write the vision tower under two names; of two values in one checkpoint none is the right one."""
    checkpoint = shutil.copytree(GOLDENS / "mistral_clip_stp" / "checkpoint", tmp_path / "checkpoint")
    name = "model.vision_tower.vision_tower.vision_model.post_layernorm.weight"
    stored = read_folder(checkpoint)[name]
    tensors = load_file(stored.file)
    tensors[name.replace("vision_model.", "")] = tensors[name].clone()
    save_file(tensors, stored.file, metadata={"format": "pt"})
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        weight_map[name.replace("vision_model.", "")] = stored.file.name
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert len(build_plan(open_source(checkpoint)).left_out) == 1
    tensors[name.replace("vision_model.", "")] += 1
    save_file(tensors, stored.file, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match="but differ"):
        build_plan(open_source(checkpoint))


def test_trained_model_of_unknown_origin(converted, tmp_path):
    model = AutoModelForMultimodalLM.from_pretrained(converted("lora"))
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ConversionError, match="--original PATH"):
        restore_original(tmp_path / "trained", tmp_path / "original")
    assert not (tmp_path / "original").exists()


@pytest.mark.parametrize(
    ("vision", "connector_type"), [("siglip_vision_model", "stc_connector_v35"), ("clip_vision_model", "linear")]
)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_language_model_there_and_back(tmp_path, family, vision, connector_type):
    model = make_model(
        family,
        vision=vision,
        connector_type=connector_type,
        connector_depth=4,
        hears=vision == "siglip_vision_model",
        text_config={"vocab_size": 400, "tie_word_embeddings": family == "gemma2"},
        image_token_id=400,
        video_token_id=401,
        audio_token_id=402,
    )
    assert_there_and_back(model, tmp_path, "qwen2" if family == "qwen2" else "llama")


@pytest.mark.parametrize("connector_type", get_args(ConnectorType)[:-1])  # the last one is Video-LLaVA's
def test_every_connector_there_and_back(tmp_path, connector_type):
    model = make_model(
        "mistral",
        vision="clip_vision_model",
        connector_type=connector_type,
        connector_depth=4,
        hears=False,
        # Some connectors need the tower's width, which is 24.
        text_config={"vocab_size": 400, "hidden_size": 24, "num_key_value_heads": 4},
        image_token_id=400,
        video_token_id=401,
        audio_token_id=402,
    )
    assert_there_and_back(model, tmp_path, "llama")


def assert_there_and_back(model, folder, tokenizer):
    """A checkpoint of the original's layout becomes one with the model's weights and its logits, and then itself."""
    write_original(model, folder / "original", tokenizer)
    convert_checkpoint(folder / "original", folder / "model")
    loaded, info = AutoModelForMultimodalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    batch = collate([row("video t", model.config), row("t image t", model.config)])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)
    restore_original(folder / "model", folder / "back")
    assert_same_files(folder / "back", folder / "original")


def test_cast_to_another_dtype(tmp_path):
    convert_checkpoint(GOLDENS / "mistral_clip_stp" / "checkpoint", tmp_path / "model", dtype="float16")
    tensors = read_folder(tmp_path / "model")
    assert {tensor.dtype for tensor in tensors.values()} == {"F16"}
    assert AutoModelForMultimodalLM.from_pretrained(tmp_path / "model").dtype == torch.float16


def test_sound_beside_the_weights(tmp_path):
    """The original's audio weights in files of their own: taken where the checkpoint itself has none."""
    source = GOLDENS / "qwen2_siglip_beats_av"
    silent = tmp_path / "silent"
    shutil.copytree(source / "checkpoint", silent, ignore=shutil.ignore_patterns("model*"))
    tensors = {name: tensor.load() for name, tensor in read_folder(source / "checkpoint").items()}
    audio = {name for name in tensors if "audio_tower" in name or "mm_projector_a" in name}
    save_file({name: tensor for name, tensor in tensors.items() if name not in audio}, silent / "model.safetensors")
    with pytest.raises(ConversionError, match="--audio-tower FILE"):
        convert_checkpoint(silent, tmp_path / "no")
    shutil.copy(source / "mm_projector_a.bin", silent)
    convert_checkpoint(silent, tmp_path / "microsoft", audio_tower=source / "BEATs_tiny.pt")
    shutil.copy(source / "audio_tower.bin", silent)
    convert_checkpoint(silent, tmp_path / "beside")
    expected = read_folder(source / "checkpoint")
    for folder in ("microsoft", "beside"):
        for name, tensor in read_folder(tmp_path / folder).items():
            if folder == "microsoft" and "audio_tower" in name:  # float32 there
                assert torch.equal(tensor.load().bfloat16(), expected[name].load()), name
            else:
                assert tensor.equals(expected[name]), name
    config = AutoConfig.from_pretrained(tmp_path / "microsoft")
    assert config.audio_config.to_dict() == AutoConfig.from_pretrained(source / "checkpoint").audio_config.to_dict()
    restore_original(tmp_path / "beside", tmp_path / "back")
    assert_same_files(tmp_path / "back", silent)


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name != "lora"])
def test_every_tensor_is_the_source_byte_for_byte(converted, name):
    target = read_folder(converted(name))
    plan = build_plan(open_source(GOLDENS / name / CHECKPOINTS[name]))
    assert set(target) == {tensor.target for tensor in plan.tensors}
    for tensor in plan.tensors:
        assert tensor.source.equals(target[tensor.target]), tensor.target


def test_only_what_belongs_to_the_model_is_kept_of_the_source(tmp_path):
    """`original/` is published with the model: no logs, data or nested checkpoints."""
    source = tmp_path / "source"
    shutil.copytree(GOLDENS / "mistral_clip_stp" / "checkpoint", source)
    (source / "checkpoint-100").mkdir()
    for name in ("trainer_state.json", "train.log", "clip.mp4", "checkpoint-100/config.json", ".netrc.json"):
        (source / name).write_text("{}")
    convert_checkpoint(source, tmp_path / "model")
    kept = {
        str(path.relative_to(tmp_path / "model" / "original")) for path in (tmp_path / "model").rglob("original/**/*")
    }
    assert not {
        name
        for name in kept
        if "checkpoint-100" in name or name.endswith((".log", ".mp4", "state.json", "netrc.json"))
    }
    assert "config.json" in kept and "tokenizer.model" in kept


@pytest.mark.parametrize(
    ("files", "skipped"),
    [
        (["model-00001-of-00002.safetensors", "pytorch_model.bin", "consolidated.safetensors"], True),
        (["pytorch_model-00001-of-00002.bin", "adapter_model.safetensors"], False),
    ],
)
def test_weights_are_downloaded_once(monkeypatch, tmp_path, files, skipped):
    """Repositories often hold the same weights in two formats."""
    asked: dict = {}

    def snapshot_download(name, **kwargs):
        asked.update(kwargs)
        return str(tmp_path)

    monkeypatch.setattr("videollama2_hf.conversion.sources.HfApi.list_repo_files", lambda self, *args, **kwargs: files)
    monkeypatch.setattr("videollama2_hf.conversion.sources.snapshot_download", snapshot_download)
    assert fetch("owner/name") == tmp_path
    assert ("pytorch_model*" in asked["ignore_patterns"]) == skipped and "consolidated*" in asked["ignore_patterns"]


def test_parts_that_are_not_there_are_noted(tmp_path):
    """An adapter alone, over a base that is whole; and weights beside it, which count for nothing."""
    convert_checkpoint(GOLDENS / "lora" / "checkpoint-lora", tmp_path / "base")
    adapter = tmp_path / "adapter-lora"
    shutil.copytree(GOLDENS / "lora" / "checkpoint-lora", adapter)
    (adapter / "non_lora_trainables.bin").unlink()
    shutil.copy(tmp_path / "base" / "model.safetensors", adapter)
    plan = convert_checkpoint(adapter, None, base=tmp_path / "base", dry_run=True)
    assert any("connectors and towers are the base's" in note for note in plan.source.notes)
    assert any("whole weights beside the adapter" in note for note in plan.source.notes)
