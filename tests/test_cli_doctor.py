"""`videollama2 doctor`: this machine is well; what is missing or does not fit is found, with a command."""

import json
import shutil
import sys
from collections import namedtuple

import av
import pytest
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement

from videollama2_hf import diagnosis
from videollama2_hf.cli import main
from videollama2_hf.diagnosis import can_use_codec, check_companion, check_requirement, diagnose, summarise


def run(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main(["doctor", *arguments])
    return end.value.code or 0, capsys.readouterr().out


def find(name: str) -> diagnosis.Check:
    return next(check for check in diagnose() if check.name == name)


def test_this_machine_is_well(capsys):
    code, out = run(capsys)
    assert code == 0 and out.splitlines()[-1] == "Everything that is needed is here."
    report = json.loads(run(capsys, "--json")[1])
    names = {check["name"] for check in report["checks"]}
    expected = {
        "python",
        "torch",
        "av",
        "torchaudio with torch",
        "CPU",
        "threads",
        "sdpa",
        "h264",
        "opus",
        "Hub cache",
    }
    assert report["ok"] and names >= expected | {"train", "quantize", "C++ compiler"}
    versions = {check["name"]: check["value"] for check in report["checks"]}
    assert versions["torch"] == torch.__version__.partition("+")[0] or versions["torch"] == torch.__version__
    assert "accelerate " in versions["train"] and "uvicorn " in versions["serve"]  # transformers[serving]
    assert all(check["fix"] for check in report["checks"] if check["status"] != "ok")


@pytest.mark.parametrize(
    ("requirement", "status", "value"),
    [
        ("numpy>=1", "ok", None),
        ("numpy>=999", "broken", r"(needs >=999)"),
        ("a-package-that-nobody-has>=2", "broken", "not installed (needs >=2)"),
    ],
)
def test_versions(requirement, status, value):
    check = check_requirement(Requirement(requirement), "packages", "broken", "pip install it")
    assert check.status == status and (value is None or check.value.endswith(value))
    assert check.fix == ("" if status == "ok" else "pip install it")


def test_a_torchaudio_for_another_torch(tmp_path, monkeypatch):
    """Its library is not found, or it says so itself; both are errors of the import."""
    monkeypatch.syspath_prepend(tmp_path)
    for name, error in (
        ("built_elsewhere", "OSError('libcudart.so.13: cannot open')"),
        ("says_so", "RuntimeError('x')"),
    ):
        (tmp_path / f"{name}.py").write_text(f"raise {error}\n")
        check = check_companion("torchaudio", name)
        assert check.status == "broken" and "does not fit torch" in check.value
        assert check.fix.startswith("pip install --force-reinstall torch torchvision torchaudio")
        assert name not in sys.modules
    assert check_companion("json", "json").status == "ok"


def test_codecs():
    assert can_use_codec("h264", "r") == ("h264" in av.codecs_available)
    assert can_use_codec("libx264", "w") and not can_use_codec("libx264", "r") and not can_use_codec("nothing", "r")


def test_a_codec_that_is_missing_is_broken_only_where_it_is_frequent(monkeypatch, capsys):
    monkeypatch.setattr(diagnosis, "can_use_codec", lambda name, mode: name not in ("aac", "opus", "libopus"))
    assert find("aac").status == "broken" and find("opus").status == "warning" and find("mp3").status == "ok"
    code, out = run(capsys)
    assert code == 1 and out.splitlines()[-1] == "One thing needs to be repaired: aac."
    assert "!! aac" in out and "-> pip install --force-reinstall --only-binary av av" in out


def test_a_graphics_card_that_torch_cannot_use(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", None)
    check = find("GPU")
    assert "for CPUs only" in check.value and check.fix.endswith("https://download.pytorch.org/whl/cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "not for CUDA 13.0" in find("GPU").value
    (tmp_path / "nvidia-smi").unlink()
    assert find("GPU").status == "ok" and find("C++ compiler").status == "warning"
    assert find("C++ compiler").fix


def test_threads_and_offline_and_cache(tmp_path, monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1000)
        check = find("threads")
    finally:
        torch.set_num_threads(before)
    assert check.status == "warning" and check.fix.startswith("export OMP_NUM_THREADS=")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find("network").fix == "unset HF_HUB_OFFLINE" and "HF_HUB_OFFLINE" in find("network").value
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    usage = namedtuple("usage", "total used free")
    for free, status in ((10**12, "ok"), (10**9, "warning")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(free, 0, free))
        assert find("Hub cache").status == status


def test_a_check_that_fails_does_not_hide_the_others(monkeypatch, capsys):
    def fail():
        raise OSError("no such device")

    monkeypatch.setattr(diagnosis, "_check_devices", fail)
    code, out = run(capsys)
    assert code == 1 and "OSError: no such device" in out and "h264" in out
    assert summarise([]) == "Everything that is needed is here."
