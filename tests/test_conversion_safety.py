"""Malformed checkpoints, hostile files and full disks: one clear sentence, its exit code, and nothing left behind."""

import errno
import json
import os
import pickle
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion_utils import RECORDED, copy_checkpoint, edit_json, hashes, random_checkpoint
from golden_utils import GOLDENS
from videollama2_hf.cli import main
from videollama2_hf.conversion import ConversionError, convert_checkpoint, restore_original
from videollama2_hf.conversion.convert import published_folder
from videollama2_hf.conversion.tensors import SafetensorsWriter, read_file, read_folder


LORA, PROJECTOR = GOLDENS / "lora", GOLDENS / "base_projector_only"
SHARD, INDEX = "model-00002-of-00004.safetensors", "model.safetensors.index.json"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return copy_checkpoint(RECORDED, tmp_path / "checkpoint")


@pytest.fixture
def lora(tmp_path) -> Path:
    shutil.copytree(LORA / "base_llm_mistral", tmp_path / "base_llm_mistral")
    return copy_checkpoint(LORA / "checkpoint-lora", tmp_path / "checkpoint-lora")


@pytest.fixture
def refuse(capsys):
    """Runs `videollama2 convert`, which must refuse; returns the message."""

    def run(*arguments, code: int = 2) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["convert", *map(str, arguments)])
        message = capsys.readouterr().err
        assert ended.value.code == code, message
        assert message.startswith("Error: ") and message.count("Error") == 1
        assert "Traceback" not in message
        return message

    return run


def edit_index(checkpoint: Path, **weight_map) -> None:
    index = json.loads((checkpoint / INDEX).read_text())
    index["weight_map"] |= weight_map
    (checkpoint / INDEX).write_text(json.dumps(index))


def edit_tensors(path: Path, edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def a_tensor(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name, tensor in tensors.items() if tensor.ndim == 2 and "layers" in name)


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / SHARD, (checkpoint / SHARD).stat().st_size - 100)


def truncate_header(checkpoint: Path) -> None:
    os.truncate(checkpoint / SHARD, 50)


def remove_shard(checkpoint: Path) -> None:
    (checkpoint / SHARD).unlink()


def remove_all_weights(checkpoint: Path) -> None:
    for path in checkpoint.glob("model*"):
        path.unlink()


def break_index(checkpoint: Path) -> None:
    (checkpoint / INDEX).write_text("not JSON")


def name_missing_key(checkpoint: Path) -> None:
    edit_index(checkpoint, **{"model.layers.7.ghost": SHARD})


def name_missing_file(checkpoint: Path) -> None:
    edit_index(checkpoint, **{"model.layers.7.ghost": "model-00009-of-00004.safetensors"})


def leave_the_folder(checkpoint: Path) -> None:
    shutil.copy(checkpoint / SHARD, checkpoint.parent / "outside.safetensors")
    edit_index(checkpoint, **{"lm_head.weight": "../outside.safetensors"})


def name_an_absolute_path(checkpoint: Path) -> None:
    edit_index(checkpoint, **{"lm_head.weight": str(checkpoint / SHARD)})


def name_no_file(checkpoint: Path) -> None:
    edit_index(checkpoint, **{"lm_head.weight": 7})


def break_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")


def config_of_a_list(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("[]")


def remove_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()


def unknown_model_type(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", model_type="whale")


def model_type_of_a_list(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", model_type=["videollama2_mistral"])


def size_of_text(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", hidden_size="large")


def no_vision_tower(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", mm_vision_tower=None)


def unknown_connector(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", mm_projector_type="crystal")


def wrong_shape(checkpoint: Path) -> None:
    edit_tensors(checkpoint / SHARD, lambda tensors: tensors.update({a_tensor(tensors): torch.ones(3, 5)}))


def not_a_number(checkpoint: Path) -> None:
    edit_tensors(checkpoint / SHARD, lambda tensors: tensors[a_tensor(tensors)].view(-1)[5].fill_(float("nan")))


def infinite(checkpoint: Path) -> None:
    edit_tensors(checkpoint / SHARD, lambda tensors: tensors[a_tensor(tensors)].view(-1)[-1].fill_(-float("inf")))


def empty(checkpoint: Path) -> None:
    edit_tensors(checkpoint / SHARD, lambda tensors: tensors.update({a_tensor(tensors): torch.empty(0)}))


def left_over(checkpoint: Path) -> None:
    edit_tensors(checkpoint / SHARD, lambda tensors: tensors.update({"model.layers.0.extra": torch.ones(3)}))


def missing(checkpoint: Path) -> None:
    name = a_tensor(load_file(checkpoint / SHARD))
    edit_tensors(checkpoint / SHARD, lambda tensors: tensors.pop(name))
    index = json.loads((checkpoint / INDEX).read_text())
    del index["weight_map"][name]
    (checkpoint / INDEX).write_text(json.dumps(index))


def break_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")


DAMAGES = {
    truncate: (SHARD, "where its header asks for", "again"),
    truncate_header: (SHARD, "cut off", "again"),
    remove_shard: (SHARD, "missing"),
    remove_all_weights: ("holds no weights that are known",),
    break_index: (INDEX, "not an index"),
    name_missing_key: (INDEX, "disagree", "model.layers.7.ghost"),
    name_missing_file: ("model-00009-of-00004.safetensors", "missing"),
    leave_the_folder: ("../outside.safetensors", "not followed"),
    name_an_absolute_path: (SHARD, "not followed"),
    name_no_file: ("'7'", "not followed"),
    break_config: ("config.json", "not JSON"),
    config_of_a_list: ("no config.json",),
    remove_config: ("no config.json",),
    unknown_model_type: ("'whale'", "videollama2_qwen2"),
    model_type_of_a_list: ("['videollama2_mistral']", "videollama2_qwen2"),
    size_of_text: ("hidden_size",),
    no_vision_tower: ("mm_vision_tower",),
    unknown_connector: ("crystal", "stc_connector"),
    wrong_shape: ("has the shape [3, 5], expected", "1 tensors"),
    not_a_number: ("not finite", "1 tensors", "fc1.weight"),
    infinite: ("not finite", "1 tensors", "fc1.weight"),
    empty: ("is empty", "zero_to_fp32"),
    left_over: ("model.layers.0.extra", "no place in the model"),
    missing: ("is missing", "1 tensors"),
    break_tokenizer: ("tokenizer", "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoint(checkpoint, tmp_path, refuse, damage):
    damage(checkpoint)
    before = hashes(checkpoint)
    message = refuse(checkpoint, "--output", tmp_path / "output")
    for part in DAMAGES[damage]:
        assert part in message, message
    assert hashes(checkpoint) == before
    assert not (tmp_path / "output").exists() and not (tmp_path / ".output.partial").exists()


def as_pytorch(checkpoint: Path, legacy: bool = False) -> Path:
    """The weights of a checkpoint in one PyTorch file instead."""
    state_dict = {name: tensor.load().clone() for name, tensor in read_folder(checkpoint).items()}
    remove_all_weights(checkpoint)
    path = checkpoint / "pytorch_model.bin"
    torch.save(state_dict, path, _use_new_zipfile_serialization=not legacy)
    return path


class Intruder:
    """What runs a command when it is unpickled by anything that executes pickles."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return (os.system, (f"touch {self.proof}",))


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle"])
def test_pickle_that_would_run_code(checkpoint, tmp_path, refuse, kind):
    path, proof = as_pytorch(checkpoint), tmp_path / "it-ran"
    state_dict = torch.load(path, weights_only=True) | {"lm_head.weight": Intruder(proof)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(state_dict))
    else:
        torch.save(state_dict, path, _use_new_zipfile_serialization=kind == "zip")
    message = refuse(checkpoint, "--output", tmp_path / "output")
    assert "pytorch_model.bin" in message and "was not read" in message
    assert not proof.exists() and not (tmp_path / "output").exists()
    pickle.loads(path.read_bytes()) if kind == "plain pickle" else torch.load(path, weights_only=False)
    assert proof.exists()  # the file does what it is said to do


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pytorch_files_give_the_same_result(checkpoint, tmp_path, legacy):
    convert_checkpoint(checkpoint, tmp_path / "expected")
    as_pytorch(checkpoint, legacy)
    convert_checkpoint(checkpoint, tmp_path / "output")
    expected, found = read_folder(tmp_path / "expected"), read_folder(tmp_path / "output")
    assert set(found) == set(expected) and all(found[name].equals(expected[name]) for name in expected)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04garbage", None, [1, 2], {"model": 3}])
def test_pytorch_file_without_weights(checkpoint, tmp_path, refuse, content):
    path = as_pytorch(checkpoint)
    if content is None:
        os.truncate(path, path.stat().st_size // 2)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert "pytorch_model.bin" in refuse(checkpoint, "--output", tmp_path / "output")


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse()], ids=["complex", "sparse"]
)
def test_pytorch_file_with_tensors_of_another_kind(tmp_path, tensor):
    torch.save({"weight": tensor}, tmp_path / "weights.bin")
    with pytest.raises(ConversionError, match="weights.bin holds tensors of another kind"):
        read_file(tmp_path / "weights.bin")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},  # the file holds 4 bytes
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": None, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]},
        {"dtype": "F32", "shape": [1], "data_offsets": "04"},
        {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"shape": [1], "data_offsets": [0, 4]},
        "text",
        None,
    ],
)
def test_malformed_safetensors_header(tmp_path, entry):
    header = json.dumps({"weight": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(ConversionError, match="model.safetensors"):
        read_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"\0" * 4, b"\xff" * 64, struct.pack("<Q", 2) + b"[]", b"\0" * 9])
def test_file_that_is_no_safetensors(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConversionError, match="model.safetensors"):
        read_file(tmp_path / "model.safetensors")


def test_lora_without_its_base(lora, tmp_path, refuse):
    shutil.rmtree(tmp_path / "base_llm_mistral")
    message = refuse(lora, "--output", tmp_path / "output")
    assert "../base_llm_mistral" in message and "Pass the base: --base PATH." in message


def test_projector_without_its_base(tmp_path, refuse):
    message = refuse(copy_checkpoint(PROJECTOR / "checkpoint", tmp_path / "base"), "--output", tmp_path / "output")
    assert "only a projector" in message and "Pass the base: --base PATH." in message


def test_adapter_with_one_factor(lora, tmp_path, refuse):
    def drop(tensors):
        del tensors[next(name for name in tensors if "lora_B" in name)]

    edit_tensors(lora / "adapter_model.safetensors", drop)
    assert "only one of the two LoRA factors" in refuse(lora, "--output", tmp_path / "output")


def test_adapter_of_another_rank(lora, tmp_path, refuse):
    def widen(tensors):
        name = next(name for name in tensors if "lora_A" in name)
        tensors[name] = torch.cat([tensors[name]] * 2)

    edit_tensors(lora / "adapter_model.safetensors", widen)
    assert "rank" in refuse(lora, "--output", tmp_path / "output")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_adapter_of_another_kind(lora, tmp_path, refuse, changes, expected):
    edit_json(lora / "adapter_config.json", **changes)
    assert expected in refuse(lora, "--output", tmp_path / "output")


def test_adapter_config_that_is_no_json(lora, tmp_path, refuse):
    (lora / "adapter_config.json").write_text("{")
    message = refuse(lora, "--output", tmp_path / "output")
    assert "adapter_config.json" in message and "not JSON" in message


def test_converted_folder_is_not_converted_again(checkpoint, tmp_path, refuse):
    convert_checkpoint(checkpoint, tmp_path / "output")
    assert "converted already" in refuse(tmp_path / "output", "--output", tmp_path / "again")


def test_output_that_exists_is_kept(checkpoint, tmp_path, refuse):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "diary.txt").write_text("mine")
    assert "--overwrite" in refuse(checkpoint, "--output", tmp_path / "output")
    assert hashes(tmp_path / "output").keys() == {"diary.txt"}
    convert_checkpoint(checkpoint, tmp_path / "output", overwrite=True)
    assert not (tmp_path / "output" / "diary.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "output"}


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("where", [".", "converted", "vision/converted", ".."])
def test_output_that_would_change_the_source(checkpoint, refuse, where, options):
    before = hashes(checkpoint)
    refuse(checkpoint, "--output", checkpoint / where, *options)
    assert hashes(checkpoint) == before


def test_output_that_holds_the_base(lora, tmp_path, refuse):
    before = hashes(tmp_path)
    assert "overlap" in refuse(lora, "--output", tmp_path / "base_llm_mistral", "--overwrite")
    assert hashes(tmp_path) == before


def test_source_that_is_a_file(checkpoint, tmp_path, refuse):
    assert "is a file; pass the folder" in refuse(checkpoint / SHARD, "--output", tmp_path / "output")


def test_source_that_is_nowhere(tmp_path, refuse):
    assert "There is no folder ./nowhere" in refuse("./nowhere", "--output", tmp_path / "output")


def test_linked_files_as_in_the_cache_of_the_hub(checkpoint, tmp_path):
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "hub" / "checkpoint"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in checkpoint.iterdir() if path.is_file())):
        shutil.copy(path, tmp_path / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    shutil.copytree(checkpoint / "vision", snapshot / "vision")
    before = hashes(snapshot)
    convert_checkpoint(checkpoint, tmp_path / "expected" / "output")
    convert_checkpoint(snapshot, tmp_path / "output")
    assert hashes(tmp_path / "output") == hashes(tmp_path / "expected" / "output")
    restore_original(tmp_path / "output", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(checkpoint)
    assert hashes(snapshot) == before


def test_source_that_cannot_be_written(checkpoint, tmp_path):
    before, folders = hashes(checkpoint), [checkpoint, *(path for path in checkpoint.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    times = {path: path.stat().st_mtime_ns for path in [checkpoint, *checkpoint.rglob("*")]}
    try:
        convert_checkpoint(checkpoint, tmp_path / "output")
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert hashes(checkpoint) == before
    assert times == {path: path.stat().st_mtime_ns for path in times}  # as root, nothing stops a write


@pytest.fixture
def small_disk():
    """No file may grow beyond 62 kB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (62_000, before[1]))

    def clear() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    yield clear
    clear()


def test_full_disk(tmp_path, refuse, request):
    sizes = {"hidden_size": 64, "num_hidden_layers": 12}
    source, output = random_checkpoint(tmp_path / "source", **sizes), tmp_path / "output"
    convert_checkpoint(source, tmp_path / "expected" / "output", max_shard_size=60_000)
    before = hashes(source)
    clear = request.getfixturevalue("small_disk")
    message = refuse(source, "--output", output, "--max-shard-size", "60KB", code=1)
    clear()
    assert "is not complete. Make space and go on with --resume." in message
    assert not output.exists() and hashes(source) == before
    assert "--resume" in refuse(source, "--output", output, "--max-shard-size", "60KB")
    convert_checkpoint(source, output, max_shard_size=60_000, resume=True)
    assert hashes(output) == hashes(tmp_path / "expected" / "output")


def test_full_disk_on_the_way_back(checkpoint, tmp_path, refuse, request):
    convert_checkpoint(checkpoint, tmp_path / "converted")
    clear = request.getfixturevalue("small_disk")
    message = refuse(tmp_path / "converted", "--to-original", "--output", tmp_path / "back", code=1)
    clear()
    assert "is not complete. Make space and go on with --resume." in message
    assert not (tmp_path / "back").exists()
    restore_original(tmp_path / "converted", tmp_path / "back", resume=True)
    assert hashes(tmp_path / "back") == hashes(checkpoint)


def test_space_is_checked_before_anything_is_written(checkpoint, tmp_path, refuse, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "GB are needed" in refuse(checkpoint, "--output", tmp_path / "output", code=1)
    assert not (tmp_path / "output").exists()


def test_values_that_are_not_finite_are_found_after_an_interruption_too(checkpoint, tmp_path, monkeypatch, refuse):
    not_a_number(checkpoint)
    write, written = SafetensorsWriter.write, []

    def fill(writer, chunk):
        written.append(writer.path.name)
        if len(set(written)) == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, chunk)

    arguments = [checkpoint, "--output", tmp_path / "output", "--max-shard-size", "60KB"]
    monkeypatch.setattr(SafetensorsWriter, "write", fill)
    assert os.strerror(errno.ENOSPC) in refuse(*arguments, code=1)
    monkeypatch.undo()
    assert "not finite" in refuse(*arguments, "--resume")


def test_two_conversions_to_one_output(checkpoint, tmp_path, refuse):
    with published_folder(tmp_path / "output", "of the first") as first:
        (first / "model.safetensors").write_bytes(b"half")
        for option in ([], ["--resume"], ["--overwrite"]):
            message = refuse(checkpoint, "--output", tmp_path / "output", *option)
            assert "running" in message if not option else "Another process is converting" in message
        assert (first / "model.safetensors").read_bytes() == b"half"
    assert (tmp_path / "output" / "model.safetensors").read_bytes() == b"half"


def test_resume_of_another_conversion(checkpoint, tmp_path, refuse):
    with pytest.raises(OSError), published_folder(tmp_path / "output", "another"):
        raise OSError("interrupted")
    assert "--overwrite" in refuse(checkpoint, "--output", tmp_path / "output", "--resume")


def test_layout_that_leaves_the_folder(checkpoint, tmp_path, refuse):
    convert_checkpoint(checkpoint, tmp_path / "output")
    path = tmp_path / "output" / "original" / "layout.json"
    layout = json.loads(path.read_text())
    layout["files"]["../../stolen.safetensors"] = layout["files"].pop(SHARD)
    path.write_text(json.dumps(layout))
    message = refuse(tmp_path / "output", "--to-original", "--output", tmp_path / "deep" / "back")
    assert "../../stolen.safetensors" in message and not (tmp_path / "stolen.safetensors").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"kind": "full", "files": {"a.bin": 3}}'])
def test_layout_that_is_none(checkpoint, tmp_path, refuse, content):
    (checkpoint / "original").mkdir()
    (checkpoint / "original" / "layout.json").write_text(content)
    message = refuse(checkpoint, "--to-original", "--output", tmp_path / "back")
    assert "layout.json" in message and "Convert the original again" in message


def test_output_is_needed(checkpoint, refuse):
    assert "--output" in refuse(checkpoint)


def test_unknown_dtype(checkpoint, tmp_path, refuse):
    assert "'int7'" in refuse(checkpoint, "--output", tmp_path / "output", "--dtype", "int7")


def test_values_that_a_smaller_dtype_cannot_hold(checkpoint, tmp_path, refuse):
    edit_tensors(checkpoint / SHARD, lambda tensors: tensors[a_tensor(tensors)].view(-1)[0].fill_(1e6))
    assert "change of dtype" in refuse(checkpoint, "--output", tmp_path / "output", "--dtype", "float16")
