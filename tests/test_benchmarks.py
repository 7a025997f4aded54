"""The short forms of the benchmarks: results are equal, what is saved is saved; speed is judged with a wide margin."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# By how much a row may be slower than its reference on small models and a busy machine. Rows that are not here compare
# with a limit of the machine.
AT_LEAST = {
    "import": 0.1,  # `import transformers` is lazy
    "load": 0.1,  # by the byte; the time goes by the number of tensors
    "beats float32": 0.3,
    "beats bfloat16": 0.3,
    "tower clip": 0.3,
    "tower siglip": 0.3,
    "image clip": 1.0,
    "image siglip": 1.0,
    "connector 2": 0.3,
    "connector 2.1": 0.3,
    "long video": 1.5,
    "prefill": 1.1,
    "chat": 1.0,
    "questions": 1.0,
    "captions": 0.2,  # threads beside each other, by the clock
}


def run(name: str, *arguments: str, **environment: str) -> list[dict]:
    """Rows that a benchmark prints."""
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def test_encoding_and_answering():
    rows = {row["row"]: row for row in run("model.py", "--short")}
    assert set(rows) == {*AT_LEAST, "decode float32", "decode bfloat16"}
    for name, row in rows.items():
        assert row["check"], name
        assert row["ratio"] >= AT_LEAST.get(name, 0.0), row
    assert float(rows["load"]["check"].split()[0]) < 50, rows["load"]["check"]


@pytest.fixture
def here(monkeypatch):
    """The benchmarks as modules, with the number of threads as it was."""
    import torch

    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    torch.set_num_threads(threads)


def test_cost_against_length(here, tmp_path):
    import length

    rows = length.main(True, 1, tmp_path, tmp_path / "picture.svg")
    assert {row["what"].split()[0] for row in rows} == set(length.LENGTHS)
    assert len(rows) == 12 and all(row["seconds"] > 0 for row in rows)
    assert (tmp_path / "picture.svg").read_text().count("<svg") == 1


def test_on_a_gpu_or_its_code_without_one(here, tmp_path):
    import gpu
    import torch

    rows = gpu.main(True, "qwen2", 1, tmp_path)
    assert len(rows) == 9 and all(row["check"] for row in rows)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="No GPU here"):
            gpu.main(False, "qwen2", 1, tmp_path)


def test_rows_are_named(here, tmp_path):
    import model

    with pytest.raises(SystemExit, match="No row has bears.*beats float32"):
        model.main(True, ["bears"], None, 1, tmp_path)


def test_documentation_has_the_measured_table():
    document = (BENCHMARKS.parent / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()
    rows = json.loads((BENCHMARKS / "results" / "model.json").read_text())["rows"]
    for row in rows:
        line = f"| {row['step']} | {row['reference']} | {row['ratio']:.3g} | {row['target']:.3g} |"
        assert line in document, line
    assert {row["row"] for row in rows} <= {*AT_LEAST, "decode float32", "decode bfloat16"}
