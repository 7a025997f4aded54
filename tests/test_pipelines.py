"""What transformers builds on a model by itself: its pipelines, and how `transformers serve` loads and asks it."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor, pipeline
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseHandler, Modality
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

import videollama2_hf  # noqa: F401  registers the classes
from golden_utils import GOLDENS


CHECKPOINT = str(GOLDENS / "qwen2_siglip_beats_av" / "checkpoint")
VIDEO = str(GOLDENS / "processing_av" / "av_3s.mp4")
SOUND = str(GOLDENS / "processing_av" / "wav" / "sweep_3s_16k.flac")
STEREO = str(GOLDENS / "processing_av" / "wav" / "stereo_2s_44k.flac")
IMAGE = Image.fromarray(np.arange(60 * 80 * 3, dtype=np.uint8).reshape(60, 80, 3))

BLOCKS = {
    "image": {"type": "image", "image": IMAGE},
    "video": {"type": "video", "path": VIDEO},
    "audio": {"type": "audio", "path": SOUND},
}
MESSAGES = {
    name: [{"role": "user", "content": [*blocks, {"type": "text", "text": "What is it?"}]}]
    for name, blocks in {**{name: [block] for name, block in BLOCKS.items()}, "all": BLOCKS.values()}.items()
}
GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForMultimodalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module", params=["any-to-any", "image-text-to-text"])
def pipe(request):
    return pipeline(request.param, model=CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def any_to_any():
    return pipeline("any-to-any", model=CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def ask(processor, model):
    """What the model says to a chat or, if `text` is given, to media by themselves: its tokens and its words."""

    def ask(messages=None, continue_final_message=False, **options):
        if messages is None:
            inputs = processor(return_tensors="pt", **options)
        else:
            inputs = processor.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=not continue_final_message,
                continue_final_message=continue_final_message,
                **options,
            )
        output = model.generate(**inputs, **GREEDY)[0]
        answer = output[inputs["input_ids"].shape[1] :]
        return output, processor.decode(answer, skip_special_tokens=True)

    return ask


@pytest.fixture(scope="module")
def answers(ask):
    return {name: ask(messages) for name, messages in MESSAGES.items()}


def test_the_media_matter(answers):
    """Otherwise nothing below means much."""
    assert len({text for _, text in answers.values()}) == len(answers)


@pytest.mark.parametrize("name", MESSAGES)
def test_chat(pipe, answers, name):
    output, text = answers[name]
    (result,) = pipe(text=MESSAGES[name], generate_kwargs=dict(GREEDY), return_full_text=False)
    assert result["generated_text"] == text
    (result,) = pipe(text=MESSAGES[name], generate_kwargs=dict(GREEDY), return_tensors=True)
    assert torch.equal(result["generated_token_ids"], output)


def test_several_chats_and_full_conversations(pipe, answers):
    results = pipe(text=list(MESSAGES.values()), generate_kwargs=dict(GREEDY))
    for (result,), messages, (_, text) in zip(results, MESSAGES.values(), answers.values(), strict=True):
        assert result["generated_text"] == [*messages, {"role": "assistant", "content": text}]


def test_continue_an_answer(pipe, ask):
    messages = [*MESSAGES["image"], {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]
    (result,) = pipe(text=messages, generate_kwargs=dict(GREEDY))
    text = "It is" + ask(messages, continue_final_message=True)[1]
    assert result["generated_text"][-1] == {"role": "assistant", "content": [{"type": "text", "text": text}]}


def test_options_of_the_processor_pass_through(pipe, ask, answers):
    options = {"load_audio_from_video": False, "processor_kwargs": {"num_frames": 4}}
    output, text = ask(MESSAGES["video"], **options)
    (result,) = pipe(text=MESSAGES["video"], generate_kwargs=dict(GREEDY), return_tensors=True, **options)
    assert torch.equal(result["generated_token_ids"], output)
    assert text != answers["video"][1]


@pytest.mark.parametrize(
    "inputs",
    [
        {"text": "<image>\nWhat is it?", "images": IMAGE},
        {"text": "<video>\nWhat is it?", "videos": VIDEO},
        {"text": "<audio>\nWhat is it?", "audio": SOUND},
        {"text": "<audio>\nWhat is it?", "audio": STEREO},  # which the pipeline has resampled before the processor
        {"text": "What is it?"},
    ],
    ids=["image", "video", "audio", "resampled", "text"],
)
def test_without_a_chat(any_to_any, ask, inputs):
    output, text = ask(**inputs)
    (result,) = any_to_any(**inputs, generate_kwargs=dict(GREEDY), return_full_text=False)
    assert result["generated_text"] == text
    (result,) = any_to_any(**inputs, generate_kwargs=dict(GREEDY), return_tensors=True)
    assert torch.equal(result["generated_token_ids"], output)


def test_several_prompts_without_a_chat(pipe, ask):
    """A processor cannot know that a prompt is to be continued; a chat says so, here `padding_side` does."""
    prompts = ["<image>\nWhat is it?", "<image>\nWhere was this picture taken, and what is in the background?"]
    inputs = {"images": [IMAGE, IMAGE], "text": prompts, "processor_kwargs": {"padding_side": "left"}}
    results = pipe(**inputs, generate_kwargs=dict(GREEDY), return_full_text=False)
    assert [result["generated_text"] for result in results] == [ask(images=IMAGE, text=text)[1] for text in prompts]


def test_serve(answers):
    """`transformers serve` without its server: the model type says how to load, OpenAI messages carry the media."""
    assert AutoConfig.from_pretrained(CHECKPOINT).model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    manager = ModelManager(device="cpu", model_timeout=-1)
    model, processor = manager.load_model_and_processor(manager.process_model_name(CHECKPOINT))
    try:
        modality = manager.get_model_modality(model, processor)
        assert modality == Modality.MULTIMODAL

        png = io.BytesIO()
        IMAGE.save(png, "png")
        image = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        with open(SOUND, "rb") as file:
            sound = base64.b64encode(file.read()).decode()
        content = {
            "image": [{"type": "image_url", "image_url": {"url": image}}],
            "video": [{"type": "video_url", "video_url": {"url": VIDEO}}],
            "audio": [{"type": "input_audio", "input_audio": {"data": sound, "format": "flac"}}],
        }
        content["all"] = sum(content.values(), [])
        for name, blocks in content.items():
            messages = [{"role": "user", "content": [*blocks, {"type": "text", "text": "What is it?"}]}]
            # As the server calls it, which asks for 32 frames unless the request says otherwise.
            has_video = name in ("video", "all")
            inputs = processor.apply_chat_template(
                BaseHandler.get_processor_inputs_from_messages(messages, modality),
                add_generation_prompt=True,
                tools=None,
                return_tensors="pt",
                return_dict=True,
                tokenize=True,
                load_audio_from_video=has_video,
                **({"num_frames": 8} if has_video else {}),
            )
            assert torch.equal(model.generate(**inputs, **GREEDY)[0], answers[name][0]), name
    finally:
        manager.shutdown()
