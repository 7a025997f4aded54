"""Rows of every format from every kind of file, mixtures, streams, unreadable media, and the examples of the docs."""

import io
import json
import logging
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from processing_utils import make_processor, write_media
from videollama2_hf.media_videollama2 import MediaError
from videollama2_hf.training import (
    DataSource,
    VideoLlama2DataCollator,
    VideoLlama2Dataset,
    VideoLlama2IterableDataset,
    load_rows,
    to_messages,
)
from videollama2_hf.training.data import RowStream


PAGE = (Path(__file__).parent.parent / "docs" / "training_data.md").read_text()
EXAMPLES = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]
ANSWER = {"from": "gpt", "value": "A cat."}


@pytest.fixture(scope="module")
def processor():
    processor = make_processor()
    processor.feature_extractor.chunk_length = 1
    return processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The media of the examples, and their rows in files."""
    folder = tmp_path_factory.mktemp("data")
    names = write_media(folder)
    for name, new in {"loud": "clip.mp4", "image": "photo.png", "sound": "sound.wav"}.items():
        Path(names[name]).rename(folder / new)
    (folder / "train.json").write_text(json.dumps(EXAMPLES))
    (folder / "train.jsonl").write_text("\n\n".join(json.dumps(row) for row in EXAMPLES) + "\n")
    return folder


def text(value: str) -> list[dict]:
    return [{"from": "human", "value": value}, ANSWER]


def blocks(row: dict, **kwargs) -> list[tuple]:
    """Type and source (or text) of every block of the first turn of the user."""
    content = next(m["content"] for m in to_messages(row, **kwargs) if m["role"] == "user")
    return [(block["type"], block.get(block["type"])) for block in content]


# Formats


def test_placeholders_of_the_original_move_to_the_front():
    row = {"video": "a.mp4", "conversations": text("Look at <video> and say")}
    assert blocks(row) == [("video", "a.mp4"), ("text", "Look at  and say")]
    assert blocks(row, format="sharegpt") == [("text", "Look at "), ("video", "a.mp4"), ("text", " and say")]
    two = {"image": ["a", "b"], "conversations": text("<image> or\n<image>")}
    assert blocks(two) == [("image", "a"), ("text", " or\n"), ("image", "b")]
    assert blocks(two, format="videollama2") == [("image", "a"), ("image", "b"), ("text", "or")]
    assert blocks({"image": "a", "conversations": text("<image>")}) == [("image", "a")]


def test_media_take_the_placeholders_of_their_kind_in_turn():
    turns = [*text("<image><video>\nWhat?"), {"from": "human", "value": "<audio><image>"}, ANSWER]
    row = {"images": ["a", "b"], "video": ["v"], "audios": ["s"], "system": "Be kind.", "conversations": turns}
    messages = to_messages(row)
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2]
    found = [block[block["type"]] for message in messages for block in message["content"] if block["type"] != "text"]
    assert found == ["a", "v", "s", "b"]


def test_blocks_of_messages_take_media_from_beside_them():
    answer = {"role": "assistant", "content": "A cat."}
    content = [
        {"type": "video", "text": None},
        {"type": "audio"},
        {"type": "image"},
        {"type": "text", "text": "What?"},
    ]
    row = {"messages": [{"role": "user", "content": content}, answer], "videos": ["v"], "images": [{"bytes": b"i"}]}
    # An empty audio block behind a video says that the video is heard.
    assert blocks(row) == [("video", "v"), ("audio", None), ("image", b"i"), ("text", "What?")]
    assert blocks({**row, "audios": ["s"]})[1] == ("audio", "s")
    plain = {"messages": [{"role": "user", "content": "What is <image> in HTML?"}, answer]}
    assert blocks(plain) == [("text", "What is <image> in HTML?")]


def test_paths_start_at_the_root_unless_they_are_absolute_or_elsewhere():
    for source, found in {
        "b/a.png": "/root/b/a.png",
        "/a.png": "/a.png",
        "https://host/a.png": "https://host/a.png",
        "data:image/png;base64,AA==": "data:image/png;base64,AA==",
    }.items():
        assert blocks({"image": source, "conversations": text("<image>")}, media_root="/root")[0][1] == found
    for source in ({"bytes": b"x", "path": "a.png"}, b"x"):
        assert blocks({"image": source, "conversations": text("<image>")}, media_root="/root")[0][1] == b"x"
    row = {"image": {"bytes": None, "path": "a.png"}, "conversations": text("<image>")}
    assert blocks(row, media_root="/root")[0][1] == "/root/a.png"


def test_the_nearest_word_on_the_sound_of_a_video_holds():
    def heard(row, **kwargs):
        return to_messages(row, **kwargs)[0]["content"][0].get("load_audio_from_video")

    row = {"video": "a", "conversations": text("<video>")}
    assert heard(row) is None
    assert heard(row, load_audio_from_video=True) is True
    assert heard({**row, "load_audio_from_video": False}, load_audio_from_video=True) is False
    answer = {"role": "assistant", "content": "A cat."}
    block = {"type": "video", "video": "a", "load_audio_from_video": True}
    chat = {"messages": [{"role": "user", "content": [block]}, answer]}
    assert heard({**chat, "load_audio_from_video": False}) is True


def test_a_first_turn_of_the_assistant_is_dropped():
    row = {"image": "a", "conversations": [{"from": "gpt", "value": "Hi."}, *text("<image>What?")]}
    assert [message["role"] for message in to_messages(row)] == ["user", "assistant"]


@pytest.mark.parametrize(
    "row, message",
    [
        ([], "A row is an object with a dialogue, got a list"),
        ({"text": "x"}, r"needs `conversations` or `messages`, got the keys \['text'\]"),
        ({"conversations": []}, "`conversations` must be a list of at least two turns"),
        ({"conversations": [{"value": "x"}]}, "Turn 0 of `conversations` needs the keys 'from' and 'value'"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "role 'tool'; choose one of human, user, gpt"),
        ({"conversations": [{"from": "human", "value": 3}, ANSWER]}, "The value of turn 0 must be text, got 3"),
        ({"conversations": text("What?")[:1]}, "must take turns and the assistant must end; got user"),
        ({"conversations": [*text("a"), ANSWER]}, "got user, assistant, assistant"),
        ({"conversations": [text("a")[0], {"from": "gpt", "value": " "}]}, "The answer in turn 1 is empty"),
        ({"conversations": text("<video>")}, "1 <video> in the text, but 0 under 'video'"),
        ({"video": "a", "conversations": text("x")}, "0 <video> in the text, but 1 under 'video'"),
        ({"image": ["a"], "conversations": text("<image><image>")}, "2 <image> in the text, but 1 under 'image'"),
        ({"image": "a", "conversations": [text("x")[0], {"from": "gpt", "value": "<image>x"}]}, "only the user shows"),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        to_messages(row)


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="'alpaca'; choose one of auto, videollama2, sharegpt, messages"):
        to_messages({"conversations": text("x")}, format="alpaca")


# Files


def as_tar(rows: list[dict], path: Path, folder: Path) -> Path:
    """A WebDataset shard; a row without the names of its media takes all members."""
    with tarfile.open(path, "w") as archive:
        for number, row in enumerate(rows):
            members = {}
            for kind in ("image", "video", "audio"):
                for key in (kind, f"{kind}s"):
                    for index, name in enumerate([row[key]] if isinstance(row.get(key), str) else row.get(key) or []):
                        members[f"{index}{Path(name).suffix}"] = (folder / name).read_bytes()
            row = {key: value for key, value in row.items() if key.rstrip("s") not in ("image", "video", "audio")}
            members["json"] = json.dumps(row).encode()
            for extension, content in members.items():
                info = tarfile.TarInfo(f"part/{number:04}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def lengths(dataset) -> list[int]:
    return [len(dataset[index]["input_ids"]) for index in range(len(dataset))]


def test_every_example_is_read_from_every_kind_of_file(folder, processor):
    """Those in the docs: as rows of files, with their media, to the same model inputs."""
    from datasets import Dataset

    assert len(EXAMPLES) == 6
    dataset = VideoLlama2Dataset(str(folder / "train.json"), processor)
    expected = lengths(dataset)
    assert [dataset.num_tokens(index) for index in range(6)] == expected
    batch = VideoLlama2DataCollator(processor)([dataset[index] for index in range(6)])
    assert batch["pixel_values"].shape[0] == 3 and batch["pixel_values_videos"].shape[:2] == (3, 8)
    assert batch["input_features"].shape[0] == 4  # three videos that are heard, and a sound

    assert lengths(VideoLlama2Dataset(str(folder / "*.jsonl"), processor)) == expected
    assert lengths(VideoLlama2Dataset(DataSource(EXAMPLES, media_root=str(folder)), processor)) == expected

    beside = [
        index
        for index, row in enumerate(EXAMPLES)
        if not isinstance(row.get("messages", [{}])[0].get("content"), list)
    ]
    shard = as_tar([EXAMPLES[index] for index in beside], folder / "train.tar", folder)
    assert lengths(VideoLlama2Dataset(str(shard), processor)) == [expected[index] for index in beside]

    for index in range(6):  # tables want rows of one form
        table = Dataset.from_list([EXAMPLES[index]])
        assert lengths(VideoLlama2Dataset(DataSource(table, media_root=str(folder)), processor)) == [expected[index]]
    table.to_parquet(str(folder / "train.parquet"))
    table.save_to_disk(str(folder / "saved"))
    for path in (folder / "train.parquet", folder / "saved"):
        assert lengths(VideoLlama2Dataset(str(path), processor)) == [expected[5]]
    stream = VideoLlama2IterableDataset(DataSource(table.to_iterable_dataset()), processor)
    assert [len(row["input_ids"]) for row in stream] == [expected[5]]


def test_media_of_datasets_stay_files(folder, processor):
    """Columns of images, sounds and videos are not decoded by `datasets`, whose decoders are another library's."""
    from datasets import Audio, Dataset, Image, List, Video

    def stored(name: str) -> dict:
        return {"bytes": (folder / name).read_bytes(), "path": None}

    row = {
        "images": [stored("photo.png")],
        "audio": stored("sound.wav"),
        "video": stored("clip.mp4"),
        "messages": [{"role": "user", "content": "<image><audio><video>"}, {"role": "assistant", "content": "A cat."}],
    }
    table = Dataset.from_list([row])
    for name, feature in {"images": List(Image()), "audio": Audio(), "video": Video()}.items():
        table = table.cast_column(name, feature)
    expected = [len(VideoLlama2Dataset([row], processor)[0]["input_ids"])]
    assert lengths(VideoLlama2Dataset(table, processor)) == expected
    stream = VideoLlama2IterableDataset(table.to_iterable_dataset(), processor)
    assert [len(row["input_ids"]) for row in stream] == expected


def test_members_of_shards_are_found_by_name(folder):
    row = {"__key__": "part/0001", "json": {"image": "0001.left.png", "conversations": text("<image>")}}
    row |= {"left.png": b"left", "right.png": b"right"}
    assert blocks(row)[0] == ("image", b"left")
    row["json"]["image"] = ["right.png", "left.png"]
    row["json"]["conversations"] = text("<image><image>")
    assert blocks(row) == [("image", b"right"), ("image", b"left")]


def test_broken_files_are_named(tmp_path):
    (tmp_path / "a.json").write_text("[{]")
    with pytest.raises(ValueError, match="a.json is not valid JSON: .*line 1 column 3"):
        load_rows(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="b.json must hold a list of rows, got a dict"):
        load_rows(str(tmp_path / "b.json"))
    (tmp_path / "c.jsonl").write_text('{"conversations": 1}\n{oops\n')
    rows = load_rows(str(tmp_path / "c.jsonl"))
    with pytest.raises(ValueError, match=r"Row 0 of .*c.jsonl: `conversations` must be a list"):
        rows[0]
    with pytest.raises(ValueError, match="1 of .*c.jsonl is not valid JSON"):
        rows[1]
    (tmp_path / "d.tar").write_text("no archive")
    with pytest.raises(ValueError, match="d.tar is not a complete, uncompressed tar archive"):
        load_rows(str(tmp_path / "d.tar"))
    for name in ("nothing.jsonl", "nothing.csv", "*.tsv"):
        with pytest.raises(FileNotFoundError, match="There is no data file|No file matches"):
            load_rows(str(tmp_path / name))
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="There are no rows in .*e.jsonl"):
        load_rows(str(tmp_path / "e.jsonl"))


# Mixtures and streams


def make_source(name: str, number: int, **kwargs) -> DataSource:
    return DataSource([{"id": f"{name}{index}", "conversations": text("What?")} for index in range(number)], **kwargs)


def test_weights_say_how_often_rows_are_seen():
    sources = [make_source("a", 10), make_source("b", 10, weight=2.5), make_source("c", 10, weight=0.3)]
    rows = load_rows(sources)
    ids = [rows[index]["id"] for index in range(len(rows))]
    assert [sum(i.startswith(name) for i in ids) for name in "abc"] == [10, 25, 3]
    counts = {i: ids.count(i) for i in ids}
    assert all(counts[f"a{n}"] == 1 and counts[f"b{n}"] in (2, 3) for n in range(10))
    assert [row.id for row in RowStream(sources)] != ids and sorted(row.id for row in RowStream(sources)) == sorted(
        ids
    )
    assert [row.id for row in RowStream(sources)] == [row.id for row in RowStream(sources)]
    assert [row.id for row in RowStream(sources, seed=1)] != [row.id for row in RowStream(sources)]
    first = [row.id[0] for row in RowStream(sources)][:12]
    assert {"a", "b"} <= set(first)  # mixed, not one behind the other
    with pytest.raises(ValueError, match="weight of a source must be above 0, got 0"):
        make_source("a", 1, weight=0)


def test_streams_without_a_length_are_mixed_until_all_are_through():
    from datasets import Dataset

    sources = [make_source("a", 5), make_source("b", 9, weight=2)]
    sources = [
        DataSource(Dataset.from_list(source.path).to_iterable_dataset(), weight=source.weight) for source in sources
    ]
    ids = [row.id for row in load_rows(sources, streaming=True)]
    assert sorted(ids) == sorted([f"a{n}" for n in range(5)] + [f"b{n}" for n in range(9)] * 2)
    with pytest.raises(ValueError, match="read them as a stream"):
        load_rows(sources)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_share_a_stream(workers, processor):
    source = make_source("a", 11)
    order = []
    for epoch in (0, 0, 1):
        stream = VideoLlama2IterableDataset(source, processor, shuffle_buffer=4, seed=3)
        stream.set_epoch(epoch)
        stream.encode = lambda messages: {"input_ids": torch.zeros(1), "labels": torch.zeros(1)}
        assert len(list(DataLoader(stream, batch_size=None, num_workers=workers))) == 11
        order.append([row.number for row in stream._shuffle(iter(stream.rows))])
    assert order[0] == order[1] != order[2] and all(sorted(numbers) == list(range(11)) for numbers in order)


# Media that cannot be read


@pytest.fixture(scope="module")
def damaged(folder):
    def video(number: int, name: str) -> dict:
        return {"id": number, "video": str(folder / name), "conversations": text("<video>What?")}

    return [video(n, name) for n, name in enumerate(["clip.mp4", "broken.mp4", "nowhere.mp4", "silent.mp4"])]


def test_unreadable_rows_stop_the_training(damaged, processor):
    dataset = VideoLlama2Dataset(damaged, processor)
    for index, error, message in [
        (1, MediaError, r"Row 1 \(id 1\) of the list: .*broken.mp4"),
        (2, OSError, "nowhere"),
    ]:
        with pytest.raises(error, match=message):
            dataset[index]
        with pytest.raises(error, match=message):
            list(DataLoader(dataset, sampler=[0, index], batch_size=2, collate_fn=VideoLlama2DataCollator(processor)))
    with pytest.raises(ValueError, match="on_unreadable must be 'stop' or 'skip', got 'replace'"):
        VideoLlama2Dataset(damaged, processor, on_unreadable="replace")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_rows_are_skipped_logged_and_counted(damaged, processor, workers, tmp_path):
    handler = logging.FileHandler(tmp_path / "log")  # workers write into it too
    logging.getLogger("videollama2_hf.training.dataset").addHandler(handler)
    dataset = VideoLlama2Dataset(damaged, processor, on_unreadable="skip")
    loader = DataLoader(dataset, 2, sampler=[0, 1, 2, 1, 3, 2], num_workers=workers, collate_fn=len)
    assert list(loader) == [1, 1, 1]  # the second batch has nothing left: one row stands in for it
    assert dataset.skipped == [1, 2]
    logging.getLogger("videollama2_hf.training.dataset").removeHandler(handler)
    logged = (tmp_path / "log").read_text()
    assert "Skipped: Row 1 (id 1) of the list" in logged and "Row 3 (id 3) of the list stands in for" in logged
    with pytest.raises(MediaError):
        dataset[1]
    stream = VideoLlama2IterableDataset(damaged, processor, on_unreadable="skip")
    assert len(list(DataLoader(stream, batch_size=None, num_workers=workers))) == 2 and stream.num_skipped == 2


def test_a_data_set_of_which_nothing_can_be_read_is_an_error(damaged, processor):
    dataset = VideoLlama2Dataset(damaged[1:3], processor, on_unreadable="skip")
    with pytest.raises(RuntimeError, match="No row of the data set can be read"):
        dataset.__getitems__([0])


def test_rows_that_are_too_long_are_skipped_and_malformed_ones_never(processor):
    long = {"conversations": [{"from": "human", "value": "What? " * 200}, ANSWER]}
    short = {"conversations": text("What?")}
    dataset = VideoLlama2Dataset([long, short], processor, on_unreadable="skip", max_length=100)
    assert len(dataset.__getitems__([0, 1])) == 1 and dataset.skipped == [0]
    dataset = VideoLlama2Dataset([{"conversations": text("<image>")}, short], processor, on_unreadable="skip")
    with pytest.raises(ValueError, match="Row 0 of the list: Placeholders and media differ"):
        dataset.__getitems__([0, 1])


def test_the_code_of_the_page_runs(folder, processor, monkeypatch):
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    monkeypatch.chdir(folder)
    for name, rows in {"videos": EXAMPLES[:2], "text": EXAMPLES[5:] * 2}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    names = {"processor": processor}
    exec(code, names)
    assert len(names["train"]) == 3 and names["batch"]["input_ids"].shape[0] == 2
    assert len(list(names["stream"])) == 3
    assert np.isin(names["batch"]["attention_mask"], [0, 1]).all()
