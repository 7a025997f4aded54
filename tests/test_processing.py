"""The processor: prompts, ids and label masks against the original's recordings; media, batches, policies, errors."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    ByT5Tokenizer,
)

from processing_utils import (
    AUDIO_TOKENS,
    FRAMES,
    GOLDENS,
    IMAGE,
    ORIGINAL_IDS,
    PROMPTS,
    SIZE,
    SOUND,
    VIDEO_TOKENS,
    block,
    encode,
    make_processor,
    user,
    write_media,
)
from videollama2_hf import VideoLlama2Config
from videollama2_hf.checkpoint_videollama2 import (
    MISTRAL_SYSTEM_MESSAGE,
    add_placeholder_tokens,
    convert_original_config,
    load_original_image_processor_config,
)
from videollama2_hf.media_videollama2 import MediaError, VideoClip
from videollama2_hf.processing_videollama2 import VideoLlama2Processor
from videollama2_hf.prompt_videollama2 import build_chat_template
from videollama2_hf.tokenization_videollama2 import load_sentencepiece_tokenizer, load_tokenizer


def load_processor(checkpoint: Path, **kwargs) -> tuple[VideoLlama2Processor, VideoLlama2Config]:
    """The processor of an original checkpoint."""
    config_dict = json.loads((checkpoint / "config.json").read_text())
    config = VideoLlama2Config(**convert_original_config(config_dict, str(checkpoint)))
    preprocessor = None
    if config.vision_config.model_type != "languagebind_vision":
        preprocessor = load_original_image_processor_config(config_dict, str(checkpoint))
    return VideoLlama2Processor.from_config(config, load_tokenizer(checkpoint), preprocessor, **kwargs), config


@pytest.fixture(scope="module")
def hearing():
    return make_processor()


@pytest.fixture(scope="module")
def deaf():
    return make_processor(has_audio=False)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


def runs(processor, ids, *others) -> list[tuple]:
    """Ids (and what else goes with them) with every run of a placeholder as one entry: the original's negative id."""
    tokens = {processor.tokenizer.convert_tokens_to_ids(token): value for token, value in ORIGINAL_IDS.items()}
    result = []
    for entry in zip(*(values.tolist() if hasattr(values, "tolist") else values for values in (ids, *others))):
        value = tokens.get(entry[0], entry[0])
        if value >= 0 or not result or result[-1][0] != value:
            result.append((value, *entry[1:]))
    return result


def collapse(processor, ids) -> list[int]:
    return [value for (value,) in runs(processor, ids)]


def typed(content: str, after_media: str = "\n") -> list[dict]:
    """The original's strings as typed content, with media in memory."""
    blocks = []
    for piece in re.split("(<image>|<video>|<audio>)", content):
        if piece in ORIGINAL_IDS:
            blocks.append(block(piece[1:-1]))
        elif piece:
            after = blocks and blocks[-1]["type"] != "text"
            blocks.append({"type": "text", "text": piece.removeprefix(after_media) if after else piece})
    return blocks


# Prompts and ids


@pytest.mark.parametrize("template", PROMPTS)
def test_prompts_and_ids(template):
    processor = make_processor(template)
    checked = 0
    for name, case in PROMPTS[template]["cases"].items():
        if "messages" not in case:
            continue
        kwargs = {"add_generation_prompt": name.endswith("True"), "load_audio_from_video": False}
        assert processor.apply_chat_template(case["messages"], **kwargs) == case["prompt"]
        messages = [{**message, "content": typed(message["content"])} for message in case["messages"]]
        if case["modal"] is not None:
            assert processor.apply_chat_template(messages, **kwargs) == case["prompt"]
        ids = encode(processor, messages, **kwargs).input_ids[0]
        assert collapse(processor, ids) == case["ids_fast"] == case["ids_slow"]
        checked += 1
    assert checked == 8


@pytest.mark.parametrize("template", PROMPTS)
def test_prompts_of_mm_infer(template):
    """The system message of the original's inference, by the language model's type."""
    checked = 0
    for name, case in PROMPTS[template]["cases"].items():
        if not name.startswith("mm_infer"):
            continue
        _, model_type, modality, turns = name.split(".")
        has_system_message = model_type in ("videollama2", "videollama2_mistral", "videollama2_mixtral")
        processor = make_processor(template, MISTRAL_SYSTEM_MESSAGE if has_system_message else None)
        instruction = {"video": "What is shown?", "image": "Describe.", "text": "Hello."}[modality]
        if modality == "text":
            messages = [{"role": "user", "content": "\n" + instruction}]
        else:
            messages = [user(block(modality), instruction)]
        if turns == "multi":
            messages = [user(block(modality), "Q1"), {"role": "assistant", "content": "A1"}, user("Q2")]
        kwargs = {"add_generation_prompt": True, "load_audio_from_video": False}
        if "error" in case:
            # The original stops at templates that refuse system messages; here the message is left out.
            assert template == "mistral_strict_v0.2" and has_system_message
            bare = make_processor(template).apply_chat_template(messages, **kwargs)
            assert processor.apply_chat_template(messages, **kwargs) == bare
            continue
        assert processor.apply_chat_template(messages, **kwargs) == case["prompt"]
        assert collapse(processor, encode(processor, messages, **kwargs).input_ids[0]) == case["ids"]
        training = processor.apply_chat_template(messages, add_generation_prompt=True, for_training=True)
        assert "helpful, respectful" not in training
        checked += 1
    assert checked >= 8


@pytest.mark.parametrize("job", ["mistral_clip_stc_8f", "qwen2_siglip_stcv35_16f", "qwen2_siglip_beats_av"])
def test_mm_infer_of_checkpoints(job):
    """From an original checkpoint alone: prompt, ids, number of features, and the text of the recorded answer."""
    processor, config = load_processor(GOLDENS / job / "checkpoint")
    cases = json.loads((GOLDENS / job / "manifest.json").read_text())["cases"]
    for name, case in cases.items():
        if not name.startswith("mm_infer"):
            continue
        messages = case["instruct"]
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        first, *others = messages
        if case["modal"] == "text":
            first = {"role": "user", "content": "\n" + first["content"]}
        else:
            first = user(block(case["modal"]), first["content"])
        heard = name == "mm_infer_va"
        inputs = encode(processor, [first, *others], load_audio_from_video=heard)
        text = processor.apply_chat_template([first, *others], add_generation_prompt=True)
        assert text == case["prompt"]
        ids = inputs.input_ids[0].tolist()
        expected = [-201, -202] if heard else []
        collapsed = collapse(processor, ids)
        if heard:  # the original has one placeholder for both
            position = collapsed.index(-201)
            assert collapsed[position : position + 2] == expected
            del collapsed[position + 1]
        assert collapsed == case["input_ids"]
        if case["modal"] in ("image", "video"):
            count = config.num_visual_tokens(case["modal"])
            assert ids.count(processor.tokenizer.convert_tokens_to_ids(f"<{case['modal']}>")) == count
        # SentencePiece writes the readable bytes of broken UTF-8, the fast tokenizer none; one recording has some.
        if (job, name) != ("mistral_clip_stc_8f", "mm_infer_image"):
            answer = processor.decode(case["output_ids"], skip_special_tokens=True).strip()
            assert answer == case["output_text"]


@pytest.mark.parametrize("branch", ["training", "training_av"])
def test_assistant_masks_equal_the_labels(branch):
    """`preprocess` of both branches: what is trained on is what the assistant says, to the end of its turn."""
    recorded = json.loads((GOLDENS / branch / "label_masking.json").read_text())
    templates = {"mistral_strict": "mistral_strict_v0.2"}
    for key, cases in recorded.items():
        name = key.split(".")[0]
        processor = make_processor(templates.get(name, name), "a system message that training leaves out")
        for case in cases.values():
            turns = case["after_preprocess_multimodal"]
            turns = turns if turns[0]["from"] == "human" else turns[1:]
            roles = {"human": "user", "gpt": "assistant"}
            messages = [{"role": roles[turn["from"]], "content": typed(turn["value"])} for turn in turns]
            inputs = encode(
                processor,
                messages,
                add_generation_prompt=False,
                return_assistant_tokens_mask=True,
                load_audio_from_video=False,
            )
            ids, mask = zip(*runs(processor, inputs.input_ids[0], inputs.assistant_masks[0]))
            assert list(ids) == case["input_ids"]
            assert list(mask) == [int(label != -100) for label in case["labels"]]


@pytest.fixture(scope="module")
def video_llava():
    folder = GOLDENS / "video_llava"
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest, load_file(folder / "goldens.safetensors"), load_processor(folder / "tiny-video-llava-7b")


def in_original_terms(processor, ids, *others, image_tokens=4, frame_tokens=5) -> list[tuple]:
    """Ids with one -200 for an image and for each frame of a video, as Video-LLaVA writes them."""
    image_id, video_id, _ = processor.tokenizer.convert_tokens_to_ids(list(ORIGINAL_IDS))
    entries, result = list(zip(ids.tolist(), *(other.tolist() for other in others))), []
    while entries:
        length = {image_id: image_tokens, video_id: frame_tokens}.get(entries[0][0])
        if length is None:
            result.append(entries.pop(0))
        else:
            assert len({entry[0] for entry in entries[:length]}) == 1
            result.append((-200, *entries[0][1:]))
            del entries[:length]
    return result


@pytest.mark.parametrize("row", ["image", "video", "video_image", "two_images", "text"])
def test_video_llava_rows(row, video_llava):
    manifest, recorded, (processor, config) = video_llava
    recording = manifest["rows"][row]
    question = recording["prompt"].split("USER: ")[1].removesuffix(" ASSISTANT:")
    question = question.replace("<image>" * 8, "<video>")
    inputs = encode(processor, [{"role": "user", "content": typed(question)}])
    ids = [entry[0] for entry in in_original_terms(processor, inputs.input_ids[0])]
    assert ids == recorded[f"rows.{row}.input_ids"][0].tolist()
    assert inputs.input_ids.shape[1] == recording["sequence_length"]
    if "video" in row:
        assert inputs.pixel_values_videos.shape == (1, 8, 3, 28, 28)
        assert (inputs.input_ids == config.video_token_id).sum() == config.num_visual_tokens("video") == 40


@pytest.mark.parametrize("legacy", [False, True])
def test_video_llava_dialogs(legacy, video_llava):
    """Ids and labels of training, with the tokenizer in both of its modes."""
    manifest, recorded, (processor, config) = video_llava
    if legacy:
        tokenizer = load_sentencepiece_tokenizer(
            GOLDENS / "video_llava" / "tiny-video-llava-7b" / "tokenizer.model", legacy=True
        )
        processor = VideoLlama2Processor.from_config(config, tokenizer)
    for name, dialog in manifest["dialogs"].items():
        roles = {"human": "user", "gpt": "assistant"}
        # The line break is in the recorded text.
        messages = [{"role": roles[role], "content": typed(text, after_media="")} for role, text in dialog["turns"]]
        inputs = encode(processor, messages, add_generation_prompt=False, return_assistant_tokens_mask=True)
        entries = in_original_terms(processor, inputs.input_ids[0], inputs.assistant_masks[0])
        key = f"dialogs.{name}{'.legacy' if legacy else ''}"
        assert [ids for ids, _ in entries] == recorded[f"{key}.input_ids"].tolist()
        assert [mask for _, mask in entries] == (recorded[f"{key}.labels"] != -100).int().tolist()


def test_video_llava_turns_on_its_own_transforms(video_llava):
    processor = video_llava[2][0]
    assert processor.image_processor.antialias is False and processor.video_processor.antialias is False
    assert processor.video_processor.sample_endpoints and not processor.image_processor.do_pad_to_square
    assert (processor.image_class_tokens, processor.video_class_tokens, processor.image_num_frames) == (0, 1, 1)


@pytest.mark.parametrize(
    "connector", ["stc_connector", "stc_connector_v35", "stp_connector", "spatial_pool", "linear"]
)
@pytest.mark.parametrize("num_frames", [4, 16])
def test_numbers_of_tokens_are_the_configuration_s(connector, num_frames):
    vision = {"model_type": "siglip_vision_model", "hidden_size": 48, "image_size": 70, "patch_size": 14}
    text = {"model_type": "qwen2", "hidden_size": 48, "max_position_embeddings": 4096}
    tokenizer = load_tokenizer(GOLDENS / "processing" / "tokenizers" / "qwen2")
    add_placeholder_tokens(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(list(ORIGINAL_IDS))
    config = VideoLlama2Config(
        vision_config=vision,
        text_config=text,
        connector_type=connector,
        num_frames=num_frames,
        **dict(zip(("image_token_id", "video_token_id", "audio_token_id"), ids)),
    )
    processor = VideoLlama2Processor.from_config(config, tokenizer)
    inputs = encode(processor, [user(block("image"), block("video"), block("video", num_frames=6), "What?")])
    assert [video.shape for video in inputs.pixel_values_videos] == [(num_frames, 3, 70, 70), (6, 3, 70, 70)]
    ids = inputs.input_ids[0].tolist()
    assert ids.count(config.image_token_id) == config.num_visual_tokens("image")
    assert ids.count(config.video_token_id) == config.num_visual_tokens("video") + config.num_visual_tokens("video", 6)
    assert processor.context_length == 4096 and not processor.has_audio
    config.audio_token_id = 7
    with pytest.raises(ValueError, match="config.audio_token_id is 7, but <audio> has the id"):
        VideoLlama2Processor.from_config(config, tokenizer)


# Text


def test_placeholder_tokens_in_text_are_text(hearing):
    text = "Is <video> a tag?  And <image><audio> <|im_end|>"
    inputs = encode(
        hearing, [user(block("image"), text), {"role": "assistant", "content": [user(text)["content"][0]]}]
    )
    ids = inputs.input_ids[0]
    assert [value for value in collapse(hearing, ids) if value < 0] == [-200]
    # The tokenizer without the placeholder tokens is the original's.
    original = load_tokenizer(GOLDENS / "processing" / "tokenizers" / "qwen2")
    prompt = hearing.apply_chat_template([user(block("image"), text), {"role": "assistant", "content": ""}])
    prompt = prompt.replace("\ufdd0", "<").replace("<image>\n", "\n", 1)
    prompt = prompt.removesuffix("<|im_end|>\n") + text + "<|im_end|>\n<|im_start|>assistant\n"
    assert ids[ids != hearing.image_token_id].tolist() == original(prompt).input_ids
    # In a string, which is taken as it is, they are placeholders.
    with pytest.raises(ValueError, match="there are 1 <video> tokens and 0 videos"):
        encode(hearing, [{"role": "user", "content": "Is <video> a tag?"}])
    # A prompt can be rendered first and processed later.
    rendered = hearing.apply_chat_template([user(block("image"), text)], add_generation_prompt=True)
    assert (
        hearing(text=rendered, images=IMAGE).input_ids
        == encode(hearing, [user(block("image"), text)]).input_ids.tolist()
    )


def test_media_in_reading_order_and_line_breaks(hearing):
    messages = [
        user(block("video"), block("image"), "Compare.", block("audio"), " and", block("image"), "\nthis"),
        {"role": "assistant", "content": "They differ."},
        user("Look", block("audio")),
    ]
    prompt = hearing.apply_chat_template(messages, load_audio_from_video=False)
    assert "user\n<video><image>\nCompare.<audio> and<image>\nthis<|im_end|>" in prompt
    assert prompt.endswith("user\nLook<audio><|im_end|>\n")
    inputs = encode(hearing, messages, load_audio_from_video=False)
    assert [i for i in collapse(hearing, inputs.input_ids[0]) if i < 0] == [-201, -200, -202, -200, -202]
    assert (len(inputs.pixel_values), len(inputs.pixel_values_videos), len(inputs.input_features)) == (2, 1, 2)
    with pytest.raises(Exception, match="Content is text, image, video or audio, not movie"):
        hearing.apply_chat_template([user({"type": "movie"})])
    with pytest.raises(ValueError, match="A content block needs a type"):
        hearing.apply_chat_template([user({"text": "no type"})])


def test_padding_side_follows_the_purpose(hearing):
    short, long = [user("Hi")], [user("A somewhat longer question?")]
    for generate, side in ((True, "left"), (False, "right")):
        inputs = encode(hearing, short, long, add_generation_prompt=generate)
        column = 0 if side == "left" else -1
        assert inputs.attention_mask[:, column].tolist() == [0, 1]
        assert inputs.input_ids[0, column] == hearing.tokenizer.pad_token_id
        alone = encode(hearing, short, add_generation_prompt=generate)
        assert inputs.input_ids[0][inputs.attention_mask[0].bool()].tolist() == alone.input_ids[0].tolist()
        for kwargs in ({"padding_side": "right"}, {"text_kwargs": {"padding_side": "right"}}):
            inputs = encode(hearing, short, long, add_generation_prompt=generate, processor_kwargs=kwargs)
            assert inputs.attention_mask[:, -1].tolist() == [0, 1]
    prefilled = (
        [user("Hi"), {"role": "assistant", "content": "I"}],
        [user("Hello there"), {"role": "assistant", "content": "I am"}],
    )
    inputs = encode(hearing, *prefilled, add_generation_prompt=False, continue_final_message=True)
    assert inputs.attention_mask[:, 0].tolist() == [0, 1] and hearing.decode(inputs.input_ids[1]).endswith("\nI am")


def test_default_system_message_is_for_inference():
    processor = make_processor("mistral_system_prepended", "SYSTEM")
    messages = [user("Hi"), {"role": "assistant", "content": [{"type": "text", "text": "I"}]}]
    assert "SYSTEM" not in processor.apply_chat_template(messages)
    assert "SYSTEM" in processor.apply_chat_template(messages, continue_final_message=True)
    assert "SYSTEM" in processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    own = [{"role": "system", "content": [{"type": "text", "text": "OWN"}]}, *messages[:1]]
    prompt = processor.apply_chat_template(own, add_generation_prompt=True)
    assert "OWN" in prompt and "SYSTEM" not in prompt
    # The assistant's tokens are found in a prompt with the system message too.
    inputs = encode(processor, [*messages, user("And?")], return_assistant_tokens_mask=True)
    assert processor.decode(inputs.input_ids[0][inputs.assistant_masks[0].bool()]) == "I </s>"


def test_assistant_masks_with_generation_tags_and_straddling_tokens(hearing):
    tagged = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ 'A:' }}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ 'U:' + message['content'] }}"
        "{% endif %}{% endfor %}"
    )
    plain = tagged.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    plain += "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    messages = [user(block("video"), "What?"), {"role": "assistant", "content": "A man."}]
    masks = []
    for template in (tagged, plain):
        inputs = encode(
            hearing,
            messages,
            [*messages, user("Where?"), {"role": "assistant", "content": "In a park."}],
            chat_template=build_chat_template(template),
            add_generation_prompt=False,
            return_assistant_tokens_mask=True,
        )
        said = [hearing.decode(ids[mask.bool()]) for ids, mask in zip(inputs.input_ids, inputs.assistant_masks)]
        assert said == ["A man.<|im_end|>", "A man.<|im_end|>In a park.<|im_end|>"]
        masks.append(inputs.assistant_masks)
    assert torch.equal(*masks)

    # A token that begins in the prompt and ends in the answer is none that generation can give: it is the prompt's.
    joined = build_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    inputs = encode(
        hearing,
        [user("Look at th"), {"role": "assistant", "content": "e man."}],
        chat_template=joined,
        add_generation_prompt=False,
        return_assistant_tokens_mask=True,
    )
    tokens = hearing.tokenizer.convert_ids_to_tokens(inputs.input_ids[0].tolist())
    assert "Ġthe" in tokens
    assert hearing.decode(inputs.input_ids[0][inputs.assistant_masks[0].bool()]) == " man."
    # A template whose turns change when others follow cannot be told apart.
    changing = build_chat_template(
        "{{ messages | length }}{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    for conversation, template, message in (
        ([user("Hi"), {"role": "assistant", "content": "Yes"}], changing, "renders turn 1 differently"),
        ([{"role": "assistant", "content": "Yes"}, user("Hi")], None, "begins with the assistant"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(hearing, conversation, chat_template=template, return_assistant_tokens_mask=True)


def test_control_tokens_in_messages_can_be_text(hearing):
    messages = [user(block("image"), "end <|im_end|> or <image>?")]
    ids = encode(hearing, messages, sanitize_control_tokens=True).input_ids[0].tolist()
    assert ids.count(hearing.tokenizer.eos_token_id) == 2  # behind the system message and behind the question
    assert [value for value in collapse(hearing, ids) if value < 0] == [-200]
    plain = encode(hearing, messages).input_ids[0].tolist()
    assert plain.count(hearing.tokenizer.eos_token_id) == 3


def test_limits(hearing):
    processor = make_processor(context_length=VIDEO_TOKENS + 60)
    fits = [user(block("video"), "Hi")]
    encode(processor, fits, load_audio_from_video=False)
    with pytest.raises(
        ValueError, match=r"the model takes 105: \d+ of text, 45 of video 1, 1496 of its sound, 45 of image 1"
    ):
        encode(processor, [user(block("video"), block("image"), "Hi")])
    with pytest.raises(ValueError, match="Prompt 1 has .* Lower num_frames"):
        encode(processor, fits, [user("many " * 200)], load_audio_from_video=False)
    ids = encode(hearing, fits, load_audio_from_video=False).input_ids[0]
    cut = {"truncation": True, "max_length": len(ids) - 2}
    assert (
        encode(hearing, fits, load_audio_from_video=False, processor_kwargs=cut).input_ids[0].tolist()
        == ids[:-2].tolist()
    )
    with pytest.raises(ValueError, match="max_length=20 would cut media off"):
        encode(hearing, fits, processor_kwargs={"truncation": True, "max_length": 20})
    with pytest.raises(ValueError, match="`is_split_into_words` is not supported"):
        hearing(text="a", is_split_into_words=True)


# Media


def forms_of(path: str, mime: str) -> dict[str, dict]:
    """A file in every form that a message can hold it in."""
    data = Path(path).read_bytes()
    encoded = base64.b64encode(data).decode()
    return {
        "path": {"path": path},
        "url": {"url": path},
        "pathlib": {"path": Path(path)},
        "data": {"url": f"data:{mime};base64,{encoded}"},
        "base64": {"base64": encoded},
        "bytes": {"bytes": data},
        "file": {"file": io.BytesIO(data)},
    }


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_every_form_of_a_file(kind, media, hearing):
    path, mime = {
        "image": (media["image"], "image/png"),
        "video": (media["loud"], "video/mp4"),
        "audio": (media["sound"], "audio/wav"),
    }[kind]
    names = {
        "image": ["pixel_values"],
        "video": ["pixel_values_videos", "input_features"],
        "audio": ["input_features"],
    }
    expected = encode(hearing, [user({"type": kind, kind: path}, "What?")])
    for source in forms_of(path, mime).values():
        (value,) = source.values()
        source = source if set(source) <= {"path", "url", "base64"} else {kind: value}
        inputs = encode(hearing, [user({"type": kind, **source}, "What?")])
        assert inputs.input_ids.tolist() == expected.input_ids.tolist()
        for name in names[kind]:
            assert torch.equal(inputs[name], expected[name])


def test_every_form_of_pixels_and_waveforms(media, hearing):
    array = np.asarray(IMAGE)
    expected = encode(hearing, [user(block("image"))]).pixel_values
    for image in (array, torch.from_numpy(array.copy()).movedim(-1, 0)):
        assert torch.equal(encode(hearing, [user(block("image", image))]).pixel_values, expected)

    frames = np.stack([np.asarray(frame) for frame in FRAMES])
    expected = encode(hearing, [user(block("video"))], load_audio_from_video=False).pixel_values_videos
    videos = [frames, torch.from_numpy(frames), list(frames), media["folder"], media["gif"]]
    videos.append(sorted(str(path) for path in Path(media["folder"]).iterdir()))
    for video in videos:
        inputs = encode(hearing, [user(block("video", video))], load_audio_from_video=False)
        assert inputs.pixel_values_videos.shape == expected.shape
        torch.testing.assert_close(inputs.pixel_values_videos, expected, atol=0.02, rtol=0)  # GIF: a palette

    expected = encode(hearing, [user(block("audio"))]).input_features
    for sound in (torch.from_numpy(SOUND), SOUND[None]):
        assert torch.equal(encode(hearing, [user(block("audio", sound))]).input_features, expected)
    precise = encode(hearing, [user(block("audio", SOUND.astype(np.float64)))]).input_features
    assert torch.equal(encode(hearing, [user(block("audio", SOUND.tolist()))]).input_features, precise)
    assert hearing(text="<audio>", audio=SOUND, return_tensors="pt").input_features.shape == (1, 2998, 128)


def test_parts_of_a_video(media, hearing):
    """A block's own `start`, `end`, `num_frames` and `fps`; the frames' brightness says which they are."""

    def frames_of(**options):
        inputs = encode(hearing, [user(block("video", media["loud"], **options))], load_audio_from_video=False)
        processor = hearing.video_processor
        pixels = inputs.pixel_values_videos[0] * torch.tensor(processor.image_std)[:, None, None]
        pixels = pixels + torch.tensor(processor.image_mean)[:, None, None]
        return (pixels.mean(dim=(1, 2, 3)) * 255 / 8).round().int().tolist(), inputs

    assert frames_of()[0] == [2, 5, 9, 13, 16, 20, 24, 27]
    assert frames_of(num_frames=4)[0] == [4, 11, 18, 25]
    assert frames_of(start=1.0, end=2.0, num_frames=2)[0] == [12, 17]
    indices, inputs = frames_of(fps=2)
    assert len(indices) == 6 and inputs.input_ids[0].tolist().count(hearing.video_token_id) == 4 * 3 * 3
    inputs = encode(
        hearing,
        [user(block("video", media["loud"]), block("video", media["loud"], num_frames=16))],
        load_audio_from_video=False,
    )
    assert [len(video) for video in inputs.pixel_values_videos] == [8, 16]
    assert inputs.input_ids[0].tolist().count(hearing.video_token_id) == (5 + 9) * 3 * 3
    clip = VideoClip(media["loud"], start=1.0, end=2.0, num_frames=2)
    direct = hearing(text="<video>", videos=clip, load_audio_from_video=False, return_tensors="pt")
    assert torch.equal(direct.pixel_values_videos, frames_of(start=1.0, end=2.0, num_frames=2)[1].pixel_values_videos)


def test_sound_of_a_video(media, hearing):
    extractor = hearing.feature_extractor
    inputs = encode(hearing, [user(block("video", media["loud"]), "Hi")])
    assert [value for value in collapse(hearing, inputs.input_ids[0]) if value < 0] == [-201, -202]
    ids = inputs.input_ids[0].tolist()
    assert (ids.count(hearing.video_token_id), ids.count(hearing.audio_token_id)) == (VIDEO_TOKENS, AUDIO_TOKENS)
    expected = extractor(extractor.load_video_audio(media["loud"]), sampling_rate=16000, return_tensors="pt")
    assert torch.equal(inputs.input_features, expected.input_features)
    # The sound is that of the seconds whose frames are taken.
    inputs = encode(hearing, [user(block("video", media["loud"], start=2.0, end=2.5))])
    waveform = extractor.load_video_audio(media["loud"], 2.0, 2.5)
    expected = extractor(waveform, sampling_rate=16000, return_tensors="pt")
    assert torch.equal(inputs.input_features, expected.input_features)
    # Sound can be left out for one video, and asked for as transformers does, by an empty audio block behind it.
    loud, quiet = block("video", media["loud"]), block("video", media["loud"], load_audio_from_video=False)
    inputs = encode(hearing, [user(quiet, loud, "Hi")])
    assert [value for value in collapse(hearing, inputs.input_ids[0]) if value < 0] == [-201, -202]
    assert len(inputs.input_features) == 1 and len(inputs.pixel_values_videos) == 2
    inputs = encode(hearing, [user(loud, {"type": "audio"}, "Hi")], load_audio_from_video=False)
    assert len(inputs.input_features) == 1
    assert hearing.apply_chat_template([user(loud, {"type": "audio"}, "Hi")]).count("<audio>") == 0


@pytest.mark.parametrize("source", ["silent", "folder", "gif", "frames"])
def test_videos_without_a_sound_track(source, media, hearing):
    video = block("video", FRAMES if source == "frames" else media[source])
    extractor = hearing.feature_extractor
    inputs = encode(hearing, [user(video, "Hi")])
    silence = extractor(extractor.silent_waveform(), sampling_rate=16000, return_tensors="pt").input_features
    assert torch.equal(inputs.input_features, silence)
    dropped = encode(hearing, [user(video, "Hi")], processor_kwargs={"missing_audio": "drop"})
    assert "input_features" not in dropped and hearing.audio_token_id not in dropped.input_ids[0]
    with pytest.raises(ValueError, match="Video 0 has no audio track, and missing_audio is 'error'"):
        encode(hearing, [user(video, "Hi")], processor_kwargs={"missing_audio": "error"})
    # Of two videos only the one with a track has audio tokens.
    strict = make_processor(missing_audio_policy="drop")
    inputs = encode(strict, [user(video, "Hi")], [user(block("video", media["loud"]), "Hi")])
    assert (inputs.input_ids == strict.audio_token_id).sum(dim=1).tolist() == [0, AUDIO_TOKENS]
    assert len(inputs.input_features) == 1
    with pytest.raises(ValueError, match="missing_audio_policy must be"):
        make_processor(missing_audio_policy="hum")
    with pytest.raises(Exception, match="missing_audio"):
        encode(hearing, [user(video, "Hi")], processor_kwargs={"missing_audio": "hum"})


def test_a_broken_track_is_never_silence(media, hearing):
    for policy in ("silence", "drop"):
        with pytest.raises(MediaError):
            encode(hearing, [user(block("video", media["broken"]))], processor_kwargs={"missing_audio": policy})
    encode(hearing, [user(block("video", media["broken"]))], load_audio_from_video=False)


def test_sounds_of_videos_and_by_themselves_stay_in_order(media, hearing):
    """Rows of `input_features` are in reading order, whatever they belong to; several channels and rates mix."""
    extractor = hearing.feature_extractor
    loud, silent = block("video", media["loud"]), block("video", media["silent"])
    conversations = (
        [user(block("audio"), loud, "a", block("audio", media["sound"]))],
        [user("only text")],
        [user(silent, block("image"), "b"), {"role": "assistant", "content": "c"}, user(block("audio"), loud)],
    )
    inputs = encode(hearing, *conversations)
    track = extractor.load_video_audio(media["loud"])
    file, rate = extractor.load_audio_file(media["sound"])
    waveforms = [SOUND, track, file, extractor.silent_waveform(), SOUND, track]
    expected = extractor(waveforms, [16000, 16000, rate, 16000, 16000, 16000], return_tensors="pt")
    assert torch.equal(inputs.input_features, expected.input_features)
    order = [[value for value in collapse(hearing, row) if value < 0] for row in inputs.input_ids]
    assert order == [[-202, -201, -202, -202], [], [-201, -202, -200, -202, -201, -202]]
    counts = (inputs.input_ids == hearing.audio_token_id).sum(dim=1).tolist()
    assert counts == [3 * AUDIO_TOKENS, 0, 3 * AUDIO_TOKENS]

    # Each row of the batch is the row alone, and its media are the row's.
    taken = dict.fromkeys(("pixel_values", "pixel_values_videos", "input_features"), 0)
    for index, conversation in enumerate(conversations):
        alone = encode(hearing, conversation)
        row = inputs.input_ids[index][inputs.attention_mask[index].bool()]
        assert torch.equal(row, alone.input_ids[0])
        for name in taken:
            if name in alone:
                rows = inputs[name][taken[name] : taken[name] + len(alone[name])]
                assert torch.equal(rows, alone[name])
                taken[name] += len(alone[name])
    assert taken == {name: len(inputs[name]) for name in taken}


def test_decoded_sound_of_videos(media, hearing):
    """Serving libraries decode sound themselves and pass it with `audio_from_video_indices`."""
    track = hearing.feature_extractor.load_video_audio(media["loud"])
    video = np.stack([np.asarray(frame) for frame in FRAMES])
    inputs = hearing(
        text=["<audio> and <video>", "<video> <video>"],
        videos=[video, video, video],
        audio=[SOUND, track, track],
        audio_from_video_indices=[None, 0, 2],
        load_audio_from_video=True,
        return_tensors="pt",
    )
    assert (inputs.input_ids == hearing.audio_token_id).sum(dim=1).tolist() == [2 * AUDIO_TOKENS, AUDIO_TOKENS]
    expected = hearing.feature_extractor([SOUND, track, track], sampling_rate=16000, return_tensors="pt")
    assert torch.equal(inputs.input_features, expected.input_features)


def test_media_alone(media, hearing):
    assert set(hearing(images=IMAGE)) == {"pixel_values"}
    assert set(hearing(videos=FRAMES, load_audio_from_video=False)) == {"pixel_values_videos"}
    assert set(hearing(audio=SOUND)) == {"input_features", "input_features_mask"}
    assert set(hearing(text="text")) == {"input_ids", "attention_mask"}
    inputs = hearing(videos=[media["loud"]], audio=SOUND, return_tensors="pt", return_metadata=True)
    assert len(inputs.input_features) == 2 and inputs.video_metadata[0].total_num_frames == 30


def test_media_that_do_not_fit(hearing, deaf):
    with pytest.raises(ValueError, match="there are 2 <image> tokens and 1 images"):
        hearing(text="<image> and <image>", images=IMAGE)
    with pytest.raises(ValueError, match="there are 0 <audio> tokens and 1 audio inputs"):
        hearing(text="a", audio=SOUND)
    with pytest.raises(ValueError, match="nothing to process"):
        hearing()
    for call in (
        lambda: deaf(text="<audio>", audio=SOUND),
        lambda: encode(deaf, [user(block("audio"))]),
        lambda: deaf(text="<video>", videos=[FRAMES], load_audio_from_video=True, audio_from_video_indices=[0]),
        lambda: encode(deaf, [user(block("video", load_audio_from_video=True))]),
    ):
        with pytest.raises(ValueError, match="This model does not hear"):
            call()
    # transformers' server turns the flag on for every model; it says nothing to one that does not hear.
    for kwargs in ({}, {"load_audio_from_video": True}, {"processor_kwargs": {"load_audio_from_video": True}}):
        assert "input_features" not in encode(deaf, [user(block("video"))], **kwargs)
    assert "input_features" not in deaf(text="<video>", videos=[FRAMES], load_audio_from_video=True)
    assert "input_features" not in encode(
        hearing, [user(block("video"))], processor_kwargs={"load_audio_from_video": False}
    )
    with pytest.raises(ValueError, match="type video needs one of the keys video, url, path and base64"):
        encode(hearing, [user({"type": "video", "num_frames": 4})])
    with pytest.raises(ValueError, match="base64 of a content block of type image is broken"):
        encode(hearing, [user({"type": "image", "base64": "&&&"})])


# Around the processor


def test_audio_mode(media, hearing):
    reference, full = (
        encode(hearing, [user(block("video", media["loud"]))], processor_kwargs={"audio_kwargs": {"audio_mode": mode}})
        for mode in ("reference", "full")
    )
    waveform = hearing.feature_extractor.load_video_audio(media["loud"], audio_mode="full")
    expected = hearing.feature_extractor(waveform, 16000, return_tensors="pt", audio_mode="full").input_features
    assert torch.equal(full.input_features, expected) and not torch.equal(reference.input_features, expected)


def test_save_and_load(tmp_path, media):
    processor = make_processor("mistral_system_prepended", "SYSTEM", missing_audio_policy="drop", context_length=5000)
    processor.video_processor.num_frames = 16
    processor.save_pretrained(tmp_path)
    loaded = VideoLlama2Processor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict() and loaded.chat_template == processor.chat_template
    assert (loaded.missing_audio_policy, loaded.context_length, loaded.has_audio) == ("drop", 5000, True)
    assert loaded.load_audio_from_video and loaded.video_token_id == processor.video_token_id
    messages = [user(block("video", media["loud"]), block("image"), "What?")]
    expected = encode(processor, messages)
    for other in (loaded, AutoProcessor.from_pretrained(tmp_path)):
        inputs = encode(other, messages)
        assert set(inputs) == set(expected) and all(torch.equal(inputs[name], expected[name]) for name in inputs)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == processor.apply_chat_template(messages)
    # What was built for one checkpoint is not built again.
    assert build_chat_template(tokenizer.chat_template, "OTHER") == processor.chat_template
    changed = VideoLlama2Processor.from_pretrained(tmp_path, missing_audio_policy="error")
    assert changed.missing_audio_policy == "error"


def test_checkpoint_without_a_chat_template(hearing):
    tokenizer = load_tokenizer(GOLDENS / "processing" / "tokenizers" / "llama")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="The tokenizer has no chat template"):
        build_chat_template(tokenizer.chat_template)
    assert build_chat_template({"default": "a", "other": "b"}).endswith("a")


def test_what_serving_libraries_ask_for(media, hearing):
    outputs = hearing(
        text=["One <image>, two <video>!", "<audio> three"],
        images=IMAGE,
        videos=media["loud"],
        audio=SOUND,
        return_mm_token_type_ids=True,
        return_text_replacement_offsets=True,
        return_tensors="pt",
    )
    counts = [(outputs.mm_token_type_ids == kind).sum().item() for kind in (0, 1, 2, 3)]
    assert counts[1:] == [45, VIDEO_TOKENS, 2 * AUDIO_TOKENS]
    first, second = outputs["text_replacement_offsets"]
    assert [item["type"] for item in first] == ["image", "video"] and [item["type"] for item in second] == ["audio"]
    expanded = "One <image>, two <video>!"
    for item in first:
        start, end = item["new_span"]
        expanded = expanded[:start] + item["replacement"] + expanded[start + len(item["text"]) :]
        assert expanded[start:end] == item["replacement"] and item["text"] == f"<{item['type']}>"
    assert first[1]["replacement"] == "<video>" * VIDEO_TOKENS + "<audio>" * AUDIO_TOKENS
    assert hearing.decode(outputs.input_ids[0], skip_special_tokens=False).startswith("One <image><image>")

    numbers = hearing._get_num_multimodal_tokens(
        image_sizes=[(100, 50), (10000, 10000)], video_sizes=[(8, 10, 10), (7, 20, 30)], audio_lengths=[16000, 10**6]
    )
    assert numbers.num_image_tokens == [45, 45] and numbers.num_image_patches == [1, 1]
    assert numbers.num_video_tokens == [45, 4 * 9] and numbers.num_audio_tokens == [AUDIO_TOKENS] * 2
    processed = {
        "pixel_values": torch.zeros(1, 3, SIZE, SIZE),
        "pixel_values_videos": torch.zeros(1, 8, 3, SIZE, SIZE),
    }
    assert hearing.replace_image_token(processed, 0) == "<image>" * 45
    sound = {"input_features_mask": torch.ones(1, 2998)}
    assert hearing.replace_video_token(processed, 0, sound, [0]) == first[1]["replacement"]
    assert hearing.replace_audio_token(sound, 0) == "<audio>" * AUDIO_TOKENS
    assert set(outputs) - {"mm_token_type_ids", "text_replacement_offsets"} == set(hearing.model_input_names)


def test_answers_are_decoded(hearing):
    ids = hearing.tokenizer(
        ["A cat.<|im_end|>", "Two dogs run.<|im_end|>"], padding=True, return_tensors="pt"
    ).input_ids
    for decode in (
        hearing.batch_decode,
        hearing.post_process_image_text_to_text,
        hearing.post_process_multimodal_output,
    ):
        assert decode(ids, skip_special_tokens=True) == ["A cat.", "Two dogs run."]
    assert hearing.decode(ids[0], skip_special_tokens=True) == "A cat."


def test_a_slow_tokenizer(hearing):
    """Everything but what needs to know where a token is in the text."""
    processor = VideoLlama2Processor(
        hearing.image_processor,
        hearing.video_processor,
        hearing.feature_extractor,
        ByT5Tokenizer(),
        chat_template=build_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}"),
    )
    ids = encode(processor, [user(block("image"), "Hi")]).input_ids[0]
    expected = [-200, *processor.tokenizer("\nHi", add_special_tokens=False).input_ids]
    assert collapse(processor, ids) == expected
    with pytest.raises(ValueError, match="slow tokenizer cannot take as text"):
        encode(processor, [user(block("image"), "a <video> tag")])
    with pytest.raises(ValueError, match="needs a fast tokenizer"):
        encode(processor, [user("Hi"), {"role": "assistant", "content": "Yes"}], return_assistant_tokens_mask=True)


def test_prompts_outside_of_chats_are_padded_for_generation():
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(GOLDENS / "qwen2_siglip_beats_av" / "checkpoint")
    inputs = processor(text=["What?", "Who is in this picture?"], return_tensors="pt")
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1] and inputs["attention_mask"][0, 0] == 0
