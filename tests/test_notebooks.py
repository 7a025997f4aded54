"""The notebooks of the documentation: they run, and the repository holds what they gave with the shipped model."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}


def read_printed(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


@pytest.fixture(scope="module")
def execute():
    """Runs a notebook in its folder, with the commands of this environment, and returns it with its outputs."""

    def run(name: str):
        notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
            NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
        return notebook

    return run


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_kept(name):
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    assert notebook.cells[0].source.startswith("# ") and NOTEBOOKS[name].stat().st_size < 2**21
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]


def test_quick_start(execute):
    committed = nbformat.read(NOTEBOOKS["1_quick_start"], as_version=4)
    assert read_printed(execute("1_quick_start")) == read_printed(committed)


def test_audio_visual_questions(execute):
    printed = read_printed(execute("2_audio_visual_questions"))
    both, picture = (int(share) for share in re.findall(r"(\d+)% right", printed))
    assert both >= picture + 20


def test_fine_tuning_with_lora(execute):
    printed = read_printed(execute("3_fine_tuning_with_lora"))
    corners, shapes = (tuple(map(int, found)) for found in re.findall(r"(\d+)% -> (\d+)%", printed))
    assert corners[0] <= 25 and corners[1] >= 75
    assert shapes[1] >= shapes[0] - 25


def test_converting_a_checkpoint(execute):
    printed = read_printed(execute("4_converting_a_checkpoint"))
    assert "VideoLlama2ForConditionalGeneration VideoLlama2Processor" in printed


def test_captioning_many_clips(execute):
    printed = read_printed(execute("5_captioning_many_clips"))
    assert "exit code 1" in printed and "10 were there before" in printed


def test_looking_inside(execute):
    notebook = execute("6_looking_inside")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
