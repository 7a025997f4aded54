"""Conversion of Video-LLaVA: the original's checkpoints and transformers' port, against the original's recordings."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM, VideoLlavaConfig, VideoLlavaForConditionalGeneration

from test_conversion import contents
from test_video_llava import CHECKPOINT, GOLDENS, MANIFEST, RECORDED, row_inputs
from videollama2_hf import VideoLlama2Processor
from videollama2_hf.conversion import ConversionError, build_plan, convert_checkpoint, open_source, restore_original
from videollama2_hf.conversion.tensors import read_folder


LANGUAGEBIND = GOLDENS / "LanguageBind"
IMAGE_TOWER, VIDEO_TOWER = LANGUAGEBIND / "LanguageBind_Image", LANGUAGEBIND / "LanguageBind_Video_merge"
TOWERS = {"vision_tower": IMAGE_TOWER, "video_tower": VIDEO_TOWER}
VOCABULARY = MANIFEST["config"]["vocab_size"]
RANDOM_ROWS = 4


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def load(folder: Path):
    model, info = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def assert_answers_as_the_original(folder: Path):
    model = load(folder)
    for row, content in MANIFEST["rows"].items():
        inputs, expected = row_inputs(row, model.config), RECORDED[f"rows.{row}.logits"]
        with torch.no_grad():
            logits = model(**inputs).logits
        torch.testing.assert_close(logits[:, -expected.shape[1] :], expected, atol=1e-4, rtol=0)
        generated = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        assert generated[0, inputs["input_ids"].shape[1] :].tolist() == content["greedy"]


def write_checkpoint_parts(root: Path) -> tuple[Path, Path]:
    """The recorded checkpoint's language model as a base by itself, and the projector as stage 1 leaves it."""
    base, projector = root / "tiny-vicuna", root / "video-llava-projector"
    for folder in (base, projector):
        folder.mkdir()
    weights = torch.load(CHECKPOINT / "pytorch_model.bin", weights_only=True)
    language_model = {name: value for name, value in weights.items() if "_tower" not in name and "mm_" not in name}
    torch.save(language_model, base / "pytorch_model.bin")
    torch.save({name: weights[name] for name in weights if "mm_projector" in name}, projector / "mm_projector.bin")
    config = json.loads((CHECKPOINT / "config.json").read_text())
    text_config = {name: value for name, value in config.items() if "mm_" not in name} | {"model_type": "llama"}
    (base / "config.json").write_text(json.dumps(text_config))
    (projector / "config.json").write_text(json.dumps(config | {"_name_or_path": "tiny-vicuna"}))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copyfile(CHECKPOINT / name, base / name)
    shutil.copytree(LANGUAGEBIND, root / "LanguageBind")
    return base, projector


def write_port(folder: Path, layout: str = "released") -> VideoLlavaForConditionalGeneration:
    """
    What transformers' conversion script makes of the recorded checkpoint: no attention over time, quick_gelu, tokens
    and random rows added behind the vocabulary.
    """
    weights = torch.load(CHECKPOINT / "pytorch_model.bin", weights_only=True)
    original = json.loads((CHECKPOINT / "config.json").read_text())
    vision = json.loads((IMAGE_TOWER / "config.json").read_text())["vision_config"]
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    )
    text_names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = {name: original[name] for name in (*text_names, "num_key_value_heads", "max_position_embeddings")}
    config = VideoLlavaConfig(
        text_config=text
        | {"model_type": "llama", "vocab_size": VOCABULARY + RANDOM_ROWS, "rms_norm_eps": original["rms_norm_eps"]},
        vision_config={name: vision[name] for name in names} | {"model_type": "clip_vision_model"},
        image_token_index=VOCABULARY,
        video_token_index=VOCABULARY + 1,
        image_seq_length=4,
        video_seq_length=40,
    )
    native = VideoLlavaForConditionalGeneration(config).eval()
    state, generator = {}, torch.Generator().manual_seed(0)
    for name, value in weights.items():
        name = name.replace("model.image_tower.image_tower.", "model.image_tower.")
        name = name.replace("model.video_tower.video_tower.", "model.video_tower.")
        name = name.replace("model.mm_projector.0.", "model.multi_modal_projector.linear_1.")
        name = name.replace("model.mm_projector.2.", "model.multi_modal_projector.linear_2.")
        for part in ("embed_tokens", "layers", "norm"):
            name = name.replace(f"model.{part}.", f"model.language_model.{part}.") if f"model.{part}" in name else name
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            value = torch.cat([value, torch.randn(RANDOM_ROWS, value.shape[1], generator=generator)])
        state[name] = value
    info = native.load_state_dict(state, strict=False)
    assert not info.missing_keys and all("temporal" in key or "inv_freq" in key for key in info.unexpected_keys)
    native.generation_config.pad_token_id = VOCABULARY + 2
    if layout == "saved":  # as the installed version writes it, in several files
        native.save_pretrained(folder, max_shard_size="200KB")
    else:
        native.save_pretrained(folder)
        _rename(folder, layout, native)
    _write_port_tokenizer(folder)
    return native


def _rename(folder: Path, layout: str, native: VideoLlavaForConditionalGeneration):
    saved = load_file(folder / "model.safetensors")
    if layout == "released":  # "vision_model." in front of the towers' keys, as transformers 4 wrote them
        saved = {
            name.replace("_tower.", "_tower.vision_model.") if "vision_model" not in name else name: value
            for name, value in saved.items()
        }
    else:  # the names of the modules themselves
        saved = dict(native.state_dict())
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})


def _write_port_tokenizer(folder: Path):
    tokenizer = VideoLlama2Processor.from_pretrained(CHECKPOINT).tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] != "<audio>"]
    template = backend["added_tokens"][-1]
    backend["added_tokens"].append(template | {"id": VOCABULARY + 2, "content": "<pad>"})
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings |= {"tokenizer_class": "LlamaTokenizer", "model_max_length": 2048, "padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("video_llava") / "converted"
    convert_checkpoint(CHECKPOINT, folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Path, Path]:
    return write_checkpoint_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> tuple[VideoLlavaForConditionalGeneration, Path]:
    folder = tmp_path_factory.mktemp("port") / "video-llava-hf"
    return write_port(folder), folder


def test_original_answers_as_recorded(converted):
    assert_answers_as_the_original(converted)


def test_every_tensor_is_the_original_byte_for_byte(converted):
    plan, target = build_plan(open_source(CHECKPOINT)), read_folder(converted)
    assert {tensor.target for tensor in plan.tensors} == set(target)
    assert all(tensor.source.equals(target[tensor.target]) for tensor in plan.tensors)
    assert {item.source.name.rsplit(".", 1)[1] for item in plan.left_out} == {"inv_freq"}


def test_processor_is_that_of_the_original(converted):
    expected, processor = (VideoLlama2Processor.from_pretrained(folder) for folder in (CHECKPOINT, converted))
    for name in ("image_processor", "video_processor", "feature_extractor"):
        settings, saved = getattr(expected, name).to_dict(), getattr(processor, name).to_dict()
        assert {key: saved.get(key) for key in settings} == settings
    assert processor.chat_template == expected.chat_template
    text = "  A man\twalks.\n\n<s> 猫 \U0001f408 def f(x):\n    return x"
    assert processor.tokenizer(text)["input_ids"] == expected.tokenizer(text)["input_ids"]


def test_the_way_back_gives_the_same_files(converted, tmp_path):
    restore_original(converted, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(CHECKPOINT)


def test_a_model_that_was_saved_again_goes_back(converted, tmp_path):
    model = load(converted)
    model.save_pretrained(tmp_path / "trained")
    restore_original(tmp_path / "trained", tmp_path / "back", original=converted)
    assert contents(tmp_path / "back") == contents(CHECKPOINT)


def test_safetensors_go_back_too(tmp_path):
    weights = torch.load(CHECKPOINT / "pytorch_model.bin", weights_only=True)
    shutil.copytree(CHECKPOINT, tmp_path / "source", ignore=shutil.ignore_patterns("*.bin"))
    save_file(weights, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(tmp_path / "source", tmp_path / "converted", **TOWERS)
    restore_original(tmp_path / "converted", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "source")


def test_towers_that_differ_from_their_repository_are_chosen_and_noted(tmp_path):
    shutil.copytree(LANGUAGEBIND, tmp_path / "LanguageBind")
    shutil.copytree(CHECKPOINT, tmp_path / "video-llava")
    other = tmp_path / "LanguageBind" / "LanguageBind_Image" / "pytorch_model.bin"
    weights = torch.load(other, weights_only=True)
    name = "vision_model.pre_layrnorm.weight"
    torch.save(weights | {name: weights[name] + 0.5}, other)
    embedded = build_plan(open_source(tmp_path / "video-llava"))
    chosen = {tensor.target: tensor.source.file for tensor in embedded.tensors}
    target = "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight"
    assert chosen[target].parent.name == "video-llava"
    assert len(embedded.source.notes) == 1 and "different in 1 of" in embedded.source.notes[0]
    assert f"--vision-tower {other.parent}" in embedded.source.notes[0]
    given = build_plan(open_source(tmp_path / "video-llava", vision_tower=other.parent))
    chosen = {tensor.target: tensor.source.file for tensor in given.tensors}
    assert chosen[target] == other and "as the original code loads it" in given.source.notes[0]
    replaced = [item for item in given.left_out if item.reason.startswith("replaced by")]
    assert [item.source.name for item in replaced] == ["model.image_tower.image_tower.pre_layrnorm.weight"]
    assert {"the text half of the tower's repository"} <= {item.reason for item in given.left_out}
    # What was replaced is kept for the way back.
    convert_checkpoint(tmp_path / "video-llava", tmp_path / "converted", vision_tower=other.parent)
    restore_original(tmp_path / "converted", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "video-llava")


def test_towers_rounded_to_another_dtype_are_called_so(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "half", ignore=shutil.ignore_patterns("*.bin"))
    weights = torch.load(CHECKPOINT / "pytorch_model.bin", weights_only=True)
    torch.save({name: value.bfloat16() for name, value in weights.items()}, tmp_path / "half" / "pytorch_model.bin")
    notes = open_source(tmp_path / "half", **TOWERS).notes
    assert len(notes) == 2 and all("equal, but for rounding to another dtype" in note for note in notes)


def test_projector_over_its_base_answers_as_recorded(parts, tmp_path):
    base, projector = parts
    plan = convert_checkpoint(projector, tmp_path / "converted")
    assert plan.source.kind == "projector"
    assert_answers_as_the_original(tmp_path / "converted")
    restore_original(tmp_path / "converted", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(projector)
    # As a full checkpoint it has the original's names, towers included.
    restore_original(tmp_path / "converted", tmp_path / "full", full=True)
    weights = read_folder(tmp_path / "full")
    for name, value in torch.load(CHECKPOINT / "pytorch_model.bin", weights_only=True).items():
        assert name.endswith("inv_freq") or torch.equal(weights[name].load(), value), name


def test_lora_is_merged_in_the_language_model_only(parts, tmp_path):
    base, projector = parts
    folder, generator = tmp_path / "video-llava-lora", torch.Generator().manual_seed(0)
    folder.mkdir()
    shutil.copyfile(projector / "config.json", folder / "config.json")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    # `find_all_linear_names` of the original does not leave the towers out; they do not train, so B stays 0.
    language, vision = (
        "model.layers.0.self_attn.q_proj",
        "model.image_tower.image_tower.encoder.layers.0.self_attn.q_proj",
    )
    factors = {}
    for module, width, scale in ((language, 48, 1.0), (vision, 32, 0.0)):
        factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, width, generator=generator)
        factors[f"base_model.model.{module}.lora_B.weight"] = scale * torch.randn(width, 2, generator=generator)
    torch.save(factors, folder / "adapter_model.bin")
    weights = torch.load(CHECKPOINT / "pytorch_model.bin", weights_only=True)
    projector_weights = {name: value for name, value in weights.items() if "mm_projector" in name}
    changed = {f"base_model.model.{name}": value + 0.25 for name, value in projector_weights.items()}
    torch.save(changed, folder / "non_lora_trainables.bin")

    plan = convert_checkpoint(folder, tmp_path / "converted", base=base, **TOWERS)
    assert any("LoRA points at 1 weights of the towers" in note for note in plan.source.notes)
    result = load_file(tmp_path / "converted" / "model.safetensors")
    factor_a, factor_b = (factors[f"base_model.model.{language}.lora_{letter}.weight"] for letter in "AB")
    merged = weights[f"{language}.weight"] + 2.0 * factor_b @ factor_a
    torch.testing.assert_close(result[f"{language}.weight"], merged, atol=1e-6, rtol=0)
    for name, value in projector_weights.items():
        assert torch.equal(result[name], value + 0.25)
    unchanged = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(result[unchanged], weights[unchanged])
    load(tmp_path / "converted")


def assert_answers_as_the_port(folder: Path, native: VideoLlavaForConditionalGeneration):
    model = load(folder)
    for row in ("image", "video", "text"):
        inputs = row_inputs(row, model.config)
        with torch.no_grad():
            ours = model(**inputs).logits
            inputs["pixel_values_images"] = inputs.pop("pixel_values", None)
            theirs = native(**inputs).logits[..., :VOCABULARY]
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


@pytest.mark.parametrize("layout", ["released", "saved", "5.x"])
def test_port_as_it_is(tmp_path, layout):
    native = write_port(tmp_path / "hf", layout)
    plan = convert_checkpoint(tmp_path / "hf", tmp_path / "converted")
    assert any("--video-tower" in note for note in plan.source.notes)
    config = plan.source.config
    assert config.vision_config.hidden_act == config.video_config.hidden_act == "quick_gelu"
    assert not config.video_config.add_time_attn and config.text_config.vocab_size == VOCABULARY
    assert_answers_as_the_port(tmp_path / "converted", native)
    restore_original(tmp_path / "converted", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1 or layout != "saved"


def test_port_repaired_answers_as_the_original(port, tmp_path):
    _, folder = port
    plan = convert_checkpoint(folder, tmp_path / "converted", video_tower=VIDEO_TOWER)
    config = plan.source.config
    assert config.vision_config.hidden_act == config.video_config.hidden_act == "gelu"
    assert config.video_config.add_time_attn and not config.vision_config.add_time_attn
    assert_answers_as_the_original(tmp_path / "converted")
    with pytest.raises(ConversionError, match="no way back"):
        restore_original(tmp_path / "converted", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    generation_config = json.loads((tmp_path / "converted" / "generation_config.json").read_text())
    assert generation_config["pad_token_id"] == 0  # <pad> was a row that is cut


def test_tokenizer_of_the_port_becomes_the_original_one(converted, port):
    expected = VideoLlama2Processor.from_pretrained(converted).tokenizer
    tokenizer = open_source(port[1]).tokenizer
    assert tokenizer.get_vocab() == expected.get_vocab()
    for text in ("Why is this video funny?", "  two  spaces\n    code()", "猫 \U0001f408", "<pad> is text"):
        assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert tokenizer.pad_token == expected.pad_token == "<unk>"


def test_wrong_towers_are_refused(port, parts, tmp_path):
    folder = port[1]
    with pytest.raises(ConversionError, match="is not LanguageBind's video tower .* but LanguageBind's image tower"):
        open_source(folder, video_tower=IMAGE_TOWER)
    with pytest.raises(ConversionError, match="model_type 'llava'"):
        open_source(folder, video_tower=CHECKPOINT)
    with pytest.raises(ConversionError, match="repaired with LanguageBind's video tower. Pass it too"):
        open_source(folder, vision_tower=IMAGE_TOWER)
    with pytest.raises(ConversionError, match="is not LanguageBind's image tower"):
        open_source(CHECKPOINT, vision_tower=VIDEO_TOWER)
    with pytest.raises(ConversionError, match="has no config.json"):
        open_source(CHECKPOINT, vision_tower=LANGUAGEBIND)
    shutil.copytree(VIDEO_TOWER, tmp_path / "another")
    weights = torch.load(VIDEO_TOWER / "pytorch_model.bin", weights_only=True)
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    torch.save(weights | {name: -weights[name]}, tmp_path / "another" / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="is not the video tower that .* was made with: .*layers.1.mlp.fc1"):
        open_source(folder, video_tower=tmp_path / "another")
    timeless = {name: value for name, value in weights.items() if "temporal" not in name}
    torch.save(timeless, tmp_path / "another" / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="has no attention over time"):
        open_source(folder, video_tower=tmp_path / "another")
    with pytest.raises(ConversionError, match=r"temporal_embedding is missing"):
        build_plan(open_source(parts[1], video_tower=tmp_path / "another"))


def test_what_is_missing_is_named(parts, tmp_path):
    base, projector = parts
    alone = tmp_path / "alone"
    shutil.copytree(projector, alone)
    with pytest.raises(ConversionError, match="holds only a projector and needs its base model.*--base PATH"):
        open_source(alone)
    with pytest.raises(ConversionError, match="do not hold the image tower 'LanguageBind/.*--vision-tower PATH"):
        open_source(alone, base=base)
    with pytest.raises(ConversionError, match="do not hold the video tower 'LanguageBind/.*--video-tower PATH"):
        open_source(alone, base=base, vision_tower=IMAGE_TOWER)
    shutil.copytree(CHECKPOINT, tmp_path / "full")
    with pytest.raises(ConversionError, match="not of the released size.*--vision-tower PATH"):
        open_source(tmp_path / "full")
    with pytest.raises(ConversionError, match="does not hear"):
        open_source(CHECKPOINT, audio_tower="BEATs.pt")
    qwen = GOLDENS.parent / "qwen2_siglip_stcv35_16f" / "checkpoint"
    with pytest.raises(ConversionError, match="has no --video-tower"):
        open_source(qwen, video_tower=VIDEO_TOWER)


def test_released_values_of_towers_whose_configuration_is_nowhere(tmp_path):
    """Header and holes of a file with the released towers; nothing of its 800 MB is read."""
    shutil.copytree(CHECKPOINT, tmp_path / "full", ignore=shutil.ignore_patterns("*.bin"))
    from videollama2_hf import LanguageBindVisionConfig
    from videollama2_hf.modeling_languagebind import LanguageBindVisionModel

    entries: dict[str, tuple[int, ...]] = {}
    for name, has_time in (("image", False), ("video", True)):
        with torch.device("meta"):
            tower = LanguageBindVisionModel(LanguageBindVisionConfig(add_time_attn=has_time))
        prefix = f"model.{name}_tower.{name}_tower."
        entries |= {prefix + key: tuple(value.shape) for key, value in tower.state_dict().items()}
    weights = torch.load(CHECKPOINT / "pytorch_model.bin", weights_only=True)
    entries |= {key: tuple(value.shape) for key, value in weights.items() if "_tower" not in key}
    entries["model.mm_projector.0.weight"] = (48, 1024)
    header, offset = {}, 0
    for key, shape in entries.items():
        size = 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    with open(tmp_path / "full" / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
    plan = build_plan(open_source(tmp_path / "full"))
    assert sum("released values" in note for note in plan.source.notes) == 2
    video, image = plan.source.config.video_config, plan.source.config.vision_config
    assert video.add_time_attn and not image.add_time_attn and video.hidden_act == image.hidden_act == "gelu"


def test_script(port, tmp_path, monkeypatch, capsys):
    script = Path(__file__).parents[1] / "conversion" / "convert_video_llava.py"

    def run(*arguments) -> int:
        monkeypatch.setattr("sys.argv", [str(script), str(port[1]), *map(str, arguments)])
        with pytest.raises(SystemExit) as result:
            runpy.run_path(str(script), run_name="__main__")
        return result.value.code

    assert run("--dry-run", "--video-tower", VIDEO_TOWER) == 0
    assert "temporal_embedding" in capsys.readouterr().out
    assert run("--output", tmp_path / "converted", "--video-tower", IMAGE_TOWER) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("Error: ") and "\n" not in message and "--video-tower PATH" in message
    assert not list(tmp_path.iterdir())
