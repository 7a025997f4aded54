"""`videollama2 data check` and `videollama2 data show`, run as commands."""

import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from transformers import AutoProcessor

from processing_utils import GOLDENS, write_media
from videollama2_hf.cli import main
from videollama2_hf.messages_videollama2 import prepare_messages
from videollama2_hf.training import RowEncoder, to_messages
from videollama2_hf.training.inspection import _plan_panels, draw_media, render_text, split_runs


CHECKPOINT = str(GOLDENS / "qwen2_siglip_beats_av" / "checkpoint")


def turns(question: str, answer: str = "A cat.") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_media(folder)
    good = [
        {"id": "all", "video": "loud.mp4", "image": "image.png", "audio": "sound.wav"}
        | {"conversations": turns("<video><image>\n<audio>What?")},
        {"id": "text", "conversations": turns("What?")},
    ]
    bad = [
        {"id": "missing", "video": "nowhere.mp4", "conversations": turns("<video>What?")},
        "{oops",
        {"id": "broken", "video": "broken.mp4", "conversations": turns("<video>What?")},
        {"id": "many", "image": ["image.png"], "conversations": turns("<image><image>")},
        {"id": "role", "conversations": [{"from": "bot", "value": "x"}]},
        {"id": "mute", "conversations": turns("What?", "")},
        {"id": "long", "conversations": turns("What?", "A cat. " * 3000)},
    ]
    for name, rows in {"good": good, "bad": good + bad}.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def test_check_of_good_rows(folder, capsys):
    assert run("data", "check", folder / "good.jsonl", "--media") == 0
    assert capsys.readouterr().out == "2 rows with 1 image, 1 video, 1 audio. No bad rows.\n"


def test_check_names_every_bad_row(folder, capsys):
    """Undecodable media only with `--media`, long rows only with `--model`; the rest always."""
    assert run("data", "check", folder / "bad.jsonl") == 1
    found = capsys.readouterr().out
    reasons = {
        "Row 2 (id missing)": "There is no file",
        "Row 3": "not valid JSON",
        "Row 5 (id many)": "2 <image> in the text, but 1 under 'image'",
        "Row 6 (id role)": "role 'bot'",
        "Row 7 (id mute)": "answer in turn 1 is empty",
    }
    *lines, summary = found.splitlines()
    assert len(lines) == len(reasons) and summary == "9 rows with 1 image, 3 video, 1 audio. 5 bad rows."
    for line, (row, reason) in zip(lines, reasons.items()):
        assert line.startswith(f"{row} of {folder / 'bad.jsonl'}: ") and reason in line

    assert run("data", "check", folder / "bad.jsonl", "--media", "--model", CHECKPOINT) == 1
    more = set(capsys.readouterr().out.splitlines()[:-1]) - set(lines)
    assert len(more) == 2
    broken, long = sorted(more)
    assert "(id broken)" in broken and "cannot be decoded" in broken
    assert "(id long)" in long and "more than the 4096 that are taken" in long


def test_check_of_what_is_no_data(folder, capsys):
    (folder / "bad.json").write_text("[1, 2")
    assert run("data", "check", folder / "bad.json") == 2
    assert "bad.json is not valid JSON" in capsys.readouterr().err
    assert run("data", "check", folder / "nothing.json") == 2
    assert "There is no data file" in capsys.readouterr().err


def test_show_prints_and_draws_a_row(folder, capsys):
    picture = folder / "row.png"
    assert run("data", "show", folder / "good.jsonl", "--model", CHECKPOINT, "--output", picture) == 0
    out = capsys.readouterr().out
    assert "A cat.<|im_end|>⏎" in out and "6 of them learned" in out
    assert "[1496 x <audio>]" in out and "│ -100  │" in out
    with Image.open(picture) as image:
        assert image.size[0] == 1200 and len(np.unique(np.asarray(image.convert("L")))) > 50
    assert run("data", "show", folder / "good.jsonl", "--row", 2, "--model", CHECKPOINT) == 2
    assert "has the rows 0 to 1" in capsys.readouterr().err


def test_silent_videos_without_audio_tokens_have_no_panel_of_sound(folder, tmp_path):
    processor = AutoProcessor.from_pretrained(CHECKPOINT, chunk_length=1, missing_audio_policy="drop")
    row = {"videos": ["silent.mp4", "loud.mp4"], "audio": "sound.wav", "conversations": turns("<video><video><audio>")}
    messages = to_messages(row, media_root=folder)
    encoded = RowEncoder(processor)(messages)
    content = [block for message in prepare_messages(messages) for block in message["content"]]
    titles = [title for _, title, *_ in _plan_panels(content, encoded, processor)]
    assert titles == ["video 1, 8 frames", "video 2, 8 frames", "sound of video 2", "audio 1"]


def test_what_is_learned_is_what_is_coloured(folder):
    processor = AutoProcessor.from_pretrained(CHECKPOINT, chunk_length=1)
    row = json.loads((folder / "good.jsonl").read_text().splitlines()[0])
    messages = to_messages(row, media_root=folder)
    encoded = RowEncoder(processor)(messages)
    text = render_text(encoded, processor)
    green = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
    assert green == "A cat.<|im_end|>⏎\n"
    console = Console(force_terminal=True, color_system="standard", record=True, width=200)
    console.print(text)
    assert "\x1b[1;32mA cat." in console.export_text(styles=True)
    runs = split_runs(encoded, processor)
    assert sum(len(run.ids) for run in runs) == len(encoded["input_ids"])
    assert [run.medium for run in runs if run.medium] == ["video", "audio", "image", "audio"]
    with pytest.raises(ValueError, match="no media to draw"):
        messages = to_messages({"conversations": turns("What?")})
        draw_media(messages, RowEncoder(processor)(messages), processor, folder / "none.png")
