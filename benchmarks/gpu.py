"""
On a GPU: the next token of a 7B model, BEATs, and the ways to run the STC connector.

    python benchmarks/gpu.py                        # a GPU with 24 GB, some minutes
    python benchmarks/gpu.py --language-model mixtral    # 8x7B, a GPU with 120 GB
    python benchmarks/gpu.py --tiny                 # small models on what there is, for tests: nothing written

Random bfloat16 weights in true shapes. Seconds from synchronisation to synchronisation, variants in turns, medians.
The fast ways to generate are compared with the plain one by the logits of the same tokens, one after the other.
Results: `results/gpu.{json,md}`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from answering import prompt_inputs
from common import RESULTS, describe_machine, ratios, write_results
from random_models import CLIP_L, QWEN2_HALF_B, SIGLIP, SMALL_AUDIO, build, build_config
from torch import nn
from towers import OriginalBias, as_convolutions, compare
from transformers import LogitsProcessor, LogitsProcessorList
from true_shapes import MISTRAL_7B, MIXTRAL_8X7B, QWEN2_7B

from videollama2_hf import VideoLlama2AudioConfig, VideoLlama2AudioModel, VideoLlama2ForConditionalGeneration
from videollama2_hf.connector_videollama2 import STCConnector


LANGUAGE_MODELS = {"qwen2": QWEN2_7B, "mistral": MISTRAL_7B, "mixtral": MIXTRAL_8X7B}
PROMPT, NEW_TOKENS = 1560, 64


class Forced(LogitsProcessor):
    """Makes `generate` say given tokens: (tokens,) behind a prompt of some length."""

    def __init__(self, tokens: torch.Tensor, prompt_length: int):
        self.tokens, self.prompt_length = tokens, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[input_ids.shape[1] - self.prompt_length]] = 0.0
        return forced


def measure(
    variants: dict[str, Callable[[], Any]], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each round, and results, of variants in turns behind one round that compiles and warms up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds: dict[str, list[float]] = {name: [] for name in variants}
    results = {}
    for turn in range(rounds + 1):
        for name, variant in variants.items():
            wait()
            begin = time.perf_counter()
            results[name] = variant()
            wait()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return seconds, results


def make_row(
    step: str, reference: str, ours: list[float], theirs: list[float], target: float, check: str, note: str = ""
) -> dict[str, Any]:
    ratio, low, high = ratios(ours, theirs)
    return {
        "step": step,
        "reference": reference,
        "ours": f"{1e3 * statistics.median(ours):.3g} ms",
        "theirs": f"{1e3 * statistics.median(theirs):.3g} ms",
        "ratio": ratio,
        "spread": f"{low:.2g} to {high:.2g}, {len(ours)} rounds",
        "target": target,
        "reached": ratio >= target,
        "check": check,
        "note": note,
    }


def decode(name: str, tiny: bool, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """The next token of one row: static cache, compiled by `generate`, against plain `generate` and against memory."""
    text = LANGUAGE_MODELS[name] | ({"max_position_embeddings": 4096} if tiny else {})
    if tiny:
        text |= {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = build_config(CLIP_L | {"num_hidden_layers": 1}, text, connector_type="linear")
    with device:
        model = build(VideoLlama2ForConditionalGeneration, config, dtype=torch.bfloat16)
    prompt, new = (80, 4) if tiny else (PROMPT, NEW_TOKENS)
    inputs = prompt_inputs(model, prompt)
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
    forced = torch.randint(10, 500, (new + 1,), generator=torch.Generator().manual_seed(0)).to(device)

    def generate(count: int, **options: Any) -> Any:
        return model.generate(
            **inputs,
            max_new_tokens=count,
            do_sample=False,
            logits_processor=LogitsProcessorList([Forced(forced, prompt)]),
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )

    static = {"cache_implementation": "static"}
    variants = {
        "first": lambda: generate(1),
        "plain": lambda: generate(1 + new),
        "first static": lambda: generate(1, **static),
        "static": lambda: generate(1 + new, **static),
    }
    weights = [*model.model.language_model.layers.parameters(), model.lm_head.weight]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    buffer = torch.zeros(size // 4, device=device)
    variants["read"] = lambda: buffer.sum()
    seconds, results = measure(variants, rounds, device)
    plain, fast = (torch.stack(results[key].logits).float() for key in ("plain", "static"))
    difference = float((fast - plain).norm() / plain.norm())
    assert difference < 3e-2, difference
    same = float((fast.argmax(-1) == plain.argmax(-1)).float().mean())
    check = f"logits of {len(plain)} forced tokens: relative difference {difference:.1g}, {same:.0%} the same best"
    token, slow = (
        [(b - a) / new for a, b in zip(seconds[first], seconds[last])]
        for first, last in (("first static", "static"), ("first", "plain"))
    )
    step = f"a token of {name} behind {prompt} others, static cache, compiled"
    bound = f"reading its {size / 1e9:.3g} GB of weights"
    note = "All weights are read, also of experts that do not answer." if name == "mixtral" else ""
    return [
        make_row(step, bound, token, seconds["read"], 0.7, check, note),
        make_row(step, "plain `generate`", token, slow, 2.0, check),
    ]


def beats(tiny: bool, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    config = VideoLlama2AudioConfig(**(SMALL_AUDIO if tiny else {}))
    model = build(VideoLlama2AudioModel, config, dtype=torch.bfloat16)
    reference = OriginalBias.build(model).to(device)
    model.to(device)
    features = (15 + 6 * torch.randn(1, 998 if tiny else 2998, 128)).to(device)
    variants = {name: lambda m=m: m(features).last_hidden_state for name, m in (("ours", model), ("ref", reference))}
    seconds, results = measure(variants, rounds, device)
    attention: Any = model.encoder.layers[0].self_attn
    length = results["ours"].shape[1]
    table, _ = measure({"table": lambda: attention.position_bias(length, device)}, rounds, device)
    note = f"Our table of position biases takes {1e3 * statistics.median(table['table']):.2g} ms of it."
    check = compare(results["ours"], results["ref"])
    name = "eager attention, position buckets from the CPU, as the original"
    return [make_row("BEATs, 30 s, bfloat16", name, seconds["ours"], seconds["ref"], 2.4, check, note)]


def stc_connector(version: str, tiny: bool, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Matrix products, compiled and not, and torch's convolutions with channels last, against these as they come."""
    vision, kind, width = (CLIP_L, "stc_connector", 4096) if version == "2" else (SIGLIP, "stc_connector_v35", 3584)
    text = QWEN2_HALF_B | ({} if tiny else {"hidden_size": width, "num_attention_heads": width // 128})
    config = build_config(vision, text, tiny, connector_type=kind, connector_depth=1 if tiny else 4)
    products = build(STCConnector, config, dtype=torch.bfloat16).to(device)
    convolutions, last = (as_convolutions(config, products) for _ in range(2))
    for module in last.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    side = config.vision_config.image_size // config.vision_config.patch_size
    features = torch.randn(1, 8, side**2, config.vision_config.hidden_size, dtype=torch.bfloat16, device=device)
    compiled = torch.compile(products, backend="eager" if device.type == "cpu" else "inductor")
    modules = {"torch's convolutions": convolutions, "weights with channels last": last}
    modules |= {"matrix products (what the model does)": products, "matrix products, compiled": compiled}
    seconds, results = measure({name: lambda m=m: m(features) for name, m in modules.items()}, rounds, device)
    theirs, *ours = modules
    return [
        make_row(
            f"STC connector of VideoLLaMA {version}, 8 x {side} x {side}: {name}",
            theirs,
            seconds[name],
            seconds[theirs],
            1.0,
            compare(results[name], results[theirs]),
        )
        for name in ours
    ]


@torch.inference_mode()
def main(tiny: bool, language_model: str, rounds: int, results: Path) -> list[dict[str, Any]]:
    if not tiny and not torch.cuda.is_available():
        raise SystemExit("No GPU here: these rows are for one. `--tiny` runs the same code on the CPU.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for make in (
        lambda: decode(language_model, tiny, rounds, device),
        lambda: beats(tiny, rounds, device),
        lambda: stc_connector("2", tiny, rounds, device),
        lambda: stc_connector("2.1", tiny, rounds, device),
    ):
        rows += make()
        print(json.dumps(rows[-1]), flush=True)
    if not tiny:
        machine = describe_machine("torch", "transformers", "timm") | {"processor": torch.cuda.get_device_name()}
        write_results("gpu", "On a GPU", rows, machine, results)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", choices=LANGUAGE_MODELS, default="qwen2")
    parser.add_argument("--tiny", action="store_true", help="small models, also without a GPU, nothing written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the table goes")
    arguments = parser.parse_args()
    main(arguments.tiny, arguments.language_model, 1 if arguments.tiny else arguments.rounds, arguments.results)
