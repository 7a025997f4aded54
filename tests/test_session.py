"""Sessions: media encoded once, conversations that go on from the cache, and the same answers as without either."""

import threading

import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

from golden_utils import GOLDENS
from tiny_models import make_model
from videollama2_hf.session import EncodedMedia, Session


CLIP = {"type": "video", "video": str(GOLDENS / "processing_av" / "av_3s.mp4")}
SOUND = {"type": "audio", "audio": str(GOLDENS / "processing_av" / "wav" / "noise_2s_16k.flac")}


@pytest.fixture(scope="module")
def parts():
    checkpoint = GOLDENS / "qwen2_siglip_beats_av" / "checkpoint"
    model = AutoModelForMultimodalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture
def session(parts):
    return Session(*parts)


def answer_from_scratch(parts, messages, **generation):
    model, processor = parts
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, do_sample=False, **generation)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip(), inputs


def count_calls(model):
    """How often each tower runs."""
    calls = {"vision_tower": 0, "audio_tower": 0}
    # The vision tower's own forward is not called; its embeddings always are.
    modules = {"vision_tower": model.model.vision_tower.embeddings, "audio_tower": model.model.audio_tower}
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    return calls


def test_turns_equal_those_from_scratch_and_read_only_what_is_new(parts, session):
    calls = count_calls(session.model)
    chat, messages = session.chat(), []
    turns = [("What is it?", [CLIP]), ("And then?", []), ("Is this the same?", [SOUND]), ("Why?", [])]
    for number, (question, media) in enumerate(turns):
        answer = chat.ask(question, *media, max_new_tokens=6)
        seen = dict(calls)
        messages.append({"role": "user", "content": [*media, {"type": "text", "text": question}]})
        expected, inputs = answer_from_scratch(parts, messages, max_new_tokens=6)
        messages.append({"role": "assistant", "content": expected})
        assert answer.text == expected
        assert answer.num_prompt_tokens == inputs["input_ids"].shape[1]
        assert answer.finish_reason == "length" and answer.num_new_tokens == 6
        assert 0 < answer.first_token_seconds <= answer.seconds
        if number == 0:
            assert answer.num_reused_tokens == 0
        else:  # all but the last turn and this one
            assert answer.num_reused_tokens > 1400
        calls.update(seen)
    assert calls == {"vision_tower": 1, "audio_tower": 2}
    assert chat.messages == messages


def test_streaming_says_the_same(session):
    chat = session.chat()
    pieces, stream = [], chat.stream("What is it?", CLIP, max_new_tokens=8)
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            answer = end.value
            break
    assert "".join(pieces).strip() == answer.text == session.ask("What is it?", CLIP, max_new_tokens=8).text


def test_a_stream_that_is_closed_leaves_no_turn(session):
    chat = session.chat()
    first = chat.ask("What is it?", CLIP, max_new_tokens=4)
    stream = chat.stream("And then?", max_new_tokens=200)
    next(stream)
    stream.close()
    assert len(chat.messages) == 2 and threading.active_count() < 10
    again = chat.ask("And then?", max_new_tokens=4)
    fresh = session.chat()
    assert fresh.ask("What is it?", CLIP, max_new_tokens=4).text == first.text
    assert fresh.ask("And then?", max_new_tokens=4).text == again.text


def test_an_error_reaches_the_caller_and_leaves_no_turn(session):
    chat = session.chat()
    with pytest.raises(ValueError, match="max_new_tokens"):
        chat.ask("What is it?", CLIP, max_new_tokens=0)
    assert not chat.messages
    assert chat.ask("What is it?", CLIP, max_new_tokens=3).text


def test_many_questions_about_one_clip(session):
    calls = count_calls(session.model)
    lengths = []
    language_model = session.model.model.language_model
    hook = language_model.register_forward_pre_hook(
        lambda module, args, inputs: lengths.append(tuple(inputs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    questions = ["What is it?", "Is there any sound, and which?", "Why?"]
    answers = session.ask_many(questions, CLIP, max_new_tokens=6)
    hook.remove()
    assert calls == {"vision_tower": 1, "audio_tower": 1}
    # The clip is read once, and then only what differs.
    assert lengths[0][0] == 1 and lengths[0][1] > 1400
    assert lengths[1][0] == 3 and lengths[1][1] < 50
    alone = [session.ask(question, CLIP, max_new_tokens=6) for question in questions]
    assert [answer.text for answer in answers] == [answer.text for answer in alone]
    assert [answer.num_prompt_tokens for answer in answers] == [answer.num_prompt_tokens for answer in alone]
    assert session.ask_many([], CLIP) == []
    assert session.ask_many(questions[:1], CLIP, max_new_tokens=6)[0].text == alone[0].text


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"repetition_penalty": 1.5}])
def test_many_questions_however_they_are_generated(session, settings):
    questions = ["What is it?", "Is there any sound, and which?"]
    content = [[CLIP, {"type": "text", "text": question}] for question in questions]
    apart = [
        session.answer([[{"role": "user", "content": blocks}]], max_new_tokens=6, **settings) for blocks in content
    ]
    together = session.ask_many(questions, CLIP, max_new_tokens=6, **settings)
    assert [answer.text for answer in together] == [answer.text for [answer] in apart]


def test_a_sliding_window_reads_every_prompt_whole(session, monkeypatch):
    config = session.model.config.get_text_config()
    monkeypatch.setattr(config, "layer_types", ["sliding_attention"] * config.num_hidden_layers)
    monkeypatch.setattr(config, "sliding_window", 4096)
    monkeypatch.setattr(session.model.model.language_model, "has_sliding_layers", True)
    questions = ["What is it?", "Is there any sound, and which?"]
    lengths = []
    hook = session.model.model.language_model.register_forward_pre_hook(
        lambda module, args, inputs: lengths.append(tuple(inputs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    answers = session.ask_many(questions, CLIP, max_new_tokens=4)
    hook.remove()
    assert lengths[0][0] == 2 and lengths[0][1] > 1400
    assert [answer.text for answer in answers] == [session.ask(q, CLIP, max_new_tokens=4).text for q in questions]


def test_a_session_gives_one_answer_to_a_question(session):
    with pytest.raises(ValueError, match="num_return_sequences. is 2: call .model.generate"):
        session.ask_many(["What is it?"], CLIP, num_beams=2, num_return_sequences=2)


def test_another_clip_in_the_place_of_the_first(session):
    """Placeholders look the same whatever the medium is."""
    chat = session.chat()
    chat.ask("What is it?", CLIP, max_new_tokens=4)
    part = {**CLIP, "start": 1.0, "end": 2.0}
    chat.messages = []
    assert (
        chat.ask("What is it?", part, max_new_tokens=4).text == session.ask("What is it?", part, max_new_tokens=4).text
    )


def test_encoded_media_can_be_kept(session, parts, tmp_path):
    encoded = session.encode(CLIP)
    assert [name for name, _ in encoded.features] == ["video", "audio"] and encoded.num_tokens > 1400
    encoded.save(tmp_path / "clip.safetensors")
    loaded = EncodedMedia.load(tmp_path / "clip.safetensors")
    fresh = Session(*parts)
    calls = count_calls(fresh.model)
    answer = fresh.ask("What is it?", {"type": "video", "video": loaded}, max_new_tokens=6)
    assert not any(calls.values())
    assert answer.text == session.ask("What is it?", CLIP, max_new_tokens=6).text
    fresh.processor.video_processor.num_frames = 3
    try:
        with pytest.raises(ValueError, match="Encode them again"):
            Session(*parts).ask("What is it?", {"type": "video", "video": loaded})
    finally:
        fresh.processor.video_processor.num_frames = parts[0].config.num_frames


def test_a_changed_file_is_read_again(session, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes((GOLDENS / "processing_av" / "av_3s.mp4").read_bytes())
    first = session.encode({"type": "video", "video": str(path)})
    assert session.encode({"type": "video", "video": str(path)}) is first
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    assert session.encode({"type": "video", "video": str(path)}) is not first


def test_least_recently_used_media_go(parts):
    session = Session(*parts, max_encoded=1)
    first = session.encode(SOUND)
    session.encode({**SOUND, "end": 1.0})
    assert session.encode(SOUND) is not first


def test_language_model_with_a_sliding_window(parts):
    """What a window dropped is not in the cache, so the conversation is read again."""
    processor = parts[1]
    model = make_model(
        "gemma2", connector_depth=1, num_frames=16, text_config={"vocab_size": 500, "sliding_window": 8}
    )
    config = model.config
    config.image_token_id, config.video_token_id = processor.image_token_id, processor.video_token_id
    config.audio_token_id = processor.audio_token_id
    chat, messages = Session(model, processor).chat(), []
    for question in ("What is it?", "And then?", "Why?"):
        answer = chat.ask(question, max_new_tokens=5)
        messages.append({"role": "user", "content": question})
        expected, _ = answer_from_scratch((model, processor), messages, max_new_tokens=5)
        messages.append({"role": "assistant", "content": expected})
        assert answer.text == expected
