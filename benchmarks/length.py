"""
What a question costs as its media grow: frames, seconds of sound, tokens of the prompt, rows of a batch.

    python benchmarks/length.py            # some minutes of CPU time
    python benchmarks/length.py --short    # small models, nothing written

Random weights: CLIP-L with the STC connector, BEATs, and a language model in the shapes of Qwen2's 0.5B, bfloat16. One
thread, CPU seconds. Results: `results/length.{json,md}` and the picture `docs/images/cost_against_length.svg`.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from answering import prompt_inputs
from common import RESULTS, describe_machine, measure, write_results
from random_models import SMALL_AUDIO, build, build_config

from videollama2_hf import VideoLlama2ForConditionalGeneration
from videollama2_hf.configuration_videollama2 import get_num_audio_tokens


PICTURE = Path(__file__).parents[1] / "docs" / "images" / "cost_against_length.svg"
LENGTHS = {
    "frames": ("of a video, until its tokens", (2, 4, 8, 16)),
    "seconds": ("of sound, until its tokens", (5, 10, 20, 30, 60)),
    "tokens": ("of a prompt, until the first word", (256, 512, 1024, 2048, 4096)),
    "rows": ("of a batch, for the next token of each", (1, 2, 4, 8)),
}


def costs(model: VideoLlama2ForConditionalGeneration) -> dict[str, Callable[[int], Callable[[], Any]]]:
    """By what grows: a function from how much of it there is to what is measured."""
    config = model.config
    size = config.vision_config.image_size

    def frames(count: int) -> Callable[[], Any]:
        video = torch.randn(1, count, 3, size, size, dtype=model.dtype)
        tokens = config.num_visual_tokens("video", count)

        def encode() -> None:
            assert model.get_video_features(video).pooler_output.shape[1] == tokens

        return encode

    def seconds(count: int) -> Callable[[], Any]:
        features = torch.randn(1, 100 * count - 2, 128)
        tokens = get_num_audio_tokens(features.shape[1])

        def encode() -> None:
            assert model.get_audio_features(features).pooler_output.shape[1] == tokens

        return encode

    def tokens(count: int) -> Callable[[], Any]:
        inputs = prompt_inputs(model, count)
        return lambda: model(**inputs, logits_to_keep=1)

    def rows(count: int) -> Callable[[], Any]:
        inputs = prompt_inputs(model, 128, rows=count)
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        next_ids = torch.full((count, 1), 5)

        def read() -> None:
            model(input_ids=next_ids, past_key_values=cache)
            cache.crop(-1)

        return read

    return {"frames": frames, "seconds": seconds, "tokens": tokens, "rows": rows}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One plot for each of what grows; dashed: in proportion to its smallest amount."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "cost_against_length", "font.size": 9, "svg.fonttype": "none"})
    figure, axes = plt.subplots(2, 2, figsize=(8, 5.4), layout="constrained")
    for axis, (name, (what, _)) in zip(axes.flat, LENGTHS.items()):
        points = [(row["length"], row["seconds"]) for row in rows if row["what"].startswith(name)]
        lengths, values = zip(*points)
        axis.plot(lengths, [values[0] * length / lengths[0] for length in lengths], "--", color="0.6", linewidth=1)
        axis.plot(lengths, values, "o-", color="#1f5fa8")
        axis.set(xlabel=f"{name} {what}", ylabel="CPU seconds", xlim=(0, None), ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


@torch.inference_mode()
def main(short: bool, rounds: int, results: Path, picture: Path) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = build_config(
        short=short, connector_type="stc_connector", num_frames=8, audio_config=SMALL_AUDIO if short else {}
    )
    model = build(VideoLlama2ForConditionalGeneration, config, dtype=torch.bfloat16)
    rows = []
    for name, make in costs(model).items():
        what, lengths = LENGTHS[name]
        variants = {str(length): make(length) for length in (lengths[:3] if short else lengths)}
        next(iter(variants.values()))()  # what is set up once
        measured = measure(variants, rounds)
        smallest = statistics.median(measured[str(lengths[0])]["cpu"])
        for length, values in measured.items():
            seconds = statistics.median(values["cpu"])
            rows.append({"what": f"{name} {what}", "length": int(length), "seconds": seconds})
            rows[-1]["for each, against the shortest"] = seconds / int(length) / (smallest / lengths[0])
            rows[-1]["spread"] = f"{min(values['cpu']):.3g} to {max(values['cpu']):.3g}, {rounds} rounds"
            print(rows[-1], flush=True)
    if not short:
        write_results("length", "Cost against length", rows, describe_machine("torch", "transformers"), results)
    draw(rows, picture)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="small models, no table is written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the table goes")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where the picture goes")
    arguments = parser.parse_args()
    if arguments.short and arguments.picture == PICTURE:
        parser.error("--short draws nothing worth keeping; name another --picture")
    main(arguments.short, 1 if arguments.short else arguments.rounds, arguments.results, arguments.picture)
