"""Rows of `model.py` for what answers: prompts, tokens, conversations, many questions, loading and importing."""

import gc
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import cpu_seconds, measure, memory_row, peak_memory, ratios, time_row
from random_models import CLIP_L, QWEN2_HALF_B, build, build_config, build_session
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling
from true_shapes import AUDIO_VISUAL, QWEN2_7B, tensor_shapes, write_checkpoint, write_language_model

from videollama2_hf import VideoLlama2ForConditionalGeneration
from videollama2_hf.captioning import caption
from videollama2_hf.session import Session
from videollama2_hf.synthetic.rendering import render_clip
from videollama2_hf.synthetic.world import draw_clip


QUESTIONS = [
    "What is happening?",
    "Who is it?",
    "Where are they?",
    "What do you hear?",
    "How does it end?",
]
OPTIONAL = ("av", "datasets", "fastapi", "gradio", "matplotlib", "peft", "timm", "trl")


def prompt_inputs(
    model: VideoLlama2ForConditionalGeneration, num_tokens: int, num_text: int = 60, rows: int = 1
) -> dict[str, Any]:
    """What `generate` takes for rows of an encoded video and a text."""
    config = model.config
    ids = torch.full((rows, num_tokens), config.video_token_id)
    ids[:, -num_text:] = torch.arange(2, 2 + num_text)
    features = torch.randn(rows, num_tokens - num_text, config.text_config.hidden_size, dtype=model.dtype)
    encoded: Any = {"video": BaseModelOutputWithPooling(pooler_output=features)}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_encoder_outputs": encoded}


def prefill(short: bool) -> dict[str, Any]:
    """Memory until the first token, against logits for every position, in float32 as the original has them."""
    config = build_config(text=QWEN2_HALF_B | ({"num_hidden_layers": 2} if short else {}), connector_type="linear")
    config.vision_config.num_hidden_layers = 1
    model = build(VideoLlama2ForConditionalGeneration, config, dtype=torch.bfloat16)
    inputs = prompt_inputs(model, 400 if short else 1560)

    def generate() -> torch.Tensor:
        return model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        ).logits[0]

    @torch.inference_mode()
    def all_logits() -> torch.Tensor:
        return model(**inputs).logits.float()[:, -1].clone()

    model(**prompt_inputs(model, 61))  # what is allocated once
    logits, ours = peak_memory(generate)
    reference_logits, reference = peak_memory(all_logits)
    difference = float((logits - reference_logits).abs().max() / reference_logits.std())
    assert difference < 0.1, difference
    num_tokens, vocab_size = inputs["input_ids"].shape[1], config.text_config.vocab_size
    saved, size = reference - ours, num_tokens * vocab_size * 4
    row = memory_row(
        f"peak memory of a prompt of {num_tokens} tokens, 0.5B, bfloat16",
        "logits for every position, in float32",
        1.0,
        ours,
        reference,
        f"last logits within {difference:.2g} of their spread",
        f"{saved / 1e6:.0f} MB less; the positions times the vocabulary times 4 bytes are {size / 1e6:.0f} MB.",
    )
    return row | {"reached": saved >= size}


def decode(short: bool, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """One row's next token, against reading every weight that it needs once."""
    config = build_config(short=short, connector_type="linear")
    config.vision_config.num_hidden_layers = 1
    model = build(VideoLlama2ForConditionalGeneration, config, dtype=dtype)
    weights = [*model.model.language_model.layers.parameters(), model.lm_head.weight]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    buffer = torch.zeros(size // 4)
    inputs, count = prompt_inputs(model, 128), 4 if short else 8

    def read() -> float:
        begin = cpu_seconds()
        buffer.sum()
        return cpu_seconds() - begin

    def generate() -> float:
        seconds = []
        for number in (1, 1 + count):
            begin = cpu_seconds()
            tokens = model.generate(**inputs, max_new_tokens=number, min_new_tokens=number, do_sample=False)
            seconds.append(cpu_seconds() - begin)
            assert tokens.shape[1] == 128 + number
        return (seconds[1] - seconds[0]) / count

    read(), generate()
    times = [(read(), generate()) for _ in range(rounds)]
    share, low, high = ratios([time for _, time in times], [time for time, _ in times])
    bound, token = (sorted(values)[len(values) // 2] for values in zip(*times))
    return {
        "step": f"a token of 0.5B, {str(dtype).removeprefix('torch.')}",
        "reference": f"reading its {size / 1e9:.2g} GB of weights",
        "ours": f"{token:.3g} s",
        "theirs": f"{bound:.3g} s",
        "ratio": share,
        "spread": f"{low:.2g} to {high:.2g}, {rounds} rounds",
        "target": 0.6,
        "reached": share >= 0.6,
        "check": f"{count} tokens",
        "note": f"{size / bound / 1e9:.2g} GB/s is what one core reads here.",
    }


def make_session(short: bool) -> tuple[Session, dict[str, Any]]:
    """A session with a vision tower in bfloat16 and a language model in float32, and a video."""
    config = build_config(CLIP_L, short=short, connector_type="stc_connector", num_frames=4)
    session = build_session(config, torch.bfloat16)
    frames = torch.randint(0, 256, (4, 3, 120, 160), dtype=torch.uint8)
    return session, {"type": "video", "video": frames.movedim(1, -1).numpy()}


def count_towers(session: Session) -> list[int]:
    """A list that gets an entry whenever the vision tower runs."""
    runs: list[int] = []
    session.model.model.vision_tower.embeddings.register_forward_hook(lambda *_: runs.append(1))
    return runs


def five_turns(short: bool) -> dict[str, Any]:
    """Time to the first token of the second turn and on, against a conversation that is read again at every turn."""
    session, video = make_session(short)
    runs = count_towers(session)
    seconds: dict[str, list[float]] = {"ours": [], "reference": []}
    answers: dict[str, list[list[int]]] = {"ours": [], "reference": []}
    chat, messages, reused = session.chat(), [], []
    for turn, question in enumerate(QUESTIONS):
        media = [] if turn else [video]
        begin = cpu_seconds()
        answer = chat.ask(question, *media, max_new_tokens=1)
        seconds["ours"].append(cpu_seconds() - begin)
        answers["ours"].append(answer.token_ids)
        reused.append(answer.num_reused_tokens)
        messages.append({"role": "user", "content": [*media, {"type": "text", "text": question}]})
        num_runs, fresh = len(runs), Session(session.model, session.processor)
        begin = cpu_seconds()
        again = fresh.answer([messages], max_new_tokens=1)[0]
        seconds["reference"].append(cpu_seconds() - begin)
        answers["reference"].append(again.token_ids)
        messages.append({"role": "assistant", "content": answer.text})
        assert num_runs == turn + 1 and len(runs) == turn + 2  # ours in the first turn only, the reference in each
    assert answers["ours"] == answers["reference"], answers
    assert min(reused[1:]) > 300 or short
    measured = {name: {"cpu": values[1:]} for name, values in seconds.items()}
    check = "equal answers, the tower runs once instead of five times"
    return time_row("first token of turns 2 to 5 about a clip", "all of it read again", 3.0, measured, check)


def many_questions(short: bool, rounds: int) -> dict[str, Any]:
    """Questions about one clip as one batch, against one call for each."""
    session, video = make_session(short)
    runs, questions = count_towers(session), QUESTIONS[:4]

    def ask_many() -> list[list[int]]:
        fresh = Session(session.model, session.processor)
        return [answer.token_ids for answer in fresh.ask_many(questions, video, max_new_tokens=4)]

    def ask_each() -> list[list[int]]:
        sessions = [Session(session.model, session.processor) for _ in questions]
        return [s.ask(q, video, max_new_tokens=4).token_ids for s, q in zip(sessions, questions)]

    measured = measure({"ours": ask_many, "reference": ask_each}, rounds)
    assert measured["ours"]["result"] == measured["reference"]["result"], measured
    assert len(runs) == rounds * (1 + len(questions))
    check = "equal answers, the tower runs once instead of four times"
    return time_row("4 questions about a clip", "one call for each", 1.0, measured, check)


def captions(short: bool, rounds: int) -> dict[str, Any]:
    """Many clips, the next ones read and encoded while a batch is answered, against one after the other."""
    session, _ = make_session(short)
    count, batch_size = (4, 2) if short else (12, 4)
    options, waiting = {"max_new_tokens": 8, "min_new_tokens": 8}, []

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        clips = [draw_clip(np.random.default_rng([1, i])) for i in range(count)]
        paths = [str(render_clip(clip, root / f"{i}.mp4", 128)) for i, clip in enumerate(clips)]

        def in_batches() -> list[str]:
            output = root / "captions.jsonl"
            output.unlink(missing_ok=True)
            report = caption(session, paths, output, batch_size=batch_size, show_progress=False, **options)
            assert report.num_answered == count, report
            waiting.append(report.waiting_seconds / report.seconds)
            return [json.loads(line)["text"] for line in output.read_text().splitlines()]

        def one_by_one() -> list[str]:
            question = {"type": "text", "text": "Describe this in detail."}
            texts = []
            for path in paths:
                block = {"type": "video", "video": session.encode({"type": "video", "video": path})}
                texts.append(session.answer([[{"role": "user", "content": [block, question]}]], **options)[0].text)
            return texts

        measured = measure({"ours": in_batches, "reference": one_by_one}, rounds)
    assert measured["ours"]["result"] == measured["reference"]["result"], measured
    return time_row(
        f"captions of {count} clips, by the clock",
        "one after the other",
        1.0,
        measured,
        "equal captions",
        f"Batches of {batch_size}; two threads read and encode ahead, one answers. The language model waits for "
        f"media in {statistics.median(waiting):.0%} of the time.",
        clock="wall",
    )


def _load(folders: dict[str, str], rounds: int) -> dict[str, list[dict[str, float]]]:
    """In a process of its own, in turns: CPU seconds and anonymous memory of loading each, and its bytes."""

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    classes: dict[str, Any] = {"ours": VideoLlama2ForConditionalGeneration, "reference": AutoModelForCausalLM}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    for turn in range(rounds + 1):
        for name, folder in folders.items():
            gc.collect()
            memory, begin = anonymous(), cpu_seconds()
            model = classes[name].from_pretrained(folder, dtype=torch.bfloat16)
            run = {"cpu": cpu_seconds() - begin, "anonymous": anonymous() - memory}
            run["bytes"] = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
            run["tensors"] = len(list(model.parameters()))
            if turn:  # the first round imports
                runs[name].append(run)
            del model
    return runs


def load(rounds: int) -> dict[str, Any]:
    """An original checkpoint in true shapes, directly, against transformers and the bare language model."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folders = {"ours": str(write_checkpoint(root, AUDIO_VISUAL)), "reference": str(root / "qwen2")}
        write_language_model(root / "qwen2", QWEN2_7B, tensor_shapes(AUDIO_VISUAL.config_dict()))
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            runs = process.submit(_load, folders, rounds).result()
    # Seconds for every GB
    measured = {name: {"cpu": [run["cpu"] / run["bytes"] * 1e9 for run in runs[name]]} for name in runs}
    anonymous = {name: max(run["anonymous"] for run in runs[name]) for name in runs}
    by_tensor = [[run["cpu"] / run["tensors"] for run in runs[name]] for name in ("ours", "reference")]
    tensors = " and ".join(str(runs[name][0]["tensors"]) for name in runs)
    row = time_row(
        f"load of the original VideoLLaMA2.1-7B-AV, {runs['ours'][0]['bytes'] / 1e9:.3g} GB, seconds for every GB",
        "transformers, the bare language model",
        1.0,
        measured,
        " and ".join(f"{size / 1e6:.3g} MB" for size in anonymous.values()) + " of anonymous memory",
        f"Weights are mapped, not read, so the time goes by their number, {tensors}: for each of them the ratio is "
        f"{ratios(*by_tensor)[0]:.2f}.",
    )
    return row | {"reached": row["ratio"] >= 1.0 and anonymous["ours"] < 50e6}


def importing(rounds: int) -> dict[str, Any]:
    """The package, against what it is built on."""
    optional = f"assert not [name for name in {OPTIONAL!r} if name in sys.modules]"
    programs = {
        "ours": f"import sys, videollama2_hf; {optional}",
        "reference": "import torch, transformers",
        "base classes": "from transformers import PreTrainedModel, ProcessorMixin, BaseVideoProcessor",
    }

    def run(program: str) -> None:
        subprocess.run([sys.executable, "-c", program], check=True)

    measured = measure({name: lambda program=program: run(program) for name, program in programs.items()}, rounds)
    base = ratios(measured["base classes"]["cpu"], measured["ours"]["cpu"])[0]
    note = (
        "`import transformers` imports nothing of itself before it is used. The classes that a model and a processor "
        f"derive from are nearly all of our time: we take {base:.2f} times as long as they alone."
    )
    reference = "import torch, transformers"
    return time_row("import videollama2_hf", reference, 1 / 1.3, measured, "nothing optional imported", note)
