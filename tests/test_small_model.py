"""The small model that the package brings along, its clip, and what is said about them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from videollama2_hf.assets import EXAMPLE_CLIP, SMALL_MODEL
from videollama2_hf.media_videollama2 import read_frames
from videollama2_hf.session import Session
from videollama2_hf.synthetic.__main__ import main
from videollama2_hf.synthetic.evaluation import evaluate, format_table
from videollama2_hf.synthetic.example import EXAMPLE_SEED, QUESTIONS, draw_example, get_answers
from videollama2_hf.synthetic.questions import SKILLS, STILL_SKILLS
from videollama2_hf.synthetic.rendering import (
    FRAME_RATE,
    describe_frames,
    describe_sounds,
    draw_frames,
    draw_sounds,
)


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "small_model.md").read_text()


def read_table(text: str) -> dict[str, list[float | None]]:
    """The numbers behind the skills of the table that `format_table` writes, in the middle of a text."""
    rows = text.split(f"{format_table([])}\n")[1].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {name: [float(cell) if cell else None for cell in numbers] for name, *numbers in cells}


TABLE = read_table(PAGE)


@pytest.fixture(scope="module")
def session() -> Session:
    return Session.from_pretrained(SMALL_MODEL)


def test_the_package_stays_small():
    files = [path for path in SMALL_MODEL.parent.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert not list(SMALL_MODEL.glob("*.py"))


def test_the_clip_is_drawn_from_its_seed(session):
    times = np.arange(32) / FRAME_RATE
    drawn = draw_frames(describe_frames([draw_example()], times), 256)[0].float()
    frames = read_frames(EXAMPLE_CLIP, range(32)).permute(0, 3, 1, 2).float()
    assert (frames - drawn).abs().mean() < 4
    sound = draw_sounds(describe_sounds([draw_example()]))[0].numpy()
    heard = session.processor.feature_extractor.load_video_audio(str(EXAMPLE_CLIP))
    assert np.corrcoef(heard, sound)[0, 1] > 0.95


def test_the_questions_of_the_documentation_are_answered_rightly(session):
    clip = {"type": "video", "video": str(EXAMPLE_CLIP)}
    right = get_answers(draw_example())
    answers = session.ask_many(list(QUESTIONS), clip)
    assert {question: answer.text for question, answer in zip(QUESTIONS, answers)} == right
    chat = session.chat()
    first, *others = QUESTIONS
    said = [chat.ask(first, clip).text, *(chat.ask(question).text for question in others)]
    assert said == list(right.values())


def test_the_search_finds_the_clip(tmp_path, capsys):
    main(["example", "--search", "--output", str(tmp_path / "clip.mp4")])
    *_, last, path = capsys.readouterr().out.splitlines()
    seed, found = last.split(": ", 1)
    assert int(seed) <= EXAMPLE_SEED and found == "all answers are right" and Path(path).is_file()


def test_the_first_command_of_the_readme():
    command = [sys.executable, "-m", "videollama2_hf", "ask"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == get_answers(draw_example())["What do you see and hear?"]
    assert f"```text\n{result.stdout}```" in (ROOT / "README.md").read_text()
    assert str(EXAMPLE_CLIP) in result.stderr and "A real checkpoint is one option away" in result.stderr


def test_the_table_is_what_the_command_prints():
    assert list(TABLE) == [*SKILLS, "multiple choice", *(f"image: {skill}" for skill in STILL_SKILLS)]
    for count, *shares in TABLE.values():
        assert count == 100 and all(share is None or 0 <= share <= 1 for share in shares)


def test_questions_about_held_out_clips(session):
    """Some dozens, other than those of the table."""
    results = evaluate(session.model, session.processor, per_skill=3, seed=2)
    right = np.mean([result.accuracy for result in results])
    assert right > np.mean([shares[1] for shares in TABLE.values()]) - 0.1
    assert right > np.mean([result.shuffled for result in results]) + 0.3


@pytest.mark.slow
def test_the_table_is_reproduced():
    command = [sys.executable, "-m", "videollama2_hf.synthetic", "evaluate"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table = read_table(printed)
    assert list(table) == list(TABLE)
    for skill, values in TABLE.items():
        for value, again in zip(values, table[skill]):
            assert (value is None) == (again is None) and (value is None or abs(value - again) <= 0.02), skill
