"""The `tests` folder of the source distribution of the installed transformers."""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


CACHE = Path(__file__).parents[3] / ".cache"


def fetch_suites() -> Path:
    """
    The folder with transformers' common test suites, downloaded from the package index by pip when it is not there.

    Returns:
        `.cache/transformers-<installed version>/tests` in this repository.

    Raises:
        RuntimeError: pip could not get the source distribution.
    """
    name = f"transformers-{version('transformers')}"
    suites = CACHE / name / "tests"
    if suites.is_dir():
        return suites

    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        command += ["--dest", folder, name.replace("-", "==", 1)]
        result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if result.returncode != 0:
            raise RuntimeError(
                f"The source distribution of {name}, which holds the test suites, could not be downloaded. "
                f"Leave these tests out with `--ignore tests/upstream`, or repair this command:\n"
                f"{' '.join(command)}\n{result.stderr}"
            )
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as sdist:
            wanted = [member for member in sdist if member.name.startswith(f"{name}/tests/")]
            sdist.extractall(folder, members=wanted, filter="data")
        # ConfigTester executes this file, as if it were the one of `src/transformers` in a git checkout.
        (Path(folder) / name / "tests" / "__init__.py").touch()
        try:
            (Path(folder) / name).rename(CACHE / name)
        except OSError:  # another process was faster
            if not suites.is_dir():
                raise
    return suites
