"""The synthetic world: its balance, its files, its batches, the small model and its table."""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

from tiny_models import AUDIO_SIZES
from videollama2_hf import VideoLlama2ForConditionalGeneration, VideoLlama2Processor
from videollama2_hf.synthetic import ablation, dataset, evaluation, rows, small_model, stages
from videollama2_hf.synthetic.__main__ import main
from videollama2_hf.synthetic.dataset import RowTokenizer, WorldCollator, WorldDataset, describe_media, draw_media
from videollama2_hf.synthetic.pretraining import ClipDataset, collate_frames, label_patches, label_sounds
from videollama2_hf.synthetic.questions import (
    AUDIO_VISUAL_SKILLS,
    SKILLS,
    STILL_SKILLS,
    TEMPLATES,
    ask,
    letters,
    recall,
    with_choices,
)
from videollama2_hf.synthetic.rendering import (
    describe_frames,
    describe_sounds,
    draw_frames,
    frame_times,
    render_clip,
    render_image,
    render_sound,
)
from videollama2_hf.synthetic.rows import MEDIA, Row, draw_caption_row, draw_row, to_messages, write_medium
from videollama2_hf.synthetic.small_model import build_config, build_model, build_processor, build_world_tokenizer
from videollama2_hf.synthetic.trainer import WorldTrainer
from videollama2_hf.synthetic.world import (
    COLOURS,
    INSTRUMENTS,
    SHAPES,
    SOUNDS,
    draw_clip,
    is_held_out,
    is_instrument_held_out,
)
from videollama2_hf.training import RowEncoder, VideoLlama2Dataset, VideoLlama2TrainingArguments


SCENE_OF = {"match": "move", "synchrony": "collide", "number": "count", "which": "order"}


@pytest.fixture(scope="module")
def tokenizer():
    return build_world_tokenizer()


@pytest.fixture(scope="module")
def config(tokenizer):
    return build_config(tokenizer)


@pytest.fixture(scope="module")
def processor(config, tokenizer):
    return build_processor(config, tokenizer)


def clips_of(relation, count, held_out=False, seed=0):
    generator = np.random.default_rng(seed)
    clips = (draw_clip(generator, held_out, scenes=(SCENE_OF[relation],)) for _ in range(2 * count))
    return [clip for clip in clips if clip.relation == relation]


def bayes_rate(pairs):
    """How often the most frequent label of each value, learnt on one half of the pairs, is right on the other."""
    half = len(pairs) // 2
    counts = defaultdict(Counter)
    for value, label in pairs[:half]:
        counts[value][label] += 1
    overall = Counter(label for _, label in pairs[:half]).most_common(1)[0][0]
    guesses = [
        (counts[value].most_common(1)[0][0] if counts[value] else overall) == label for value, label in pairs[half:]
    ]
    return np.mean(guesses)


def seen_of(clip):
    """What one sees that could tell, without colours."""
    return (clip.scene, clip.things[0].shape, clip.variant, clip.slot, len(clip.things))


def heard_of(clip):
    return tuple((sound.name, sound.slot if sound.name != "beep" else None) for sound in clip.sounds)


@pytest.mark.parametrize("relation", ["match", "synchrony", "number"])
@pytest.mark.parametrize("held_out", [False, True])
def test_one_medium_does_not_tell_whether_picture_and_sound_fit(relation, held_out):
    clips = clips_of(relation, 4500, held_out)
    assert len(clips) > 4000
    assert abs(bayes_rate([(seen_of(clip), clip.related) for clip in clips]) - 0.5) < 0.035
    assert abs(bayes_rate([(heard_of(clip), clip.related) for clip in clips]) - 0.5) < 0.035
    # Single latents have fewer values, so the estimate is finer.
    latents = {
        "match": [lambda c: c.things[0].shape, lambda c: c.sounds[0].name, lambda c: c.sounds[0].slot],
        "synchrony": [lambda c: c.slot, lambda c: c.sounds[0].slot, lambda c: c.things[0].shape],
        "number": [lambda c: len(c.things), lambda c: c.num_beeps],
    }[relation]
    for latent in latents:
        assert abs(bayes_rate([(latent(clip), clip.related) for clip in clips]) - 0.5) < 0.025
    both = {
        "match": lambda c: (c.things[0].shape, c.sounds[0].name),
        "synchrony": lambda c: (c.slot, c.sounds[0].slot),
        "number": lambda c: (len(c.things), c.num_beeps),
    }[relation]
    assert bayes_rate([(both(clip), clip.related) for clip in clips]) == 1


def test_a_picture_does_not_tell_which_thing_comes_with_the_sound():
    clips = clips_of("which", 4000)
    assert abs(bayes_rate([((clip.slot, clip.variant), clip.related) for clip in clips]) - 0.5) < 0.03
    for clip in clips[:50]:  # the sound begins when its thing appears
        thing = clip.things[0 if clip.related else 1]
        assert clip.sounds[0].onset == pytest.approx(thing.appears + 0.05)


def test_things_touch_when_the_thud_is_heard_or_a_second_off():
    for clip in clips_of("synchrony", 300):
        event = clip.things[0].path[1][0]
        distance = abs(event - clip.sounds[0].onset)
        assert distance < 0.01 if clip.related else distance > 0.9


def test_questions_about_both_media_do_not_say_what_they_ask_about():
    assert not any("{" in template for skill in AUDIO_VISUAL_SKILLS for template in TEMPLATES[skill])


def test_held_out_compositions_are_never_trained_and_keep_every_attribute_uniform():
    held_out = [key for key in product(range(6), range(4), range(4)) if is_held_out(*key)]
    assert [Counter(values) for values in zip(*held_out)] == [
        {value: len(held_out) // n for value in range(n)} for n in (6, 4, 4)
    ]
    for wanted in (True, False):
        generator = np.random.default_rng(3)
        for _ in range(400):
            clip = draw_clip(generator, wanted)
            assert is_held_out(*clip.composition) == wanted
            if len(clip.sounds) == 1 and clip.sounds[0].name in INSTRUMENTS:
                instrument = INSTRUMENTS.index(clip.sounds[0].name)
                assert is_instrument_held_out(instrument, clip.sounds[0].slot) == wanted


def test_letters_of_multiple_choice_are_equally_likely():
    generator = np.random.default_rng(0)
    counts = Counter()
    for _ in range(600):
        for question in ask(draw_clip(generator), generator):
            if len(question.choices) >= 4:
                choice = with_choices(question, generator)
                counts[choice.answer] += 1
                assert f"{choice.answer}. {question.answer}" in choice.text
                explained = with_choices(question, generator, explained=True)
                wanted, letter = explained.answer.rsplit(", so ", 1)
                assert wanted == question.answer and f"{letter}. {wanted}" in explained.text
    assert max(counts.values()) < 1.15 * min(counts.values())


def test_rows_follow_from_their_seed():
    def draw(seed):
        return [draw_row(np.random.default_rng([seed, i])) for i in range(20)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_recall_asks_for_what_its_text_says_once():
    forms = Counter()
    for seed in range(100):
        text, questions = recall(np.random.default_rng(seed))
        pairs = [pair.split(" ", 2) for pair in text.split(", ")]
        assert len({question.text for question in questions}) == len(questions) > 2
        for question in questions:
            asked = question.text.rstrip("?.").replace(" object", "").replace("color", "colour")
            place = {"Repeat": None, "What colour": 0, "What shape": 1, "And the": 2}[
                next(start for start in ("Repeat", "What colour", "What shape", "And the") if asked.startswith(start))
            ]
            forms[place, len(asked.split())] += 1
            if place is None:
                assert question.answer == text
                continue
            named = set(asked.split(" the ")[1].split())
            told = [pair[place] for pair in pairs if named <= set(pair[:2])]
            assert told == [question.answer]
    assert min(forms.values()) > 50 and len(forms) == 5


def test_letters_ask_where_a_word_stands():
    for seed in range(20):
        for question in letters(np.random.default_rng(seed)):
            wanted = question.text.split("?")[0].removeprefix("Which letter is ")
            assert f"{question.answer}. {wanted}" in question.text


def test_things_are_asked_for_by_what_only_they_have():
    generator, shares = np.random.default_rng(4), []
    for _ in range(200):
        clip = draw_clip(generator, scenes=("count",))
        for question in ask(clip, generator, "image"):
            kind = question.skill.removesuffix(" of several")
            if kind != question.skill:
                named = "shape" if kind == "colour" else "colour"
                things = [thing for thing in clip.things if getattr(thing, named) in question.text]
                assert [getattr(thing, kind) for thing in things] == [question.answer]
                shares.append(kind)
    assert min(Counter(shares).values()) > 50


def test_a_relation_is_asked_with_and_without_its_reason():
    rows = [draw_row(np.random.default_rng([9, i]), {"audio_visual": 1.0}, max_turns=20) for i in range(200)]
    related = [[q for q in row.questions if q.skill in ("match", "synchrony", "same number")] for row in rows]
    pairs = [questions for questions in related if len(questions) == 2]
    assert len(pairs) > 50
    for questions in pairs:
        short, long = sorted(questions, key=lambda question: len(question.answer))
        assert long.answer.endswith(f", so {short.answer}") and "xplain" in long.text
    assert {len(pair[0].answer) < len(pair[1].answer) for pair in pairs} == {False, True}  # in both orders


@pytest.mark.parametrize("skill", rows.DRILLS)
def test_a_drill_asks_for_one_skill_only(skill):
    drawn = [rows.draw_drill(np.random.default_rng([3, i]), skill) for i in range(20)]
    assert {question.skill for row in drawn for question in row.questions} == {skill}
    assert {row.medium for row in drawn} == {
        "audio": {"audio", "audio_visual"},
        "audio_visual": {"audio_visual"},
        "video": {"video", "audio_visual"} | ({"image"} if skill in STILL_SKILLS else set()),
        "multiple choice": {"image", "video", "audio", "audio_visual"},
    }[skill if skill == "multiple choice" else drawn[0].questions[0].medium]
    assert all(len({question.text for question in row.questions}) == len(row.questions) <= 12 for row in drawn)
    assert max(len(row.questions) for row in drawn) > 1
    if skill == "time of event":  # the scene that needs it
        assert {row.clip.scene for row in drawn} == {"change"}


def test_pictures_show_what_the_clip_says():
    clips = [draw_clip(np.random.default_rng([1, i]), scenes=("count",)) for i in range(40)]
    description = describe_frames(clips, np.array([1.0]))
    labels = label_patches(description, 64, 8)
    frames = draw_frames(description)[:, 0]
    assert labels["number"].tolist() == [len(clip.things) for clip in clips]
    assert labels["centre"].sum(1).tolist() == [len(clip.things) for clip in clips]
    for index, (clip, colour, shape, frame) in enumerate(zip(clips, labels["colour"], labels["shape"], frames)):
        thing = clip.things[0]
        row, column = int(thing.path[0][2] * 8), int(thing.path[0][1] * 8)
        patch = row * 8 + column
        assert (labels["row"][index, patch], labels["column"][index, patch]) == (row + 1, column + 1)
        assert shape[patch] == SHAPES.index(thing.shape) + 1
        assert colour[patch] == list(COLOURS).index(thing.colour) + 1
        if not thing.striped:
            pixel = frame[:, int(thing.path[0][2] * 64), int(thing.path[0][1] * 64)]
            assert tuple(pixel.tolist()) == COLOURS[thing.colour]


def test_sound_labels_count_the_beeps():
    clips = [draw_clip(np.random.default_rng([2, i])) for i in range(200)]
    labels = label_sounds(describe_sounds(clips), 24, 16)
    assert labels["beeps"].tolist() == [clip.num_beeps for clip in clips]
    assert (labels["onset"] > 0).sum(1).tolist() == [len(clip.sounds) for clip in clips]
    for clip, starts, lasts, times in zip(clips, *(labels[name].tolist() for name in ("onset", "active", "time"))):
        assert times == [step // 3 + 1 if last else 0 for step, last in enumerate(lasts)]
        named = [list(SOUNDS).index(sound.name) + 1 for sound in clip.sounds]
        assert [name for name in starts if name] == named
        assert set(lasts) - {0} == set(named)


def test_files_without_loss_give_the_batches_of_the_fast_path(tmp_path, processor, tokenizer, config):
    clips = [draw_clip(np.random.default_rng([4, i])) for i in range(3)]
    questions = draw_row(np.random.default_rng(4), {"audio_visual": 1}).questions
    rows = [Row(clip, medium, questions) for clip, medium in zip(clips, ("audio_visual", "image", "audio"))]
    drawn = draw_media(describe_media(rows, frame_times()))
    paths = [
        render_clip(clips[0], tmp_path / "clip.mkv"),
        render_image(clips[1], tmp_path / "image.png"),
        render_sound(clips[2], tmp_path / "sound.wav"),
    ]
    encode = RowEncoder(processor)
    read = [encode(to_messages(row, str(path))) for row, path in zip(rows, paths)]
    torch.testing.assert_close(drawn["pixel_values_videos"], read[0]["pixel_values_videos"], atol=1e-6, rtol=0)
    torch.testing.assert_close(drawn["pixel_values"], read[1]["pixel_values"], atol=1e-6, rtol=0)
    torch.testing.assert_close(drawn["input_features"][:1], read[0]["input_features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(drawn["input_features"][1:], read[2]["input_features"], atol=1e-4, rtol=0)


def test_mp4_is_close_to_the_fast_path(tmp_path, processor):
    for index in range(3):
        clip = draw_clip(np.random.default_rng([6, index]))
        path = str(render_clip(clip, tmp_path / f"{index}.mp4"))
        pixels = processor.video_processor([path], return_tensors="pt")["pixel_values_videos"][0]
        expected = draw_frames(describe_frames([clip], frame_times()))[0].float() / 127.5 - 1
        assert (pixels - expected).abs().mean() < 0.05
        waveform = processor.feature_extractor.load_video_audio(path)
        assert len(waveform) == 64000


@pytest.mark.parametrize(
    ("medium", "prompt_format"),
    [*product(MEDIA, ["chat"]), *product(["image", "video"], ["plain"]), ("audio", "plain_audio")],
)
def test_tokens_and_labels_are_those_of_the_processor(tmp_path, processor, tokenizer, config, medium, prompt_format):
    tokenize, encode = RowTokenizer(tokenizer, config, prompt_format), RowEncoder(processor, prompt_format)
    draw = draw_row if prompt_format == "chat" else draw_caption_row
    path = None
    for index in range(4):
        row = draw(np.random.default_rng([8, index]), {medium: 1})
        path = path or write_medium(row, tmp_path / "medium")  # which clip it shows makes no difference here
        expected, given = encode(to_messages(row, None if path is None else str(path))), tokenize(row)
        assert given["input_ids"].tolist() == expected["input_ids"].tolist()
        assert given["labels"].tolist() == expected["labels"].tolist()


def test_unknown_words_are_spelled(tokenizer):
    text = "Où est le cœur? 42 zebras <3 \U0001f98a"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer.tokenize(" circle")) == 1
    assert tokenizer.unk_token is None


def test_generate_writes_a_folder_that_training_reads(tmp_path, processor):
    main(["generate", "--output", str(tmp_path / "a"), "--rows", "6", "--seed", "9"])
    main(["generate", "--output", str(tmp_path / "b"), "--rows", "6", "--seed", "9"])
    assert (tmp_path / "a" / "data.jsonl").read_text() == (tmp_path / "b" / "data.jsonl").read_text()
    lines = [json.loads(line) for line in (tmp_path / "a" / "data.jsonl").read_text().splitlines()]
    assert all(len(line["messages"]) == 2 * len(line["skills"]) for line in lines)
    rows = VideoLlama2Dataset(str(tmp_path / "a" / "data.jsonl"), processor)
    assert len(rows) == 6
    assert all((rows[i]["labels"] != -100).any() for i in range(6))


def test_captions_are_what_the_first_stages_train_on(tmp_path, processor, capsys):
    output = str(tmp_path / "captions")
    main(["generate", "--output", output, "--rows", "4", "--captions", "--medium", "video", "--medium", "image"])
    rows = VideoLlama2Dataset(f"{output}/data.jsonl", processor, prompt_format="plain")
    assert all((rows[i]["labels"] != -100).any() for i in range(4))
    with pytest.raises(SystemExit):
        main(["generate", "--output", str(tmp_path / "none"), "--rows", "1", "--captions"])
    assert "A text has no caption" in capsys.readouterr().err


def test_command_refuses_what_it_does_not_know(tmp_path, capsys, starts_tiny):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--output", str(tmp_path), "--rows", "1", "--medium", "smell"])
    assert stopped.value.code == 2 and "smell" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no stage '9'"):
        stages.run_stage("9", tmp_path)
    with pytest.raises(FileNotFoundError, match="stage 2 follows stage 1"):
        stages.load_before("2", tmp_path)
    with pytest.raises(ValueError, match="no skill 'smell' to drill; choose from colour, "):
        stages.run_stage("drills", tmp_path, drills={"smell": 0.5})
    with pytest.raises(ValueError, match="no skill 'smell' to drill"):
        rows.draw_drill(np.random.default_rng(0), "smell")
    with pytest.raises(ValueError, match="Stage 5 has no drills; they are a stage of their own: drills"):
        stages.run_stage("5", tmp_path, drills={"count": 0.5})
    with pytest.raises(ValueError, match="from 0 to 1 together; got .*0.6.*0.5"):
        stages.run_stage("drills", tmp_path, drills={"count": 0.6, "match": 0.5})
    with pytest.raises(ValueError, match="Stage text begins with new weights"):
        stages.run_stage("text", tmp_path, start=tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is missing; name the folder of a model"):
        stages.run_stage("5", tmp_path, start=tmp_path / "nowhere")
    for wrong, says in (
        (["--drill", "count=nan", "--stage", "drills"], "from 0 to 1 together; got {'count': nan}"),
        (["--drill", "count", "--stage", "drills"], "A drill is SKILL=SHARE, such as synchrony=0.4; got 'count'"),
        (["--drill", "count=0.5"], "Drills are for the stage of that name; add --stage drills"),
        (["--model", "model"], "is for one stage; name it with --stage"),
    ):
        with pytest.raises(SystemExit):
            main(["train", "--output", str(tmp_path / "x"), *wrong])
        assert says in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"untrained"}


def tiny(tokenizer, **kwargs):
    """The small model's configuration, smaller."""
    text = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "vocab_size": build_config(tokenizer).text_config.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "vision_use_head": False,
    }
    return build_config(
        tokenizer, text_config=text, vision_config=vision, audio_config=AUDIO_SIZES, connector_depth=1, **kwargs
    )


@pytest.fixture
def starts_tiny(monkeypatch, tokenizer):
    """Stages start from a smaller model."""

    def save_untrained(folder):
        config = tiny(tokenizer)
        build_processor(config, tokenizer).save_pretrained(folder)
        build_model(config).save_pretrained(folder)

    monkeypatch.setattr(small_model, "save_untrained", save_untrained)


def test_every_stage_trains_its_parts_and_the_next_begins_with_them(tmp_path, starts_tiny, monkeypatch):
    parts = {"vision": "vision_tower", "audio": "audio_tower", "text": "language_model"}
    for name in stages.STAGES:
        assert stages.run_stage(name, tmp_path, steps=2, batch_size=2, cpu=True)
        before, _ = stages.load_before(name, tmp_path)
        after = VideoLlama2ForConditionalGeneration.from_pretrained(tmp_path / name / "model", dtype=torch.float32)
        old, new = before.model.state_dict(), after.model.state_dict()
        changed = {key.split(".")[0] for key in new if not torch.equal(old[key], new[key])}
        assert changed == {
            "1": {"mm_projector"},
            "2": {"mm_projector", "language_model"},
            "3": {"mm_projector_a"},
            "4": {"mm_projector_a", "audio_tower"},
            "5": {"mm_projector", "language_model", "mm_projector_a", "audio_tower"},
            "drills": {"language_model"},
        }.get(name, {parts.get(name)})
        assert (tmp_path / name / "log.jsonl").is_file()
    assert VideoLlama2Processor.from_pretrained(tmp_path / "5" / "model").feature_extractor.chunk_length == 4

    # Drills go on from any model, with any shares; the other rows ask for everything.
    asked = []
    for kind in ("draw_row", "draw_drill"):
        draw = getattr(stages, kind)
        monkeypatch.setattr(stages, kind, lambda *a, draw=draw, **k: asked.append(draw(*a, **k)) or asked[-1])
    options = ["--model", str(tmp_path / "2" / "model"), "--drill", "synchrony=0.4", "--drill", "count=0.2"]
    small = ["--stage", "drills", "--steps", "2", "--batch-size", "12", "--cpu"]
    main(["train", "--output", str(tmp_path / "drilled"), *small, *options])
    folders = tmp_path / "drilled" / "drills" / "model", tmp_path / "2" / "model"
    drilled, before = (VideoLlama2ForConditionalGeneration.from_pretrained(path).state_dict() for path in folders)
    moved = {name: (drilled[name] - before[name]).abs().max() for name in before}
    assert 0 < max(moved.values()) < 0.01
    assert all("language_model" in name or name == "lm_head.weight" for name in before if moved[name] > 0)
    kinds = Counter(" ".join(sorted({question.skill for question in row.questions})) for row in asked)
    assert kinds["synchrony"] > 4 and kinds["count"] > 1 and len(kinds) > 6 and sum(kinds.values()) == 24

    main(["export", "--model", str(tmp_path / "5" / "model"), "--output", str(tmp_path / "shipped")])
    assert not [path for path in (tmp_path / "shipped").iterdir() if path.suffix == ".py"]
    assert not [path for path in (tmp_path / "shipped").glob("*.json") if "auto_map" in path.read_text()]
    shipped = AutoModelForMultimodalLM.from_pretrained(tmp_path / "shipped", dtype="auto")
    assert shipped.dtype == torch.bfloat16
    assert type(AutoProcessor.from_pretrained(tmp_path / "shipped")) is VideoLlama2Processor

    monkeypatch.setattr(ablation, "CONNECTORS", {"spatial_pool": "pooling", "frame_mlp2x_gelu": "every frame"})
    results = ablation.run_ablation(tmp_path, seeds=1, steps=2, batch_size=2, num_rows=3, per_skill=1, cpu=True)
    assert [results[name][0]["tokens"] for name in ("spatial_pool", "frame_mlp2x_gelu")] == [8 * 16, 8 * 64]
    # It goes on where it was, with the same settings only.
    settings = {"seeds": 1, "steps": 2, "batch_size": 2, "num_rows": 3, "per_skill": 1, "cpu": True}
    assert results == ablation.run_ablation(tmp_path, **settings)
    with pytest.raises(ValueError, match="steps 2, .* and steps 3, .* are asked for"):
        ablation.run_ablation(tmp_path, **{**settings, "steps": 3})
    assert "| 128 | " in ablation.format_ablation(results)


def test_separate_questions_are_answered_as_if_alone(tokenizer):
    config = tiny(tokenizer)
    model, tokenize = build_model(config).eval(), RowTokenizer(tokenizer, config)
    rows = [draw_row(np.random.default_rng([15, i]), {medium: 1}) for i, medium in enumerate(MEDIA[:4])]
    texts = [draw_row(np.random.default_rng([16, i]), {"text": 1}) for i in range(8)]
    rows += [next(row for row in texts if row.context.endswith(".")), next(row for row in texts if "," in row.context)]
    assert max(len(row.questions) for row in rows) > 2
    together = [(row, True) for row in rows] + [(row, False) for row in texts[:2]]
    data = [{"row": row, **tokenize(row, separate)} for row, separate in together]
    batch = WorldCollator(tokenizer.pad_token_id)(data)
    batch |= draw_media(batch.pop("drawn"), 64, config.audio_config.num_mel_bins)
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation({"text_config": attention})
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits
        for given, item, (row, separate) in zip(logits, data, together):
            branches = item.get("branches")
            for branch, question in enumerate(row.questions if separate else [None], 1):
                single = row if question is None else replace(row, questions=(question,))
                alone = WorldCollator(tokenizer.pad_token_id)([{"row": single, **tokenize(single)}])
                alone |= draw_media(alone.pop("drawn"), 64, config.audio_config.num_mel_bins)
                with torch.no_grad():
                    expected = model(**alone, use_cache=False).logits[0]
                own = given[: len(item["labels"])]
                if branches is not None:
                    own = own[(branches == 0) | (branches == branch)]
                torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)


def test_questions_are_separate_behind_what_they_share(tokenizer):
    config = tiny(tokenizer)
    data = WorldDataset(RowTokenizer(tokenizer, config), 60, 3, draw_row, separate=1.0)
    items = [data[i] for i in range(60)]
    shares = [item["row"].medium != "text" or item["row"].context != "" for item in items]
    assert ["branches" in item for item in items] == shares and not all(shares)
    assert any(item["row"].medium == "text" and "branches" in item for item in items)


def test_a_batch_in_pieces_gives_the_gradient_of_the_whole(tmp_path, tokenizer, monkeypatch):
    config = tiny(tokenizer)
    data = WorldDataset(RowTokenizer(tokenizer, config), 7, 13, draw_row)
    rows, gradients, losses = [data[i] for i in range(7)], [], []
    monkeypatch.setattr(dataset, "_imitate_codec", lambda pixels: pixels)  # which is random
    for pieces in (1, 3):
        batch = WorldCollator(tokenizer.pad_token_id, pieces=pieces)(rows)
        if pieces > 1:
            lengths = [piece["input_ids"].shape[1] for piece in batch["pieces"]]
            assert lengths == sorted(lengths) and sum(len(piece["labels"]) for piece in batch["pieces"]) == 7
        arguments = VideoLlama2TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
        model = build_model(config)
        trainer = WorldTrainer(model=model, args=arguments)
        trainer.current_gradient_accumulation_steps = 1
        count = (batch["labels"] != -100).sum()
        losses.append(trainer.training_step(model, batch, count).item())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=2e-5, rtol=1e-3)


@pytest.mark.slow
def test_a_stage_runs_in_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"]
    command += ["-m", "videollama2_hf.synthetic", "train", "--output", str(tmp_path), "--stage", "text"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--steps", "2", "--batch-size", "4", "--cpu"], check=True, env=environment)
    assert VideoLlama2ForConditionalGeneration.from_pretrained(tmp_path / "text" / "model").config.num_frames == 8
    lines = [json.loads(line) for line in (tmp_path / "text" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2]


@pytest.mark.parametrize("name", ["audio", "text"])
def test_a_stage_that_is_stopped_goes_on_to_the_same_weights(tmp_path, starts_tiny, name):
    assert stages.run_stage(name, tmp_path / "a", steps=3, batch_size=2, cpu=True)
    while not stages.run_stage(name, tmp_path / "b", steps=3, batch_size=2, minutes=0, cpu=True):
        assert not (tmp_path / "b" / name / "model").exists()
    models = [VideoLlama2ForConditionalGeneration.from_pretrained(tmp_path / run / name / "model") for run in "ab"]
    for one, other in zip(*(model.state_dict().values() for model in models)):
        assert torch.equal(one, other)


def test_the_table_asks_every_kind_and_counts_what_greedy_generation_says(tmp_path, tokenizer):
    config = tiny(tokenizer)
    processor, model = build_processor(config, tokenizer), build_model(config).eval()
    results = evaluation.evaluate(model, processor, per_skill=2)
    assert len(evaluation.evaluate(model, processor, per_skill=1, from_files=False)) == len(results)
    assert {result.skill for result in results} >= {*SKILLS, "multiple choice", "image: count"}
    assert all(result.count == 2 and 0 <= result.accuracy <= 1 for result in results)
    assert "| match | 2 |" in evaluation.format_table(results)

    # Overfit a few questions, so that some answers are right and some are not.
    rows = [draw_row(np.random.default_rng([11, i]), {"text": 1}, captions=0, max_turns=1) for i in range(24)]
    data = WorldDataset(RowTokenizer(tokenizer, config), 24, 11, lambda g: draw_row(g, {"text": 1}, False, 0, 1))
    batch = WorldCollator(tokenizer.pad_token_id)([data[i] for i in range(12)])
    del batch["drawn"]
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(40):
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    right = evaluation.Evaluator(model, processor, tmp_path).answers_rightly(rows, [{}] * len(rows))
    for row, is_right in zip(rows, right):
        inputs = processor.apply_chat_template(
            to_messages(row)[:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert (answer == row.questions[0].answer) == is_right
    assert 0 < sum(right) < len(right)


def test_frames_of_a_batch_are_at_one_time_and_of_trained_compositions():
    data = ClipDataset(50, 3, ("count", "change"), beeps=1.0)
    assert all(data[i].num_beeps for i in range(5))
    assert data[7] == data[7]
    assert collate_frames([data[i] for i in range(4)])["drawn"]["place"].shape[:2] == (4, 1)
