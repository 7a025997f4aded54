"""What the tests of training share: a small model on disk with its processor, and rows with real media files."""

import json
from pathlib import Path

from processing_utils import GOLDENS, PROMPTS, write_media
from tiny_models import make_model
from videollama2_hf import VideoLlama2Processor
from videollama2_hf.prompt_videollama2 import build_chat_template
from videollama2_hf.tokenization_videollama2 import load_tokenizer


def make_folder(folder: Path, family: str = "qwen2", hears: bool = True, **kwargs) -> Path:
    """
    A small random model and its processor: 8 visual tokens for a video or an image, 48 for one second of sound.
    """
    tokenizer = load_tokenizer(GOLDENS / "processing" / "tokenizers" / ("qwen2" if family == "qwen2" else "llama"))
    tokenizer.chat_template = PROMPTS["qwen2" if family == "qwen2" else "mistral"]["chat_template"]
    size = len(tokenizer)
    ids = {f"{kind}_token_id": size + i for i, kind in enumerate(("image", "video", "audio"))}
    text = {"vocab_size": size, "max_position_embeddings": 2048, "pad_token_id": tokenizer.pad_token_id}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = make_model(family, hears=hears, **ids, text_config=text, **kwargs)
    processor = VideoLlama2Processor.from_config(model.config, tokenizer, chunk_length=1)
    processor.chat_template = build_chat_template(tokenizer.chat_template)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _row(question: str, answer: str, **media) -> dict:
    placeholders = "".join(f"<{kind}>\n" for kind in media if kind in ("image", "video", "audio"))
    turns = [{"from": "human", "value": placeholders + question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **media}


def write_rows(folder: Path, name: str = "rows.json", kinds: str = "va v a i t", repeat: int = 2) -> Path:
    """
    Rows of a question and an answer, of the kinds named: `va` a video with its sound, `v` a video not heard, `a` a
    sound, `i` an image, `t` text.
    """
    folder.mkdir(exist_ok=True)
    if not (folder / "loud.mp4").exists():
        write_media(folder)
    make = {
        "va": lambda i: _row(
            f"What is seen and heard, {i}?", "A square that grows brighter, a tone.", video="loud.mp4"
        ),
        "v": lambda i: _row(f"What is seen, {i}?", "Grey.", video="silent.mp4", load_audio_from_video=False),
        "a": lambda i: _row(f"What is heard, {i}?", "A tone.", audio="sound.wav"),
        "i": lambda i: _row(f"What is this, {i}?", "A pattern of many colours.", image="image.png"),
        "t": lambda i: _row(f"How much is {i} and {i}?", f"{2 * i}"),
    }
    rows = [make[kind](i) for i in range(repeat) for kind in kinds.split()]
    (folder / name).write_text(json.dumps(rows))
    return folder / name
