"""What the README tells people to run."""

import json
import re
import shlex
import shutil
from fnmatch import fnmatch
from pathlib import Path

import torch
from transformers import AutoModelForMultimodalLM

from golden_utils import GOLDENS


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CLIP = GOLDENS / "processing_av" / "av_3s.mp4"
CHECKPOINT = GOLDENS / "qwen2_siglip_beats_av" / "checkpoint"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_commands():
    """Those that start an environment; what they do is tested in test_newcomer.py and test_small_model.py."""
    first, own_file, others, tests, *_ = (block.strip() for block in blocks("bash"))
    assert first == "pip install uv && uv run videollama2 ask"
    assert own_file.startswith("uv run videollama2 ask ")
    extras = re.findall(r"^uv run --extra (\w+) ", others, flags=re.MULTILINE)
    assert extras == ["web", "serve", "train"]
    assert tests in (ROOT / ".ci" / "run").read_text()


def test_notebook_snippets(tmp_path, monkeypatch, capsys):
    """As printed, but for the checkpoint and the number of tokens, with the user's file in the working folder."""
    shutil.copy(CLIP, tmp_path / "holiday.mp4")
    monkeypatch.chdir(tmp_path)
    notebook, again, _ = blocks("python")
    code = notebook.replace("DAMO-NLP-SG/VideoLLaMA2.1-7B-AV", str(CHECKPOINT))
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


def test_differences_name_tests_that_exist():
    text = (ROOT / "docs" / "differences.md").read_text()
    file, names = "", {}
    for name, test in re.findall(r"(test_\w+\.py)?::(test_\w+\*?)", text):
        file = name or file
        if file not in names:
            names[file] = re.findall(r"^def (test_\w+)\(", (ROOT / "tests" / file).read_text(), flags=re.MULTILINE)
        assert any(fnmatch(candidate, test) for candidate in names[file]), f"{file}::{test}"
    assert len(names) > 15


def test_conversation(monkeypatch, capsys):
    """The snippet that asks twice."""
    from videollama2_hf.session import Chat

    code = blocks("python")[2]
    code = code.replace("DAMO-NLP-SG/VideoLLaMA2.1-7B-AV", str(CHECKPOINT)).replace("holiday.mp4", str(CLIP))
    ask = Chat.ask
    monkeypatch.setattr(Chat, "ask", lambda *args, **kwargs: ask(*args, max_new_tokens=4, **kwargs))
    names: dict = {}
    exec(code, names)
    assert len(names["chat"].messages) == 4 and capsys.readouterr().out.strip()


def test_commands_in_the_terminal(tmp_path, monkeypatch, capsys):
    from videollama2_hf.cli import app

    shutil.copy(CLIP, tmp_path / "holiday.mp4")
    monkeypatch.chdir(tmp_path)
    lines = iter(["Who is playing?", "/quit"])
    monkeypatch.setattr("typer.prompt", lambda *args, **kwargs: next(lines))
    commands = re.findall(r"^(?:uv run )?videollama2 ((?:ask|chat) .*)$", README, flags=re.MULTILINE)
    for command in commands:
        command = command.replace("DAMO-NLP-SG/VideoLLaMA2.1-7B-AV", str(CHECKPOINT)).replace("--end 30", "--end 3")
        app([*shlex.split(command), "--max-new-tokens", "3"], standalone_mode=False)
    assert len(commands) == 3 and len(capsys.readouterr().out.split()) >= 2


def test_conversion_commands(tmp_path, monkeypatch):
    from videollama2_hf.cli import app

    commands = re.findall(r"^videollama2 convert (.*)$", README, flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        if "fine-tuned" in command:
            model = AutoModelForMultimodalLM.from_pretrained("converted")
            model.save_pretrained("fine-tuned")
        arguments = command.replace("DAMO-NLP-SG/VideoLLaMA2.1-7B-AV", str(CHECKPOINT)).split()
        app(["convert", *arguments], standalone_mode=False)
    assert (tmp_path / "converted" / "CONVERSION.md").is_file()
    restored = {path.name for path in (tmp_path / "for-the-original-code").glob("*.safetensors")}
    assert restored == {path.name for path in CHECKPOINT.glob("*.safetensors")}
    assert len(commands) == 2


def test_training_commands(tmp_path, monkeypatch, capsys):
    from videollama2_hf.cli import app

    turns = [{"from": "human", "value": "<video>\nWhat is it?"}, {"from": "gpt", "value": "A test picture."}]
    shutil.copy(CLIP, tmp_path / "clip.mp4")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"video": "clip.mp4", "conversations": turns}) + "\n")
    monkeypatch.chdir(tmp_path)
    check, train = re.findall(r"^videollama2 ((?:data|train) .*)$", README, flags=re.MULTILINE)
    app(check.split(), standalone_mode=False)
    train = train.replace("model=converted", f"model={CHECKPOINT}")
    small = [
        "max_steps=1",
        "global_batch_size=1",
        "per_device_batch_size=1",
        "num_workers=0",
        "lora.r=2",
        "bf16=false",
    ]
    app([*train.split(), *(part for value in small for part in ("--set", value))], standalone_mode=False)
    assert (tmp_path / "tuned" / "merged" / "model.safetensors").is_file()
