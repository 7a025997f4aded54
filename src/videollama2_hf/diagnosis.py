"""Whether this machine has what the package needs, and for every missing thing the command that brings it."""

import importlib.util
import os
import platform
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import Version


Status = Literal["ok", "warning", "broken"]

_PACKAGE = "videollama2-hf"
# Extras for people who use the package, and what each is for.
_EXTRAS = {
    "train": "training",
    "serve": "the server",
    "web": "the web page",
    "export": "export",
    "quantize": "weights in 8 and 4 bits",
}
# Codec, the encoder that FFmpeg calls so, and whether media of it are so frequent that it is needed.
_CODECS = {
    "h264": ("libx264", True),
    "hevc": ("libx265", False),
    "vp9": ("libvpx-vp9", False),
    "av1": ("libsvtav1", False),
    "aac": ("aac", True),
    "opus": ("libopus", False),
    "mp3": ("libmp3lame", True),
}
# The CUDA that the last release of torchaudio is built for; beside a torch of another it refuses to be imported.
_CUDA_BUILD = "cu130"
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
# What the instructions of a CPU that matter here are called in /proc/cpuinfo.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class Check:
    """
    One thing that was looked at.

    Args:
        section: What it belongs to.
        name: What it is.
        status: `"ok"`; `"warning"`, of what only some uses want; `"broken"`, without which the package does not work.
        value: What was found.
        fix: The command, or the step, that repairs it.
    """

    section: str
    name: str
    status: Status
    value: str
    fix: str = ""


def diagnose() -> list[Check]:
    """All checks. None of them raises, and none asks the network."""
    sections: dict[str, Callable[[], Iterator[Check]]] = {
        "packages": _check_packages,
        "extras": _check_extras,
        "processor and memory": _check_devices,
        "attention": _check_attention,
        "codecs": _check_codecs,
        "compiling": _check_compiler,
        "files": _check_files,
    }
    checks = []
    for section, find in sections.items():
        try:
            checks += list(find())
        except Exception as error:  # whatever is wrong with a machine, the other checks are still wanted
            checks.append(Check(section, "check", "broken", f"{type(error).__name__}: {error}", "Please report this."))
    return checks


def summarise(checks: list[Check]) -> str:
    """One sentence."""
    broken = [check.name for check in checks if check.status == "broken"]
    if not broken:
        return "Everything that is needed is here."
    count = "One thing needs" if len(broken) == 1 else f"{len(broken)} things need"
    return f"{count} to be repaired: {', '.join(broken)}."


def check_requirement(requirement: Requirement, section: str, status: Status, fix: str) -> Check:
    """Whether a package is installed in a version that fits; `status` if not."""
    wanted = f" (needs {requirement.specifier})" if str(requirement.specifier) else ""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(section, requirement.name, status, f"not installed{wanted}", fix)
    if not requirement.specifier.contains(Version(version), prereleases=True):
        return Check(section, requirement.name, status, f"{version}{wanted}", fix)
    return Check(section, requirement.name, "ok", version)


def _read_requires(package: str) -> list[Requirement]:
    """What a package declares; of one that is not installed it cannot be known."""
    try:
        return [Requirement(text) for text in metadata.requires(package) or []]
    except metadata.PackageNotFoundError:
        return []


def _requirements() -> list[Requirement]:
    return _read_requires(_PACKAGE)


def _requirements_of_extra(requirements: list[Requirement], extra: str) -> list[Requirement]:
    return [
        item
        for item in requirements
        if item.marker is not None
        and item.marker.evaluate({"extra": extra})
        and not item.marker.evaluate({"extra": ""})
    ]


def _install(requirement: Requirement) -> str:
    return f"pip install {shlex.quote(f'{requirement.name}{requirement.specifier}')}"


def _check_packages() -> Iterator[Check]:
    section = "packages"
    yield Check(section, "python", "ok", platform.python_version())
    requirements = [item for item in _requirements() if item.marker is None]
    if not requirements:
        yield Check(section, _PACKAGE, "warning", "not installed, used from its folder", f"pip install {_PACKAGE}")
    for requirement in requirements:
        yield check_requirement(requirement, section, "broken", _install(requirement))
    for name, module in (("torchvision", "torchvision"), ("torchaudio", "torchaudio.compliance.kaldi")):
        yield check_companion(name, module)


def check_companion(name: str, module: str) -> Check:
    """Whether a package of compiled operators fits the installed torch: the wrong build fails when it is imported."""
    import torch

    base = Version(torch.__version__).base_version
    fix = _reinstall_torch("cpu" if torch.version.cuda is None else _CUDA_BUILD)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        return Check("packages", f"{name} with torch", "broken", f"does not fit torch {base}: {reason}", fix)
    return Check("packages", f"{name} with torch", "ok", f"fits torch {base}")


def _reinstall_torch(build: str) -> str:
    command = "pip install --force-reinstall torch torchvision torchaudio"
    return command if sys.platform == "darwin" else f"{command} --index-url https://download.pytorch.org/whl/{build}"


def _check_extras() -> Iterator[Check]:
    for extra, purpose in _EXTRAS.items():
        wanted = _requirements_of_extra(_requirements(), extra)
        for item in list(wanted):  # transformers[serving]
            wanted += [
                found for name in item.extras for found in _requirements_of_extra(_read_requires(item.name), name)
            ]
        fix = f'pip install "{_PACKAGE}[{extra}]"'
        found = [check_requirement(item, "extras", "warning", fix) for item in wanted]
        lacking = [f"{check.name} {check.value}" for check in found if check.status != "ok"]
        if lacking:
            yield Check("extras", extra, "warning", f"for {purpose}: {', '.join(lacking)}", fix)
        elif found:
            versions = ", ".join(f"{check.name} {check.value}" for check in found)
            yield Check("extras", extra, "ok", f"for {purpose}: {versions}")


def _check_devices() -> Iterator[Check]:
    import torch

    section = "processor and memory"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        has_bfloat16 = "bfloat16" if major >= 8 else "no fast bfloat16 (pass --dtype float16)"
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        yield Check(section, f"GPU {index}", "ok", f"{properties.name}, {memory}, {has_bfloat16}, {major}.{minor}")
    if not torch.cuda.is_available():
        if torch.backends.mps.is_available():
            yield Check(section, "GPU", "ok", "Apple's, through MPS")
        elif shutil.which("nvidia-smi") and torch.version.cuda is None:
            fix = _reinstall_torch(_CUDA_BUILD)
            yield Check(section, "GPU", "warning", "one of NVIDIA, but this torch is built for CPUs only", fix)
        elif shutil.which("nvidia-smi"):
            fix = "Update NVIDIA's driver: nvidia-smi shows what it supports"
            yield Check(section, "GPU", "warning", f"one of NVIDIA, but not for CUDA {torch.version.cuda}", fix)
        else:
            yield Check(section, "GPU", "ok", "none; models run on the CPU")
    flags = _read_cpu_flags()
    instructions = f"{torch.backends.cpu.get_cpu_capability()}, {', '.join(flags) or 'no AVX'}"
    yield Check(section, "CPU", "ok", f"{platform.machine()}, {instructions}")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    value = f"{threads} on {usable} cores"
    if threads > usable:
        yield Check(
            section, "threads", "warning", f"{value}: they wait for each other", f"export OMP_NUM_THREADS={usable}"
        )
    else:
        yield Check(section, "threads", "ok", value)
    free_memory = _read_free_memory()
    if free_memory is not None:
        yield Check(section, "memory", "ok", f"{free_memory / 2**30:.1f} GiB free")


def _read_cpu_flags() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
    words = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [flag for flag in _CPU_FLAGS if flag in words]


def _read_free_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _check_attention() -> Iterator[Check]:
    import torch
    from transformers.utils import import_utils

    yield Check("attention", "sdpa", "ok", "the default, part of torch")
    fixes = {"flash_attention_2": "pip install flash-attn --no-build-isolation", "kernels": "pip install kernels"}
    found = {
        "flex_attention": import_utils.is_torch_flex_attn_available(),
        "flash_attention_2": import_utils.is_flash_attn_2_available(),
        "flash_attention_3": import_utils.is_flash_attn_3_available(),
        "kernels": importlib.util.find_spec("kernels") is not None,
    }
    for name, is_usable in found.items():
        if is_usable:
            yield Check("attention", name, "ok", "usable")
        elif name in fixes and torch.cuda.is_available():
            yield Check("attention", name, "warning", "not installed; sdpa does the same", fixes[name])


def _check_codecs() -> Iterator[Check]:
    import av

    for name, (encoder, is_needed) in _CODECS.items():
        reads = can_use_codec(name, "r")
        writes = can_use_codec(encoder, "w") or can_use_codec(name, "w")
        value = "reads and writes" if reads and writes else "reads" if reads else "cannot be read"
        status: Status = "ok" if reads else "broken" if is_needed else "warning"
        fix = "" if reads else "pip install --force-reinstall --only-binary av av"
        yield Check("codecs", name, status, value, fix)
    versions = ", ".join(f"{name} {'.'.join(map(str, version))}" for name, version in av.library_versions.items())
    yield Check("codecs", "FFmpeg", "ok", f"in PyAV {av.__version__}: {versions}")


def can_use_codec(name: str, mode: Literal["r", "w"]) -> bool:
    """Whether PyAV's FFmpeg decodes (`"r"`) or encodes (`"w"`) a codec."""
    import av

    try:
        av.Codec(name, mode)
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def _check_compiler() -> Iterator[Check]:
    wanted = os.environ.get("CXX")
    found = next(
        (path for name in ([wanted] if wanted else ["g++", "clang++", "c++"]) if (path := shutil.which(name))), None
    )
    if found:
        yield Check("compiling", "C++ compiler", "ok", found)
        return
    fix = {"Darwin": "xcode-select --install", "Windows": "winget install Microsoft.VisualStudio.2022.BuildTools"}
    command = fix.get(platform.system(), "sudo apt-get install g++")
    yield Check("compiling", "C++ compiler", "warning", "none; only torch.compile needs it", command)


def _check_files() -> Iterator[Check]:
    from huggingface_hub import constants

    from .assets import SMALL_MODEL

    section, cache = "files", Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    value = f"{cache}, {free / 1e9:.1f} GB free"
    if not os.access(existing, os.W_OK):
        yield Check(section, "Hub cache", "warning", f"{value}, not writable", "export HF_HOME=/a/folder/of/yours")
    elif free < 20e9:
        fix = "hf cache prune, or export HF_HOME=/a/folder/with/space"
        yield Check(section, "Hub cache", "warning", f"{value}: too little for a 7B checkpoint (16 GB)", fix)
    else:
        yield Check(section, "Hub cache", "ok", value)
    offline = [name for name in _OFFLINE if os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON")]
    if offline:
        fix = f"unset {' '.join(offline)}"
        yield Check(section, "network", "warning", f"not used, because {' and '.join(offline)} is set", fix)
    if os.environ.get("HF_ENDPOINT"):
        yield Check(section, "network", "ok", f"the Hub is {os.environ['HF_ENDPOINT']} (HF_ENDPOINT)")
    if (SMALL_MODEL / "config.json").is_file():
        yield Check(section, "small model", "ok", str(SMALL_MODEL))
    else:
        fix = f"pip install --force-reinstall --no-deps {_PACKAGE}"
        yield Check(section, "small model", "warning", "not in this copy of the package; pass --model", fix)


def to_dict(checks: list[Check]) -> dict[str, Any]:
    """Plain values, for JSON."""
    is_ok = all(check.status != "broken" for check in checks)
    return {"ok": is_ok, "summary": summarise(checks), "checks": [vars(check) for check in checks]}


__all__ = ["Check", "can_use_codec", "check_companion", "check_requirement", "diagnose", "summarise", "to_dict"]
