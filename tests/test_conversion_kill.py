"""A conversion and the way back, killed at random moments: nothing is lost, nothing half done has the final name."""

import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conversion_utils import hashes, random_checkpoint
from videollama2_hf.conversion import convert_checkpoint, restore_original


KILLS = 20
SHARD_SIZE = 4 * 10**6  # bytes
PRELOADED = [
    "pytest",
    "timm.models",
    "videollama2_hf.conversion",
    "videollama2_hf.modeling_videollama2",
    "transformers.models.clip.modeling_clip",
    "transformers.models.mistral.modeling_mistral",
]


def convert(source: Path, output: Path) -> None:
    convert_checkpoint(source, output, max_shard_size=SHARD_SIZE, resume=True)


def restore(source: Path, output: Path) -> None:
    restore_original(source, output, resume=True)


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have everything imported and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    run(context, time.sleep, 0)  # the imports
    return context


def run(processes, function: Callable, *arguments) -> float:
    """Seconds of a process that ends well."""
    process, begin = processes.Process(target=function, args=arguments), time.monotonic()
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - begin


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """What is to be converted, in files of one tensor up to some, and what is to be restored."""
    root = tmp_path_factory.mktemp("sources")
    sizes = {"vocab_size": 8000, "hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 20}
    original = random_checkpoint(root / "original", **sizes)
    convert_checkpoint(original, root / "converted", max_shard_size=SHARD_SIZE)
    return {"convert": original, "restore": root / "converted"}


def size_of(folder: Path) -> int:
    """Bytes that are written so far; files may vanish or change their name meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.mark.parametrize("work", [convert, restore])
def test_killed_at_random_moments(processes, sources, tmp_path, work):
    source = sources[work.__name__]
    before = hashes(source)
    seconds = run(processes, work, source, tmp_path / "whole" / "output")
    expected = hashes(tmp_path / "whole" / "output")
    total = size_of(tmp_path / "whole" / "output")
    output, partial = tmp_path / "output", tmp_path / ".output.partial"
    generator = random.Random(0)
    kills, found = 0, set()
    while kills < KILLS:
        process = processes.Process(target=work, args=(source, output))
        begin = time.monotonic()
        process.start()
        # Half of the moments are in time, the planning included, the other half in the bytes written.
        moment, size = begin + generator.uniform(0, seconds), generator.uniform(size_of(partial), total)
        while process.is_alive() and (
            time.monotonic() < moment if kills % 2 else size_of(partial) < size and not output.exists()
        ):
            time.sleep(0.001)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL)
        if not output.exists():
            found.add(size_of(partial))
            if kills % 2:
                continue  # what goes on with it is killed too
            work(source, output)
        check_same(output, expected)
        shutil.rmtree(output)
    assert hashes(source) == before
    assert len(found) > KILLS // 4  # the moments were spread over the work


def check_same(output: Path, expected: dict[str, str]) -> None:
    files = hashes(output)
    files.pop(".lock", None)  # taken away last
    assert files == expected
