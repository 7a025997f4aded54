"""The place of a conversion's result: behind links, beside sources, and what an interruption leaves there."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion_utils import RECORDED, hashes
from golden_utils import GOLDENS
from videollama2_hf.conversion import ConversionError, convert_checkpoint
from videollama2_hf.conversion.convert import check_apart, published_folder
from videollama2_hf.conversion.tensors import SafetensorsWriter, from_state_dict, read_file


@pytest.mark.parametrize("exists", [False, True])
def test_an_output_that_is_a_link_is_the_place_behind_it(tmp_path, exists):
    disk, link = tmp_path / "disk" / "place", tmp_path / "link"
    disk.parent.mkdir()
    if exists:
        disk.mkdir()
    link.symlink_to(disk)
    convert_checkpoint(RECORDED, link)
    assert link.is_symlink() and (disk / "config.json").is_file()
    before = hashes(disk)
    convert_checkpoint(RECORDED, link, overwrite=True)
    assert link.is_symlink() and hashes(disk) == before
    assert {path.name for path in [*tmp_path.iterdir(), *disk.parent.iterdir()]} == {"disk", "link", "place"}


@pytest.mark.parametrize("name", ["output", ".output.partial", ".output.replaced"])
@pytest.mark.parametrize("inside", [".", "deep/inside"])
def test_a_source_that_would_be_replaced(tmp_path, name, inside):
    """An adapter alone, whose base lies elsewhere; also where an earlier conversion left it."""
    lora = tmp_path / name / inside
    shutil.copytree(GOLDENS / "lora" / "checkpoint-lora", lora)
    (lora / "non_lora_trainables.bin").unlink()
    shutil.copytree(GOLDENS / "lora" / "base_llm_mistral", tmp_path / "base")
    before = hashes(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ConversionError, match="overlap"):
            check_apart(tmp_path / "output", {lora, tmp_path / "base"}, set())
        with pytest.raises(ConversionError):
            convert_checkpoint(lora, tmp_path / "output", base=tmp_path / "base", overwrite=overwrite)
    assert hashes(tmp_path) == before


def test_a_projector_beside_its_checkpoint_is_a_source_too(tmp_path):
    """`mm_projector/checkpoint-N.bin` lies in neither the checkpoint's nor the base's folder."""
    golden = GOLDENS / "base_projector_only"
    checkpoint, projector = tmp_path / "run" / "checkpoint-7", tmp_path / "run" / "mm_projector" / "checkpoint-7.bin"
    shutil.copytree(golden / "checkpoint", checkpoint)
    projector.parent.mkdir()
    (checkpoint / "mm_projector.bin").rename(projector)
    with pytest.raises(ConversionError, match="overlap"):
        convert_checkpoint(checkpoint, projector.parent, base=golden / "base_llm_mistral", overwrite=True)
    assert projector.is_file()


def test_what_an_interruption_before_the_last_step_leaves_is_known(tmp_path, monkeypatch):
    """Between the last file and the folder's name: still resumed only by the conversion that it is of."""

    def interrupt(*_):
        raise KeyboardInterrupt

    output = tmp_path / "output"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("videollama2_hf.conversion.convert.os.rename", interrupt)
        convert_checkpoint(RECORDED, output)
    assert not output.exists()
    with pytest.raises(ConversionError, match="other files or options"):
        convert_checkpoint(RECORDED, output, resume=True, dtype="float16")
    convert_checkpoint(RECORDED, output, resume=True)
    convert_checkpoint(RECORDED, tmp_path / "expected")
    assert {path.name for path in tmp_path.iterdir()} == {"output", "expected"}
    found, expected = hashes(output), hashes(tmp_path / "expected")
    assert {name for name in expected if found.get(name) != expected[name]} <= {"README.md"}  # it has the name in it
    assert found.keys() == expected.keys()


def test_files_of_nobody_are_not_resumed(tmp_path):
    partial = tmp_path / ".output.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_text("of an unknown conversion")
    with published_folder(tmp_path / "output", "a", resume=True) as folder:
        (folder / "config.json").write_text("{}")
    assert hashes(tmp_path / "output").keys() == {"config.json"}


@pytest.mark.parametrize("stored", ["safetensors", "PyTorch"])
@pytest.mark.parametrize("rows", [0, 3, 5, 9])
def test_rows_that_are_cut_off_are_kept(tmp_path: Path, stored, rows):
    tensors = {"a": torch.arange(3), "b": torch.randn(5, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    source = read_file(tmp_path / "a.safetensors") if stored == "safetensors" else from_state_dict(tensors, tmp_path)
    kept = source["b"].after(rows)
    with SafetensorsWriter(tmp_path / "kept.safetensors", [("b", kept.dtype, kept.shape)]) as writer:
        for chunk in kept.chunks():
            writer.write(chunk)
    assert torch.equal(load_file(tmp_path / "kept.safetensors")["b"], tensors["b"][rows:])
    assert torch.equal(kept.load(), tensors["b"][rows:])
