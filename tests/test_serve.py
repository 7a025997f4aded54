"""`videollama2 serve`: a server on a free port and OpenAI's client."""

import asyncio
import base64
import dataclasses
import functools
import http.server
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest
from huggingface_hub.utils import httpx
from PIL import Image

from golden_utils import GOLDENS
from videollama2_hf.cli import app, main
from videollama2_hf.serving import Limits, build_app, gate, remote
from videollama2_hf.serving.server import Server, describe_start, open_socket
from videollama2_hf.session import Session


CHECKPOINT = GOLDENS / "qwen2_siglip_beats_av" / "checkpoint"
CLIP = (GOLDENS / "processing_av" / "av_3s.mp4").read_bytes()
DOCUMENT = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
KEY = "a-key"
LIMITS = Limits(
    max_upload_bytes=2 * 2**20, max_clip_seconds=4, max_frames=32, max_request_seconds=60, max_new_tokens=40
)


def to_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{to_base64(content)}"


def make_image(width: int = 60, height: int = 40) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(width * height * 3, dtype=np.uint32).astype(np.uint8).reshape(height, width, 3)).save(
        file, "PNG"
    )
    return file.getvalue()


def make_wav(seconds: float = 1.0, rate: int = 16000) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, rate, 0, "NONE", ""))
        sound.writeframes((8000 * np.sin(np.arange(int(seconds * rate)) / 10)).astype("<i2").tobytes())
    return file.getvalue()


IMAGE, SOUND = make_image(), make_wav()
TEXT = {"type": "text", "text": "What is it?"}
VIDEO_PART = {"type": "video_url", "video_url": {"url": data_uri(CLIP, "video/mp4")}}
IMAGE_PART = {"type": "image_url", "image_url": {"url": data_uri(IMAGE, "image/png"), "detail": "auto"}}
SOUND_PART = {"type": "input_audio", "input_audio": {"data": to_base64(SOUND), "format": "wav"}}


@pytest.fixture(scope="module")
def session():
    return Session.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Another machine, from which media may be downloaded."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "clip.mp4").write_bytes(CLIP)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"clips.example.org:{running.server_port}"
        running.shutdown()


@pytest.fixture(scope="module")
def server(session, site):
    application = build_app(session, "tiny", LIMITS, KEY, allowed_hosts=[site])
    opened, ready = open_socket("127.0.0.1", 0), threading.Event()
    running = Server(application, ready.set)
    thread = threading.Thread(target=running.run, args=([opened],))
    thread.start()
    assert ready.wait(60)
    running.url = f"http://127.0.0.1:{opened.getsockname()[1]}"
    yield running
    running.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=300)


@pytest.fixture
def fresh(session):
    """The same model without what it has encoded."""
    return Session(session.model, session.processor)


@pytest.fixture
def slow(session):
    """Every token takes 0.1 seconds; how often the language model has run."""
    calls = []

    def wait(*_):
        calls.append(time.sleep(0.1))

    hook = session.model.model.language_model.register_forward_pre_hook(wait)
    yield calls
    hook.remove()


def ask(client, *parts, role="user", **kwargs):
    kwargs = {"model": "tiny", "max_tokens": 6, **kwargs}
    return client.chat.completions.create(messages=[{"role": role, "content": list(parts)}], **kwargs)


def assert_equal(response, answer):
    assert response.choices[0].message.content.strip() == answer.text
    assert response.choices[0].finish_reason == answer.finish_reason
    assert response.usage.prompt_tokens == answer.num_prompt_tokens
    assert response.usage.completion_tokens == answer.num_new_tokens  # cut off, so without a token that ends it
    assert response.usage.total_tokens == answer.num_prompt_tokens + answer.num_new_tokens


# What is answered


def test_models_and_health(client, server):
    assert [(entry.id, entry.object) for entry in client.models.list()] == [("tiny", "model")]
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("parts", "blocks"),
    [
        ([], []),
        ([IMAGE_PART], [{"type": "image", "image": IMAGE}]),
        ([VIDEO_PART], [{"type": "video", "video": CLIP}]),
        ([SOUND_PART], [{"type": "audio", "audio": SOUND}]),
    ],
    ids=["text", "image", "video", "input_audio"],
)
def test_answers_are_those_of_a_session(client, fresh, parts, blocks):
    expected = fresh.ask(TEXT["text"], *blocks, max_new_tokens=6)
    assert_equal(ask(client, *parts, TEXT), expected)


def test_options_of_media(client, fresh):
    options = {"start": 1, "end": 2.5, "num_frames": 4, "load_audio_from_video": False}
    part = {"type": "video_url", "video_url": {**VIDEO_PART["video_url"], **options}}
    expected = fresh.ask(TEXT["text"], {"type": "video", "video": CLIP, **options}, max_new_tokens=6)
    assert_equal(ask(client, part, TEXT), expected)
    part = {"type": "audio_url", "audio_url": {"url": data_uri(SOUND, "audio/wav"), "end": 0.5}}
    expected = fresh.ask(TEXT["text"], {"type": "audio", "audio": SOUND, "end": 0.5}, max_new_tokens=6)
    assert_equal(ask(client, part, TEXT), expected)


def test_frames_are_those_of_training_unless_asked_for(client, fresh):
    """transformers would take 32 of every video."""
    block = {"type": "video", "video": CLIP, "load_audio_from_video": False}
    trained, fewer = (
        fresh.ask(TEXT["text"], {**block, **more}, max_new_tokens=6).num_prompt_tokens
        for more in ({}, {"num_frames": 4})
    )
    part = {"type": "video_url", "video_url": {**VIDEO_PART["video_url"], "load_audio_from_video": False}}
    assert ask(client, part, TEXT).usage.prompt_tokens == trained > fewer
    extra = {"chat_template_kwargs": {"num_frames": 4}}
    assert ask(client, part, TEXT, extra_body=extra).usage.prompt_tokens == fewer


def test_a_conversation_encodes_its_clip_once(client, session, fresh):
    chat = fresh.chat("Be brief.")
    first = chat.ask(TEXT["text"], {"type": "video", "video": CLIP}, max_new_tokens=5).text
    expected = chat.ask("And <video> then?", max_new_tokens=6)  # a typed placeholder is text
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [VIDEO_PART, TEXT]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And <video> then?"},
    ]
    session.encode({"type": "video", "video": CLIP})
    runs = []
    hook = session.model.model.audio_tower.register_forward_hook(lambda *_: runs.append(1))
    response = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=6)
    hook.remove()
    assert_equal(response, expected)
    assert not runs


def test_streaming(client, server):
    whole = ask(client, SOUND_PART, TEXT, max_tokens=12)
    chunks = list(ask(client, SOUND_PART, TEXT, max_tokens=12, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    # A character whose last bytes were not generated is not sent.
    assert text and text == whole.choices[0].message.content.rstrip("\ufffd")
    assert len([chunk for chunk in chunks if chunk.choices[0].delta.content]) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (chunks[-1].choices[0].finish_reason, chunks[-1].usage) == ("length", whole.usage)
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, "stream": True}
    raw = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert raw.text.endswith("data: [DONE]\n\n") and raw.headers["content-type"].startswith("text/event-stream")


def test_sampling(client):
    greedy, again = (ask(client, TEXT, max_tokens=16, temperature=0).choices[0].message.content for _ in range(2))
    assert greedy == again == ask(client, TEXT, max_tokens=16).choices[0].message.content
    first, same, other = (
        ask(client, TEXT, max_tokens=16, temperature=2, seed=seed).choices[0].message.content for seed in (1, 1, 2)
    )
    assert first == same != other


def test_two_at_once(client, fresh):
    """Each gets its own answer, streamed or not."""
    requests = [
        ([VIDEO_PART], [{"type": "video", "video": CLIP}]),
        ([], []),
        ([IMAGE_PART], [{"type": "image", "image": IMAGE}]),
    ]
    expected = [fresh.ask(TEXT["text"], *blocks, max_new_tokens=8).text for _, blocks in requests]

    def send(number):
        parts, _ = requests[number % 3]
        if number < 3:
            return ask(client, *parts, TEXT, max_tokens=8).choices[0].message.content.strip()
        chunks = ask(client, *parts, TEXT, max_tokens=8, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip()

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(send, range(6)))
    assert answers[:3] == expected
    assert answers[3:] == [text.rstrip("\ufffd") for text in expected]


def test_the_server_answers_about_itself_while_the_model_works(client, server, slow):
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, client, TEXT, max_tokens=30)
        wait_for(lambda: slow)
        started = time.monotonic()
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert time.monotonic() - started < 1.5 and not answer.done()
        assert answer.result().usage.completion_tokens == 30


def wait_for(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# What is refused


def video_part(**options):
    return {"type": "video_url", "video_url": {**VIDEO_PART["video_url"], **options}}


def url_part(url: str, kind: str = "image_url"):
    return {"type": kind, kind: {"url": url}}


BIG = io.BytesIO()
Image.new("1", (9000, 8000)).save(BIG, "PNG")


@pytest.mark.parametrize(
    ("parts", "kwargs", "message"),
    [
        ([url_part("/etc/passwd")], {}, "neither a data: URI nor an http"),
        ([url_part("file:///etc/passwd", "video_url")], {}, "Files of the server are not read"),
        ([url_part("ftp://clips.example.org/a.mp4", "video_url")], {}, "neither a data: URI nor an http"),
        ([url_part("http://other.example.org/a.png")], {}, "the allowed hosts are clips.example.org"),
        ([url_part("data:image/png;base64,%%")], {}, "cannot be decoded"),
        ([url_part("data:image/png;base64,")], {}, "empty"),
        ([url_part(data_uri(b"no image", "image/png"))], {}, "none that this server reads .PNG, JPEG"),
        ([url_part(data_uri(IMAGE[:200], "image/png"))], {}, "cut off or damaged"),
        (
            [url_part(data_uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image/png"))],
            {},
            "none that this",
        ),
        ([url_part(data_uri(BIG.getvalue(), "image/png"))], {}, "64000000 pixels"),
        ([url_part(data_uri(b"no video" * 99, "video/mp4"), "video_url")], {}, "not a video or audio file"),
        ([url_part(data_uri(CLIP[:20000], "video/mp4"), "video_url")], {}, "cut off|read"),
        (
            [url_part(data_uri(make_wav(5), "audio/wav"), "audio_url")],
            {},
            "5.0 seconds long; this server takes up to 4",
        ),
        ([video_part(num_frames=33)], {}, "num_frames may be up to 32"),
        ([video_part(fps=20)], {}, "up to 32 are allowed"),
        ([video_part(num_frames=0)], {}, "num_frames must be an integer above 0"),
        ([video_part(load_audio_from_video="yes")], {}, "load_audio_from_video must be True or False"),
        ([video_part(begin=1)], {}, "video_url takes url, start, end"),
        ([{"type": "video", "video": "clip.mp4"}], {}, "A part is"),
        ([{"type": "text"}], {}, "A part is"),
        (["text"], {}, "A part is"),
        ([TEXT], {"role": "tool"}, "The roles are system"),
        ([IMAGE_PART], {"role": "system"}, "Media are in messages of the user"),
        ([TEXT], {"max_tokens": 41}, "max_tokens must be an integer from 1 to 40"),
        ([TEXT], {"max_completion_tokens": 0}, "max_completion_tokens must be an integer from 1 to 40"),
        ([TEXT], {"temperature": 3}, "temperature must be a number from 0.0 to 2.0"),
        ([TEXT], {"seed": 2**70}, "seed must be an integer"),
        ([TEXT], {"n": 2}, "n=2 is not supported"),
        ([TEXT], {"stop": ["."]}, "stop=.* is not supported"),
        ([TEXT], {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools=.* is not supported"),
        ([TEXT], {"extra_body": {"generation_config": "{}"}}, "There is no field 'generation_config'"),
        (
            [TEXT],
            {"extra_body": {"chat_template_kwargs": {"tools": 1}}},
            "chat_template_kwargs is an object that takes",
        ),
        ([SOUND_PART] * 15, {}, "tokens"),
    ],
)
def test_refusals(client, parts, kwargs, message):
    with pytest.raises(openai.BadRequestError, match=message) as error:
        ask(client, *parts, **kwargs)
    assert error.value.type == "invalid_request_error" and set(error.value.body) == {
        "message",
        "type",
        "param",
        "code",
    }


def test_values_that_ask_for_nothing_are_taken(client):
    neutral = {"n": 1, "stop": [], "presence_penalty": 0, "logprobs": False, "user": "me", "store": False}
    assert ask(client, TEXT, **neutral, response_format={"type": "text"}).usage.completion_tokens == 6


def test_which_part_is_wrong(client):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, TEXT, url_part("/etc/passwd"))
    assert (error.value.param, error.value.code) == ("messages[0].content[1]", "source_not_allowed")


def test_another_model(client):
    with pytest.raises(openai.NotFoundError, match="answers as 'tiny'"):
        ask(client, TEXT, model="gpt-4o")


@pytest.mark.parametrize("messages", [[], "Hello", [1], [{"role": "user"}], [{"content": "Hello"}]])
def test_messages_that_are_none(client, messages):
    with pytest.raises(openai.BadRequestError, match="messages|message"):
        client.chat.completions.create(model="tiny", messages=messages)


def test_bodies_that_are_no_requests(server):
    url, headers = f"{server.url}/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}]})
    for content, kind in (("{", "application/json"), ("[]", "application/json"), (body, "text/plain")):
        response = httpx.post(url, content=content, headers={**headers, "Content-Type": kind})
        assert response.status_code == 400 and "JSON object" in response.json()["error"]["message"]


def test_api_key(server):
    for header in (b"Bearer another", b"Bearer", KEY.encode(), "Bearer schlüssel".encode()):
        response = httpx.get(f"{server.url}/v1/models", headers={"Authorization": header})
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"):
        ask(openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0), TEXT)


def test_only_these_routes(server):
    """transformers' application can do more: load models, drop this one, read messages in its own way."""
    routes = {route.path for route in server.gate.application.routes}
    assert {"/load_model", "/reset", "/v1/responses", "/v1/chat/completions", "/v1/models", "/health"} <= routes
    headers = {"Authorization": f"Bearer {KEY}"}
    for path in routes - {"/v1/chat/completions", "/v1/models", "/health"}:
        assert httpx.post(f"{server.url}{path}", json={}, headers=headers).status_code == 404
    response = httpx.get(f"{server.url}/v1/chat/completions", headers=headers)
    assert response.status_code == 405 and response.headers["allow"] == "POST"


# Limits


def test_upload_size(client):
    with pytest.raises(openai.APIStatusError, match="this server takes up to 2097152") as error:
        ask(client, {"type": "text", "text": "a" * 3 * 2**20})
    assert error.value.status_code == 413 and error.value.code == "upload_too_large"


def test_slow_upload(server, monkeypatch):
    monkeypatch.setattr(server.gate, "limits", dataclasses.replace(LIMITS, max_request_seconds=0.3))
    address = (server.url.split("//")[1]).split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=30) as connection:
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: a", f"Authorization: Bearer {KEY}", "Content-Length: 9"]
        connection.sendall("\r\n".join([*lines, "", "{"]).encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_queue_length(client, server, slow, monkeypatch):
    monkeypatch.setattr(server.gate, "limits", dataclasses.replace(LIMITS, max_queue=0))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, client, TEXT, max_tokens=10)
        wait_for(lambda: slow)
        with pytest.raises(openai.RateLimitError, match="0 wait, which is the most") as error:
            ask(client, TEXT)
        assert error.value.response.headers["retry-after"] == "1"
        assert answer.result().usage.completion_tokens == 10


@pytest.mark.parametrize("stream", [False, True])
def test_request_time(client, server, slow, monkeypatch, stream):
    """The client hears of it, the model stops, and the next request is answered."""
    monkeypatch.setattr(server.gate, "limits", dataclasses.replace(LIMITS, max_request_seconds=1.0))
    with pytest.raises(openai.APIError, match="took more than 1 seconds") as error:
        list(ask(client, TEXT, max_tokens=40, stream=stream))
    assert error.value.code == "request_timeout"
    if not stream:
        assert error.value.status_code == 504 and error.value.response.headers["x-should-retry"] == "false"
    monkeypatch.undo()
    assert ask(client, TEXT, max_tokens=2).usage.completion_tokens == 2
    assert len(slow) < 30


def test_request_time_while_waiting(client, server, slow, monkeypatch):
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(ask, client, TEXT, max_tokens=25)
        wait_for(lambda: slow)
        monkeypatch.setattr(server.gate, "limits", dataclasses.replace(LIMITS, max_request_seconds=0.3))
        with pytest.raises(openai.InternalServerError, match="Waiting and answering took more"):
            ask(client, IMAGE_PART)
        assert answer.result().usage.completion_tokens == 25


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_stops_when_its_client_has_gone(client, slow, stream):
    if stream:
        answer = ask(client, TEXT, max_tokens=40, stream=True)
        next(answer)
        answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.8), TEXT, max_tokens=40)
    assert ask(client, TEXT, max_tokens=2).usage.completion_tokens == 2
    assert len(slow) < 30


def test_clients_that_do_not_read_hold_nobody_up(monkeypatch):
    monkeypatch.setattr(gate, "_FAREWELL_SECONDS", 0.1)

    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: {}\n\n"})

    async def ask_twice():
        front = gate.Gate(answer, dataclasses.replace(LIMITS, max_request_seconds=0.2))
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        received: list = []

        async def receive():
            return {"type": "http.request", "body": b"{}"} if not received else await asyncio.Future()

        async def block(message):
            received.append(message)
            await asyncio.Future()

        await front(dict(scope), receive, block)
        assert len(received) == 2
        received.clear()

        async def read(message):
            received.append(message)

        await front(dict(scope), receive, read)
        return received

    assert [message["type"] for message in asyncio.run(ask_twice())] == ["http.response.start", "http.response.body"]


def test_media_too_many_for_the_model_are_not_all_encoded(client, session):
    runs = []
    hook = session.model.model.audio_tower.register_forward_hook(lambda *_: runs.append(1))
    parts = [{"type": "input_audio", "input_audio": {"data": to_base64(make_wav(0.2 + i / 100))}} for i in range(8)]
    try:
        with pytest.raises(openai.BadRequestError, match="tokens or more, but the model takes") as error:
            ask(client, *parts)
    finally:
        hook.remove()
    assert error.value.code == "context_length_exceeded" and 0 < len(runs) < 8


def test_limits_that_are_none():
    with pytest.raises(ValueError, match="max_frames must be a number above 0"):
        Limits(max_frames=0)


# Failures


def test_failures_of_the_model_are_not_the_clients(client, session, monkeypatch, caplog):
    reason = 'a "secret"\nof the server'

    def fail(**kwargs):
        raise FloatingPointError(reason)

    monkeypatch.setattr(session.model, "generate", fail)
    with pytest.raises(openai.InternalServerError, match="its log says why") as error:
        ask(client, TEXT)
    assert "secret" not in str(error.value.body)
    with pytest.raises(openai.APIError, match="its log says why"):  # in transformers' stream this is no JSON
        list(ask(client, TEXT, stream=True))
    assert [record.message for record in caplog.records] == ["A request failed.", f"The model failed: {reason}"]
    assert caplog.records[0].exc_info[0] is FloatingPointError
    monkeypatch.undo()
    assert ask(client, TEXT).usage.completion_tokens == 6


# Downloads: what is refused is in test_serving_remote.py


def test_downloads_from_an_allowed_host(client, fresh, site, monkeypatch):
    """From a machine of the local network only if the test says that it is none."""
    resolve = socket.getaddrinfo

    def find(host, *args, **kwargs):
        return resolve("127.0.0.1" if host == "clips.example.org" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", find)
    part = url_part(f"http://{site}/clip.mp4", "video_url")
    with pytest.raises(openai.BadRequestError, match="is of the local network") as error:
        ask(client, part, TEXT)
    assert error.value.code == "host_not_allowed"
    monkeypatch.setattr(remote, "is_public", lambda address: address == "127.0.0.1")
    assert_equal(ask(client, part, TEXT), fresh.ask(TEXT["text"], {"type": "video", "video": CLIP}, max_new_tokens=6))


# The command


def test_command(tmp_path):
    """Start message, its request, Ctrl-C in the middle of an answer."""
    environment = {**os.environ, "VIDEOLLAMA2_API_KEY": KEY, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "videollama2_hf", "serve", "--port", "0", "--model", str(CHECKPOINT)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        first = process.stdout.readline()
        assert process.stdout.readline() == "\n"
        request = process.stdout.readline()
        url = re.match(r"checkpoint answers at (http://127\.0\.0\.1:\d+/v1) \(Ctrl-C ends it\)", first)[1]
        output = subprocess.run(["bash", "-c", request], env=environment, capture_output=True, check=True).stdout
        assert json.loads(output)["choices"][0]["message"]["content"]
        client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
        stream = ask(client, TEXT, max_tokens=1024, model="checkpoint", stream=True)
        next(stream)
        process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in errors


def test_the_extra_is_named_where_it_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "videollama2_hf.serving", None)
    with pytest.raises(SystemExit) as end:
        main(["serve"])
    assert end.value.code == 2 and "pip install videollama2-hf[serve]" in capsys.readouterr().err


def test_start_message():
    text = describe_start("small", "0.0.0.0", 9000, has_key=False)
    assert "http://127.0.0.1:9000/v1" in text and "--api-key asks for a key" in text
    assert "http://[::1]:8000/v1" in describe_start("small", "::1", 8000, has_key=True)


def test_wrong_options(capsys, server):
    port = server.url.rsplit(":", 1)[1]
    for arguments, message, code in (
        (["--port", port], f"Cannot listen on 127.0.0.1 port {port}", 1),
        (["--max-frames", "0"], "max_frames must be a number above 0", 2),
        (["--api-key", ""], "The API key must be", 2),
    ):
        with pytest.raises(SystemExit) as end:
            main(["serve", "--model", str(CHECKPOINT), *arguments])
        assert end.value.code == code and message in capsys.readouterr().err


# docs/serving.md


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(CLIP)
    (tmp_path / "sound.wav").write_bytes(SOUND)
    Image.open(io.BytesIO(IMAGE)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIDEOLLAMA2_API_KEY", KEY)
    return tmp_path


def test_documented_requests(server, folder):
    commands = [block for block in blocks("bash") if "curl" in block]
    assert len(commands) == 3
    for command in commands:
        command = command.replace("http://127.0.0.1:8000", server.url)
        if KEY not in command and "Authorization" not in command:
            command = command.replace("curl ", f"curl -H 'Authorization: Bearer {KEY}' ")
        output = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
        assert '"completion_tokens":32' in output.replace(" ", "") and "error" not in output, output


def test_documented_snippets(server, folder, capsys, monkeypatch):
    *snippets, last = blocks("python")
    names: dict = {}
    for code in snippets:
        code = code.replace("http://127.0.0.1:8000", server.url).replace('api_key="none"', f'api_key="{KEY}"')
        exec(code.replace("max_tokens=64", "max_tokens=8"), names)
        assert "response" in names and names["response"].usage.completion_tokens == 8
    assert "8 tokens said" in capsys.readouterr().out
    monkeypatch.setattr("videollama2_hf.assets.SMALL_MODEL", CHECKPOINT)
    exec(last, names)
    assert names["app"].limits.max_clip_seconds == 60


def test_documented_commands(folder, capsys, monkeypatch):
    """All but the waiting for requests."""
    gates = []
    monkeypatch.setattr(Server, "run", lambda self, sockets: (gates.append(self.gate), self.announce()))
    monkeypatch.setattr("videollama2_hf.assets.SMALL_MODEL", CHECKPOINT)
    (folder / "converted").symlink_to(CHECKPOINT)
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    commands = re.findall(r"^videollama2 (serve.*)$", text, flags=re.MULTILINE)
    for command in commands:
        app([*shlex.split(command), "--port", "0"], standalone_mode=False)
    assert len(commands) == len(gates) == 3
    assert gates[2].limits == Limits(16 * 2**20, 60, 32, 4, 120, 256) and gates[1].api_key == KEY
    assert "converted answers at http://127.0.0.1:" in capsys.readouterr().out


def test_documented_limits():
    """The defaults in the table are those of the code."""
    values = re.findall(r"^\| `--max-[a-z-]+` \| (\d+) ", DOCUMENT, flags=re.MULTILINE)
    defaults = dataclasses.astuple(Limits(max_upload_bytes=64))
    assert [float(value) for value in values] == [float(default) for default in defaults]
    assert Limits().max_upload_bytes == 64 * 2**20
