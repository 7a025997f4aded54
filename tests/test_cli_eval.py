"""`videollama2 eval`: answers equal single ones, scores, formats of data, interruptions, what cannot be read."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

from golden_utils import GOLDENS
from videollama2_hf.cli import main
from videollama2_hf.evaluation import evaluate
from videollama2_hf.scoring import EvaluationReport, find_letter, find_options, normalise, score
from videollama2_hf.session import Session
from videollama2_hf.synthetic.rows import generate
from videollama2_hf.training.data import DataSource


CHECKPOINT = GOLDENS / "qwen2_siglip_beats_av" / "checkpoint"
RECORDINGS = GOLDENS / "processing_av"
COLOURS = {"A": "red", "B": "dark blue", "C": "blue"}


@pytest.fixture(scope="module")
def session():
    model = AutoModelForMultimodalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return Session(model, AutoProcessor.from_pretrained(CHECKPOINT))


@pytest.fixture
def folder(tmp_path):
    shutil.copy(RECORDINGS / "av_3s.mp4", tmp_path / "clip.mp4")
    shutil.copy(RECORDINGS / "wav" / "noise_2s_16k.flac", tmp_path / "noise.flac")
    return tmp_path


def dialogue(*turns: str, media: tuple[dict, ...] = (), **columns) -> dict:
    """A row of messages: questions and answers in turn, the media in front of the first question."""
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": [*(media if i == 0 else ()), {"type": "text", "text": turn}]}
        for i, turn in enumerate(turns)
    ]
    return {"messages": messages, **columns}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Scores


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The Cat. ", "cat"),
        ("A well-known dog!", "well known dog"),
        ("3.5 to 1,000", "3.5 to 1,000"),
        ("It's an owl", "its owl"),
        ("A", "a"),
        ("两只猫。", "两只猫"),
        ("ﬁve", "five"),
        ("", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What colour? A. red B. dark blue C. blue", COLOURS),
        ("What colour?\nOptions:\n(A) red\n(B) dark blue\n(C) blue\nAnswer with the option's letter.", COLOURS),
        ("A) red\nB) dark blue\nC) blue", COLOURS),
        ("Which letter comes first, B. or A. red?", {}),
        ("Plan A. Why?", {}),
        ("What is it?", {}),
    ],
)
def test_options(question, expected):
    assert find_options(question) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("B. dark blue", "B"),
        ("The answer is (B).", "B"),
        ("Answer: C", "C"),
        ("The best option is C.", "C"),
        ("dark blue", "B"),  # though blue is in it
        ("It is red.", "A"),
        ("Because of the light", None),  # the original finds a B in it
        ("A blue one", "C"),  # the original finds an A in it
        ("Blue or red", None),
        ("red, not dark blue", None),
        ("D", None),
        ("", None),
    ],
)
def test_letters(answer, expected):
    assert find_letter(answer, COLOURS) == expected


def test_scores():
    assert vars(score("A cat", "the cat.")) == {"right": True, "exact": True, "contains": True, "letter": None}
    assert vars(score("a cat on a mat", "cat")) == {"right": False, "exact": False, "contains": True, "letter": None}
    assert not score("concatenated", "cat").contains
    assert vars(score("(B)", "B", COLOURS)) == {"right": True, "exact": True, "contains": True, "letter": "B"}
    assert score("It is dark blue", "B", COLOURS).right and not score("nothing", "C", COLOURS).right


def test_the_report_says_what_its_numbers_are_of():
    def result(group, reference, right, options=(), turn=0):
        return {"group": group, "reference": reference, "right": right, "contains": right, "options": options} | {
            "finish_reason": "stop",
            "turn": turn,
        }

    results = [result("colour", name, name == "red") for name in ("red", "red", "blue", "Red")]
    results += [result("choice", "A", True, COLOURS), result("choice", "B", False, COLOURS, turn=1)]
    report = EvaluationReport(results, num_questions=7)
    expected = [("choice", 2, 1 / 2, 1 / 3), ("colour", 4, 1 / 2, 3 / 4), ("all", 6, 1 / 2, (2 / 3 + 3) / 6)]
    got = [(row["group"], row["questions"], row["right"], row["guess"]) for row in report.table()]
    assert got == [(*row[:3], pytest.approx(row[3])) for row in expected]
    text = report.describe()
    # Wilson's interval of 3 of 6 is 18.8 to 81.2 %.
    assert "3 of 6 answers are right: 50.0%" in text and "between 18.8% and 81.2%" in text
    assert "(2 questions are multiple choice)" in text and "1 of 7 questions are not in these numbers" in text
    assert "1 questions are not the first of their row; the earlier ones stand before them, with the model's" in text
    assert EvaluationReport().describe() == "No question was answered."


# Answers


def test_every_answer_is_that_of_a_conversation(session, folder):
    """Batches of rows of different media and lengths; the references are what the model says, so all are right."""
    video = {"type": "video", "video": "clip.mp4", "load_audio_from_video": False}
    blocks = [{**video, "video": str(folder / "clip.mp4")}, {"type": "audio", "audio": str(folder / "noise.flac")}]
    chat, turns = session.chat(), []
    for question, media in (("What is it?", blocks[:1]), ("And this?", []), ("Why?", [])):
        turns += [question, chat.ask(question, *media, max_new_tokens=4).text]
    heard = session.ask("What do you hear?", blocks[1], max_new_tokens=4).text
    rows = [
        dialogue(*turns, media=(video,), id="a", skills=["one", "two", "two"]),
        dialogue("What do you hear?", heard, media=({"type": "audio", "audio": "noise.flac"},), id="b", skills="two"),
        dialogue("What is it?", turns[1], media=(video,), id="c", skills=["one"]),
    ]
    data = write(folder / "data.jsonl", rows)
    report = evaluate(session, data, batch_size=2, max_new_tokens=4)
    assert [(r["id"], r["turn"], r["group"]) for r in report.results] == [
        ("a", 0, "one"), ("a", 1, "two"), ("a", 2, "two"), ("b", 0, "two"), ("c", 0, "one")
    ]  # fmt: skip
    assert all(r["exact"] and r["right"] for r in report.results)
    assert [r["answer"] for r in report.results] == [*turns[1::2], heard, turns[1]]
    assert report.results[0]["media"] == [
        {"type": "video", "load_audio_from_video": False, "source": str(folder / "clip.mp4")}
    ]

    alone = evaluate(session, data, history="none", max_new_tokens=4).results[1]
    assert alone["answer"] == session.ask("And this?", blocks[0], max_new_tokens=4).text
    rows[0]["messages"][1]["content"][0]["text"] = "A red bicycle."
    told = evaluate(
        session, rows[:1], block_options={"video": blocks[0]["video"]}, history="reference", max_new_tokens=4
    )
    with_told = [
        {"role": "user", "content": [blocks[0], {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A red bicycle."},
        {"role": "user", "content": "And this?"},
    ]
    assert told.results[1]["answer"] == session.answer([with_told], max_new_tokens=4)[0].text


def test_media_are_encoded_once(session, folder, monkeypatch):
    """Four rows about two clips, taking turns, with a session that keeps only one."""
    shutil.copy(folder / "clip.mp4", folder / "other.mp4")
    media = [{"type": "video", "video": name, "load_audio_from_video": False} for name in ("clip.mp4", "other.mp4")]
    rows = [dialogue("What?", "x", "Why?", "y", media=(media[i % 2],)) for i in range(4)]
    small, calls = Session(session.model, session.processor, max_encoded=1), []
    encode = session.model.encode_media

    def count(**inputs):
        calls.extend(name for name in inputs if name == "pixel_values_videos" and inputs[name] is not None)
        return encode(**inputs)

    monkeypatch.setattr(session.model, "encode_media", count)
    report = evaluate(small, write(folder / "data.jsonl", rows), batch_size=1, max_new_tokens=2)
    assert len(report.results) == 8 and len(calls) == 2


def test_formats(session, folder):
    """The same question in every format gives the same answer; so do rows of question and answer."""
    media = {"video": "clip.mp4", "load_audio_from_video": False}
    turns = [{"from": "human", "value": "<video>\nWhat is it?"}, {"from": "gpt", "value": "cat"}]
    block = {"type": "video", **media}
    rows = {
        "videollama2": {**media, "conversations": turns},
        "sharegpt": {"videos": ["clip.mp4"], "load_audio_from_video": False, "conversations": turns},
        "messages": dialogue("What is it?", "cat", media=(block,)),
        "plain": {**media, "question": "What is it?", "answer": "cat", "id": 7},
    }
    (folder / "list.json").write_text(json.dumps(list(rows.values())))
    results = evaluate(session, str(folder / "list.json"), max_new_tokens=3).results
    assert len({(r["question"], r["answer"], r["reference"]) for r in results}) == 1 and results[3]["id"] == 7
    import datasets

    datasets.Dataset.from_list([rows["plain"]] * 2).to_parquet(folder / "rows.parquet")
    source = DataSource(str(folder / "rows.parquet"), media_root=str(folder))
    assert [r["answer"] for r in evaluate(session, source, max_new_tokens=3).results] == [results[0]["answer"]] * 2


def test_multiple_choice(session):
    """The prompt is the original's; the right option is a letter, a text, or a number."""
    rows = [
        {"question": "Which colour?", "candidates": ["red", "dark blue"], "answer": "dark blue", "task_type": "x"},
        {"question": "Which colour?", "options": ["A. red", "B. dark blue"], "answer": "B", "task_type": "x"},
        {"question": "Which colour?", "choices": ["red", "dark blue"], "answer": 1, "task_type": "y"},
    ]
    results = evaluate(session, rows, group_by="task_type", max_new_tokens=2).results
    prompt = (
        "Question: Which colour?\nOptions:\n(A) red\n(B) dark blue\n"
        "Answer with the option's letter from the given choices directly and only give the best option."
    )
    assert {r["question"] for r in results} == {prompt} and {r["reference"] for r in results} == {"B"}
    assert results[0]["options"] == {"A": "red", "B": "dark blue"} and [r["group"] for r in results] == ["x", "x", "y"]
    with pytest.raises(ValueError, match="the answer 'green' is none of the options red, dark blue"):
        evaluate(session, [{**rows[0], "answer": "green"}])
    with pytest.raises(ValueError, match="Row 0 .* has no column 'kind' to group by; it has question"):
        evaluate(session, rows, group_by="kind")
    with pytest.raises(ValueError, match="has 1 questions, but 2 entries in 'skills'"):
        evaluate(session, [{**rows[0], "skills": ["a", "b"]}])


# Runs


def test_an_interrupted_run_goes_on(session, folder):
    rows = [dialogue("What?", "x", "Why?", "y", id=0), dialogue("Who?", "z", id=1), dialogue("When?", "z", id=2)]
    data, output = write(folder / "data.jsonl", rows), folder / "out" / "results.jsonl"
    whole = evaluate(session, data, output, batch_size=1, max_new_tokens=3)
    content = output.read_text()
    lines = content.splitlines(keepends=True)
    assert [json.loads(line) for line in lines] == whole.results
    output.write_text(lines[0] + lines[1][:30])  # killed while it wrote, in the middle of a row
    report = evaluate(session, data, output, batch_size=1, max_new_tokens=3)
    assert output.read_text() == content and report.results == whole.results and report.num_before == 1
    report = evaluate(session, data, output, group_by="id", limit=1, max_new_tokens=3)
    assert report.num_before == 2 and [r["group"] for r in report.results] == ["0", "0"]

    with pytest.raises(ValueError, match="was written with max_new_tokens=3, this run has 4"):
        evaluate(session, data, output, max_new_tokens=4)
    rows[1]["messages"][0]["content"][0]["text"] = "Which?"
    with pytest.raises(ValueError, match="another question for Row 1 \\(id 1\\)"):
        evaluate(session, write(folder / "other.jsonl", rows), output, max_new_tokens=3)
    output.write_text("something else\n")
    with pytest.raises(ValueError, match="Line 1 of .* Choose another output"):
        evaluate(session, data, output, max_new_tokens=3)
    assert output.read_text() == "something else\n"


def test_what_cannot_be_asked_is_listed(session, folder):
    (folder / "broken.mp4").write_bytes(b"no video")
    rows = [
        dialogue("What?", "x", media=({"type": "video", "video": "broken.mp4"},), id="broken"),
        dialogue("What?", "x", media=({"type": "audio", "audio": "nowhere.wav"},), id="missing"),
        dialogue("word " * 5000, "x", id="long"),
        dialogue("What?", "x", id="good"),
    ]
    data = write(folder / "data.jsonl", rows)
    report = evaluate(session, data, max_new_tokens=2)
    assert [r["id"] for r in report.results] == ["good"] and report.num_questions == 4
    for (name, reason), (row, part) in zip(
        sorted(report.failed.items()),
        [("(id broken)", "broken.mp4"), ("(id missing)", "nowhere.wav"), ("(id long)", "tokens, but the model takes")],
    ):
        assert row in name and part in reason
    assert "3 of 4 questions are not in these numbers" in report.describe()
    with pytest.raises(ValueError, match="id broken"):
        evaluate(session, data, on_unreadable="stop", max_new_tokens=2)
    with pytest.raises(ValueError, match="history must be one of answers, reference, none, got 'own'"):
        evaluate(session, data, history="own")
    write(folder / "bad.jsonl", [dialogue("What?", "")])
    with pytest.raises(ValueError, match="Row 0 of .*answer in turn 1 is empty"):
        evaluate(session, str(folder / "bad.jsonl"))


def test_command_on_held_out_data_of_the_synthetic_world(folder, capsys):
    data = generate(folder / "held_out", 2, seed=3, held_out=True, mix={"image": 1, "text": 1})
    output = folder / "results.jsonl"
    arguments = ["eval", str(CHECKPOINT), str(data), "-o", str(output), "--max-new-tokens", "2", "--history", "none"]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    printed = capsys.readouterr().out
    skills = [skill for row in read(data) for skill in row["skills"]]
    assert not end.value.code and sorted(r["group"] for r in read(output)) == sorted(skills)
    assert all(skill in printed for skill in skills) and f"of {len(skills)} answers are right" in printed

    with open(data, "a") as file:
        file.write(json.dumps(dialogue("What?", "x", media=({"type": "image", "image": "none.png"},), skills="x")))
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--json"])
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert end.value.code == 1 and "none.png" in printed.err and report["num_answered"] == len(skills)
    assert report["table"][-1]["group"] == "all" and len(report["failed"]) == 1
    with pytest.raises(SystemExit) as end:
        main([*arguments[:3], "-o", "results.txt"])
    assert end.value.code == 2 and "must be a .jsonl file" in capsys.readouterr().err
