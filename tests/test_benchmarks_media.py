"""The short form of the benchmark of media reading: it checks that results are equal, whatever the machine's speed."""

import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "media.py"


def test_short_form(tmp_path):
    command = [sys.executable, str(SCRIPT), "--short", "--folder", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [line for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 10
    assert sum("'check': 'equal'" in row for row in rows) >= 6  # without decord two rows are empty
    assert sum("level" in row for row in rows) == 2
