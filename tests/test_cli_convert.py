"""`videollama2 convert`: options that would be without effect are refused, not ignored."""

import pytest

from conversion_utils import RECORDED, edit_json, random_checkpoint
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


def test_a_tower_for_a_configuration_that_names_none(tmp_path, capsys):
    checkpoint = random_checkpoint(tmp_path / "checkpoint")
    edit_json(checkpoint / "config.json", mm_vision_tower=None)
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(checkpoint), "--vision-tower", str(checkpoint / "vision"), "--dry-run"])
    assert ended.value.code == 2 and "mm_vision_tower" in capsys.readouterr().err
