"""The numbers of `docs/conversion.md`, and the benchmark of conversion in its short form."""

import json
import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent


def run(*arguments: str | Path) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_table_of_the_published_checkpoints():
    document = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8")
    table = [line for line in document.splitlines() if line.startswith(("| command", "| `videollama2 convert"))]
    printed = run(ROOT / "benchmarks" / "true_shapes.py").splitlines()
    assert [line for line in printed if not line.startswith("| ---")] == table
    assert len(table) == 13  # the heading and twelve checkpoints


def test_short_benchmark(tmp_path):
    """Equal tensors and bounded memory; time is not judged."""
    run(ROOT / "benchmarks" / "conversion.py", "--short", "--folder", tmp_path, "--results", tmp_path)
    rows = json.loads((tmp_path / "conversion.json").read_text())["rows"]
    assert set(rows) == {"safetensors", "pytorch .bin"}
    for row in rows.values():
        assert row["equal_tensors"] > 300 and row["bytes"] > 10**8
