"""
transformers' own linter for model code (transformers-mlinter) on the model folder.

A rule is waived here, for the whole folder and with its reason, or not at all. A waiver that nothing needs any more
is an error, so the list stays true.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path


FOLDER = "src/videollama2_hf"
WAIVERS = {
    "TRF028": "The licence is stated once, in LICENSE and pyproject.toml, not at the top of every file.",
    "TRF041": "Every option serves ablations too; the configuration says, once, which checkpoint has which value.",
    "TRF057": "auto_docstring writes about transformers' own checkpoints; the docstrings here are written by hand.",
}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable,
            "-m",
            "mlinter",
            "--no-cache",
            "--no-progress",
            "--output-json",
            str(report),
            FOLDER,
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if not report.exists():
            print(result.stderr, file=sys.stderr)
            return result.returncode or 1
        findings = json.loads(report.read_text())["findings"]

    kept = [finding for finding in findings if finding["rule"] not in WAIVERS]
    for finding in kept:
        print(f"{finding['path']}:{finding['line']}: {finding['message']}")
    unused = sorted(WAIVERS.keys() - {finding["rule"] for finding in findings})
    for rule in unused:
        print(f"{__file__}: the waiver of {rule} is no longer needed; remove it.")
    return 1 if kept or unused else 0


if __name__ == "__main__":
    sys.exit(main())
