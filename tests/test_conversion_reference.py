"""
Comparison with original code, by a stand-in: a package that loads and answers as the original does, made from this
package's own model, right or with one wrong weight.
"""

import ast
import sys
from pathlib import Path

import pytest

from golden_utils import GOLDENS
from videollama2_hf.conversion import ConversionError, convert_checkpoint, reference, verify
from videollama2_hf.conversion.reference import SCRIPT, compare_with_original
from videollama2_hf.conversion.report import describe
from videollama2_hf.conversion.verify import VerificationError


HEARING = GOLDENS / "qwen2_siglip_beats_av" / "checkpoint"

# The names, the calls and the quirks that the script relies on: float16 at loading, BEATs' sizes from a class of their
# own, an image that is taken for sound by a model with an audio tower, one entry for a video with its sound.
STAND_IN = """
import types
from pathlib import Path

import torch
import videollama2_hf
from transformers import AutoModelForMultimodalLM

from .beats.BEATs import BEATsConfig

VLLMs = {}


class Tower(torch.nn.Module):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


class Original(torch.nn.Module):
    def __init__(self, ours):
        super().__init__()
        self.hidden = [ours]
        inner = ours.model
        self.model = Tower(
            vision_tower=Tower(vision_tower=Tower(vision_model=inner.vision_tower)),
            mm_projector=inner.mm_projector,
            audio_tower=inner.audio_tower,
            mm_projector_a=inner.mm_projector_a,
            layers=inner.language_model.layers,
            norm=inner.language_model.norm,
        )
        self.lm_head = ours.lm_head

    def encode(self, data, kind):
        inner = self.hidden[0].model
        if isinstance(data, dict):
            return torch.cat([self.encode(data["video"], "video"), self.encode(data["audio"], "audio")])
        if kind == "audio":
            return inner.get_audio_features(data).pooler_output[0]
        if kind == "image":
            if self.model.audio_tower is not None:
                raise RuntimeError("an image is no sound")
            data = data.expand(inner.config.num_frames, -1, -1, -1)
        return inner.get_video_features(data[None]).pooler_output[0]

    def forward(self, input_ids, attention_mask, images, use_cache, return_dict):
        language_model = self.hidden[0].model.language_model
        media = [self.encode(*entry) for entry in images or []]
        row = [
            media.pop(0) if token < 0 else language_model.embed_tokens(torch.tensor([token]))
            for token in input_ids[0].tolist()
        ]
        states = language_model(inputs_embeds=torch.cat(row)[None], use_cache=use_cache).last_hidden_state
        return types.SimpleNamespace(logits=self.lm_head(states))


def load_pretrained_model(model_path, model_base, model_name, device="cuda"):
    assert (model_base, model_name, device) == (None, "videollama2", "cpu")
    assert torch.float16 == torch.zeros(1).dtype  # the original asks for float16, the comparison is in float32
    ours = AutoModelForMultimodalLM.from_pretrained(model_path, dtype=torch.float16, attn_implementation="eager")
    assert BEATsConfig().encoder_layers == ours.config.audio_config.num_hidden_layers
    if Path(__file__).with_name("wrong").exists():
        ours.model.language_model.layers[1].mlp.down_proj.weight.data[0, 0] += 1
    return None, Original(ours), None, 2048
"""
BEATS = """
class BEATsConfig:
    def __init__(self, cfg=None):
        self.encoder_layers = 12
        self.__dict__.update(cfg or {})
"""


@pytest.fixture(scope="module", autouse=True)
def enough_memory():
    """Whatever else this machine is doing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "available_memory", lambda: None)
        yield


@pytest.fixture(scope="module")
def original_code(tmp_path_factory):
    code = tmp_path_factory.mktemp("code")
    model = code / "videollama2" / "model"
    (model / "beats").mkdir(parents=True)
    (code / "videollama2" / "__init__.py").write_text("raise ImportError('reading media is not needed')\n")
    (model / "__init__.py").write_text(STAND_IN)
    (model / "beats" / "__init__.py").touch()
    (model / "beats" / "BEATs.py").write_text(BEATS)
    return code


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "out"
    return convert_checkpoint(HEARING, folder), folder


def test_every_layer_agrees(converted, original_code):
    plan, folder = converted
    result = compare_with_original(plan, folder, original_code)
    assert result["problems"] == []
    assert list(result["cases"]) == ["text", "image", "video", "audio", "video_with_sound"]
    assert result["versions"]["python"] == sys.version.split()[0]
    config = plan.source.config
    layers = {name: [layer["module"] for layer in case["layers"]] for name, case in result["cases"].items()}
    language_model = [f"model.layers.{i}" for i in range(config.text_config.num_hidden_layers)]
    assert layers["text"] == ["inputs_embeds", *language_model, "model.norm", "logits"]
    vision = [
        f"model.vision_tower.vision_tower.vision_model.encoder.layers.{i}"
        for i in range(config.vision_config.num_hidden_layers - 1)
    ]
    audio = [f"model.audio_tower.encoder.layers.{i}" for i in range(config.audio_config.num_hidden_layers)]
    media = [*vision, "model.mm_projector", *audio, "model.mm_projector_a"]
    assert layers["video_with_sound"] == media + layers["text"]
    assert layers["image"] == layers["video"] == [*vision, "model.mm_projector", *layers["text"]]
    for case in result["cases"].values():
        assert case["equal_predictions"] == case["tokens"] and case["first_difference"] is None
        assert all(layer["difference"] < 1e-5 < layer["max"] for layer in case["layers"])
    assert not list(folder.parent.glob(".reference*"))


def test_the_first_layer_that_differs_is_named(original_code, tmp_path):
    wrong = original_code / "videollama2" / "model" / "wrong"
    wrong.touch()
    try:
        with pytest.raises(VerificationError) as caught:
            convert_checkpoint(HEARING, tmp_path / "out", reference=original_code)
    finally:
        wrong.unlink()
    assert "video: model.layers.1 is the first layer that differs from the original, by" in str(caught.value)
    assert "model.layers.0 " not in str(caught.value) and not (tmp_path / "out").exists()


def test_code_that_does_not_run(converted, tmp_path):
    (tmp_path / "videollama2" / "model").mkdir(parents=True)
    (tmp_path / "videollama2" / "model" / "__init__.py").write_text("import flash_attention_of_old\n")
    with pytest.raises(
        VerificationError, match="did not run with .*--reference-python.*(?s:.*)flash_attention_of_old"
    ):
        compare_with_original(*converted, tmp_path, sys.executable)


def test_no_original_code_or_interpreter(original_code, tmp_path):
    with pytest.raises(ConversionError, match="does not hold the original code"):
        convert_checkpoint(HEARING, tmp_path / "out", reference=tmp_path)
    with pytest.raises(ConversionError, match="python9 is not an interpreter"):
        convert_checkpoint(HEARING, tmp_path / "out", reference=original_code, reference_python="python9")
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_said(converted, original_code, monkeypatch):
    monkeypatch.setattr(reference, "lacking_memory", lambda needed: f"it needs {needed}")
    assert compare_with_original(*converted, original_code)["skipped"].startswith("The original code was not run: it")


def test_the_report_names_what_differs_most():
    layers = [
        {"module": "model.layers.0", "difference": 2e-6, "max": 1.0},
        {"module": "model.norm", "difference": 3e-6, "max": 100.0},
        {"module": "logits", "difference": 1e-6, "max": 12.0},
    ]
    case = {"tokens": 7, "equal_predictions": 7, "first_difference": None, "layers": layers}
    report = {
        "created": "now",
        "versions": {"python": "3"},
        "source": {"name": "mine", "revision": None, "kind": "full", "files": []},
        "notes": ["A note."],
        "counts": {"tensors": 0, "left_out": 0, "relations": {}},
        "tensors": [],
        "left_out": [],
        "checks": {
            "self_check": {"skipped": "Not tried."},
            "reference": {"versions": {"torch": "2.4.1"}, "tolerance": 1e-4, "cases": {"text": case}},
        },
    }
    text = describe(report)
    assert "| text | 7 | 3 | `model.layers.0` | 2e-06 | 1 | 1e-06 | 7 of 7 |" in text
    assert "Note: A note." in text and "the logits differ by at most 1e-06" in text


def test_the_script_needs_nothing_of_this_environment():
    """It runs where the original does: an older Python with torch and transformers."""
    tree = ast.parse(Path(SCRIPT).read_text(), feature_version=(3, 8))
    imported = {
        name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    assert imported - set(sys.stdlib_module_names) == {"numpy", "torch", "transformers"}
