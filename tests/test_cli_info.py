"""`videollama2 info`: numbers of checkpoints are those of the loaded model, of files what the processor takes."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForMultimodalLM, AutoProcessor, DynamicCache

from golden_utils import GOLDENS
from processing_utils import write_media
from tiny_models import make_config
from videollama2_hf import VideoLlama2ForConditionalGeneration, get_num_audio_tokens
from videollama2_hf.cli import main
from videollama2_hf.inference_memory import PeakMemory, estimate_inference, get_num_mel_frames
from videollama2_hf.information import describe_model, format_bytes
from videollama2_hf.media_information import describe_medium
from videollama2_hf.media_videollama2 import MediaError


CHECKPOINT = GOLDENS / "qwen2_siglip_beats_av" / "checkpoint"


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["info", *map(str, arguments)])
    output = capsys.readouterr()
    return end.value.code or 0, output.out, output.err


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


# Memory


def test_peak_memory_of_known_tensors():
    for device in ("cpu", "meta"):
        with PeakMemory() as memory:
            first = torch.empty(1000, device=device)
            second = first + 1
            view = second.view(10, 100)
            del second
            assert (memory.live, memory.peak) == (8000, 8000)  # the view holds it
            del view
            assert (memory.live, memory.peak) == (4000, 8000)
            first.add_(1)
            (first * 2).sum()
            assert memory.peak == 8004
        del first
        assert memory.live == 0


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_memory_is_that_of_a_real_answer(family):
    """Two videos with sound as a batch, three tokens. Gemma 2 has sliding windows, and attention that holds scores."""
    text = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 2000, "max_position_embeddings": 8192}
    placeholders = {"image_token_id": 2000, "video_token_id": 2001, "audio_token_id": 2002}
    config = make_config(family, text_config=text, num_frames=8, **placeholders)
    estimate = estimate_inference(config, num_new_tokens=3, batch_size=2, chunk_length=10, num_text_tokens=50)
    model = VideoLlama2ForConditionalGeneration(config).to(torch.bfloat16).eval()
    num_mel_frames = get_num_mel_frames(10)
    counts = {5: 25, 2001: config.num_visual_tokens("video"), 2002: get_num_audio_tokens(num_mel_frames), 6: 25}
    ids = torch.tensor([[token for token, count in counts.items() for _ in range(count)]] * 2)
    cache = DynamicCache(config=config.text_config)
    with torch.no_grad(), PeakMemory() as memory:
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values_videos": torch.zeros(2, 8, 3, 28, 28),
            "input_features": torch.zeros(2, num_mel_frames, 128),
            "input_features_mask": torch.ones(2, num_mel_frames, dtype=torch.long),
        }
        model.generate(**inputs, past_key_values=cache, min_new_tokens=3, max_new_tokens=3, do_sample=False)
    found = estimate["bfloat16"]
    assert found.weights == sum(parameter.nbytes for parameter in model.parameters())
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found.cache == pytest.approx(held, rel=0.02)
    assert found.activations + found.cache == pytest.approx(memory.peak, rel=0.03)
    linear = sum(m.weight.numel() for m in model.model.language_model.modules() if isinstance(m, torch.nn.Linear))
    assert found.weights - estimate["8 bit"].weights == linear
    assert found.weights - estimate["4 bit"].weights == pytest.approx(linear * (2 - 4.127 / 8), abs=1)


def test_memory_grows_with_what_is_asked_for():
    config = make_config("qwen2")
    base = estimate_inference(config, chunk_length=1)["bfloat16"]
    longer = estimate_inference(config, num_new_tokens=512, chunk_length=1)["bfloat16"]
    assert longer.cache > base.cache and longer.activations == base.activations and longer.weights == base.weights
    assert estimate_inference(config, num_frames=8, chunk_length=1)["bfloat16"].total > base.total
    assert estimate_inference(config, batch_size=3, chunk_length=1)["bfloat16"].cache == 3 * base.cache
    blind = estimate_inference(config, num_frames=0, hears=False)["bfloat16"]
    assert blind.cache < base.cache and blind.activations < base.activations
    with pytest.raises(ValueError, match="needs at least"):
        estimate_inference(config, num_frames=1)


# Checkpoints


def test_a_converted_checkpoint(tmp_path, processor):
    model = AutoModelForMultimodalLM.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(CHECKPOINT, chunk_length=4).save_pretrained(tmp_path)
    information = describe_model(tmp_path, num_frames=6)
    assert information.kind == "converted" and information.notes == []
    assert sum(information.parameters.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert information.parameters["audio_tower"] == sum(p.numel() for p in model.model.audio_tower.parameters())
    sizes = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert list(information.disk) == ["BF16"] and 0 < sizes - sum(information.disk.values()) < 40_000  # headers
    assert information.tokens["audio"] == get_num_audio_tokens(get_num_mel_frames(4)) == 192
    assert information.tokens["video"][6] == model.config.num_visual_tokens("video", 6)
    text = information.describe()
    assert "a video of 6 frames with sound" in text and "BEATs, 2 layers of 32" in text and "one window of 4 s" in text


@pytest.mark.parametrize(
    ("path", "kind", "note"),
    [
        ("qwen2_siglip_beats_av/checkpoint", "full", None),
        ("base_projector_only/checkpoint", "projector", "videollama2 convert"),
        ("lora/checkpoint-lora", "lora", "videollama2 convert"),
        ("video_llava/tiny-video-llava-7b", "full", None),
    ],
)
def test_original_layouts(path, kind, note, capsys):
    code, out, _ = run(capsys, GOLDENS / path, "--json", "--seconds", "0", "--batch-size", "2", "--new-tokens", "5")
    information = json.loads(out)
    assert code == 0 and information["kind"] == kind and information["disk"]
    assert any(note in item for item in information["notes"]) if note else not information["notes"]
    inputs = information["memory_inputs"]
    assert inputs == {"num_frames": 8, "hears": False, "num_new_tokens": 5, "batch_size": 2, "num_text_tokens": 128}
    assert information["memory"]["bfloat16"]["weights"] == 2 * sum(information["parameters"].values())
    assert information["tokens"]["video"]["8"] > 0 and len(information["memory"]) == 3
    code, out, _ = run(capsys, GOLDENS / path)
    assert "tokens of a video" in out and ("video tower" in out) == ("video_llava" in path)


def test_what_is_no_checkpoint(tmp_path, capsys, media):
    shutil.copytree(GOLDENS / "lora" / "checkpoint-lora", tmp_path / "lora")
    code, _, err = run(capsys, tmp_path / "lora")
    assert code == 2 and "goes with the base" in err and "hf download" in err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    code, _, err = run(capsys, tmp_path / "other")
    assert code == 2 and "'gpt2'" in err and "Traceback" not in err
    code, _, err = run(capsys, CHECKPOINT, "--model", CHECKPOINT)
    assert code == 2 and "Leave it out for a checkpoint" in err
    code, _, err = run(capsys, tmp_path)
    assert code == 2 and "holds no image files" in err
    code, _, err = run(capsys, "nowhere.mp4")
    assert code == 2 and "There is no media file 'nowhere.mp4'" in err


class Hub(BaseHTTPRequestHandler):
    """A Hub with one repository, `me/tiny`, of which only small files are given."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, content = self.path.split("?")[0], b""
        if path == "/api/models/me/tiny/revision/main" or path == "/api/models/me/tiny":
            names = [("model-1.safetensors", 7_000), ("model-2.safetensors", 3_000), ("config.json", 5)]
            siblings = [{"rfilename": name, "size": size} for name, size in names]
            content = json.dumps({"id": "me/tiny", "modelId": "me/tiny", "siblings": siblings}).encode()
        elif path in ("/me/tiny/resolve/main/config.json", f"/me/tiny/resolve/{'a' * 40}/config.json"):
            content = self.server.config
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"1234"')
        self.send_header("X-Repo-Commit", "a" * 40)
        if not content:
            self.send_header("X-Error-Code", "EntryNotFound" if "/tiny/" in path else "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.config = json.dumps(make_config().to_dict()).encode()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def test_a_repository_on_the_hub(hub, capsys, monkeypatch):
    """Only its configuration is fetched; afterwards it is described without the Hub, but for its size."""
    code, out, err = run(capsys, "me/tiny")
    assert code == 0, err
    assert "converted" in out and "weights on disk: 10.00 kB (.safetensors files 10.00 kB)" in out
    code, _, err = run(capsys, "me/nothing")
    assert code == 2 and "could not be read from the Hub" in err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, err = run(capsys, "me/tiny")
    assert code == 0 and "size of its files is not known" in out
    assert describe_model("me/tiny").parameters["language_model"] > 0


def test_format_bytes():
    assert [format_bytes(size) for size in (5, 1500, 16.1e9, 3e12)] == ["5 bytes", "1.50 kB", "16.10 GB", "3000.00 GB"]


# Files


def test_a_video_with_sound(media, processor, capsys):
    """Frames, times, windows and tokens are what the processor really takes."""
    information = describe_medium(media["loud"], processor, num_frames=4)
    block = {"type": "video", "video": media["loud"], "num_frames": 4}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [block]}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    taken = information.taken
    for kind in ("video", "audio"):
        token_id = getattr(processor, f"{kind}_token_id")
        assert taken["tokens"][kind] == (inputs["input_ids"] == token_id).sum()
    outputs = processor.video_processor(media["loud"], num_frames=4, return_metadata=True)
    metadata = outputs["video_metadata"][0]
    assert taken["frames"] == list(metadata.frames_indices)
    assert taken["times"] == pytest.approx(metadata.timestamps)
    heard = len(processor.feature_extractor.load_video_audio(media["loud"])) / 16000
    assert sum(end - start for start, end in taken["windows"]) == pytest.approx(heard)
    video, audio = information.streams
    assert (video["codec"], audio["codec"]) == ("mpeg4", "aac") and video["num_frames"] == metadata.total_num_frames
    code, out, _ = run(capsys, media["loud"], "--model", CHECKPOINT, "--frames", "4")
    assert code == 0 and f"{CHECKPOINT} takes of it:\n4 frames, at " in out and "sound from 0.00 to " in out
    assert f"{sum(taken['tokens'].values())} tokens" in out


def test_other_files(media, processor, capsys):
    silent = describe_medium(media["silent"], processor)
    assert [stream["type"] for stream in silent.streams] == ["video"] and "\nno sound\n" in silent.describe()
    assert "heard as silence" in silent.notes[0] and silent.taken["tokens"]["audio"] == 1496
    deaf = AutoProcessor.from_pretrained(GOLDENS / "qwen2_siglip_stcv35_16f" / "checkpoint")
    loud = describe_medium(media["loud"], deaf)
    assert loud.notes == ["This model does not hear; the sound is left out."] and list(loud.taken["tokens"]) == [
        "video"
    ]
    sound = describe_medium(media["sound"], processor)
    assert sound.kind == "audio" and sound.taken["windows"] == [(0.0, 1.0)] and sound.taken["frames"] == []
    image = describe_medium(media["image"], processor)
    assert image.kind == "image" and image.streams[0]["size"] == [80, 60]
    assert image.taken["tokens"] == {"image": silent.taken["tokens"]["video"]}
    folder = describe_medium(media["folder"])
    assert folder.streams[0]["num_frames"] == 8 and folder.size is None and folder.taken == {}
    assert describe_medium(media["gif"]).streams[0]["codec"] == "gif"
    code, out, _ = run(capsys, media["sound"], "--model", CHECKPOINT, "--json")
    assert code == 0 and json.loads(out)["taken"]["tokens"] == {"audio": 1496}


def test_the_whole_track_is_heard_in_the_full_mode(media):
    full = AutoProcessor.from_pretrained(CHECKPOINT, audio_mode="full", missing_audio_policy="drop")
    information = describe_medium(media["loud"], full)
    heard = len(full.feature_extractor.load_video_audio(media["loud"])) / 16000
    assert information.taken["windows"] == [(0.0, pytest.approx(heard))]
    silent = describe_medium(media["silent"], full)
    assert "'drop'" in silent.notes[0] and list(silent.taken["tokens"]) == ["video"]


def test_damaged_files(media, tmp_path, processor):
    (tmp_path / "text.mp4").write_text("no video")
    for path in (tmp_path / "text.mp4", media["broken"]):
        with pytest.raises(MediaError):
            describe_medium(path, processor)
