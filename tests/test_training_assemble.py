"""Models of parts: every part keeps its weights, the connectors are new, and the whole saves and loads."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

from golden_utils import GOLDENS
from training_utils import make_folder
from videollama2_hf.training import add_audio_tower, assemble_model


BASE = GOLDENS / "base_projector_only"


def test_a_language_model_and_a_vision_tower(tmp_path):
    llm, tower = BASE / "base_llm_mistral", BASE / "checkpoint" / "vision" / "clip-vit-tiny-patch14-56"
    model, processor = assemble_model(llm, tower, "stc_connector", num_frames=8)
    bare = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, bare.eval()(input_ids=ids).logits)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, info = AutoModelForMultimodalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert AutoProcessor.from_pretrained(tmp_path).image_num_frames == 8


def test_a_model_that_sees_learns_to_hear(tmp_path):
    seeing = AutoModelForMultimodalLM.from_pretrained(make_folder(tmp_path / "model", hears=False))
    heard = AutoModelForMultimodalLM.from_pretrained(make_folder(tmp_path / "heard"))
    tower, sizes = heard.model.audio_tower, heard.config.audio_config
    cfg = {
        "embed_dim": sizes.embed_dim,
        "encoder_embed_dim": sizes.hidden_size,
        "encoder_ffn_embed_dim": sizes.intermediate_size,
        "encoder_layers": sizes.num_hidden_layers,
        "encoder_attention_heads": sizes.num_attention_heads,
        "conv_pos": sizes.conv_pos,
        "conv_pos_groups": sizes.conv_pos_groups,
    }
    tower.save_pretrained(tmp_path / "tower")
    original_names = {
        name.replace("pos_conv.0.g", "pos_conv.0.weight_g").replace("pos_conv.0.v", "pos_conv.0.weight_v"): value
        for name, value in tower.state_dict().items()
    }
    torch.save({"cfg": cfg, "model": original_names}, tmp_path / "beats.pt")
    model, processor = add_audio_tower(tmp_path / "model", tmp_path / "beats.pt")
    for name, value in tower.state_dict().items():
        assert torch.equal(model.model.audio_tower.state_dict()[name], value), name
    for name, value in seeing.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert processor.has_audio and model.model.mm_projector_a is not None
    torch.save({}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no file of BEATs"):
        add_audio_tower(tmp_path / "model", tmp_path / "other.pt")
