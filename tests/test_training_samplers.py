"""Orders of rows: the original's, by length with media counted, and the fixed mixture of the joint stage."""

import json
from collections import Counter

import pytest

from golden_utils import GOLDENS
from videollama2_hf.training import (
    LengthGroupedSampler,
    ModalityLengthGroupedSampler,
    ModalityMixSampler,
    get_row_modality,
    get_signed_word_count,
)


RECORDED = {
    f"{folder} {name}": case | {"seed": 7}
    for folder in ("training", "training_av")
    for name, case in json.loads((GOLDENS / folder / "manifest.json").read_text())["cases"]["length_grouping"].items()
}
_VIDEO_LLAVA = json.loads((GOLDENS / "video_llava" / "manifest.json").read_text())["sampler"]
RECORDED["video_llava"] = _VIDEO_LLAVA | {"seed": _VIDEO_LLAVA["torch_seed"], "indices": _VIDEO_LLAVA["order"]}


@pytest.mark.parametrize("case", RECORDED)
def test_grouping_is_the_originals(case):
    recorded = RECORDED[case]
    sampler = ModalityLengthGroupedSampler(
        recorded["lengths"], recorded["batch_size"], recorded["world_size"], recorded["seed"]
    )
    assert list(sampler) == recorded["indices"]


def test_rows_without_a_length_are_refused():
    with pytest.raises(ValueError, match="Row 1 has length 0"):
        ModalityLengthGroupedSampler([3, 0], 1)


def test_order_follows_from_seed_and_epoch():
    samplers = [LengthGroupedSampler(range(1, 101), 8, seed=3) for _ in range(2)]
    first = list(samplers[0])
    assert first == list(samplers[0]) == list(samplers[1])
    samplers[0].set_epoch(1)
    second = list(samplers[0])
    assert second != first and sorted(second) == sorted(first) == list(range(100))
    samplers[1].set_epoch(1)
    assert list(samplers[1]) == second


def test_batches_hold_rows_of_similar_length():
    lengths = [(7 * i) % 400 + 1 for i in range(400)]
    order = list(LengthGroupedSampler(lengths, 8))
    spread = [max(batch) - min(batch) for batch in _batches([lengths[i] for i in order], 8)]
    assert sum(spread) / len(spread) < 40  # of 400, where random batches spread over 300
    assert lengths[order[0]] == 400  # what needs most memory comes first


def test_mixture_of_the_joint_stage():
    kinds = ["audio_visual"] * 12 + ["video"] * 3 + ["audio"] * 7
    sampler = ModalityMixSampler(kinds, {"audio_visual": 2, "video": 1, "audio": 1}, batch_size=4, seed=1)
    order = list(sampler)
    assert len(order) == len(sampler) == 28  # 7 batches, until every sound was heard
    for batch in _batches([kinds[i] for i in order], 4):
        assert Counter(batch) == {"audio_visual": 2, "video": 1, "audio": 1}
    seen = Counter(order)
    assert set(seen) == set(range(22)) and all(seen[i] == 1 for i in range(15, 22))
    assert max(seen[i] for i in range(12)) == 2 and max(seen[i] for i in range(12, 15)) == 3
    sampler.set_epoch(1)
    assert list(sampler) != order


@pytest.mark.parametrize(
    ("kinds", "batch_size", "message"),
    [
        (["audio", "video"], 3, "batch of 3 rows.*multiple of 2"),
        (["audio", "audio"], 2, "no row is video"),
        (["audio", "video", "text"], 2, "Row 2 is 'text'"),
    ],
)
def test_impossible_mixtures_are_refused(kinds, batch_size, message):
    with pytest.raises(ValueError, match=message):
        ModalityMixSampler(kinds, {"audio": 1, "video": 1}, batch_size)


VIDEO, SOUND, WORDS = (
    {"type": "video", "video": "v"},
    {"type": "audio", "audio": "a"},
    {"type": "text", "text": "one two"},
)


@pytest.mark.parametrize(
    ("blocks", "hears_videos", "modality"),
    [
        ([VIDEO, WORDS], True, "audio_visual"),
        ([VIDEO, WORDS], False, "video"),
        ([VIDEO | {"load_audio_from_video": False}], True, "video"),
        ([VIDEO | {"load_audio_from_video": True}], False, "audio_visual"),
        ([VIDEO | {"load_audio_from_video": None}], True, "audio_visual"),
        ([VIDEO, SOUND], False, "audio_visual"),
        ([{"type": "image", "image": "i"}], True, "video"),
        ([SOUND, WORDS], True, "audio"),
        ([WORDS], True, "text"),
        ("one two", True, "text"),
    ],
)
def test_modality_of_a_row(blocks, hears_videos, modality):
    row = {"messages": [{"role": "user", "content": blocks}, {"role": "assistant", "content": "three"}]}
    assert get_row_modality(row, hears_videos) == modality
    words = 1 + (2 if blocks == "one two" or WORDS in blocks else 0)
    media = 0 if blocks == "one two" else sum(block["type"] != "text" for block in blocks)
    assert get_signed_word_count(row) == (words + media if media else -words)


def _batches(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]
