"""A saved folder works, and can be saved again, where this package is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

from golden_utils import GOLDENS


CHECKPOINT = GOLDENS / "qwen2_siglip_beats_av" / "checkpoint"
CLIP = GOLDENS / "processing_av" / "av_3s.mp4"
MESSAGES = [
    {"role": "user", "content": [{"type": "video", "video": str(CLIP)}, {"type": "text", "text": "What is it?"}]}
]
WITHOUT_PACKAGE = """
import importlib.util, json, sys
sys.path = [path for path in sys.path if not path.rstrip("/").endswith("src")]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
assert importlib.util.find_spec("videollama2_hf") is None, "the package is still importable"
import torch, transformers
from transformers import *
"""
ANSWER = """
source, target, messages = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
trust = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(source, **trust)
model = AutoModelForMultimodalLM.from_pretrained(source, dtype=torch.float32, **trust)
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
loaded = {"processor": type(processor).__name__, "model": type(model).__name__}
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForCausalLM):
    loaded[auto_class.__name__] = type(auto_class.from_pretrained(source, **trust)).__name__
for auto_class in (AutoConfig, AutoVideoProcessor, AutoFeatureExtractor, AutoImageProcessor):
    loaded[auto_class.__name__] = type(auto_class.from_pretrained(source, **trust)).__name__
loaded["tokenizer"] = len(AutoTokenizer.from_pretrained(source))
model.save_pretrained(target)
processor.save_pretrained(target)
print("RESULT" + json.dumps({"ids": ids.tolist(), "loaded": loaded, "module": type(model).__module__}))
"""


def run(script: str, *args: str, cache: Path, check: bool = True) -> subprocess.CompletedProcess:
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "",
        "CUDA_VISIBLE_DEVICES": "",
    }
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE + script, *args], capture_output=True, text=True, env=env, timeout=300
    )
    if check:
        assert result.returncode == 0, result.stderr[-4000:]
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    model = AutoModelForMultimodalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    inputs = processor.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, ids


@pytest.mark.environment
def test_saved_folder_needs_no_package_and_can_be_saved_again(saved, tmp_path):
    folder, ids = saved
    source = folder
    for generation in ("first", "second"):
        target = tmp_path / generation
        output = run(ANSWER, str(source), str(target), json.dumps(MESSAGES), cache=tmp_path / f"modules-{generation}")
        (line,) = [line for line in output.stdout.splitlines() if line.startswith("RESULT")]
        result = json.loads(line.removeprefix("RESULT"))
        assert result["ids"] == ids.tolist()
        assert result["module"].startswith("transformers_modules.")
        assert result["loaded"] == {
            "processor": "VideoLlama2Processor",
            "model": "VideoLlama2ForConditionalGeneration",
            "AutoModel": "VideoLlama2Model",
            "AutoModelForImageTextToText": "VideoLlama2ForConditionalGeneration",
            "AutoModelForCausalLM": "VideoLlama2ForConditionalGeneration",
            "AutoConfig": "VideoLlama2Config",
            "AutoVideoProcessor": "VideoLlama2VideoProcessor",
            "AutoFeatureExtractor": "VideoLlama2FeatureExtractor",
            "AutoImageProcessor": "VideoLlama2ImageProcessor",
            "tokenizer": 403,
        }
        names = {path.name for path in target.iterdir()}
        assert {"modeling_videollama2.py", "processing_videollama2.py", "media_videollama2.py"} <= names
        source = target


@pytest.mark.environment
def test_without_trust_nothing_runs(saved, tmp_path):
    folder, _ = saved
    script = "AutoModelForMultimodalLM.from_pretrained(sys.argv[1], trust_remote_code=False)"
    output = run(script, str(folder), cache=tmp_path, check=False)
    assert output.returncode != 0 and "trust_remote_code=True" in output.stderr


def test_saved_folder_holds_the_code_of_this_package(saved):
    folder, _ = saved
    package = Path(sys.modules["videollama2_hf"].__file__).parent
    for path in folder.glob("*.py"):
        assert path.read_text() == (package / path.name).read_text()


def test_saved_folder_loads_with_the_package(saved):
    folder, ids = saved
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForMultimodalLM.from_pretrained(folder)
    assert type(model).__module__ == "videollama2_hf.modeling_videollama2"
    inputs = processor.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), ids)
