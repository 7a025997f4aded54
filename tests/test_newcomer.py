"""The README, followed to the letter on a fresh clone in an environment of its own."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from golden_utils import GOLDENS


ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.environment,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(shutil.which("git") is None, reason="clones the repository"),
]


def blocks(language: str) -> list[str]:
    return [
        block.strip()
        for block in re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.M)
    ]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A clone of what is committed, and the variables of a shell in which only Python and pip are installed."""
    folder = tmp_path_factory.mktemp("newcomer")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "clone")], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "python")], check=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    paths = [str(folder / "python" / "bin"), *(part for part in kept["PATH"].split(":") if ".venv" not in part)]
    environment = {**kept, "PATH": ":".join(paths)}
    return folder / "clone", environment


def run(clone, command: str) -> subprocess.CompletedProcess:
    folder, environment = clone
    result = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stderr[-3000:]}"
    return result


@contextmanager
def running(clone, command: str):
    folder, environment = clone
    environment = {**environment, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=60)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_first_command(clone):
    result = run(clone, blocks("bash")[0])
    assert result.stdout.splitlines()[-1:] == blocks("text")[0].splitlines()
    assert "A real checkpoint is one option away" in result.stderr


def test_own_clip(clone):
    shutil.copy(GOLDENS / "processing_av" / "av_3s.mp4", clone[0] / "holiday.mp4")
    command = blocks("bash")[1]
    for model in ("", f"--model {GOLDENS / 'qwen2_siglip_beats_av' / 'checkpoint'}"):
        own = re.sub(r"--model \S+", f"{model} --max-new-tokens 8", command)
        assert own != command and run(clone, own).stdout.strip()


def test_what_pip_installs(clone):
    """The model and its clip are in the wheel."""
    run(clone, "uv build --wheel --out-dir wheel")
    (wheel,) = (clone[0] / "wheel").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assets = "src/videollama2_hf/assets"
    committed = run(clone, f"git ls-files {assets}").stdout.split()
    assert f"{assets}/small_model/model.safetensors" in committed and f"{assets}/clip.mp4" in committed
    assert {name.removeprefix("src/") for name in committed} <= set(names)


def test_web(clone):
    command, port = blocks("bash")[2].splitlines()[0], free_port()
    assert command.endswith(" web")
    with running(clone, f"{command} --port {port}"):
        for _ in range(600):
            time.sleep(1)
            try:
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/").read().decode()
            except OSError:
                continue
            assert "VideoLLaMA 2" in page
            return
    pytest.fail("The page did not come up in ten minutes.")


def test_serve(clone):
    command = blocks("bash")[2].splitlines()[1]
    assert command.endswith(" serve")
    with running(clone, f"{command} --port {free_port()}") as process:
        lines = [process.stdout.readline() for _ in range(3)]
        answer = json.loads(run(clone, lines[-1]).stdout)
    assert answer["choices"][0]["message"]["content"]


def test_notebook(clone):
    command = blocks("bash")[2].splitlines()[2]
    assert command.endswith("jupyter lab docs/notebooks")
    execute = command.replace("jupyter lab docs/notebooks", "jupyter execute --inplace docs/notebooks/")
    for notebook in ("1_quick_start", "5_captioning_many_clips"):
        run(clone, f"{execute}{notebook}.ipynb")
