"""`videollama2 ask` and `videollama2 chat`, as they are called."""

import json
import sys
from pathlib import Path

import pytest

from golden_utils import GOLDENS
from videollama2_hf.cli import main
from videollama2_hf.cli.ask import make_block


MODEL = str(GOLDENS / "qwen2_siglip_beats_av" / "checkpoint")
CLIP = str(GOLDENS / "processing_av" / "av_3s.mp4")
SOUND = str(GOLDENS / "processing_av" / "wav" / "noise_2s_16k.flac")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    output = capsys.readouterr()
    return end.value.code or 0, output.out, output.err


def test_ask(capsys):
    code, text, _ = run(capsys, "ask", "What is it?", CLIP, "--model", MODEL, "--max-new-tokens", "6")
    assert code == 0 and text.strip()
    code, out, _ = run(capsys, "ask", "What is it?", CLIP, "--model", MODEL, "--max-new-tokens", "6", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["text"] == text.strip() and answer["finish_reason"] == "length"
    assert answer["num_new_tokens"] == 6 and answer["media"] == [CLIP]


def test_options_reach_the_media(capsys):
    """Without the sound of the video there are no 1496 tokens of it."""
    arguments = ["ask", "What is it?", "--model", MODEL, "--max-new-tokens", "2", "--json"]
    heard = json.loads(run(capsys, *arguments, CLIP, SOUND)[1])["num_prompt_tokens"]
    silent = json.loads(run(capsys, *arguments, CLIP, "--no-audio")[1])["num_prompt_tokens"]
    longer = json.loads(run(capsys, *arguments, CLIP, "--no-audio", "--frames", "32", "--start", "1", "--end", "2")[1])
    assert heard - silent > 2 * 1490 and longer["num_prompt_tokens"] > silent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["What?", "nowhere.mp4", "--model", MODEL], "There is no file 'nowhere.mp4'"),
        (["What?", MODEL + "/config.json", "--model", MODEL], "does not say what it is"),
        (["What?", CLIP, "--model", MODEL, "--start", "9", "--end", "12"], "9"),
    ],
)
def test_wrong_input_is_one_message_and_code_2(capsys, arguments, message):
    code, _, err = run(capsys, "ask", *arguments)
    assert code == 2 and message in err and "Traceback" not in err


def test_broken_logits_are_one_message_and_code_1(capsys, monkeypatch):
    def break_logits(*args, **kwargs):
        raise FloatingPointError("The logits are not numbers.")

    monkeypatch.setattr(sys.modules["videollama2_hf.cli.ask"], "load_session", break_logits)
    code, _, err = run(capsys, "ask", "What?", CLIP, "--model", MODEL)
    assert code == 1 and err == "Error: The logits are not numbers.\n"


def test_without_a_model_the_small_one_answers(capsys, monkeypatch, tmp_path):
    commands = sys.modules["videollama2_hf.cli.ask"]  # the attribute of that name is the command
    monkeypatch.setattr("videollama2_hf.assets.SMALL_MODEL", tmp_path / "none")
    code, _, err = run(capsys, "ask", "What?", CLIP)
    assert code == 2 and "without the small model" in err and "--model FOLDER" in err
    monkeypatch.setattr("videollama2_hf.assets.SMALL_MODEL", Path(MODEL))
    monkeypatch.setattr(commands, "EXAMPLE_CLIP", Path(CLIP))
    code, out, err = run(capsys, "ask", "--json", "--max-new-tokens", "2")
    record = json.loads(out)
    assert code == 0 and "--model DAMO-NLP-SG/" in err and f"its own clip, {CLIP}" in err
    assert (record["model"], record["media"]) == (MODEL, [CLIP])


def test_blocks():
    assert make_block(CLIP, 1.0, 2.0, 4, False) == {
        "type": "video",
        "video": CLIP,
        "start": 1.0,
        "end": 2.0,
        "num_frames": 4,
        "load_audio_from_video": False,
    }
    assert make_block("https://example.org/a.jpg?size=2", 1.0) == {
        "type": "image",
        "image": "https://example.org/a.jpg?size=2",
    }


def test_chat(capsys, monkeypatch):
    """Questions, a medium in between, a mistake, a new conversation."""
    lines = iter(
        ["What is it?", f"/add {SOUND} 0 1", "And this?", "/add nowhere.wav", "/what", "", "/new", "Why?", "/quit"]
    )
    monkeypatch.setattr("typer.prompt", lambda *args, **kwargs: next(lines))
    code, out, err = run(capsys, "chat", CLIP, "--model", MODEL, "--max-new-tokens", "3")
    assert code == 0 and next(lines, None) is None
    assert "There is no file 'nowhere.wav'" in err and "no command /what" in err
    assert len([line for line in out.splitlines() if line.strip()]) >= 3
