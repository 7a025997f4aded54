"""The web page in a real browser: one server, one Chromium, a window with its own session for every test."""

import os
import re
import shutil
import socket
import string
import time

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from videollama2_hf import VideoLlama2ForConditionalGeneration
from videollama2_hf.cli import main
from videollama2_hf.session import Session
from videollama2_hf.synthetic.questions import SOUND_NAMES, TEMPLATES
from videollama2_hf.synthetic.rendering import render_clip, render_image, render_sound
from videollama2_hf.synthetic.small_model import build_config, build_model, build_processor, build_tokenizer
from videollama2_hf.synthetic.world import draw_clip
from videollama2_hf.web import launch
from videollama2_hf.web.preview import draw_preview, find_duration, make_block, read_preview
from videollama2_hf.web.texts import EXAMPLE_QUESTIONS, TEXTS, choose_language


NUM_NEW_TOKENS = 16
PACE = {"seconds": 0.03}  # that a token takes, as of a larger model
QUESTION = "What moves, and in which direction?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("web")


@pytest.fixture(scope="module")
def media(folder):
    """Two clips, an image, a sound, and files that are none of these."""
    clips = [draw_clip(np.random.default_rng(seed)) for seed in (3, 5)]
    paths = {f"{name}.mp4": render_clip(clip, folder / f"{name}.mp4") for name, clip in zip(("one", "two"), clips)}
    paths["image.png"] = render_image(clips[0], folder / "image.png")
    paths["sound.wav"] = render_sound(clips[1], folder / "sound.wav")
    for name, content in {
        "text.mp4": b"No video. " * 9,
        "notes.txt": b"Words.",
        "large.mp4": bytes(2_000_000),
    }.items():
        paths[name] = folder / name
        paths[name].write_bytes(content)
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def sessions(folder):
    """Two small models whose answers are words that depend on everything they were told."""
    texts = [template for templates in TEMPLATES.values() for template in templates]
    tokenizer = build_tokenizer([*texts, *SOUND_NAMES, "user", "assistant"] * 3)
    config = build_config(tokenizer)
    spelling = [index for name, index in tokenizer.get_vocab().items() if len(name) < 4 or name.startswith("<|")]
    for seed, name in enumerate(("first", "second")):
        model = build_model(config, seed)
        with torch.no_grad():  # far from the flat distribution of a fresh model
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.1)
        model.generation_config.suppress_tokens = spelling
        model.save_pretrained(folder / name)
        build_processor(config, tokenizer).save_pretrained(folder / name)
    return {name: Session.from_pretrained(folder / name) for name in ("first", "second")}


@pytest.fixture(scope="module")
def address(folder, media, sessions):
    def take_time(module, inputs):
        if isinstance(module, VideoLlama2ForConditionalGeneration):
            time.sleep(PACE["seconds"])

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("videollama2_hf.web.page.EXAMPLE_CLIP", folder / "two.mp4")
        checkpoints = [folder / name for name in sessions]
        page = launch(checkpoints, port=port, max_upload_mb=1, max_new_tokens=NUM_NEW_TOKENS, wait=False)
        hook = register_module_forward_pre_hook(take_time)
        yield f"http://127.0.0.1:{port}/"
        hook.remove()
        page.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            chromium = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except Error as error:
            reason = f"There is no Chromium; `playwright install chromium` gets one ({error.message.splitlines()[0]})"
            if os.environ.get("CI") == "true":
                pytest.fail(reason)
            pytest.skip(reason)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, address):
    """Opens windows of users that do not know each other; none may ask another address for anything, or fail."""
    contexts, requests, errors = [], [], []

    def open_window(width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 844}, **options)
        context.set_default_timeout(60_000)
        window = context.new_page()
        window.on("request", lambda request: requests.append(request.url))
        window.on("pageerror", lambda error: errors.append(str(error)))
        window.goto(address)
        window.wait_for_selector("#question textarea")
        contexts.append(context)
        return window

    yield open_window
    for context in contexts:
        context.close()
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


def choose(window, path):
    window.set_input_files("#file input[type=file]", path)
    window.wait_for_selector("#preview .seen, #preview .seen-problem")


def send(window, question):
    window.fill("#question textarea", question)
    window.press("#question textarea", "Enter")


def wait_for_answer(window, number=1):
    """Answer `number` of a conversation when it is complete: its words."""
    window.wait_for_function(
        "([number, status]) => document.querySelectorAll('#conversation [data-testid=bot]').length == number"
        " && new RegExp(status).test(document.querySelector('#status').innerText)",
        arg=[number, "tokens in|个词元；"],
    )
    window.wait_for_selector("#question [data-testid=submit-button]")
    return words(window.locator("#conversation [data-testid=bot]").nth(number - 1).inner_text())


def words(text):
    return re.findall(r"\w+", text)


def expect(chat, question, *blocks):
    return words(chat.ask(question, *blocks, max_new_tokens=NUM_NEW_TOKENS).text)


def video(path, **options):
    return {"type": "video", "video": path, **options}


def test_upload_ask_and_a_second_turn(visit, media, sessions):
    window = visit()
    choose(window, media["one.mp4"])
    assert window.locator(".seen-frames img").count() == 8
    assert window.locator(".seen-frames figcaption").all_inner_texts()[0] == "0.2 s"
    assert window.locator(".seen-sound svg").is_visible() and window.locator(".seen-sound img").is_visible()
    window.wait_for_function("document.querySelector('video.player').duration > 3.9")

    window.evaluate("""() => {
        window.said = []
        new MutationObserver(() => {
            const bot = document.querySelector('#conversation [data-testid=bot]')
            if (bot && bot.innerText.trim() != window.said.at(-1)) window.said.push(bot.innerText.trim())
        }).observe(document.querySelector('#conversation'), {subtree: true, childList: true, characterData: true})
    }""")
    send(window, QUESTION)
    first = wait_for_answer(window)
    said = [text for text in window.evaluate("window.said") if text]
    assert len(said) > 3 and all(after.startswith(before) for before, after in zip(said, said[1:]))
    chat = sessions["first"].chat()
    assert first == expect(chat, QUESTION, video(media["one.mp4"])) and len(first) > 3

    send(window, "And what do you hear?")
    assert wait_for_answer(window, 2) == expect(chat, "And what do you hear?")
    reused = re.search(r"(\d+) of \d+ tokens before them were remembered", window.inner_text("#status"))
    assert int(reused[1]) > 160, "the clip of 160 tokens was read again"
    assert window.locator("#conversation [data-testid=user]").all_inner_texts()[0] == "one.mp4"


def test_a_part_of_a_clip(visit, media, sessions):
    window = visit()
    choose(window, media["one.mp4"])
    for name, value in (("end", "2.5"), ("start", "1.5")):
        window.fill(f"#{name} input[type=number]", value)
        window.press(f"#{name} input[type=number]", "Tab")
    window.wait_for_function("document.querySelector('.seen-frames figcaption').innerText >= '1.'")
    assert window.locator(".seen-frames figcaption").all_inner_texts()[-1] < "2.5"
    send(window, QUESTION)
    part = video(media["one.mp4"], start=1.5, end=2.5)
    assert wait_for_answer(window) == expect(sessions["first"].chat(), QUESTION, part)
    assert window.locator("#conversation [data-testid=user]").first.inner_text() == "one.mp4, from 1.5 s to 2.5 s"


def test_images_and_sounds(visit, media, sessions):
    """Another file begins another conversation below the first."""
    window = visit()
    choose(window, media["image.png"])
    assert window.locator(".seen-frames img").count() == 1 and not window.locator("#part").is_visible()
    send(window, QUESTION)
    image = {"type": "image", "image": media["image.png"]}
    assert wait_for_answer(window) == expect(sessions["first"].chat(), QUESTION, image)
    window.click("#file button[aria-label='Clear'], #file button[aria-label='Remove this file']")
    window.wait_for_selector("#preview", state="hidden")
    choose(window, media["sound.wav"])
    assert window.locator("audio.player").count() == 1 and window.locator(".seen-frames").count() == 0
    send(window, QUESTION)
    sound = {"type": "audio", "audio": media["sound.wav"]}
    assert wait_for_answer(window, 2) == expect(sessions["first"].chat(), QUESTION, sound)


def test_files_that_cannot_be_used(visit, media):
    window = visit()
    for name, reason in (("text.mp4", "not a video or audio file"), ("notes.txt", "Its name should end in")):
        choose(window, media[name])
        message = window.locator("[role=alert]").inner_text()
        assert message.startswith(f"{name} cannot be used.") and reason in message and "/" not in message
        assert not window.locator("#player").is_visible() and not window.locator("#part").is_visible()
        send(window, QUESTION)
        window.wait_for_function("document.querySelector('#status').innerText.startsWith('First choose a file')")
        window.fill("#question textarea", "")
        window.click("#file button[aria-label='Clear'], #file button[aria-label='Remove this file']")
        window.wait_for_selector("#preview", state="hidden")
    window.set_input_files("#file input[type=file]", media["large.mp4"])
    assert "1" in window.wait_for_selector(".toast-body").inner_text()
    assert window.locator("#conversation [data-testid=bot]").count() == 0


def test_languages(visit, media, sessions):
    """A Chinese browser gets a Chinese page; switching keeps file and conversation."""
    window = visit(locale="zh-CN")
    window.wait_for_selector(f"text={TEXTS['zh']['intro']}")
    choose(window, media["one.mp4"])
    send(window, QUESTION)
    answer = wait_for_answer(window)
    assert "个词元" in window.inner_text("#status") and "0.2 秒" in window.inner_text(".seen-frames")
    window.click("#language >> text=English")
    window.wait_for_selector("text=What the model sees")
    for name in ("intro", "start", "end", "new"):
        assert TEXTS["en"][name] in window.inner_text("body")
    assert window.get_attribute("#question textarea", "placeholder") == TEXTS["en"]["question"]
    assert window.get_attribute("html", "lang") == "en" and not re.search(
        "[\u4e00-\u9fff]", window.inner_text("#body")
    )
    assert words(window.locator("#conversation [data-testid=bot]").inner_text()) == answer
    assert visit(locale="fr-FR").inner_text("#intro p") == TEXTS["en"]["intro"]


def test_two_users_at_once(visit, media, sessions):
    windows = {"one.mp4": visit(), "two.mp4": visit()}
    for name, window in windows.items():
        choose(window, media[name])
    chats = {name: sessions["first"].chat() for name in windows}
    answers = {}
    for number, question in enumerate((QUESTION, "And what do you hear?"), start=1):
        for window in windows.values():
            send(window, question)
        for name, window in windows.items():
            blocks = [video(media[name])] if number == 1 else []
            answers[name] = wait_for_answer(window, number)
            assert answers[name] == expect(chats[name], question, *blocks)
            assert window.locator("#conversation [data-testid=user]").all_inner_texts()[0] == name
    assert answers["one.mp4"] != answers["two.mp4"], "the model tells the clips apart"


def test_another_model_and_a_new_conversation(visit, media, sessions):
    window = visit()
    choose(window, media["one.mp4"])
    window.click("#model input")
    window.click("#model [role=option]:has-text('second')")
    send(window, QUESTION)
    answer = wait_for_answer(window)
    assert answer == expect(sessions["second"].chat(), QUESTION, video(media["one.mp4"]))
    window.click("#new")
    window.wait_for_selector("#conversation [data-testid=bot]", state="detached")
    send(window, QUESTION)
    assert wait_for_answer(window) == answer and window.locator("#conversation [data-testid=user]").count() == 2


def test_a_stopped_answer_is_no_turn(visit, media, sessions, monkeypatch):
    window = visit()
    choose(window, media["one.mp4"])
    monkeypatch.setitem(PACE, "seconds", 0.5)
    send(window, QUESTION)
    window.wait_for_selector("#conversation [data-testid=bot]")
    window.click("#question [data-testid=stop-button]")
    window.wait_for_function(f"document.querySelector('#status').innerText == {TEXTS['en']['stopped']!r}")
    monkeypatch.setitem(PACE, "seconds", 0.03)
    window.wait_for_selector("#question [data-testid=submit-button]")
    send(window, QUESTION)
    expected = expect(sessions["first"].chat(), QUESTION, video(media["one.mp4"]))
    assert wait_for_answer(window, 2) == expected
    assert len(words(window.locator("#conversation [data-testid=bot]").first.inner_text())) < len(expected)


@pytest.mark.parametrize("width", [390, 1280])
def test_examples_on_phone_and_desktop(visit, folder, sessions, width):
    window = visit(width)
    assert window.locator("#file [data-testid=upload-text]").evaluate("e => getComputedStyle(e).fontSize") == "0px"
    window.get_by_role("button", name=EXAMPLE_QUESTIONS[1]).click()
    answer = wait_for_answer(window)
    assert answer == expect(sessions["first"].chat(), EXAMPLE_QUESTIONS[1], video(str(folder / "two.mp4")))
    assert window.evaluate("document.documentElement.scrollWidth") <= width
    frames = [window.locator(".seen-frames figure").nth(n).bounding_box() for n in range(8)]
    assert len({box["y"] for box in frames}) == (2 if width == 390 else 1) and all(box["width"] > 40 for box in frames)
    chat, file = (window.locator(name).bounding_box() for name in ("#conversation", "#file"))
    assert chat["y"] > file["y"] + file["height"] if width == 390 else chat["x"] > file["x"] + file["width"]


def test_previews_are_what_the_model_gets(media, sessions):
    processor = sessions["first"].processor
    block = make_block(media["one.mp4"], 3.0, 1.0, find_duration(media["one.mp4"]))
    assert block == video(media["one.mp4"], start=1.0, end=3.0)
    messages = [{"role": "user", "content": [block]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    preview = read_preview(processor, block)
    assert preview.num_tokens == 160 and preview.pictures.shape == (8, 64, 64, 3)
    mean, std = (
        np.array(values) for values in (processor.video_processor.image_mean, processor.video_processor.image_std)
    )
    pixels = inputs["pixel_values_videos"][0].permute(0, 2, 3, 1).numpy()
    assert np.abs((preview.pictures - mean) / std - pixels).max() < 1e-5
    assert 0.8 < preview.times[0] < preview.times[-1] < 3.0
    assert len(preview.waveform) == 2 * preview.rate and len(preview.filter_banks) == 200
    assert np.array_equal(preview.filter_banks, inputs["input_features"][0, :200])
    html = draw_preview(preview, TEXTS["en"])
    assert html.count("<figure>") == 8 and "2.0 seconds" in html and "160 tokens" in html


def test_a_clip_without_sound(folder, sessions):
    path = str(render_clip(draw_clip(np.random.default_rng(1)), folder / "mute.mp4", has_sound=False))
    preview = read_preview(sessions["first"].processor, make_block(path))
    assert preview.waveform is None and TEXTS["en"]["silent"] in draw_preview(preview, TEXTS["en"])


def test_parts():
    assert make_block("a.wav") == make_block("a.wav", 0, 4, 4.0) == {"type": "audio", "audio": "a.wav"}
    assert make_block("a.wav", 1.0, 4.0, 4.0) == {"type": "audio", "audio": "a.wav", "start": 1.0}
    assert make_block("a.wav", 4.0, 4.0, 4.0) == {"type": "audio", "audio": "a.wav", "start": 3.9}
    assert make_block("a.wav", 2.0, 2.0, 4.0) == {"type": "audio", "audio": "a.wav", "start": 2.0, "end": 2.1}
    assert make_block("a.png", 2.0, 3.0, None) == {"type": "image", "image": "a.png"}


def test_both_languages_say_everything():
    fields = {
        language: {name: {field for _, field, _, _ in string.Formatter().parse(text)} for name, text in texts.items()}
        for language, texts in TEXTS.items()
    }
    assert fields["en"] == fields["zh"]
    assert choose_language("zh-CN,zh;q=0.9,en;q=0.8") == "zh"
    assert choose_language("en-GB,zh;q=0.5") == choose_language("") == "en"


def test_command(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("videollama2_hf.web.launch", lambda *arguments: calls.append(arguments))
    with pytest.raises(SystemExit) as end:
        main(
            [
                "web",
                "--model",
                "a",
                "-m",
                "b",
                "--host",
                "0.0.0.0",
                "--port",
                "8000",
                "--share",
                "--max-upload-mb",
                "9",
            ]
        )
    assert not end.value.code and calls == [(["a", "b"], "0.0.0.0", 8000, True, 9, 512)]


def test_models_need_names_of_their_own(folder):
    with pytest.raises(ValueError, match="two have the same: org/model, org/model"):
        launch(["org/model", "org/model"])
    with pytest.raises(ValueError, match="which model"):
        launch([])
