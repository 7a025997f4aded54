"""Recipes: the published numbers, and what a recipe that is wrong is told."""

import subprocess
import sys

import pytest
import yaml

from videollama2_hf.cli import main
from videollama2_hf.training import Recipe
from videollama2_hf.training.recipe import RECIPES, list_recipes


NEEDED = ["model=somewhere", "output_dir=out", "data=rows.json"]
# Scripts of the originals: what trains, rate, connector's rate, global batch, rows per device, epochs, square padding.
PUBLISHED = {
    "videollama2_1_video_pretraining": (["mm_projector"], 1e-3, None, 256, 8, 1, "none"),
    "videollama2_2_video_tuning": (["language_model", "lm_head", "mm_projector"], 2e-5, None, 128, 4, 1, "pad"),
    "videollama2_2_video_tuning_lora": (["mm_projector"], 2e-5, 2e-5, 128, 4, 1, "pad"),
    "videollama2_2_video_tuning_qlora": (["mm_projector"], 2e-5, 2e-5, 128, 4, 1, "pad"),
    "videollama2_3_audio_pretraining": (["mm_projector_a"], 1e-3, None, 1024, 32, 1, "none"),
    "videollama2_4_audio_tuning": (["mm_projector_a", "audio_tower"], 2e-5, None, 128, 4, 2, "none"),
    "videollama2_5_audio_visual_tuning": (
        ["language_model", "lm_head", "mm_projector", "mm_projector_a", "audio_tower"],
        *(2e-5, None, 128, 4, 2, "pad"),
    ),
    "videollama2_5_audio_visual_tuning_lora": (["mm_projector", "mm_projector_a"], 2e-5, 2e-5, 128, 4, 2, "pad"),
    "videollama2_5_audio_visual_tuning_qlora": (["mm_projector", "mm_projector_a"], 2e-5, 2e-5, 128, 4, 2, "pad"),
    "video_llava_1_pretraining": (["mm_projector"], 1e-3, None, 256, 32, 1, "none"),
    "video_llava_2_tuning": (["language_model", "lm_head", "mm_projector"], 2e-5, None, 128, 16, 1, "pad"),
    "video_llava_2_tuning_lora": (["mm_projector"], 2e-4, 2e-5, 128, 16, 1, "pad"),
    "video_llava_2_tuning_qlora": (["mm_projector"], 2e-4, 2e-5, 128, 16, 1, "pad"),
}


def test_every_published_stage_has_a_recipe():
    assert list_recipes() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    recipe = Recipe.from_yaml(name, NEEDED)
    trainable, rate, connector_rate, batch, rows, epochs, aspect_ratio = PUBLISHED[name]
    assert recipe.trainable == trainable
    assert (recipe.learning_rate, recipe.connector_learning_rate) == (rate, connector_rate)
    assert (recipe.global_batch_size, recipe.per_device_batch_size, recipe.epochs) == (batch, rows, epochs)
    assert recipe.aspect_ratio == aspect_ratio
    # The same in all scripts.
    assert (recipe.warmup_ratio, recipe.lr_scheduler, recipe.weight_decay, recipe.seed) == (0.03, "cosine", 0.0, 42)
    assert recipe.bf16 and recipe.tf32 and recipe.gradient_checkpointing and recipe.max_text_length == 2048
    assert (recipe.num_frames, recipe.max_length) == ((None, 3072) if name.startswith("video_llava") else (16, None))
    if "lora" in name:
        assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (128, 256, 0.05)
        assert recipe.lora.quantize == (4 if "qlora" in name else None)
    else:
        assert recipe.lora is None
    mixed = name.startswith("videollama2_5")
    assert recipe.modality_mix == ({"audio_visual": 2, "video": 1, "audio": 1} if mixed else None)
    formats = {"videollama2_1_video_pretraining": "plain", "videollama2_3_audio_pretraining": "plain_audio"}
    assert recipe.prompt_format == formats.get(name, "chat")
    assert recipe.sampler == ("modality_length" if name.startswith("video_llava_2") else "random")
    assert recipe.accumulation_steps(1) * rows == batch and recipe.accumulation_steps(2) * rows * 2 == batch


def test_a_recipe_survives_yaml(tmp_path):
    recipe = Recipe.from_yaml("videollama2_5_audio_visual_tuning_lora", [*NEEDED, "eval.data=[held_out.json]"])
    recipe.save_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    assert recipe.eval.data[0].path == "held_out.json"


def test_overrides():
    changes = [
        "lora.r=8",
        "data=[{path: a.json}, {path: b.json, weight: 2}]",
        "data.0.weight=1e0",
        "learning_rate=1e-4",
    ]
    recipe = Recipe.from_yaml("videollama2_2_video_tuning_lora", [*NEEDED, *changes])
    assert (recipe.lora.r, recipe.lora.alpha, recipe.learning_rate) == (8, 256, 1e-4)
    assert [(source.path, source.weight) for source in recipe.data] == [("a.json", 1.0), ("b.json", 2.0)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=null", "does not say model"),
        ("learning_rat=1", "unknown key learning_rat; did you mean learning_rate"),
        ("lora.rank=8", "unknown key lora.rank"),
        ("data=[{file: a.json}]", "unknown key data.0.file"),
        ("data=[]", "data names no source"),
        ("epochs=many", "epochs must be a number, got 'many'"),
        ("bf16=1", "bf16 must be true or false, got 1"),
        ("global_batch_size=0", "global_batch_size must be at least 1"),
        ("global_batch_size=true", "global_batch_size must be a whole number, got True"),
        ("aspect_ratio=square", "aspect_ratio must be pad or none, got 'square'"),
        ("trainable=mm_projector", "trainable must be a list"),
        ("trainable=[]", "Nothing is trained"),
        ("lora={}", "take it out of `trainable`"),
        ("lora.quantize=3", "quantize must be 4 or 8"),
        ("warmup_ratio=5", "warmup_ratio is a share"),
        ("sampler=length", "leave out sampler: length"),
        ("streaming=true", "give max_steps"),
        ("seed.x=1", "nothing at 'seed.x'|must be"),
        ("data.7.path=x", "nothing at '7'"),
        ("oops", "An override is key=value"),
    ],
)
def test_wrong_recipes_get_one_clear_sentence(override, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_yaml("videollama2_5_audio_visual_tuning", [*NEEDED, override])


def test_batches_that_cannot_be_made_are_refused():
    recipe = Recipe.from_yaml("videollama2_2_video_tuning", NEEDED)
    with pytest.raises(ValueError, match="128 cannot be made of 4 rows on 3 device.*multiple of 12"):
        recipe.accumulation_steps(3)


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recipe 'nothing'.*video_llava_1_pretraining"):
        Recipe.from_yaml("nothing")
    (tmp_path / "broken.yaml").write_text("model: [")
    with pytest.raises(ValueError, match="no valid YAML"):
        Recipe.from_yaml(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- model")
    with pytest.raises(ValueError, match="must hold `key: value` lines"):
        Recipe.from_yaml(tmp_path / "list.yaml")


def test_the_command_tells_in_one_sentence(capsys):
    sets = ["--set", "model=./nowhere", "--set", "data=rows.json", "--set", "output_dir=./nothing"]
    for arguments, message in (
        (["train", "nothing"], "There is no recipe 'nothing'"),
        (["train", "videollama2_2_video_tuning"], "The recipe does not say model, output_dir, data;"),
        (["train", "videollama2_2_video_tuning", "--set", "x=1"], "unknown key x"),
        (["train", "videollama2_2_video_tuning", *sets, "--estimate"], "There is no model folder ./nowhere"),
        (["train", "videollama2_2_video_tuning", *sets], "There is no model folder ./nowhere"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and "Traceback" not in error


def test_every_key_of_a_recipe_is_documented():
    from videollama2_hf.training import recipe

    for cls in (recipe.Recipe, recipe.LoraRecipe, recipe.Evaluation):
        for name in cls.__dataclass_fields__:
            assert name in cls.__doc__, f"{cls.__name__}.{name}"
    # Shipped files say where their numbers are from, and name nothing twice.
    for path in RECIPES.glob("*.yaml"):
        text = path.read_text()
        assert text.startswith("# Video") and len(yaml.safe_load(text)) == sum(
            line[:1].isalpha() for line in text.splitlines()
        )


def test_importing_the_package_needs_no_extra():
    """PEFT, datasets, accelerate and the Trainer are for those who train."""
    code = (
        "import sys\n"
        "for name in ('peft', 'datasets', 'accelerate', 'tensorboard', 'trl'): sys.modules[name] = None\n"
        "import videollama2_hf.training, videollama2_hf.cli\n"
        "from videollama2_hf.training import Recipe, prepare_for_training, ModalityMixSampler, get_lora_config\n"
        "assert 'transformers.trainer' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
