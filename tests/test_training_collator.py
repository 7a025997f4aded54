"""Training batches: labels against the original's recordings, cutting, mixed media, packing, numbers of tokens."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor, Trainer, TrainingArguments

from processing_utils import FRAMES, GOLDENS, IMAGE, SOUND, make_processor, write_media
from test_processing import in_original_terms, load_processor, runs
from videollama2_hf import VideoClip, get_num_audio_tokens
from videollama2_hf.training import RowEncoder, VideoLlama2DataCollator, VideoLlama2Dataset, to_messages
from videollama2_hf.training.encoding import RowTooLongError


CHECKPOINT = GOLDENS / "qwen2_siglip_beats_av" / "checkpoint"
VIDEO = np.stack([np.asarray(frame) for frame in FRAMES])
MEDIA = {"image": IMAGE, "video": VIDEO, "audio": SOUND}
TEMPLATES = {"mistral_strict": "mistral_strict_v0.2"}
TWO_BRANCHES = ["training", "training_av"]


def row(question: str, *answers: str, **media) -> dict:
    """A row of the original's format: `media` by name, or for the placeholders in the question."""
    media = media or {kind: medium for kind, medium in MEDIA.items() if f"<{kind}>" in question}
    turns = [("human", question), ("gpt", answers[0] if answers else "A cat.")]
    for answer in answers[1:]:
        turns += [("human", "And then?"), ("gpt", answer)]
    return {**media, "conversations": [{"from": who, "value": text} for who, text in turns]}


def recorded_cases(branch: str, tokenizer: str = ""):
    """Processor, row and recording of every case of `preprocess`."""
    recorded = json.loads((GOLDENS / branch / "label_masking.json").read_text())
    for key, cases in recorded.items():
        name, kind = key.split(".")
        if tokenizer not in ("", kind):
            continue
        processor = make_processor(TEMPLATES.get(name, name), "a system message that training leaves out")
        for case in cases.values():
            turns = case["source"]
            media = {kind: m for kind, m in MEDIA.items() if any(f"<{kind}>" in turn["value"] for turn in turns)}
            yield processor, {**media, "conversations": turns}, case


def batch_in_original_terms(processor, data: dict, **options) -> list[tuple[int, int]]:
    """Ids and labels of a row that went through the data set and the collator, media as the original's ids."""
    dataset = VideoLlama2Dataset([{**data, "load_audio_from_video": False}], processor, **options)
    batch = VideoLlama2DataCollator(processor)([dataset[0]])
    assert batch["attention_mask"].all()
    return runs(processor, batch["input_ids"][0], batch["labels"][0])


@pytest.mark.parametrize("branch", TWO_BRANCHES)
def test_labels_of_chats_equal_the_recordings(branch):
    """The end of the turn included, which for Qwen2 is `<|im_end|>` and a line break."""
    for processor, data, case in recorded_cases(branch):
        expected = list(zip(case["input_ids"], case["labels"]))
        assert batch_in_original_terms(processor, data) == expected


@pytest.mark.parametrize("branch, prompt_format", [("training", "plain"), ("training_av", "plain_audio")])
def test_labels_of_pretraining_equal_the_recordings(branch, prompt_format):
    checked = 0
    for processor, data, case in recorded_cases(branch):
        if "plain_input_ids" in case:
            expected = list(zip(case["plain_input_ids"], case["plain_labels"]))
            assert batch_in_original_terms(processor, data, prompt_format=prompt_format) == expected
            checked += 1
    assert checked == 12


@pytest.mark.parametrize("branch", TWO_BRANCHES)
def test_text_is_cut_as_the_original_cuts_it(branch):
    """`model_max_length` counts a medium as one token."""
    for processor, data, case in recorded_cases(branch, "fast"):
        first = next(i for i, label in enumerate(case["labels"]) if label != -100)
        for length in (first + 1, len(case["labels"]) - 1):
            expected = list(zip(case["input_ids"][:length], case["labels"][:length]))
            assert batch_in_original_terms(processor, data, max_text_length=length) == expected
        with pytest.raises(RowTooLongError, match="Nothing to learn.*Raise max_length or max_text_length"):
            batch_in_original_terms(processor, data, max_text_length=first)


def test_padding_equals_the_recorded_collator():
    case = json.loads((GOLDENS / "training" / "manifest.json").read_text())["cases"]["collator"]
    length = len(case["input_ids"][0])
    processor = make_processor()
    processor.tokenizer.pad_token_id = 0
    rows = []
    for ids, labels in zip(case["input_ids"], case["labels"]):
        end = max(i for i, label in enumerate(labels) if label != -100) + 1
        rows.append({"input_ids": torch.tensor(ids[:end]), "labels": torch.tensor(labels[:end])})
    batch = VideoLlama2DataCollator(processor)(rows)
    assert batch["input_ids"].tolist() == case["input_ids"] and batch["labels"].tolist() == case["labels"]
    # The original also hides tokens of the text that equal its padding token.
    assert batch["attention_mask"].tolist() == [[1] * length, [1] * 3 + [0] * (length - 3)]
    wider = VideoLlama2DataCollator(processor, pad_to_multiple_of=8)(rows)
    assert wider["input_ids"].shape == wider["labels"].shape == wider["attention_mask"].shape == (2, 16)
    assert (wider["labels"][:, length:] == -100).all() and not wider["attention_mask"][:, length:].any()


@pytest.fixture(scope="module")
def video_llava():
    folder = GOLDENS / "video_llava"
    manifest = json.loads((folder / "manifest.json").read_text())
    processor, config = load_processor(folder / "tiny-video-llava-7b")
    return manifest, load_file(folder / "goldens.safetensors"), processor, config


def test_video_llava_dialogues(video_llava):
    """Every turn of the assistant is learned, with `</s>`; placeholders stay where they are, also at the end."""
    manifest, recorded, processor, _ = video_llava
    for name, dialog in manifest["dialogs"].items():
        turns = [{"from": role, "value": text} for role, text in dialog["turns"]]
        media = {kind: m for kind, m in MEDIA.items() if any(f"<{kind}>" in turn["value"] for turn in turns)}
        encoded = RowEncoder(processor)(to_messages({**media, "conversations": turns}, "sharegpt"))
        entries = in_original_terms(processor, encoded["input_ids"], encoded["labels"])
        assert [ids for ids, _ in entries] == recorded[f"dialogs.{name}.input_ids"].tolist()
        assert [labels for _, labels in entries] == recorded[f"dialogs.{name}.labels"].tolist()
        supervised = processor.tokenizer.decode(encoded["labels"][encoded["labels"] != -100])
        assert supervised.split() == dialog["default"]["supervised_text"].split()


def test_one_video_and_sixteen_images_in_a_row(video_llava):
    _, _, processor, config = video_llava
    data = {
        "video": VIDEO,
        "image": [IMAGE] * 16,
        "conversations": [
            {"from": "human", "value": "<video>" + "<image>" * 16 + "\nCompare them."},
            {"from": "gpt", "value": "They are the same."},
        ],
    }
    encode = RowEncoder(processor)
    encoded = encode(to_messages(data))
    assert encoded["pixel_values"].shape[0] == 16 and encoded["pixel_values_videos"].shape[:2] == (1, 8)
    ids = encoded["input_ids"]
    assert (ids == config.image_token_id).sum() == 16 * 4 and (ids == config.video_token_id).sum() == 40
    assert encode.num_tokens(to_messages(data)) == len(ids)


@pytest.fixture(scope="module")
def small():
    """Processor and model of a small recorded checkpoint that hears two seconds and sees four frames."""
    processor = AutoProcessor.from_pretrained(CHECKPOINT, chunk_length=2, num_frames=4)
    model = AutoModelForMultimodalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return processor, model


MIXTURE = [
    row("<video>\nWhat happens?", "A man plays the guitar."),
    row("Where is the capital?", "In the park."),
    row("<image>\nWhat is that?", "A cat.", "It sleeps."),
    row("<audio>\nWhat is heard?", "A sound."),
    row("<image><video><image>\nCompare.", "Nothing.", video=VIDEO, image=[IMAGE, IMAGE]),
]


def test_batch_of_any_media_has_the_loss_of_its_rows(small):
    processor, model = small
    collator = VideoLlama2DataCollator(processor)
    batch = collator(MIXTURE)
    assert batch["pixel_values"].shape[0] == 3 and batch["pixel_values_videos"].shape[:2] == (2, 4)
    assert batch["input_features"].shape[0] == 3  # a sound, and two videos that are heard
    padding = batch["attention_mask"] == 0
    assert (batch["labels"][padding] == -100).all()
    assert (padding[:, 1:] >= padding[:, :-1]).all()  # on the right
    with torch.no_grad():
        losses, counts = [], []
        for data in MIXTURE:
            alone = collator([data])
            counts.append(int((alone["labels"] != -100).sum()))
            losses.append(model(**alone).loss * counts[-1])
        torch.testing.assert_close(model(**batch).loss, sum(losses) / sum(counts), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_do_not_see_each_other(small, attention):
    processor, model = small
    model.set_attn_implementation(attention)
    padded = VideoLlama2DataCollator(processor)(MIXTURE)
    packed = VideoLlama2DataCollator(processor, packing=True)(MIXTURE)
    assert packed["input_ids"].shape == (1, int(padded["attention_mask"].sum())) and "attention_mask" not in packed
    with torch.no_grad():
        expected = model(**padded, use_cache=False)
        outputs = model(**packed, use_cache=False)
        visible = padded["attention_mask"].bool()
        torch.testing.assert_close(outputs.logits[0], expected.logits[visible], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(outputs.loss, expected.loss, atol=1e-5, rtol=1e-5)
        seen = {**packed, "position_ids": torch.arange(packed["input_ids"].shape[1])[None]}
        assert (model(**seen, use_cache=False).loss - expected.loss).abs() > 1e-3


def test_packed_gradients_equal_padded_ones(small):
    processor, model = small
    model.set_attn_implementation("sdpa")
    gradients = []
    for packing in (False, True):
        batch = VideoLlama2DataCollator(processor, packing=packing)(MIXTURE[:3])
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 100
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_rows_are_cut_by_all_their_tokens():
    processor = make_processor()
    long = row("<image>\nWhat is that?", "A cat. " * 50)
    whole = RowEncoder(processor)(to_messages(long))
    for length in (len(whole["input_ids"]) - 7, len(whole["input_ids"]) - 60):
        encode = RowEncoder(processor, max_length=length)
        cut = encode(to_messages(long))
        assert len(cut["input_ids"]) == length == encode.num_tokens(to_messages(long))
        assert encode.num_tokens(to_messages(long), cut=False) == len(whole["input_ids"])
        assert torch.equal(cut["input_ids"], whole["input_ids"][:length])
        assert torch.equal(cut["labels"], whole["labels"][:length])
    with pytest.raises(RowTooLongError, match=r"45 of them of its media.* cut off at 30\. Raise max_length, lower"):
        RowEncoder(processor, max_length=30)(to_messages(long))
    first = int((whole["labels"] != -100).nonzero()[0])
    assert (RowEncoder(processor, max_length=first + 1)(to_messages(long))["labels"] != -100).sum() == 1
    with pytest.raises(RowTooLongError, match="Nothing to learn from is left"):
        RowEncoder(processor, max_length=first)(to_messages(long))


def test_rows_longer_than_the_model_takes_are_cut_to_it():
    processor = make_processor(context_length=100)
    long = to_messages(row("What is that?", "A cat. " * 100))
    encode = RowEncoder(processor)
    assert len(encode(long)["input_ids"]) == encode.num_tokens(long) == 100
    assert processor.context_length == 100
    with pytest.raises(ValueError, match="the model takes 100"):
        processor.apply_chat_template(long, tokenize=True, return_dict=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


def test_number_of_tokens_needs_no_decoding(files, monkeypatch):
    import videollama2_hf.feature_extraction_videollama2 as sound
    import videollama2_hf.video_reading_videollama2 as reading

    processor = make_processor()
    clips = [
        {"video": files["loud"]},
        {"video": files["silent"]},
        {"video": files["loud"], "num_frames": 4, "load_audio_from_video": False},
        {"video": files["loud"], "fps": 5.0, "start": 0.4, "end": 2.0},
        {"video": files["gif"], "fps": 10},
        {"video": files["folder"], "fps": 1},
        {"video": VIDEO},
        {"audio": files["sound"]},
        {"image": files["image"]},
    ]
    kinds = ["video", "audio", "image"]
    blocks = [{"type": next(kind for kind in kinds if kind in clip), **clip} for clip in clips]
    rows = [[block, {"type": "text", "text": "What?"}] for block in blocks]
    rows.append([*blocks[:3], {"type": "text", "text": "a <video> in a text"}, *blocks[6:]])
    chats = [
        [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]
        for content in rows
    ]
    encoders = [RowEncoder(processor, prompt_format=name) for name in ("chat", "plain", "plain_audio")]
    dropping = make_processor(missing_audio_policy="drop")
    encoders += [RowEncoder(dropping), RowEncoder(make_processor("mistral_strict_v0.2"))]
    for encode in encoders:
        encode.processor.feature_extractor.chunk_length = 1
    expected = [[len(encode(chat)["input_ids"]) for chat in chats] for encode in encoders]
    assert len({tuple(counts) for counts in expected}) == len(encoders)
    assert expected[0][1] - expected[3][1] == get_num_audio_tokens(98)  # the silent video

    def refuse(*args, **kwargs):
        raise AssertionError("a medium was decoded")

    for module, names in {
        reading: ["decode_indices", "decode_runs", "decode_timestamps"],
        sound: ["read_audio_track"],
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    assert [[encode.num_tokens(chat) for chat in chats] for encode in encoders] == expected


def test_videos_of_different_numbers_of_frames_are_a_list(small):
    processor, model = small
    rows = [row("<video>\nWhat?", video=VideoClip(VIDEO, num_frames=n)) for n in (4, 6)]
    batch = VideoLlama2DataCollator(processor)(rows)
    assert [len(video) for video in batch["pixel_values_videos"]] == [4, 6]
    with torch.no_grad():
        assert torch.isfinite(model(**batch).loss)


def test_wrong_options_are_refused():
    processor = make_processor()
    with pytest.raises(ValueError, match="prompt_format 'chatty'; choose one of chat, plain, plain_audio"):
        RowEncoder(processor, prompt_format="chatty")
    with pytest.raises(ValueError, match="max_text_length must be a positive number of tokens or None, got 0"):
        RowEncoder(processor, max_text_length=0)
    with pytest.raises(ValueError, match="packing=True and pad_to_multiple_of exclude each other"):
        VideoLlama2DataCollator(processor, packing=True, pad_to_multiple_of=8)
    with pytest.raises(
        ValueError, match="one question and one answer, got the roles user, assistant, user, assistant"
    ):
        RowEncoder(processor, prompt_format="plain")(to_messages(row("What?", "A cat.", "A dog.")))
    with pytest.raises(ValueError, match="no row"):
        VideoLlama2DataCollator(processor)([])


def train(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("packing", [False, True])
def test_plain_trainer(packing, tmp_path):
    """transformers' `Trainer`, with rows read in a worker."""
    processor = AutoProcessor.from_pretrained(CHECKPOINT, chunk_length=2, num_frames=4)
    model = AutoModelForMultimodalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_num_workers=1,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=VideoLlama2Dataset(MIXTURE[:4], processor),
        data_collator=VideoLlama2DataCollator(processor, packing=packing),
    )
    losses = train(trainer)
    assert len(losses) == 3 and losses[2] < losses[0]


def test_sft_trainer_of_trl(tmp_path, files):
    """TRL prepares nothing (`skip_prepare_dataset`); the collator takes rows of a `datasets.Dataset` as they are."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    processor = AutoProcessor.from_pretrained(CHECKPOINT, chunk_length=2, num_frames=4)
    model = AutoModelForMultimodalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    questions = {"video": "<video>\nWhat happens?", "image": "<image>\nWhat is that?", "audio": "<audio>\nWhat?"}
    names = {"video": "loud", "audio": "sound", "image": "image"}
    rows = [{**dict.fromkeys(names), **row(text, **{kind: files[names[kind]]})} for kind, text in questions.items()]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=3,
        learning_rate=1e-3,
        logging_steps=1,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        data_collator=VideoLlama2DataCollator(processor),
    )
    losses = train(trainer)
    assert len(losses) == 3 and losses[2] < losses[0]
