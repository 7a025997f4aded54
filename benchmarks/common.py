"""What benchmarks share: measuring variants in turns, and writing tables of ratios as JSON and Markdown."""

import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import threading
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results"


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended, in seconds."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """
    Run the variants in turns, `rounds` times all of them.

    Returns:
        By variant the `cpu` and `wall` seconds of each round, and the `result` of the last.
    """
    measured: dict[str, dict[str, Any]] = {name: {"cpu": [], "wall": []} for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            cpu, wall = cpu_seconds(), time.perf_counter()
            measured[name]["result"] = variant()
            measured[name]["wall"].append(time.perf_counter() - wall)
            measured[name]["cpu"].append(cpu_seconds() - cpu)
    return measured


def ratios(ours: list[float], reference: list[float]) -> tuple[float, float, float]:
    """Median, smallest and largest of how many times more the reference takes, round by round."""
    values = [b / max(a, 1e-9) for a, b in zip(ours, reference, strict=True)]
    return statistics.median(values), min(values), max(values)


def peak_memory(function: Callable[[], Any]) -> tuple[Any, int]:
    """Result of a call, and by how many bytes the memory of the process grew during it, at most."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back to the system and is not used again unseen
    libc.malloc_trim(0)
    pages, stop, peak = os.sysconf("SC_PAGE_SIZE"), threading.Event(), 0

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * pages

    before = resident()

    def watch():
        nonlocal peak
        while not stop.is_set():
            peak = max(peak, resident() - before)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = function()
    finally:
        stop.set()
        watcher.join()
    return result, peak


def time_row(
    step: str,
    reference: str,
    target: float,
    measured: dict[str, Any] | None = None,
    check: str = "",
    note: str = "",
    clock: str = "cpu",
) -> dict[str, Any]:
    """How many times more seconds, by `clock` (`"cpu"` or `"wall"`), the reference takes than ours."""
    row = {"step": step, "reference": reference, "ours": "", "theirs": "", "ratio": "", "spread": "", "target": target}
    if measured is not None:
        ours, theirs = measured["ours"][clock], measured["reference"][clock]
        ratio, low, high = ratios(ours, theirs)
        row |= {"ours": f"{statistics.median(ours):.3g} s", "theirs": f"{statistics.median(theirs):.3g} s"}
        row |= {"ratio": ratio, "spread": f"{low:.2g} to {high:.2g}, {len(ours)} rounds"}
    return row | {"reached": "" if measured is None else row["ratio"] >= target, "check": check, "note": note}


def memory_row(
    step: str, name: str, target: float, ours: int, reference: int, check: str = "", note: str = ""
) -> dict[str, Any]:
    """How many times more bytes the reference takes."""
    ratio = reference / max(ours, 1)
    row = {"step": step, "reference": name, "ours": f"{ours / 1e6:.3g} MB", "theirs": f"{reference / 1e6:.3g} MB"}
    row |= {"ratio": ratio, "spread": "1 round", "target": target, "reached": ratio >= target}
    return row | {"check": check, "note": note}


def describe_machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, load, and versions of Python and of the packages that are installed."""
    names = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line]
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": date.today().isoformat(),
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": versions,
    }


def write_results(
    name: str, title: str, rows: list[dict[str, Any]], machine: dict[str, Any], folder: Path = RESULTS
) -> None:
    """Write `rows`, dictionaries of the same keys, as `NAME.json` and as a Markdown table, `NAME.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    keys = list(rows[0])
    lines = [
        f"# {title}",
        "",
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, load "
        f"{machine['load']:.1f}; " + ", ".join(f"{key} {value}" for key, value in machine["versions"].items()) + ".",
        "",
        "| " + " | ".join(keys) + " |",
        "|" + " --- |" * len(keys),
    ]
    lines += ["| " + " | ".join(_format(row[key]) for key in keys) + " |" for row in rows]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")


def _format(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _read(path: str) -> str:
    return Path(path).read_text() if os.path.exists(path) else ""
