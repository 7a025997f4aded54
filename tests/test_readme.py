"""What the README tells people to run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from golden_utils import GOLDENS


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CLIP = GOLDENS / "processing_av" / "av_3s.mp4"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_commands():
    first, own_file, tests = (block.strip() for block in blocks("bash"))
    assert first == "pip install uv && uv run docs/quickstart.py"
    assert own_file.startswith("uv run docs/quickstart.py ")
    assert tests in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("arguments", [[], [str(CLIP), "What is heard?"]])
def test_quickstart(arguments):
    command = [sys.executable, str(ROOT / "docs" / "quickstart.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"^tokens +text \d+, video 16, audio 1496$", result.stdout, flags=re.MULTILINE)
    assert re.search(r"^answer +'.+'$", result.stdout, flags=re.MULTILINE)
    assert "untrained" in result.stdout


def test_notebook_snippets(tmp_path, monkeypatch, capsys):
    """As printed, but for the checkpoint and the number of tokens, with the user's file in the working folder."""
    shutil.copy(CLIP, tmp_path / "holiday.mp4")
    monkeypatch.chdir(tmp_path)
    notebook, again = blocks("python")
    code = notebook.replace("DAMO-NLP-SG/VideoLLaMA2.1-7B-AV", str(GOLDENS / "qwen2_siglip_beats_av" / "checkpoint"))
    code = code.replace('"bfloat16"', '"float32"')  # near-ties of random weights
    code, again = (text.replace("max_new_tokens=128", "max_new_tokens=6") for text in (code, again))
    names: dict = {}
    exec(code, names)
    assert len([line for line in notebook.splitlines() if line]) <= 15
    assert capsys.readouterr().out.strip()
    first = names["output"]
    exec(again, names)
    assert torch.equal(names["output"], first)


def test_reading_video_llava():
    text = (ROOT / "docs" / "differences.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict = {}
    exec(code.replace("LanguageBind/Video-LLaVA-7B", str(GOLDENS / "video_llava" / "tiny-video-llava-7b")), names)
    content = [{"type": "video", "video": str(CLIP)}, {"type": "text", "text": "Why is this video funny?"}]
    inputs = names["processor"].apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert inputs["pixel_values_videos"].shape == (1, 8, 3, 28, 28)
    assert names["model"].generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (ROOT / target).exists(), target
