"""
Conversion of a VideoLLaMA2.1-7B-AV in its true shapes, bfloat16, random weights: speed against `cp`, and memory.

    python benchmarks/conversion.py                 # 17 GB, twice that free on the disk, an hour on a slow one
    python benchmarks/conversion.py --layers 4      # a language model of 4 layers instead of 28
    python benchmarks/conversion.py --short         # 100 MB, for tests: memory and equality only

Both formats, safetensors and PyTorch's, are built, copied by `cp` and converted, in turns. Every run begins with files
that are not in the page cache and ends when all bytes are on the disk. Results: `results/conversion.{json,md}`.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import CONFIG_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from true_shapes import (
    AUDIO_PROJECTOR_FILE,
    AUDIO_VISUAL,
    BEATS_FILE,
    SHARD_SIZE,
    Shapes,
    shards,
    tensor_shapes,
    write_index,
    write_tokenizer,
)

from videollama2_hf.conversion import build_plan, open_source
from videollama2_hf.conversion.tensors import SafetensorsWriter, read_folder


MEMORY_LIMIT = 300 * 10**6  # bytes above the idle interpreter
SPEED_LIMIT = 0.5  # of the speed of cp

_CONVERT = """
import sys
from videollama2_hf.conversion import convert_checkpoint
print("ready", flush=True)
sys.stdin.readline()
convert_checkpoint(sys.argv[1], sys.argv[2])
"""
_SHORT = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "mm_hidden_size": 384,
    "hidden_size_a": 512,
    "mm_vision_tower": "siglip",
}
_SHORT_TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "image_size": 384,
    "patch_size": 14,
}
_PREPROCESSOR = {"size": {"height": 384, "width": 384}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


class RandomWeights:
    """Random finite bfloat16 values: pieces of one pool, each from another place of it."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)
        pool = self.generator.integers(0, 2**16, 2**25, dtype=np.uint16)
        pool &= 0xBFFF  # magnitudes below 2: no NaN, no infinity
        self.pool = memoryview(pool).cast("B")

    def chunks(self, count: int) -> Iterator[memoryview]:
        """That many bytes, in pieces."""
        while count:
            size = min(count, 2**24)
            start = 2 * int(self.generator.integers(0, (len(self.pool) - size) // 2 + 1))
            yield self.pool[start : start + size]
            count -= size

    def write(self, path: Path, shapes: Shapes) -> None:
        """A safetensors file."""
        with SafetensorsWriter(path, [(name, "BF16", shape) for name, shape in shapes.items()]) as writer:
            for shape in shapes.values():
                for chunk in self.chunks(torch.Size(shape).numel() * 2):
                    writer.write(chunk)


def build_checkpoint(folder: Path, layers: int | None, short: bool) -> None:
    """The published files in safetensors shards, audio tower and audio projector inside and beside them."""
    weights = RandomWeights()
    config_dict = AUDIO_VISUAL.config_dict(layers)
    folder.mkdir()
    if short:
        config_dict |= _SHORT
        (folder / "siglip").mkdir()
        (folder / "siglip" / CONFIG_NAME).write_text(json.dumps(_SHORT_TOWER))
        (folder / "siglip" / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR))
    (folder / CONFIG_NAME).write_text(json.dumps(config_dict))
    write_tokenizer(folder)
    shapes = tensor_shapes(config_dict, str(folder), audio_layers=1 if short else None)
    files = shards(shapes, 40 * 10**6 if short else SHARD_SIZE)
    for filename, names in files.items():
        weights.write(folder / filename, {name: shapes[name] for name in names})
    write_index(folder, files)
    tensors = read_folder(folder)
    for filename, module in ((BEATS_FILE, "model.audio_tower."), (AUDIO_PROJECTOR_FILE, "model.mm_projector_a.")):
        state_dict = {name: tensor.load() for name, tensor in tensors.items() if name.startswith(module)}
        torch.save(state_dict, folder / filename)
    sync(folder)


def to_pytorch(folder: Path, target: Path) -> None:
    """Moves the checkpoint to a folder where its safetensors files are PyTorch's."""
    target.mkdir()
    tensors = read_folder(folder)
    files = sorted({tensor.file for tensor in tensors.values()})
    weight_map = {}
    for number, path in enumerate(files, 1):
        name = f"{Path(WEIGHTS_NAME).stem}-{number:05d}-of-{len(files):05d}.bin"
        state_dict = {key: tensor.load() for key, tensor in tensors.items() if tensor.file == path}
        torch.save(state_dict, target / name)
        weight_map |= dict.fromkeys(state_dict, name)
        path.unlink()
    (target / WEIGHTS_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for path in folder.iterdir():
        if not path.name.endswith(".safetensors.index.json"):
            shutil.move(path, target / path.name)
    sync(target)


def sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        with open(path if path.is_file() else os.devnull, "rb") as file:
            if path.is_file():
                os.fsync(file.fileno())


def forget(folder: Path) -> None:
    """Takes the files out of the page cache, where the system lets us."""
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_of(pid: int) -> dict[str, int]:
    """Resident bytes of a process: all of them (`rss`) and those that no file backs (`anonymous`)."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    kib = {"rss": "VmRSS", "anonymous": "RssAnon"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in kib.items() if field in fields}


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, that of the system for it included."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_convert(source: Path, target: Path) -> dict[str, float]:
    """Seconds without the import of the package, and peak memory above the idle interpreter after it, sampled."""
    arguments = [sys.executable, "-c", _CONVERT, str(source), str(target)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError("The conversion did not start.")
        idle = memory_of(process.pid)
        peak = dict(idle)
        start = time.perf_counter()
        idle_cpu = cpu_seconds(process.pid)
        cpu = idle_cpu
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            for name, size in memory_of(process.pid).items():
                peak[name] = max(peak[name], size)
            cpu = max(cpu, cpu_seconds(process.pid))
            time.sleep(0.005)
        seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"The conversion of {source} ended with exit code {process.returncode}.")
    return {"seconds": seconds, "cpu": cpu - idle_cpu, **{name: peak[name] - idle[name] for name in peak}}


def run_cp(source: Path, target: Path) -> dict[str, float]:
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", source, target], check=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"seconds": seconds, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def check_equal(source: Path, target: Path) -> int:
    """
    The number of tensors that a plan takes from a checkpoint, all of them equal to the converted ones.

    Raises:
        RuntimeError: They are not.
    """
    plan, converted = build_plan(open_source(source)), read_folder(target)
    if set(converted) != {tensor.target for tensor in plan.tensors}:
        raise RuntimeError(f"{target} holds other tensors than planned.")
    for tensor in plan.tensors:
        pairs = zip(tensor.source.chunks(), converted[tensor.target].chunks(), strict=True)
        if not all(np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)) for a, b in pairs):
            raise RuntimeError(f"{tensor.target} differs from the source.")
    return len(plan.tensors)


def measure(source: Path, work: Path, rounds: int) -> dict[str, Any]:
    """`cp` and conversion of one checkpoint, in turns."""
    runs: dict[str, list[dict[str, float]]] = {"cp": [], "convert": []}
    runners: dict[str, Callable[[Path, Path], dict[str, float]]] = {"cp": run_cp, "convert": run_convert}
    equal = 0
    for turn in range(rounds):
        for name in ("cp", "convert") if turn % 2 == 0 else ("convert", "cp"):
            target = work / name
            forget(source)
            runs[name].append(runners[name](source, target))
            print(f"  {name}: {runs[name][-1]}", flush=True)
            if name == "convert" and turn == 0:
                equal = check_equal(source, target)
            shutil.rmtree(target)
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    ratios = [copy["seconds"] / convert["seconds"] for copy, convert in zip(runs["cp"], runs["convert"])]
    return {
        "bytes": size,
        "largest_tensor": max(tensor.nbytes for tensor in read_folder(source).values()),
        "equal_tensors": equal,
        "cp_seconds": [run["seconds"] for run in runs["cp"]],
        "convert_seconds": [run["seconds"] for run in runs["convert"]],
        "cp_cpu_seconds": [run["cpu"] for run in runs["cp"]],
        "convert_cpu_seconds": [run["cpu"] for run in runs["convert"]],
        "load_average": os.getloadavg()[0],
        "speed_relative_to_cp": ratios,
        "peak_rss_above_idle": max(run["rss"] for run in runs["convert"]),
        "peak_anonymous_above_idle": max(run["anonymous"] for run in runs["convert"]),
    }


def memory_limit(name: str, row: dict[str, Any]) -> tuple[int, int]:
    """What a conversion took, and what it may take: all resident memory for safetensors, anonymous for PyTorch's."""
    if name == "safetensors":
        return row["peak_rss_above_idle"], MEMORY_LIMIT
    return row["peak_anonymous_above_idle"], row["largest_tensor"] + MEMORY_LIMIT


def to_markdown(results: dict[str, Any]) -> str:
    lines = [
        f"Measured with `{results['command']}` on {results['machine']}; medians of {results['rounds']} rounds "
        "(least to most). Memory is the peak above the idle interpreter. The limits: "
        f"{MEMORY_LIMIT / 1e6:.0f} MB resident for safetensors; anonymous, the largest tensor "
        f"({max(row['largest_tensor'] for row in results['rows'].values()) / 1e6:.0f} MB) and "
        f"{MEMORY_LIMIT / 1e6:.0f} MB more for PyTorch's files; at least {SPEED_LIMIT} of the speed of `cp`. The load "
        f"average after it was {', '.join(format(row['load_average'], '.0f') for row in results['rows'].values())}.",
        "",
        "| source | GB | `cp`, s | convert, s | speed against `cp` | CPU seconds | resident, MB | anonymous, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in results["rows"].items():
        ratios = row["speed_relative_to_cp"]
        lines.append(
            f"| {name} | {row['bytes'] / 1e9:.2f} | {statistics.median(row['cp_seconds']):.1f} | "
            f"{statistics.median(row['convert_seconds']):.1f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) | {statistics.median(row['cp_cpu_seconds']):.1f}, "
            f"{statistics.median(row['convert_cpu_seconds']):.1f} | {row['peak_rss_above_idle'] / 1e6:.0f} | "
            f"{row['peak_anonymous_above_idle'] / 1e6:.0f} |"
        )
    return "\n".join(lines) + "\n"


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} {platform.machine()} cores, {memory:.0f} GiB of memory, {platform.system()}"


def describe_command(arguments: argparse.Namespace) -> str:
    """The command without its folders."""
    layers = "" if arguments.layers is None else f" --layers {arguments.layers}"
    return (
        f"python benchmarks/conversion.py{' --short' if arguments.short else f' --rounds {arguments.rounds}'}{layers}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="layers of the language model, if not all 28")
    parser.add_argument("--short", action="store_true", help="100 MB, one round, speed is not judged")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to build, copy and convert; default: a temporary folder")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    rounds = 1 if arguments.short else arguments.rounds
    rows = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        work = Path(temporary)
        build_checkpoint(work / "safetensors", arguments.layers, arguments.short)
        print("safetensors", flush=True)
        rows["safetensors"] = measure(work / "safetensors", work, rounds)
        to_pytorch(work / "safetensors", work / "pytorch")
        print("pytorch", flush=True)
        rows["pytorch .bin"] = measure(work / "pytorch", work, rounds)
    results = {"command": describe_command(arguments), "machine": machine(), "rounds": rounds, "rows": rows}
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "conversion.json").write_text(json.dumps(results, indent=2) + "\n")
    (arguments.results / "conversion.md").write_text(to_markdown(results))
    print(to_markdown(results))
    missed = []
    for name, row in rows.items():
        used, limit = memory_limit(name, row)
        if used > limit:
            missed.append(f"{name}: {used / 1e6:.0f} MB of memory, at most {limit / 1e6:.0f}")
        if not arguments.short and statistics.median(row["speed_relative_to_cp"]) < SPEED_LIMIT:
            missed.append(f"{name}: slower than {SPEED_LIMIT} of cp")
    print("\n".join(missed) or "All limits are kept.")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
