"""Checkpoints in the original's layout that no recording covers: the other language models, connectors and towers."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

from golden_utils import GOLDENS
from test_modeling import collate, row
from tiny_models import FAMILIES, make_model


CLIP = GOLDENS / "processing_av" / "av_3s.mp4"
TOKENIZERS = GOLDENS / "processing" / "tokenizers"


def write_original(model, folder, tokenizer: str) -> None:
    """What the original writes: a flat `config.json`, the weights, the tokenizer, and a tower that it only names."""
    model.save_pretrained(folder)
    for path in folder.glob("*.py"):
        path.unlink()
    config = model.config
    tower = "siglip-tiny" if config.vision_config.model_type == "siglip_vision_model" else "clip-vit-tiny"
    flat = config.text_config.to_dict() | {
        "model_type": f"videollama2_{config.text_config.model_type}",
        "architectures": [f"Videollama2{config.text_config.model_type.title()}ForCausalLM"],
        "mm_vision_tower": f"vision/{tower}",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": config.connector_type,
        "num_frames": config.num_frames,
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }
    if config.audio_config is not None:
        flat |= {"mm_audio_tower": "audio_tower.bin", "mm_projector_a_type": "mlp2x_gelu", "hidden_size_a": 4096}
    (folder / "config.json").write_text(json.dumps(flat))
    (folder / "vision" / tower).mkdir(parents=True)
    (folder / "vision" / tower / "config.json").write_text(config.vision_config.to_json_string())
    size = config.vision_config.image_size
    preprocessor = (
        {"size": {"height": size, "width": size}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        if "siglip" in tower
        else {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    )
    (folder / "vision" / tower / "preprocessor_config.json").write_text(json.dumps(preprocessor | {"resample": 3}))
    for path in (TOKENIZERS / tokenizer).iterdir():
        shutil.copy(path, folder / path.name)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(
    ("vision", "connector_type", "num_frames", "hears"),
    [
        ("siglip_vision_model", "stc_connector_v35", 16, True),
        ("clip_vision_model", "stc_connector", 4, False),
        ("clip_vision_model", "linear", 3, False),
    ],
)
def test_checkpoint_in_the_original_layout(tmp_path, family, vision, connector_type, num_frames, hears):
    text = {"vocab_size": 400, "max_position_embeddings": 4096, "tie_word_embeddings": family == "gemma2"}
    model = make_model(
        family,
        vision=vision,
        connector_type=connector_type,
        connector_depth=4,  # what the original has in code
        num_frames=num_frames,
        hears=hears,
        text_config=text,
        image_token_id=400,
        video_token_id=401,
        audio_token_id=402,
    )
    write_original(model, tmp_path, "qwen2" if family == "qwen2" else "llama")
    loaded, info = AutoModelForMultimodalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    loaded.eval()
    assert loaded.config.num_frames == num_frames and (loaded.config.audio_config is not None) == hears

    rows = [row("image t", model.config), row("t audio t" if hears else "t", model.config)]
    batch = collate(rows)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)

    processor = AutoProcessor.from_pretrained(tmp_path)
    content = [{"type": "video", "video": str(CLIP)}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert inputs["pixel_values_videos"].shape[1] == num_frames and ("input_features" in inputs) == hears
    with torch.no_grad():
        assert torch.isfinite(loaded(**inputs, logits_to_keep=1).logits).all()
