"""The model card: facts from the checkpoint, the README's snippet, and numbers only for what was published."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from golden_utils import GOLDENS
from tiny_models import make_config
from videollama2_hf.conversion import build_plan, convert_checkpoint, open_source
from videollama2_hf.conversion.model_card import SNIPPET, model_card
from videollama2_hf.conversion.published import PUBLISHED, find_published


README = (Path(__file__).parents[1] / "README.md").read_text()
HEARING = GOLDENS / "qwen2_siglip_beats_av" / "checkpoint"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    return convert_checkpoint(HEARING, folder), folder


def full_size(published, **kwargs):
    sizes = {"hidden_size": published.hidden_size, "num_hidden_layers": published.num_layers, "head_dim": 128}
    return make_config("llama", hears=published.hears, num_frames=published.num_frames, text_config=sizes, **kwargs)


def test_metadata_and_parts(converted):
    card = ModelCard.load(converted[1] / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "video-text-to-text" and card.data.language == "en"
    assert card.data.tags == ["videollama2", "video", "image", "audio", "multimodal"]
    rows = dict(re.findall(r"^\| ([a-z ]+) \| .* \| (.*) \|$", card.text, flags=re.MULTILINE))
    assert "Apache-2.0" in rows["language model"] and "Apache-2.0" in rows["vision tower"]
    assert rows["audio tower"] == "MIT" and "Apache-2.0" in rows["connectors"]
    assert "non-commercial use ONLY" in card.text and "2406.07476" in card.text
    assert "not verified" in card.text and "as published" not in card.text
    assert str(GOLDENS) not in card.text


def test_what_was_kept_is_said(converted, tmp_path):
    plan, folder = converted
    assert "--to-original" in (folder / "README.md").read_text()
    options = {"repetition_penalty": 1.05, "top_k": 20, "eos_token_id": 2, "transformers_version": "4.42.3"}
    (tmp_path / "generation_config.json").write_text(json.dumps(options))
    plan = dataclasses.replace(plan, source=dataclasses.replace(plan.source, language_model_folder=tmp_path))
    text = model_card(plan, "mine")
    assert "the original's says (`repetition_penalty` 1.05, `top_k` 20): the original applies it in every" in text


def test_the_snippet_is_that_of_the_readme_and_runs(converted, tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (converted[1] / "README.md").read_text(), flags=re.DOTALL)
    readme = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    assert SNIPPET.format(checkpoint="DAMO-NLP-SG/VideoLLaMA2.1-7B-AV") == readme
    assert block == SNIPPET.format(checkpoint="tiny")
    shutil.copy(GOLDENS / "processing_av" / "av_3s.mp4", tmp_path / "holiday.mp4")
    (tmp_path / "tiny").symlink_to(converted[1])
    monkeypatch.chdir(tmp_path)
    exec(block.replace("max_new_tokens=128", "max_new_tokens=6").replace('"bfloat16"', '"float32"'), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("repository", list(PUBLISHED))
def test_a_published_checkpoint_is_known_by_name_and_sizes(repository):
    config = full_size(PUBLISHED[repository])
    assert find_published(repository, config) == repository
    assert find_published(repository.split("/")[1], config) == repository
    assert find_published("somebody/" + repository.split("/")[1], config) is None
    assert find_published("my-fine-tuned-model", config) is None
    assert find_published(repository, make_config("llama", num_frames=7)) is None


def test_card_of_a_published_checkpoint():
    plan = build_plan(open_source(HEARING))
    published = PUBLISHED["DAMO-NLP-SG/VideoLLaMA2-72B"]
    plan.source.config = full_size(published, vision="clip_vision_model")
    cache = Path("/cache/models--DAMO-NLP-SG--VideoLLaMA2-72B/snapshots") / ("ab" * 20)
    plan.source.folder = cache
    plan.source.config_dict["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
    card = ModelCard(model_card(plan, "me/mine"))
    assert (card.data.license, card.data.license_name) == ("other", "tongyi-qianwen")
    assert card.data.base_model == [
        "DAMO-NLP-SG/VideoLLaMA2-72B",
        "Qwen/Qwen2-72B-Instruct",
        "openai/clip-vit-large-patch14-336",
    ]
    assert "| MVBench | 62.0 |" in card.text and "| vision tower | [openai" in card.text
    assert f"commit `{'ab' * 20}`" in card.text and 'checkpoint = "me/mine"' in card.text


def test_card_of_lora_names_its_base_but_nobody_s_folders():
    plan = build_plan(open_source(GOLDENS / "lora" / "checkpoint-lora"))
    plan.source.adapter.config["base_model_name_or_path"] = "/home/somebody/models/my-mistral"
    text = model_card(plan, "mine")
    assert "`my-mistral`" in text and "/home" not in text
    plan.source.adapter.config["base_model_name_or_path"] = "mistralai/Mistral-7B-Instruct-v0.2"
    assert "mistralai/Mistral-7B-Instruct-v0.2" in ModelCard(model_card(plan, "mine")).data.base_model
