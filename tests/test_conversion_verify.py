"""The proof of a conversion: what it says when all is well, and that nothing is published when something is not."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from golden_utils import GOLDENS
from videollama2_hf import VideoLlama2ForConditionalGeneration
from videollama2_hf.conversion import build_plan, convert, convert_checkpoint, open_source, report, verify
from videollama2_hf.conversion.tensors import as_bytes
from videollama2_hf.conversion.verify import VerificationError, hash_tensor, self_check, verify_tensors


HEARING = GOLDENS / "qwen2_siglip_beats_av" / "checkpoint"
LORA = GOLDENS / "lora" / "checkpoint-lora"
AVAILABLE_MEMORY = verify.available_memory


@pytest.fixture(scope="module", autouse=True)
def enough_memory():
    """Whatever else this machine is doing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "available_memory", lambda: None)
        yield


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verified") / "out"
    convert_checkpoint(HEARING, folder, verify=True)
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A LoRA result in another dtype: tensors that are merged, cast and both; and its plan."""
    folder = tmp_path_factory.mktemp("merged") / "out"
    plan = convert_checkpoint(LORA, folder, dtype="float16")
    return plan, folder


def test_every_tensor_of_the_source_is_in_the_report(verified):
    content = json.loads((verified / "conversion_report.json").read_text())
    stored = {}
    for path in sorted(HEARING.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    hashes = {name: hashlib.sha256(as_bytes(tensor)).hexdigest() for name, tensor in stored.items()}
    copied = {item["source"]: item["source_sha256"] for item in content["tensors"]}
    left_out = {item["source"]: item["sha256"] for item in content["left_out"]}
    assert copied | left_out == hashes
    assert all(item["target_sha256"] == item["source_sha256"] for item in content["tensors"])
    assert all(item["reason"] for item in content["left_out"]) and len(left_out) == 1
    files = {item["file"]: item["sha256"] for item in content["source"]["files"]}
    assert files == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in HEARING.glob("*.safetensors")
    }
    assert content["counts"]["relations"] == {"equal bytes": len(copied)}
    assert content["versions"]["transformers"] == transformers.__version__


def test_the_reloaded_model_was_tried(verified):
    trial = json.loads((verified / "conversion_report.json").read_text())["checks"]["self_check"]
    assert trial["dtype"] == "bfloat16" and set(trial["features"]) == {"image", "video", "audio"}
    assert trial["features"]["audio"]["tokens"] == 1496
    assert all(numbers["standard_deviation"] > 0 for numbers in trial["features"].values())
    assert 0 < len(trial["greedy"]["ids"]) <= verify.NEW_TOKENS


def test_the_report_for_people(verified):
    text = (verified / "CONVERSION.md").read_text()
    content = json.loads((verified / "conversion_report.json").read_text())
    for item in content["source"]["files"]:
        assert item["sha256"] in text
    for item in content["left_out"]:
        assert item["source"] in text and item["reason"] in text
    assert "was not run" in text and str(content["checks"]["self_check"]["greedy"]["ids"]) in text
    assert str(GOLDENS) not in text and str(GOLDENS) not in json.dumps(content)


def test_merged_and_cast_tensors_are_computed_again(merged):
    plan, folder = merged
    proof = verify_tensors(plan, folder)
    assert not proof["problems"]
    relations = {item["target"]: item["relation"] for item in proof["tensors"]}
    changed = {tensor.target for tensor in plan.tensors if tensor.change is not None}
    assert {name for name, relation in relations.items() if relation == "LoRA merged"} == changed and changed
    assert relations["model.norm.weight"] == "BF16 cast to F16"
    files = {item["file"] for item in proof["tensors"]}
    assert files >= {"non_lora_trainables.bin", "base_llm_mistral/model.safetensors"}
    errors = [item["max_difference_from_float64"] for item in proof["tensors"] if "lora" in item]
    assert 0 < max(errors) < 1e-2


@pytest.mark.parametrize("kind", ["merged", "cast"])
def test_a_wrong_value_is_found(merged, tmp_path, kind):
    plan, folder = merged
    chosen = next(x for x in plan.tensors if not x.is_copy and (x.change is not None) == (kind == "merged"))
    weights = load_file(folder / "model.safetensors")
    # The next number of this dtype for what is cast; a hundredth for what is merged.
    value = weights[chosen.target].view(-1)[3]
    weights[chosen.target].view(-1)[3] = (
        value * 1.01 if kind == "merged" else torch.nextafter(value, value.new_tensor(99.0))
    )
    save_file(weights, tmp_path / "model.safetensors")
    (problem,) = verify_tensors(plan, tmp_path)["problems"]
    assert chosen.target in problem


def test_missing_and_unplanned_tensors_are_found(merged, tmp_path):
    plan, folder = merged
    weights = load_file(folder / "model.safetensors")
    weights["extra"] = weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors")
    problems = verify_tensors(plan, tmp_path)["problems"]
    assert problems == ["model.norm.weight is missing in the written files", "extra was written but not planned"]


def test_first_rows_are_hashed_alone():
    (tensor,) = (x.source for x in build_plan(open_source(HEARING)).tensors if x.target == "model.norm.weight")
    whole = bytes(as_bytes(tensor.load()))
    counts = []
    assert hash_tensor(tensor, counts.append, size=10) == hashlib.sha256(whole[:10]).hexdigest()
    assert sum(counts) == 10


def test_a_changed_byte_on_disk_publishes_nothing(tmp_path, monkeypatch):
    write_original = convert._write_original

    def damage(plan, folder):
        write_original(plan, folder)
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(convert, "_write_original", damage)
    with pytest.raises(VerificationError, match="nothing was published(?s:.*)does not have the bytes of"):
        convert_checkpoint(GOLDENS / "mistral_clip_stp" / "checkpoint", tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["missing", "not finite", "overflow", "not reproducible"])
def test_a_model_that_does_not_work(verified, tmp_path, monkeypatch, damage):
    folder = tmp_path / "out"
    shutil.copytree(verified, folder)
    weights = load_file(folder / "model.safetensors")
    if damage == "missing":
        del weights["model.mm_projector.readout.0.weight"]
        expected = "missing keys: model.mm_projector.readout.0.weight"
    elif damage == "not finite":
        weights["model.mm_projector.readout.0.bias"][0] = float("nan")
        expected = "the features of the image contain NaN"
    elif damage == "overflow":
        weights["lm_head.weight"] *= float("inf")
        expected = "the logits contain NaN"
    else:
        encode, calls = VideoLlama2ForConditionalGeneration.encode_media, []

        def drift(model, **inputs):
            media = encode(model, **inputs)
            calls.append(None)
            media["video"].pooler_output = media["video"].pooler_output + len(calls)
            return media

        monkeypatch.setattr(VideoLlama2ForConditionalGeneration, "encode_media", drift)
        expected = "the video encoded again differs by 1"
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    problems = self_check(folder, 10**6)["problems"]
    assert any(expected in problem for problem in problems), problems


def test_too_little_memory_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(verify, "available_memory", lambda: 10**6)
    monkeypatch.setattr(report.logger, "propagate", True)
    convert_checkpoint(GOLDENS / "mistral_clip_stp" / "checkpoint", tmp_path / "out", verify=True)
    content = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    said = content["checks"]["self_check"]["skipped"]
    assert "GB of memory" in said and said in (tmp_path / "out" / "CONVERSION.md").read_text()
    assert said in (tmp_path / "out" / "README.md").read_text()


def test_memory_is_that_of_the_machine_or_of_the_container(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal:  24000000 kB\nMemAvailable:  8000000 kB\n",
        "/sys/fs/cgroup/memory.max": "max\n",
        "/sys/fs/cgroup/memory.current": "3000000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 1000000000\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    free = AVAILABLE_MEMORY
    assert free() == 8_192_000_000
    files["/sys/fs/cgroup/memory.max"] = "4000000000\n"
    assert free() == 2_000_000_000
    files.clear()
    assert free() is None


def test_source_in_the_cache_of_the_hub(tmp_path):
    folder = tmp_path / "models--DAMO-NLP-SG--VideoLLaMA2.1-7B-AV" / "snapshots" / ("0a" * 20)
    assert verify.source_repository(folder) == ("DAMO-NLP-SG/VideoLLaMA2.1-7B-AV", "0a" * 20)
    assert verify.source_repository(tmp_path / "mine") == ("mine", None)
