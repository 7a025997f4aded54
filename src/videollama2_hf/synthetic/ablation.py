"""
The paper's connector ablation in small: the same tower, language model, data and steps, another connector.

Every connector of VideoLLaMA 2's ablation (2D or 3D, pooling or convolution, with RegStage or without) and
Video-LLaVA's projector of every frame learns the video part of stages 1 and 2 in one go, from stage 0's parts, with
several seeds. Media are drawn, not read from files.
"""

import json
from pathlib import Path
from typing import Any

from .stages import STAGES, load_before


# Connector -> what it is. All but the last two are rows of the paper's table; the first is the released model's.
CONNECTORS = {
    "stc_connector_v35": "3D convolution with RegStage (STC)",
    "stc_connector": "3D convolution with RegStage, padded (STC of the first release)",
    "stp_connector": "3D pooling with RegStage",
    "spatial_conv": "2D convolution",
    "spatial_pool": "2D pooling",
    "mlp2x_gelu": "mean over time, two linear layers",
    "frame_mlp2x_gelu": "two linear layers on every frame (Video-LLaVA)",
}


def run_ablation(
    output_dir: str | Path,
    seeds: int = 3,
    steps: int = 1000,
    batch_size: int = 128,
    per_skill: int = 200,
    minutes: float | None = None,
    num_workers: int = 0,
    cpu: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """
    Trains and asks every connector with every seed; results so far are in `output_dir/ablation.json`, from which a
    run that was stopped goes on.

    Args:
        output_dir: Folder of the stages, with those of stage 0.
        minutes: No training begins after so many minutes.

    Returns:
        Per connector, one dictionary per seed: `tokens` (of one video), `loss` (mean of the last tenth of the steps)
        and `skills` (name -> share of held-out questions answered rightly).
    """
    import time

    started = time.monotonic()
    path = Path(output_dir) / "ablation.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for seed in range(seeds):
        for connector in CONNECTORS:
            done = results.setdefault(connector, [])
            if len(done) > seed:
                continue
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                return results
            done.append(
                _train_and_ask(connector, seed, Path(output_dir), steps, batch_size, per_skill, num_workers, cpu)
            )
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _train_and_ask(
    connector: str, seed: int, root: Path, steps: int, batch_size: int, per_skill: int, num_workers: int, cpu: bool
) -> dict[str, Any]:
    import tempfile
    from functools import partial

    import numpy as np
    import torch

    from ..modeling_videollama2 import VideoLlama2ForConditionalGeneration
    from ..processing_videollama2 import VideoLlama2Processor
    from ..training import VideoLlama2TrainingArguments, prepare_for_training
    from .dataset import RowTokenizer, WorldCollator, WorldDataset
    from .evaluation import evaluate
    from .rows import draw_row
    from .trainer import WorldTrainer

    ready, _ = load_before("1", root)
    config = type(ready.config).from_dict({**ready.config.to_dict(), "connector_type": connector})
    torch.manual_seed(seed)
    model = VideoLlama2ForConditionalGeneration(config)
    # Everything but the connector is stage 0's.
    new = {key: value for key, value in model.state_dict().items() if ".mm_projector." in key}
    old = {key: value for key, value in ready.state_dict().items() if ".mm_projector." not in key}
    model.load_state_dict(old | new)
    prepare_for_training(model, ["language_model", "lm_head", "mm_projector"])
    tokenizer = VideoLlama2Processor.from_pretrained(str(root / "untrained")).tokenizer
    data = WorldDataset(
        RowTokenizer(tokenizer, config), steps * batch_size, 500 + seed, partial(draw_row, mix={"video": 1.0})
    )
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
            dataloader_num_workers=num_workers,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_steps=max(1, steps // 10),
            report_to=[],
            disable_tqdm=True,
            seed=seed,
        )
        collator = WorldCollator(tokenizer.pad_token_id, config.num_frames)
        trainer = WorldTrainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    processor = VideoLlama2Processor.from_config(config, tokenizer)
    table = evaluate(model.eval(), processor, per_skill, from_files=False, media=("video",))
    return {
        "tokens": config.num_visual_tokens("video"),
        "parameters": sum(p.numel() for p in model.model.mm_projector.parameters()),
        "loss": losses[-1],
        "skills": {result.skill: result.accuracy for result in table},
        "mean": float(np.mean([result.accuracy for result in table])),
    }


def format_ablation(results: dict[str, list[dict[str, Any]]]) -> str:
    """The results in Markdown: means over seeds with their standard deviations."""
    import numpy as np

    shown = ("motion", "first to appear", "time of event", "count", "colour of two", "position")
    lines = [
        f"| connector | tokens | parameters | all skills | {' | '.join(shown)} |",
        "|---" * (len(shown) + 4) + "|",
    ]
    for connector, runs in results.items():
        if not runs:
            continue
        columns = [[run["mean"] for run in runs], *([run["skills"][skill] for run in runs] for skill in shown)]
        cells = [f"{np.mean(values):.3f} ± {np.std(values, ddof=len(values) > 1):.3f}" for values in columns]
        size = f"{runs[0]['tokens']} | {runs[0]['parameters'] / 1e6:.2f} M"
        lines.append(f"| `{connector}`: {CONNECTORS[connector]} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


__all__ = ["CONNECTORS", "format_ablation", "run_ablation"]
