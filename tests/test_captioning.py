"""Captions of many files: batches equal single answers, interruptions, files that cannot be read."""

import json
import shutil
import time

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

from golden_utils import GOLDENS
from videollama2_hf.captioning import caption, list_media
from videollama2_hf.cli import main
from videollama2_hf.session import Session


CHECKPOINT = GOLDENS / "qwen2_siglip_beats_av" / "checkpoint"
RECORDINGS = GOLDENS / "processing_av"


@pytest.fixture(scope="module")
def session():
    model = AutoModelForMultimodalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return Session(model, AutoProcessor.from_pretrained(CHECKPOINT))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    shutil.copy(RECORDINGS / "av_3s.mp4", folder / "a.mp4")
    shutil.copy(RECORDINGS / "wav" / "noise_2s_16k.flac", folder / "more" / "b.flac")
    shutil.copy(RECORDINGS / "wav" / "sweep_3s_16k.flac", folder / "more" / "c.flac")
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "notes.txt").write_text("not a medium")
    return folder


def read(path) -> dict[str, dict]:
    return {record["media"]: record for record in map(json.loads, path.read_text().splitlines())}


def test_every_file_is_answered_as_alone(session, folder, tmp_path):
    media = list_media(str(folder))
    assert [path.rpartition("/")[2] for path in media] == ["a.mp4", "broken.mp4", "b.flac", "c.flac"]
    report = caption(session, media, tmp_path / "out.jsonl", "What is it?", batch_size=3, max_new_tokens=4)
    records = read(tmp_path / "out.jsonl")
    assert report.num_answered == 3 and list(report.failed) == [str(folder / "broken.mp4")]
    for path, record in records.items():
        kind = "video" if path.endswith("mp4") else "audio"
        assert record["text"] == session.ask("What is it?", {"type": kind, kind: path}, max_new_tokens=4).text


def test_an_interrupted_run_goes_on(session, folder, tmp_path):
    media, output = [path for path in list_media(str(folder)) if "broken" not in path], tmp_path / "out.jsonl"
    caption(session, media, output, "What is it?", batch_size=1, max_new_tokens=4)
    whole = output.read_text()
    lines = whole.splitlines(keepends=True)
    output.write_text(lines[0] + lines[1][:20])  # killed while it wrote
    report = caption(session, media, output, "What is it?", batch_size=2, max_new_tokens=4)
    assert output.read_text() == whole
    assert (report.num_before, report.num_answered) == (1, 2)
    assert caption(session, media, output, "Why?", max_new_tokens=2).num_answered == 3  # another question


def test_the_next_files_are_encoded_while_a_batch_is_answered(session, folder, tmp_path, monkeypatch):
    paths = [str(shutil.copy(RECORDINGS / "wav" / "noise_2s_16k.flac", folder / f"{i}.flac")) for i in range(6)]
    begun, answered = [], []
    encode, answer = session.encode, session.answer

    def encode_counted(block):
        if isinstance(block["audio"], str):  # else it is encoded already
            begun.append(block)
        return encode(block)

    def answer_when_encoded(conversations, **generation):
        answered.append(len(conversations))
        ready = min(2 + sum(answered), 6)  # one batch of one is answered, two are ahead
        while len(begun) < ready:
            time.sleep(0.01)
        assert len(begun) <= 1 + ready
        return answer(conversations, **generation)

    with monkeypatch.context() as patch:
        patch.setattr(session, "encode", encode_counted)
        patch.setattr(session, "answer", answer_when_encoded)
        report = caption(session, paths, tmp_path / "out.parquet", "What is it?", batch_size=1, max_new_tokens=2)
    assert report.num_answered == 6 and 0 < report.waiting_seconds < report.seconds
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [record["media"] for record in table] == paths


def test_lists_of_files(folder):
    (folder / "list.txt").write_text("a.mp4\nmore/b.flac\n")
    (folder / "list.jsonl").write_text('{"media": "more/b.flac"}\n')
    assert list_media(str(folder / "list.txt")) == [str(folder / "a.mp4"), str(folder / "more" / "b.flac")]
    assert list_media(str(folder / "list.jsonl")) == [str(folder / "more" / "b.flac")]
    assert list_media(str(folder / "**" / "*.flac")) == [str(folder / "more" / name) for name in ("b.flac", "c.flac")]
    (folder / "wrong.jsonl").write_text('{"path": "a.mp4"}\n')
    with pytest.raises(ValueError, match="Row 0 of .* has no `media`"):
        list_media(str(folder / "wrong.jsonl"))
    with pytest.raises(FileNotFoundError, match="no videos, images or sounds"):
        list_media(str(folder / "*.avi"))


def test_command(folder, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    arguments = ["caption", str(folder), "-o", str(output), "--model", str(CHECKPOINT), "--max-new-tokens", "2"]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--batch-size", "2"])
    printed = capsys.readouterr()
    assert end.value.code == 1 and "3 of 4 answered" in printed.out and "broken.mp4" in printed.err
    assert len(read(output)) == 3
    output.write_text("something else\n")
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "Choose another output" in capsys.readouterr().err
    assert output.read_text() == "something else\n"
