"""
Ask a VideoLLaMA 2 model about a video with its sound, an image or a sound.

    python docs/quickstart.py [FILE] [QUESTION] [--model CHECKPOINT]

Without arguments: a three-second clip and a tiny checkpoint in the original's format, both part of this repository.
"""

import argparse
import mimetypes
from pathlib import Path

import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

import videollama2_hf  # noqa: F401  (registers the classes)


GOLDENS = Path(__file__).resolve().parents[1] / "tests" / "goldens"
TINY = GOLDENS / "qwen2_siglip_beats_av" / "checkpoint"
CLIP = GOLDENS / "processing_av" / "av_3s.mp4"


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a VideoLLaMA 2 model about a video, an image or a sound.")
    parser.add_argument("file", nargs="?", default=str(CLIP), help="video, image or sound (default: a bundled clip)")
    parser.add_argument("question", nargs="?", default="What do you see and hear?")
    parser.add_argument("--model", default=str(TINY), help="folder or Hub name (default: bundled, untrained)")
    args = parser.parse_args()

    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForMultimodalLM.from_pretrained(args.model, dtype="auto")

    modality = (mimetypes.guess_type(args.file)[0] or "video").split("/")[0]
    messages = [
        {
            "role": "user",
            "content": [{"type": modality, modality: args.file}, {"type": "text", "text": args.question}],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = inputs["input_ids"][0]
    counts = {kind: int((ids == getattr(processor, f"{kind}_token_id")).sum()) for kind in ("image", "video", "audio")}
    counts = {"text": len(ids) - sum(counts.values()), **counts}
    print(f"file      {args.file}")
    print("          " + ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items() if value.ndim > 2))
    print("tokens    " + ", ".join(f"{kind} {count}" for kind, count in counts.items() if count))
    print(f"question  {args.question}")

    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=24 if args.model == str(TINY) else 256, do_sample=False)
    print(f"answer    {processor.decode(output[0, len(ids) :], skip_special_tokens=True)!r}")
    if args.model == str(TINY):
        print(
            "\nThe weights are tiny and untrained, so the answer means nothing; everything before it is real.\n"
            "For a real answer: --model DAMO-NLP-SG/VideoLLaMA2.1-7B-AV (needs about 20 GB of memory)."
        )


if __name__ == "__main__":
    main()
