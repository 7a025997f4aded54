"""
The paper's connector ablation in small: the same tower, language model, data and steps, another connector.

Every connector of VideoLLaMA 2's ablation (2D or 3D, pooling or convolution, with RegStage or without) and
Video-LLaVA's projector of every frame learns the video part of stages 1 and 2 in one go, from stage 0's parts, with
several seeds. Media are drawn, not read from files. The vision tower is frozen, so it reads every clip once, and all
connectors train from what it gave.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from .dataset import RowTokenizer, WorldCollator, WorldDataset, describe_media, draw_media
from .rendering import frame_times
from .rows import draw_row
from .stages import STAGES, load_before


# Connector -> what it is. All but the last two are rows of the paper's table; the first is the released model's.
CONNECTORS = {
    "stc_connector_v35": "3D convolution with RegStage (STC)",
    "stp_connector": "3D pooling with RegStage",
    "spatial_conv": "2D convolution",
    "spatial_pool": "2D pooling",
    "mlp2x_gelu": "mean over time, two linear layers",
    "frame_mlp2x_gelu": "two linear layers on every frame (Video-LLaVA)",
}
# The columns of the table.
SHOWN_SKILLS = ("count", "place", "motion", "last to appear", "colour after")
_FEATURES, _RESULTS = "ablation.features", "ablation.json"
_SEED = 500


def run_ablation(
    output_dir: str | Path,
    seeds: int = 3,
    steps: int = 1000,
    batch_size: int = 32,
    num_rows: int = 9600,
    per_skill: int = 100,
    minutes: float | None = None,
    processes: int = 1,
    cpu: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """
    Trains and asks every connector with every seed; results so far are in `output_dir/ablation.json`, from which a
    run that was stopped goes on. A seed draws the connector's first weights and the order of the rows.

    Args:
        output_dir: Folder of the stages, with those of stage 0. What the tower makes of the rows is kept there too, in
            `ablation.features`: 0.26 MB for each.
        num_rows: Different rows; more steps than these fill take them again.
        minutes: No training begins after so many minutes.
        processes: Trainings side by side, which share the processor's cores.

    Returns:
        Per connector, one dictionary per seed: `tokens` (of one video), `parameters`, `losses` (means of the tenths of
        the steps), `skills` (name -> share of held-out questions answered rightly), their `mean`, and the `settings`.

    Raises:
        ValueError: The folder has results with other settings.
    """
    started = time.monotonic()
    root = Path(output_dir)
    path = root / _RESULTS
    results: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings = {"steps": steps, "batch_size": batch_size, "num_rows": num_rows, "per_skill": per_skill}
    for run in (run for runs in results.values() for run in runs.values()):
        if run["settings"] != settings:
            raise ValueError(
                f"{path} has results with {_in_words(run['settings'])}, and {_in_words(settings)} are asked for; a "
                "table of both compares nothing. Give the same, or move the file away."
            )
    waiting = [(name, seed) for seed in range(seeds) for name in CONNECTORS if str(seed) not in results.get(name, {})]
    if waiting:
        cores = max(1, torch.get_num_threads() // processes)
        with ProcessPoolExecutor(
            processes, get_context("spawn"), torch.set_num_threads, (cores,), max_tasks_per_child=1
        ) as pool:
            _encode_rows(pool, processes, root, num_rows, cpu)
            train = partial(
                _train_and_ask,
                root=root,
                steps=steps,
                batch_size=batch_size,
                num_rows=num_rows,
                per_skill=per_skill,
                cpu=cpu,
                ends=None if minutes is None else time.time() + 60 * minutes - (time.monotonic() - started),
            )
            running = {pool.submit(train, name, seed): (name, seed) for name, seed in waiting}
            for future in logging.tqdm(as_completed(running), total=len(running), unit="training"):
                name, seed = running[future]
                if (result := future.result()) is not None:
                    results.setdefault(name, {})[str(seed)] = {**result, "settings": settings}
                    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return {name: [runs[seed] for seed in sorted(runs)] for name, runs in results.items()}


def _in_words(settings: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _dataset(root: Path, config: Any, num_rows: int) -> WorldDataset:
    from ..processing_videollama2 import VideoLlama2Processor

    tokenizer = VideoLlama2Processor.from_pretrained(str(root / "untrained")).tokenizer
    draw = partial(draw_row, mix={"video": 1.0})
    return WorldDataset(RowTokenizer(tokenizer, config), num_rows, _SEED, draw, STAGES["2"].separate)


def _open_features(path: Path, config: Any, num_rows: int) -> torch.Tensor:
    """The tower's features of all rows, bfloat16 (rows, frames, patches, width), in the file."""
    tower = config.vision_config
    shape = (num_rows, config.num_frames, (tower.image_size // tower.patch_size) ** 2, tower.hidden_size)
    size = torch.Size(shape).numel()
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16).view(shape)


def _encode_rows(pool: ProcessPoolExecutor, processes: int, root: Path, num_rows: int, cpu: bool) -> None:
    path = root / _FEATURES
    config = load_before("1", root)[0].config
    unfinished = path.with_suffix(".unfinished")
    size = _open_features(unfinished, config, num_rows).nbytes
    if path.is_file() and path.stat().st_size == size:
        unfinished.unlink()
        return
    edges = [round(num_rows * i / processes) for i in range(processes + 1)]
    list(pool.map(partial(_encode_piece, root, unfinished, num_rows, cpu), edges, edges[1:]))
    unfinished.replace(path)


@torch.inference_mode()
def _encode_piece(root: Path, path: Path, num_rows: int, cpu: bool, start: int, stop: int) -> None:
    model, _ = load_before("1", root)
    device = "cpu" if cpu or not torch.cuda.is_available() else "cuda"
    model = model.to(device).eval()
    features = _open_features(path, model.config, num_rows)
    data, times = _dataset(root, model.config, num_rows), frame_times(model.config.num_frames)
    torch.manual_seed(start)
    for begin in range(start, stop, 32):
        indices = range(begin, min(begin + 32, stop))
        drawn = describe_media([data[index]["row"] for index in indices], times)["video"]
        drawn = {"video": {name: value.to(device) for name, value in drawn.items()}}
        pixels = draw_media(drawn, model.config.vision_config.image_size, imitate_codecs=True)["pixel_values_videos"]
        with torch.autocast(device, torch.bfloat16):
            encoded = model.get_video_features(pixels).last_hidden_state
        features[indices.start : indices.stop] = encoded.unflatten(0, pixels.shape[:2]).to("cpu", torch.bfloat16)


class _EncodedRows(Dataset):
    """The rows, with their features in place of what is drawn."""

    def __init__(self, rows: WorldDataset, features: torch.Tensor):
        self.rows, self.features = rows, features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "features": self.features[index]}


def _collate(rows: Sequence[dict[str, Any]], collate: WorldCollator) -> dict[str, Any]:
    batch = collate(rows)
    del batch["drawn"]
    features = torch.stack([row["features"] for row in rows])
    return {**batch, "mm_encoder_outputs": {"video": BaseModelOutputWithPooling(last_hidden_state=features)}}


def _train_and_ask(
    connector: str,
    seed: int,
    root: Path,
    steps: int,
    batch_size: int,
    num_rows: int,
    per_skill: int,
    cpu: bool,
    ends: float | None,
) -> dict[str, Any] | None:
    from ..modeling_videollama2 import VideoLlama2ForConditionalGeneration
    from ..processing_videollama2 import VideoLlama2Processor
    from ..training import VideoLlama2Trainer, VideoLlama2TrainingArguments, prepare_for_training
    from .evaluation import Evaluator, draw_cases

    if ends is not None and time.time() > ends:
        return None
    ready, _ = load_before("1", root)
    config = type(ready.config).from_dict({**ready.config.to_dict(), "connector_type": connector})
    torch.manual_seed(seed)
    model = VideoLlama2ForConditionalGeneration(config)
    # Everything but the connector is stage 0's.
    new = {key: value for key, value in model.state_dict().items() if ".mm_projector." in key}
    old = {key: value for key, value in ready.state_dict().items() if ".mm_projector." not in key}
    model.load_state_dict(old | new)
    prepare_for_training(model, ["language_model", "lm_head", "mm_projector"])
    rows = _dataset(root, config, num_rows)
    tokenizer = rows.tokenize.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        arguments = VideoLlama2TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=STAGES["2"].learning_rate,
            connector_learning_rate=STAGES["2"].connector_learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, round(0.03 * steps)),
            adam_beta2=0.98,
            bf16=True,
            use_cpu=cpu or not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            save_strategy="no",
            logging_steps=max(1, steps // 10),
            report_to=[],
            disable_tqdm=True,
            seed=seed,
        )
        trainer = VideoLlama2Trainer(
            model=model,
            args=arguments,
            train_dataset=_EncodedRows(rows, _open_features(root / _FEATURES, config, num_rows)),
            data_collator=partial(_collate, collate=WorldCollator(tokenizer.pad_token_id, config.num_frames)),
        )
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    evaluator = Evaluator(model.eval(), VideoLlama2Processor.from_config(config, tokenizer), folder=None)
    cases = [case for case in draw_cases(per_skill) if case.row.medium == "video"]
    asked = [case.row for case in cases]
    evaluator.read(asked)
    right: dict[str, list[bool]] = {}
    for case, is_right in zip(cases, evaluator.answers_rightly(asked, [{"video": row.clip} for row in asked])):
        right.setdefault(case.skill, []).append(is_right)
    skills = {skill: float(np.mean(values)) for skill, values in right.items()}
    return {
        "tokens": config.num_visual_tokens("video"),
        "parameters": sum(p.numel() for p in model.model.mm_projector.parameters()),
        "losses": losses,
        "skills": skills,
        "mean": float(np.mean(list(skills.values()))),
    }


def format_ablation(results: dict[str, list[dict[str, Any]]]) -> str:
    """The results in Markdown: means over seeds with their standard deviations."""
    lines = [
        f"| connector | tokens | parameters | all skills | {' | '.join(SHOWN_SKILLS)} |",
        "|---" * (len(SHOWN_SKILLS) + 4) + "|",
    ]
    for connector in CONNECTORS:
        if not (runs := results.get(connector)):
            continue
        columns = [[run["mean"] for run in runs], *([run["skills"][skill] for run in runs] for skill in SHOWN_SKILLS)]
        cells = [f"{np.mean(values):.3f} ± {np.std(values, ddof=len(values) > 1):.3f}" for values in columns]
        size = f"{runs[0]['tokens']} | {runs[0]['parameters'] / 1e6:.2f} M"
        lines.append(f"| `{connector}`: {CONNECTORS[connector]} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


__all__ = ["CONNECTORS", "SHOWN_SKILLS", "format_ablation", "run_ablation"]
