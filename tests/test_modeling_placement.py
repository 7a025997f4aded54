"""The model in parts: on several devices, offloaded, and split over processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from test_modeling import collate, row
from tiny_models import make_model
from videollama2_hf import VideoLlama2ForConditionalGeneration


SPECS = ["image t video audio t", "t", "video t audio t"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = make_model()
    model.save_pretrained(folder)
    batch = collate([row(spec, model.config) for spec in SPECS])
    ids = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return folder, batch, ids


def test_device_map_auto(saved):
    folder, batch, ids = saved
    model = VideoLlama2ForConditionalGeneration.from_pretrained(folder, device_map="auto")
    assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0), ids)


@pytest.mark.parametrize(
    "offloaded", ["model.vision_tower", "model.audio_tower", "model.mm_projector", "model.language_model"]
)
def test_offloaded_parts(saved, tmp_path, offloaded):
    folder, batch, ids = saved
    parts = ["vision_tower", "audio_tower", "mm_projector", "mm_projector_a", "language_model"]
    device_map = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu", offloaded: "disk"}
    model = VideoLlama2ForConditionalGeneration.from_pretrained(
        folder, device_map=device_map, offload_folder=str(tmp_path), dtype=torch.float32
    )
    assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0), ids)


TENSOR_PARALLEL = """
import json, os, sys
import torch
from test_modeling import collate, row
from videollama2_hf import VideoLlama2ForConditionalGeneration

torch.set_num_threads(1)
model = VideoLlama2ForConditionalGeneration.from_pretrained(sys.argv[1], tp_plan="auto").eval()
weight = model.model.language_model.layers[0].self_attn.q_proj.weight
batch = collate([row(spec, model.config) for spec in json.loads(sys.argv[2])])
ids = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0)
if os.environ["RANK"] == "0":
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    print("RESULT" + json.dumps({"ids": ids.tolist(), "shard": list(local.shape)}))
torch.distributed.destroy_process_group()
"""


def test_tensor_parallel_over_two_processes_gives_the_same_tokens(saved, tmp_path):
    folder, batch, ids = saved
    script = tmp_path / "run.py"
    script.write_text(TENSOR_PARALLEL)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    result = subprocess.run(
        [*command, str(script), str(folder), json.dumps(SPECS)],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("RESULT")]
    output = json.loads(line.removeprefix("RESULT"))
    assert output["ids"] == ids.tolist()
    assert output["shard"] == [16, 32]  # half of the rows of a (32, 32) projection
