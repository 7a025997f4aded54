"""Proof of a conversion: every tensor compared from disk, and the converted model tried as a user would load it."""

import gc
import hashlib
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM
from transformers.utils import logging

from ..processing_videollama2 import VideoLlama2Processor
from .lora import LowRank
from .plan import Plan, PlannedTensor
from .tensors import CHUNK_SIZE, DTYPES, StoredTensor, as_bytes, read_folder


BLOCK_SIZE = 2**22  # values of a tensor that are recomputed at once
NEW_TOKENS = 8
# A folder of the Hub's cache: models--OWNER--NAME/snapshots/COMMIT.
_SNAPSHOT = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})$")
PROMPT = "What is seen and heard?"

Advance = Callable[[int], Any]


class VerificationError(RuntimeError):
    """A check of a converted checkpoint did not hold."""


def hash_file(path: Path, advance: Advance = lambda count: None) -> str:
    """SHA-256 of a file; `advance` is told the number of bytes as they are read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_SIZE):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def hash_tensor(tensor: StoredTensor, advance: Advance = lambda count: None, size: int | None = None) -> str:
    """SHA-256 of the bytes of a tensor, or of its first `size` bytes."""
    digest, left = hashlib.sha256(), tensor.nbytes if size is None else size
    for chunk in tensor.chunks() if left else ():
        chunk = chunk[:left]
        digest.update(chunk)
        advance(len(chunk))
        left -= len(chunk)
        if not left:
            break
    return digest.hexdigest()


def source_repository(folder: Path) -> tuple[str, str | None]:
    """Repository and commit of a folder in the Hub's cache; name of another folder and `None`."""
    folder = folder.resolve()
    match = _SNAPSHOT.search(str(folder))
    return (f"{match[1]}/{match[2]}", match[3]) if match else (folder.name, None)


def file_label(plan: Plan, path: Path) -> str:
    """A file of the source for a report that others read: without the folders of whoever made it."""
    folder, root = path.parent.resolve(), plan.source.folder.resolve()  # in the Hub's cache, files are links
    if folder.is_relative_to(root):
        return (folder.relative_to(root) / path.name).as_posix()
    return f"{source_repository(folder)[0]}/{path.name}"


def verify_tensors(plan: Plan, folder: Path, advance: Advance = lambda count: None) -> dict[str, Any]:
    """
    Reads all source and target tensors from disk and compares them: what is a copy has the same bytes; what is cast
    has the bytes of the cast; what is merged lies as close to the exact sum, computed in float64, as its dtype and
    float32 arithmetic allow.

    Args:
        plan: What was carried out.
        folder: Where its result lies.
        advance: Told the number of bytes as they are hashed; [`bytes_to_hash`] in all.

    Returns:
        `tensors`, `left_out`: one dictionary for each, with SHA-256 of source and target. `problems`: sentences, empty
        if everything is as it should be.
    """
    stored = read_folder(folder)
    planned = {tensor.target for tensor in plan.tensors}
    problems = [f"{name} is missing in the written files" for name in sorted(planned - set(stored))]
    problems += [f"{name} was written but not planned" for name in sorted(set(stored) - planned)]
    tensors = []
    for tensor in plan.tensors:
        if tensor.target not in stored:
            continue
        target = stored[tensor.target]
        entry: dict[str, Any] = {
            "target": tensor.target,
            "source": tensor.source.name,
            "file": file_label(plan, tensor.source.file),
            "part": tensor.part,
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
            "source_dtype": tensor.source.dtype,
            "source_sha256": hash_tensor(tensor.source, advance),
            "target_sha256": hash_tensor(target, advance),
        }
        if tensor.rows is not None:
            entry["rows"] = tensor.rows
        if (target.dtype, target.shape) != (tensor.dtype, tensor.shape):
            problems.append(
                f"{tensor.target} was written as {target.dtype} {list(target.shape)}, planned are {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        elif tensor.is_copy:
            expected = entry["source_sha256"]
            if tensor.rows is not None:
                expected = hash_tensor(tensor.source, size=tensor.nbytes)
            entry["relation"] = (
                "equal bytes" if tensor.rows is None else f"equal bytes of the first {tensor.rows} rows"
            )
            if entry["target_sha256"] != expected:
                problems.append(f"{tensor.target} does not have the bytes of {tensor.source.name}")
        else:
            problems += _check_computed(tensor, target, entry)
        tensors.append(entry)
    left_out = [
        {
            "source": item.source.name,
            "file": file_label(plan, item.source.file),
            "part": item.part,
            "shape": list(item.source.shape),
            "dtype": item.source.dtype,
            "reason": item.reason,
            "sha256": hash_tensor(item.source, advance),
        }
        for item in plan.left_out
    ]
    return {"tensors": tensors, "left_out": left_out, "problems": problems}


def bytes_to_hash(plan: Plan) -> int:
    """How many bytes [`verify_tensors`] reads."""
    sources = sum(tensor.source.nbytes for tensor in plan.tensors) + sum(item.source.nbytes for item in plan.left_out)
    return sources + plan.nbytes


def _check_computed(tensor: PlannedTensor, target: StoredTensor, entry: dict[str, Any]) -> list[str]:
    """Recomputes a tensor that was merged or cast, some rows at a time, and completes its entry."""
    source, written = tensor.source.load()[: tensor.rows], target.load()
    entry["relation"] = f"{tensor.source.dtype} cast to {tensor.dtype}" if tensor.change is None else "LoRA merged"
    largest = 0.0
    for rows in _blocks(tensor.shape):
        if tensor.change is None:
            if as_bytes(source[rows].to(DTYPES[tensor.dtype])) != as_bytes(written[rows]):
                return [f"{tensor.target} is not {tensor.source.name} cast to {tensor.dtype}"]
            continue
        exact, bound = _merge_exactly(source[rows], tensor.change, rows, DTYPES[tensor.dtype])
        difference = (written[rows].double() - exact).abs()
        largest = max(largest, float(difference.max()))
        if not (difference <= bound).all():  # also where it is not a number
            return [
                f"{tensor.target} differs from {tensor.source.name} with its LoRA change by {largest:.3g}, more than "
                f"rounding to {tensor.dtype} explains"
            ]
    if tensor.change is not None:
        entry["max_difference_from_float64"] = largest
        entry["lora"] = {
            "scaling": tensor.change.scaling,
            "a": tensor.change.a.name,
            "b": tensor.change.b.name,
            "a_sha256": hash_tensor(tensor.change.a),
            "b_sha256": hash_tensor(tensor.change.b),
        }
    return []


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    if not shape:
        yield slice(None)
        return
    step = max(1, BLOCK_SIZE * shape[0] // max(1, torch.Size(shape).numel()))
    for start, end in pairwise([*range(0, shape[0], step), shape[0]]):
        yield slice(start, end)


def _merge_exactly(
    weight: torch.Tensor, change: LowRank, rows: slice, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows of a merged weight in float64, and how far float32 arithmetic and one rounding may lead away."""
    left, right = change.b.load().double(), change.a.load().double()
    if change.is_embedding:
        left, right = right.T, left.T
    left = left[rows]
    weight = weight.double()
    exact = weight + change.scaling * (left @ right)
    magnitude = weight.abs() + abs(change.scaling) * (left.abs() @ right.abs())
    rank = right.shape[0]
    unit = torch.finfo(dtype).eps / 2 + (rank + 4) * torch.finfo(torch.float32).eps
    return exact, unit * magnitude + torch.finfo(dtype).tiny


def available_memory() -> int | None:
    """Bytes that this process may still take, as far as the system says; a container's limit counts."""
    known = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        known.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(statistics["inactive_file"])  # a cache of files
            known.append(int(limit) - used)
    except (OSError, StopIteration, ValueError, KeyError):
        pass
    return min(known, default=None)


def memory_for_model(nbytes: int) -> int:
    """Bytes to load and try a model with weights of that size: a tenth more, and some for activations."""
    return nbytes + nbytes // 10 + 10**9


def lacking_memory(needed: int) -> str | None:
    """Why something that takes this much memory cannot be done; `None` if it can, or if nobody knows."""
    free = available_memory()
    if free is None or needed <= free:
        return None
    return f"it needs about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"


def synthetic_content(processor: VideoLlama2Processor, num_frames: int) -> list[dict[str, Any]]:
    """An image, a video and, if the model hears, a sound, made from formulas, in one message."""
    height, width = 96, 128
    rows, columns = np.mgrid[0:height, 0:width]

    def frame(time: float) -> np.ndarray:
        disc = (rows - height / 2) ** 2 + (columns - width * (0.2 + 0.6 * time)) ** 2 < 400
        return np.stack([255 * disc, 255 * rows / height, 255 * columns / width], -1).astype(np.uint8)

    content: list[dict[str, Any]] = [
        {"type": "image", "image": Image.fromarray(frame(0.5))},
        {
            "type": "video",
            "video": np.stack([frame(i / num_frames) for i in range(num_frames)]),
            "load_audio_from_video": False,
        },
    ]
    if processor.has_audio:
        seconds = np.arange(3 * 16000) / 16000
        sound = 0.3 * np.sin(2 * np.pi * (220 + 110 * seconds) * seconds)
        content.append({"type": "audio", "audio": sound.astype(np.float32), "sampling_rate": 16000})
    return [*content, {"type": "text", "text": PROMPT}]


def self_check(folder: Path, nbytes: int) -> dict[str, Any]:
    """
    Loads a converted checkpoint in its stored dtype and tries it on synthetic media.

    Args:
        folder: The checkpoint.
        nbytes: Size of its weights.

    Returns:
        Numbers under `features`, `logits` and `greedy`; `problems`, empty if everything is as it should be; or only
        `skipped`, why nothing was tried.
    """
    device = "cpu"
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > memory_for_model(nbytes):
        device = "cuda"
    elif (reason := lacking_memory(memory_for_model(nbytes))) is not None:
        return {"skipped": f"The model was not tried: {reason}."}
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing or too much is reported here
    try:
        model, info = AutoModelForMultimodalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, device_map={"": device} if device == "cuda" else None
        )
    finally:
        logging.set_verbosity(level)
    problems = [
        f"loading: {kind.replace('_', ' ')}: {', '.join(sorted(map(str, info[kind])))}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[kind]
    ]
    model.eval()
    result: dict[str, Any] = {"device": device, "dtype": str(model.dtype).removeprefix("torch.")}
    if not problems:
        processor = VideoLlama2Processor.from_pretrained(folder)
        problems = _try_model(model, processor, result)
    del model
    gc.collect()
    return {**result, "problems": problems}


@torch.no_grad()
def _try_model(model: Any, processor: VideoLlama2Processor, result: dict[str, Any]) -> list[str]:
    """Encodes, runs and generates; the numbers go into `result`, what is wrong is returned."""
    messages = [{"role": "user", "content": synthetic_content(processor, model.config.num_frames)}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    media, again = model.encode_media(**inputs), model.encode_media(**inputs)
    problems = []
    result["prompt_tokens"] = inputs["input_ids"].shape[1]
    result["features"] = {}
    for modality, outputs in media.items():
        features = torch.cat(list(outputs.pooler_output)).float()
        difference = float((features - torch.cat(list(again[modality].pooler_output)).float()).abs().max())
        numbers = {
            "tokens": len(features),
            "mean": float(features.mean()),
            "standard_deviation": float(features.std()),
            "max": float(features.abs().max()),
            "difference_when_encoded_again": difference,
        }
        result["features"][modality] = numbers
        if not torch.isfinite(features).all():
            problems.append(f"the features of the {modality} contain NaN or infinite values")
        elif difference > torch.finfo(model.dtype).eps * numbers["max"]:
            problems.append(f"the {modality} encoded again differs by {difference:.3g}")
    if problems:
        return problems
    logits = model(**text, mm_encoder_outputs=media, logits_to_keep=1).logits.float()
    result["logits"] = {"min": float(logits.min()), "max": float(logits.max())}
    if not torch.isfinite(logits).all():
        return ["the logits contain NaN or infinite values"]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    try:
        reused = model.generate(**text, mm_encoder_outputs=media, **options)[0, inputs["input_ids"].shape[1] :]
        whole = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    except FloatingPointError as error:
        return [f"generation broke down: {error}"]
    result["greedy"] = {"ids": reused.tolist(), "text": processor.decode(reused)}
    if reused.tolist() != whole.tolist():
        problems.append(f"generation from encoded media gives {reused.tolist()}, from the media {whole.tolist()}")
    return problems
