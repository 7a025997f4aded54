"""Comparison with the original code, layer by layer: it runs in its own environment, on the same inputs."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForMultimodalLM

from ..configuration_videollama2 import VideoLlama2Config
from ..processing_videollama2 import VideoLlama2Processor
from .plan import Plan
from .tensors import DTYPES, ConversionError
from .verify import VerificationError, lacking_memory, memory_for_model, synthetic_content


SCRIPT = Path(__file__).with_name("run_original.py")
TOLERANCE = 1e-4  # of the largest value that the original's layer puts out, or of 1
ORIGINAL_IDS = {"image": -200, "video": -201, "audio": -202}
_TOWERS = {"mm_vision_tower": "vision tower", "mm_image_tower": "image tower", "mm_video_tower": "video tower"}
_REVISION = "0" * 40


def compare_with_original(plan: Plan, folder: Path, code: Path, python: str | None = None) -> dict[str, Any]:
    """
    Runs the original and the converted model in float32 on synthetic media and compares what every layer puts out.

    Args:
        plan: What was converted.
        folder: The converted checkpoint.
        code: A copy of the original's repository (VideoLLaMA 2, branch main or audio_visual, or Video-LLaVA).
        python: The interpreter of an environment with the original's requirements. `None`: this one.

    Returns:
        `versions` of the original's environment, `cases`: for each the `layers` in the order of computation with the
        largest absolute difference and the largest absolute value, and how many tokens are `equal_predictions`;
        `problems`, empty if all are within [`TOLERANCE`]; or only `skipped`, why nothing was compared.

    Raises:
        ConversionError: There is no original code at `code`, or no interpreter `python`.
        VerificationError: The original code did not run.
    """
    check_original_code(code, python)
    if "mm_projector_type" not in plan.source.config_dict:
        return {"skipped": "The original code was not run: it does not read checkpoints of transformers' port."}
    needed = memory_for_model(sum(tensor.nbytes // DTYPES[tensor.dtype].itemsize * 4 for tensor in plan.tensors))
    if (reason := lacking_memory(needed)) is not None:
        return {"skipped": f"The original code was not run: {reason}."}
    config = plan.source.config
    processor = VideoLlama2Processor.from_pretrained(folder)
    cases = _make_inputs(processor, config)
    modules = _modules(config)
    # Beside the checkpoint, because its disk has space for what the layers put out.
    with tempfile.TemporaryDirectory(prefix=".reference-", dir=folder.parent) as work:
        versions = _run_original(plan, Path(work), code, python or sys.executable, cases, list(modules))
        model = AutoModelForMultimodalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", device_map=None
        ).eval()
        results = {name: _compare_case(model, name, inputs, modules, Path(work)) for name, inputs in cases.items()}
    problems = [
        f"{name}: {layer['module']} is the first layer that differs from the original, by {layer['difference']:.3g} "
        f"(of at most {layer['max']:.3g})"
        for name, result in results.items()
        for layer in result["layers"]
        if layer["module"] == result["first_difference"]
    ]
    return {"versions": versions, "tolerance": TOLERANCE, "cases": results, "problems": problems}


def check_original_code(code: Path, python: str | None = None) -> None:
    """
    Raises:
        ConversionError: There is no original code at `code`, or no interpreter `python`.
    """
    if not any((code / name / "model").is_dir() for name in ("videollama2", "videollava")):
        raise ConversionError(
            f"{code} does not hold the original code: there is neither videollama2/model nor videollava/model in it. "
            "Pass a copy of the repository of VideoLLaMA 2 or Video-LLaVA."
        )
    if python is not None and shutil.which(python) is None:
        raise ConversionError(f"{python} is not an interpreter. Pass that of the original's environment.")


def _make_inputs(processor: VideoLlama2Processor, config: VideoLlama2Config) -> dict[str, dict[str, torch.Tensor]]:
    """Model inputs by name of the case: text alone, every kind of medium, and a video with its sound."""
    *media, text = synthetic_content(processor, config.num_frames)
    contents = {"text": [text], **{block["type"]: [block, text] for block in media}}
    cases = {
        name: dict(
            processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                load_audio_from_video=False,
            )
        )
        for name, content in contents.items()
    }
    if "audio" in cases:
        video, audio = cases["video"], cases["audio"]
        ids = video["input_ids"]
        end = int((ids[0] == config.video_token_id).nonzero()[-1]) + 1
        sound = audio["input_ids"][audio["input_ids"] == config.audio_token_id].unsqueeze(0)
        ids = torch.cat([ids[:, :end], sound, ids[:, end:]], 1)
        cases["video_with_sound"] = {
            **video,
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "input_features": audio["input_features"],
        }
    for inputs in cases.values():
        inputs.pop("input_features_mask", None)  # the original attends to all of the 30 seconds
        for name in ("pixel_values", "pixel_values_videos", "input_features"):
            if name in inputs:
                inputs[name] = inputs[name].float()
    return cases


def _modules(config: VideoLlama2Config) -> dict[str, str]:
    """The original's name -> ours, of every module whose output is compared, in the order of computation."""
    names = {}
    layer = config.vision_feature_layer
    text_config: Any = config.text_config
    audio_config: Any = config.audio_config

    def add_tower(original: str, ours: str, tower: Any) -> None:
        count = tower.num_hidden_layers
        for i in range(layer if layer >= 0 else count + 1 + layer):
            names[f"{original}.encoder.layers.{i}"] = f"{ours}.encoder.layers.{i}"

    if config.video_config is not None:
        add_tower("model.image_tower.image_tower", "model.vision_tower", config.vision_config)
        add_tower("model.video_tower.video_tower", "model.video_tower", config.video_config)
    else:
        add_tower("model.vision_tower.vision_tower.vision_model", "model.vision_tower", config.vision_config)
    names["model.mm_projector"] = "model.mm_projector"
    if audio_config is not None:
        for i in range(audio_config.num_hidden_layers):
            names[f"model.audio_tower.encoder.layers.{i}"] = f"model.audio_tower.encoder.layers.{i}"
        names["model.mm_projector_a"] = "model.mm_projector_a"
    names["inputs_embeds"] = "inputs_embeds"
    for i in range(text_config.num_hidden_layers):
        names[f"model.layers.{i}"] = f"model.language_model.layers.{i}"
    names["model.norm"] = "model.language_model.norm"
    return {**names, "logits": "logits"}


def _original_case(
    name: str, inputs: dict[str, torch.Tensor], config: VideoLlama2Config
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The same inputs as the original takes them: one negative id for a medium, and a list of media."""
    is_video_llava = config.video_config is not None
    tokens = {getattr(config, f"{kind}_token_id"): kind for kind in ORIGINAL_IDS}
    ids: list[int] = []
    previous = None
    for token in inputs["input_ids"][0].tolist():
        kind = tokens.get(token)
        if kind is None:
            ids.append(token)
        elif kind != previous and (kind, previous) != ("audio", "video"):  # the sound of a video is part of it
            count = config.num_frames if is_video_llava and kind == "video" else 1
            ids += [ORIGINAL_IDS["image" if is_video_llava else kind]] * count
        previous = kind
    arrays = {f"{name}.input_ids": np.array([ids])}
    if "pixel_values" in inputs:
        pixels = inputs["pixel_values"]
        arrays[f"{name}.image"] = (pixels[0] if is_video_llava else pixels).numpy()
    if "pixel_values_videos" in inputs:
        frames = inputs["pixel_values_videos"][0]
        arrays[f"{name}.video"] = (frames.transpose(0, 1) if is_video_llava else frames).numpy()
    if "input_features" in inputs:
        arrays[f"{name}.audio"] = inputs["input_features"].numpy()
    kinds = [kind for kind in ORIGINAL_IDS if f"{name}.{kind}" in arrays]
    media: list[Any] = [["plain" if is_video_llava else kind, f"{name}.{kind}"] for kind in kinds]
    if kinds == ["video", "audio"]:
        media = [["video", {"video": f"{name}.video", "audio": f"{name}.audio"}]]
    case = {"name": name, "media": media, "without_audio_tower": kinds == ["image"]}
    return case, {key: np.ascontiguousarray(array) for key, array in arrays.items()}


def _run_original(
    plan: Plan, work: Path, code: Path, python: str, cases: dict[str, dict[str, torch.Tensor]], modules: list[str]
) -> dict[str, str]:
    """Runs the script; its recordings lie in `work` then."""
    source, config = plan.source, plan.source.config
    arrays: dict[str, np.ndarray] = {}
    original_cases = []
    for name, inputs in cases.items():
        case, tensors = _original_case(name, inputs, config)
        original_cases.append(case)
        arrays |= tensors
    np.savez(work / "inputs.npz", **arrays)  # type: ignore[arg-type]  # names of arrays, not options
    kind = "" if source.kind == "full" else f"-{source.kind}"
    job = {
        "code": str(code.resolve()),
        "checkpoint": str(source.folder.resolve()),
        "base": None if source.kind == "full" else str(source.language_model_folder.resolve()),
        # The loading function decides by parts of this name.
        "name": ("video-llava" if config.video_config is not None else "videollama2") + kind,
        "model_type": source.config_dict["model_type"],
        "audio_sizes": _audio_sizes(config),
        "load_vision_tower": config.video_config is None and any(p.label == "vision tower" for p in source.parts),
        "files": _files_beside(plan),
        "rounded": [
            [[tensor.target, tensor.source.name], str(DTYPES[tensor.dtype]).removeprefix("torch.")]
            for tensor in plan.tensors
            if not tensor.is_copy
        ],
        "cases": original_cases,
        "modules": modules,
    }
    (work / "job.json").write_text(json.dumps(job))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    if _link_towers(plan, work):
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    process = subprocess.run(
        [python, str(SCRIPT), str(work / "job.json")],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if process.returncode != 0:
        tail = process.stderr.strip().splitlines()[-6:]
        raise VerificationError(
            f"The original code in {code} did not run with {python}. Its environment needs the original's "
            "requirements (--reference-python). The end of its output:\n" + "\n".join(f"  {line}" for line in tail)
        )
    return json.loads((work / "versions.json").read_text())


def _audio_sizes(config: VideoLlama2Config) -> dict[str, Any] | None:
    """BEATs' sizes under the names of the original's `BEATsConfig`."""
    audio: Any = config.audio_config
    if audio is None:
        return None
    return {
        "input_patch_size": audio.patch_size,
        "embed_dim": audio.embed_dim,
        "conv_bias": audio.conv_bias,
        "encoder_layers": audio.num_hidden_layers,
        "encoder_embed_dim": audio.hidden_size,
        "encoder_ffn_embed_dim": audio.intermediate_size,
        "encoder_attention_heads": audio.num_attention_heads,
        "conv_pos": audio.conv_pos,
        "conv_pos_groups": audio.conv_pos_groups,
        "num_buckets": audio.num_buckets,
        "max_distance": audio.max_distance,
        "gru_rel_pos": audio.gru_rel_pos,
        "finetuned_model": audio.num_classes > 0,
        "predictor_class": audio.num_classes,
    }


def _files_beside(plan: Plan) -> list[tuple[str, str]]:
    """Files that the original reads in training only, and what stands in front of their keys."""
    files = {}
    for tensor in plan.tensors:
        if tensor.part.startswith(("BEATs", "audio tower", "audio_tower", "mm_projector_a")):
            files[str(tensor.source.file.resolve())] = tensor.target.removesuffix(tensor.source.name)
    return list(files.items())


def _link_towers(plan: Plan, work: Path) -> bool:
    """
    Makes the towers that `config.json` names findable from the working folder; whether that is all of them.

    VideoLLaMA 2's code takes a folder for a name. Video-LLaVA's wants a repository, in a cache in the working folder.
    """
    source = plan.source
    found = True
    for key, label in _TOWERS.items():
        name = source.config_dict.get(key)
        if name is None:
            continue
        candidates = [part.folder for part in source.parts if part.label.startswith(label)]
        candidates += [source.folder / name, source.folder.parent / name]
        folder = next((path for path in candidates if path.is_dir()), None)
        if folder is None:
            found = False
        elif source.config.video_config is not None:
            cache = work / "cache_dir" / f"models--{name.replace('/', '--')}"
            (cache / "snapshots").mkdir(parents=True)
            (cache / "refs").mkdir()
            (cache / "refs" / "main").write_text(_REVISION)
            (cache / "snapshots" / _REVISION).symlink_to(folder.resolve())
        elif not Path(name).is_absolute():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).symlink_to(folder.resolve())
    return found


@contextmanager
def _hooks(model: Any, modules: dict[str, str], compare: Any) -> Iterator[None]:
    """Calls `compare(name, output)` for every module, and for what goes into the first layer of the language model."""
    named = dict(model.named_modules())

    def first(result: Any) -> torch.Tensor:
        return result[0] if isinstance(result, tuple) else result

    handles = [
        named[ours].register_forward_hook(lambda module, args, result, name=name: compare(name, first(result)))
        for name, ours in modules.items()
        if ours in named
    ]
    handles.append(
        named["model.language_model.layers.0"].register_forward_pre_hook(
            lambda module, args, kwargs: compare("inputs_embeds", args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _compare_case(
    model: Any, name: str, inputs: dict[str, torch.Tensor], modules: dict[str, str], work: Path
) -> dict[str, Any]:
    layers: dict[str, dict[str, Any]] = {}
    predictions: list[np.ndarray] = []

    def compare(module: str, output: torch.Tensor) -> None:
        path = work / f"{name}.{module}.npy"
        if not path.is_file():
            layers[module] = {"module": module, "difference": float("inf"), "max": float("nan")}
            return
        expected, values = np.load(path), output.float().numpy().ravel()
        if expected.size % values.size:
            layers[module] = {"module": module, "difference": float("inf"), "max": float(np.abs(expected).max())}
            return
        # An image is repeated as often as a video has frames before the original's tower, and after it here.
        difference = np.abs(expected.reshape(-1, values.size) - values).max()
        layers[module] = {
            "module": module,
            "difference": float(difference),
            "max": float(np.abs(expected).max()),
        }
        if module == "logits":
            vocabulary = expected.shape[-1]
            equal = expected.reshape(-1, vocabulary).argmax(-1) == values.reshape(-1, vocabulary).argmax(-1)
            predictions.append(equal)

    with _hooks(model, modules, compare):
        logits = model(**inputs, use_cache=False).logits
    compare("logits", logits)
    ordered = [layers[module] for module in modules if module in layers]
    first = next((x["module"] for x in ordered if not x["difference"] <= TOLERANCE * max(1.0, x["max"])), None)
    return {
        "tokens": inputs["input_ids"].shape[1],
        "equal_predictions": int(predictions[0].sum()) if predictions else 0,
        "first_difference": first,
        "layers": ordered,
    }
