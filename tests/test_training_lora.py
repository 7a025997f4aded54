"""LoRA: adapters only in the language model; trained, saved, loaded, merged; what QLoRA would quantise."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForMultimodalLM, AutoProcessor
from transformers.quantizers.quantizers_utils import should_convert_module

from golden_utils import GOLDENS
from test_modeling import collate, row
from tiny_models import FAMILIES, make_model
from training_utils import make_folder
from videollama2_hf.training import (
    add_lora,
    get_lora_config,
    get_lora_target_modules,
    get_quantization_config,
    merge_adapter,
)
from videollama2_hf.training.lora import get_lora_target_names


def recorded_names(folder: str) -> set[str]:
    return set(json.loads((GOLDENS / folder / "manifest.json").read_text())["find_all_linear_names"])


def make_batch(config):
    rows = [row(spec, config) for spec in ("image t", "video audio t", "audio t t")]
    batch = collate(rows, "right")
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def train_adapter(model, steps: int = 2, **options):
    torch.manual_seed(0)
    lora_config = get_lora_config(model, r=4, lora_alpha=8, lora_dropout=0.0, **options)
    adapted = add_lora(model, lora_config).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(steps):
        adapted(**make_batch(model.config)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


@torch.no_grad()
def logits_of(model, batch):
    return model.eval()(**batch).logits


def test_targets_are_the_originals_without_the_towers():
    """On the audio-visual branch the original's names are those of BEATs too, and hit the vision tower."""
    assert set(get_lora_target_names(make_model("mistral", hears=False))) == recorded_names("training")
    of_towers = {"fc1", "fc2", "grep_linear", "out_proj", "post_extract_proj", "predictor"}
    assert set(get_lora_target_names(make_model("qwen2"))) == recorded_names("training_av") - of_towers
    assert get_lora_target_names(make_model("phi3")) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    with pytest.raises(ValueError, match="Linear has no linear layer inside a `language_model`"):
        get_lora_target_modules(nn.Linear(2, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_train_save_load_and_merge(family, tmp_path):
    base = make_model(family)
    batch = make_batch(base.config)
    base.save_pretrained(tmp_path / "base")
    untrained = logits_of(base, batch)
    # BEATs trained whole beside the adapters, as in the joint stage.
    parts = ["mm_projector", "mm_projector_a", "audio_tower"]
    adapted = train_adapter(base, modules_to_save=parts if family == "qwen2" else None)
    adapters = {name for name, _ in adapted.named_modules() if name.endswith(".lora_A")}
    assert adapters and all(".language_model." in name for name in adapters)
    trained = logits_of(adapted, batch)
    assert (trained - untrained).abs().max() > 1e-3

    adapted.save_pretrained(tmp_path / "adapter")
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert any(".mm_projector_a." in name for name in names) and not any("vision_tower" in name for name in names)
    assert any(".audio_tower." in name for name in names) == (family == "qwen2")
    loaded = PeftModel.from_pretrained(
        AutoModelForMultimodalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert torch.equal(logits_of(loaded, batch), trained)

    merged = loaded.merge_and_unload()
    scale = max(1.0, float(trained.abs().max()))
    assert (logits_of(merged, batch) - trained).abs().max() < 1e-5 * scale
    merged.save_pretrained(tmp_path / "merged")
    model, info = AutoModelForMultimodalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits_of(model, batch), logits_of(merged, batch))


def test_merged_folder_from_an_adapter_folder(tmp_path):
    base = AutoModelForMultimodalLM.from_pretrained(make_folder(tmp_path / "base"))
    batch = make_batch(base.config)
    adapted = train_adapter(base)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits_of(adapted, batch)
    # Adapter folders load by themselves too, where PEFT is installed.
    assert torch.equal(logits_of(AutoModelForMultimodalLM.from_pretrained(tmp_path / "adapter"), batch), expected)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForMultimodalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged, "peft_config") and "lora" not in " ".join(merged.state_dict())
    assert (logits_of(merged, batch) - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    assert AutoProcessor.from_pretrained(tmp_path / "merged").has_audio
    with pytest.raises(FileNotFoundError, match="holds no adapter_config.json"):
        merge_adapter(tmp_path / "base", tmp_path / "again")


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_quantises_the_language_model_alone(bits):
    quantization = get_quantization_config(bits)
    model = make_model("qwen2")
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    converted = {name for name in linear if should_convert_module(name, quantization.llm_int8_skip_modules)}
    assert converted == {name for name in linear if ".language_model." in name}
    assert quantization.load_in_4bit == (bits == 4) and quantization.load_in_8bit == (bits == 8)
    if bits == 4:
        assert quantization.bnb_4bit_quant_type == "nf4" and quantization.bnb_4bit_use_double_quant
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        get_quantization_config(3)
