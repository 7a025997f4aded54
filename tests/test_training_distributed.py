"""Runs of several processes: the same losses and weights as one process, whatever media each of them gets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForMultimodalLM, AutoProcessor
from transformers.integrations import is_deepspeed_available

import training_worker
from processing_utils import GOLDENS
from training_worker import CONFIGURATIONS, STEPS


CHECKPOINT = GOLDENS / "qwen2_siglip_beats_av" / "checkpoint"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small model that trains the same way every time: layers of BEATs are not skipped."""
    folder = tmp_path_factory.mktemp("distributed")
    AutoProcessor.from_pretrained(CHECKPOINT, chunk_length=2, num_frames=4).save_pretrained(folder / "model")
    model = AutoModelForMultimodalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    model.config.audio_config.layerdrop = 0.0
    model.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def plain(folder):
    training_worker.run(folder, "plain")
    return read(folder / "plain")


def read(folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and norm of the gradient at every step, and the weights, which must be all of them."""
    log = json.loads((folder / "log.json").read_text())
    curve = torch.tensor([(entry["loss"], entry["grad_norm"]) for entry in log])
    model, info = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return curve, model.state_dict()


def launch(folder: Path, *kinds: str) -> None:
    """Two processes; one that waits for ever is an error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [training_worker.__file__, str(folder), *kinds]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert finished.returncode == 0, finished.stderr[-3000:]


def check_agreement(run, plain) -> None:
    (curve, weights), (expected_curve, expected_weights) = run, plain
    assert len(expected_curve) == len(STEPS) // 2 and expected_curve.isfinite().all()
    torch.testing.assert_close(curve, expected_curve, rtol=1e-5, atol=1e-5)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


def test_training_moves_every_part_that_trains(folder, plain):
    start = AutoModelForMultimodalLM.from_pretrained(folder / "model", dtype=torch.float32).state_dict()
    moved = {name.removeprefix("model.").split(".")[0] for name in start if not start[name].equal(plain[1][name])}
    assert moved == set(training_worker.TRAINABLE)


@pytest.mark.parametrize("kind", ["accumulated", "checkpointed"])
def test_one_process(folder, plain, kind):
    training_worker.run(folder, kind)
    check_agreement(read(folder / kind), plain)


def test_two_processes(folder, plain):
    """DDP, and FSDP2 as transformers and as accelerate shard, in one launch, whose imports take longest."""
    kinds = ("ddp", "fsdp2", "accelerate_fsdp2")
    launch(folder, *kinds)
    for kind in kinds:
        check_agreement(read(folder / kind), plain)
        # The code of the model, not that of the class that torch puts in front of it.
        assert (folder / kind / "modeling_videollama2.py").exists(), kind
        assert not list((folder / kind).glob("_fsdp*")), kind
        auto_map = json.loads((folder / kind / "config.json").read_text())["auto_map"]
        assert all("FSDP" not in name for name in auto_map.values()), kind


@pytest.mark.slow
@pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not a requirement of this package.")
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_deepspeed(folder, plain, kind):
    launch(folder, kind)
    check_agreement(read(folder / kind), plain)


def test_configurations_are_what_accelerate_takes():
    from accelerate.commands.config.config_args import load_config_from_file

    for path in sorted(CONFIGURATIONS.glob("*.yaml")):
        config = load_config_from_file(str(path))
        assert config.mixed_precision == "bf16"
        assert config.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[path.stem]
    settings = yaml.safe_load((CONFIGURATIONS / "fsdp2.yaml").read_text())["fsdp_config"]
    from accelerate.commands.launch import launch_command_parser

    known = {name.lstrip("-") for action in launch_command_parser()._actions for name in action.option_strings}
    assert settings.keys() <= known
    for path in CONFIGURATIONS.glob("*.json"):
        assert json.loads(path.read_text())["zero_optimization"]["stage"] == int(path.stem[-1])
