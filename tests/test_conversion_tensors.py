"""Weight files as they arrive: damaged, ambiguous, or not what their names say."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from videollama2_hf.conversion import ConversionError
from videollama2_hf.conversion.tensors import find_weight_files, load_pickle, read_file


def write_header(path, entries: dict, size: int) -> None:
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * size)


@pytest.mark.parametrize(
    "offsets", [[(0, 4), (0, 4)], [(0, 4), (8, 12)], [(4, 8)], [(0, 8), (4, 12)]], ids=["same", "hole", "late", "over"]
)
def test_bytes_without_a_name_or_with_two_are_refused(tmp_path, offsets):
    path = tmp_path / "model.safetensors"
    entries = {
        f"t{i}": {"dtype": "U8", "shape": [last - first], "data_offsets": [first, last]}
        for i, (first, last) in enumerate(offsets)
    }
    write_header(path, entries, max(last for _, last in offsets))
    with pytest.raises(ConversionError, match="not a safetensors header"):
        read_file(path)


def test_empty_tensors_have_a_place(tmp_path):
    tensors = {"a": torch.ones(2), "b": torch.ones(0), "c": torch.ones(3), "d": torch.ones(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in read_file(tmp_path / "model.safetensors").items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"<html></html>"])
def test_a_pointer_or_a_web_page_is_not_called_dangerous(tmp_path, content):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ConversionError, match="not a PyTorch file") as raised:
        load_pickle(tmp_path / "a.bin")
    assert "run code" not in str(raised.value) and "download it again" in str(raised.value)


def test_what_would_run_is_named(tmp_path):
    torch.save({"weight": torch.nn.Linear(1, 1)}, tmp_path / "a.bin")
    with pytest.raises(ConversionError, match=r"would run code .*\(torch\.nn\.modules\.linear\.Linear\)"):
        load_pickle(tmp_path / "a.bin")


@pytest.mark.parametrize("legacy", [False, True])
def test_every_damage_is_one_clear_error(tmp_path, legacy):
    path = tmp_path / "a.bin"
    torch.save({"weight": torch.ones(8)}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    refused = 0
    for position in range(0, len(whole), 7):
        for damaged in (whole[:position], whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :]):
            path.write_bytes(damaged)
            try:
                read_file(path)
            except ConversionError:  # anything else is a traceback for whoever converts
                refused += 1
    assert refused > len(whole) // 14


def test_of_two_layouts_the_one_that_transformers_load_counts(tmp_path):
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_weight_files(tmp_path) == ([tmp_path / "model.safetensors"], None)
