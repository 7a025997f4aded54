"""`videollama2 convert`: options that would be without effect are refused, not ignored."""

import shutil

import pytest

from conversion_utils import RECORDED, edit_json
from videollama2_hf.cli import main


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--to-original", "--dry-run"], "--dry-run"),
        (["--to-original", "--dtype", "float16", "--verify"], "--dtype, --verify"),
        (["--to-original", "--push-to-hub", "someone/model"], "--push-to-hub"),
        (["--full", "--original", "elsewhere"], "--original, --full"),
        (["--private"], "--push-to-hub"),
    ],
)
@pytest.mark.parametrize("output", [True, False])
def test_options_that_do_not_go_together(tmp_path, capsys, options, named, output):
    arguments = ["--output", str(tmp_path / "output")] if output else []
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(RECORDED), *arguments, *options])
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.startswith("Error: ")
    if output or "--dry-run" in options:
        assert named in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mm_vision_tower": None}, "mm_vision_tower"),
        ({"mm_vision_tower": 5}, "mm_vision_tower"),
        ({"mm_vision_tower": ["a"]}, "mm_vision_tower"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 0}, "config.json"),
    ],
)
@pytest.mark.parametrize("tower", [True, False])
def test_a_configuration_that_cannot_be_is_one_clear_error(tmp_path, capsys, changes, named, tower):
    checkpoint = shutil.copytree(RECORDED, tmp_path / "checkpoint")
    edit_json(checkpoint / "config.json", **changes)
    (vision,) = (checkpoint / "vision").iterdir()
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(checkpoint), "--dry-run", *(["--vision-tower", str(vision)] * tower)])
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.startswith("Error: ") and named in message


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_an_output_that_is_a_file_is_kept(tmp_path, capsys, options):
    (tmp_path / "output").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(RECORDED), "--output", str(tmp_path / "output"), *options])
    assert ended.value.code == 2 and "is a file" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_failed_upload_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("The Hub cannot be reached.")

    monkeypatch.setattr("videollama2_hf.conversion.push_to_hub", fail)
    with pytest.raises(SystemExit) as end:
        main(["convert", str(RECORDED), "-o", str(tmp_path / "out"), "--push-to-hub", "owner/name"])
    error = capsys.readouterr().err
    assert end.value.code == 1 and f"hf upload owner/name {tmp_path / 'out'}" in error
    assert (tmp_path / "out" / "model.safetensors").is_file()
