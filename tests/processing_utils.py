"""What the tests of the processor share: a small processor, messages, and media files."""

import json
from pathlib import Path

import av
import numpy as np
from PIL import Image

from videollama2_hf.feature_extraction_videollama2 import VideoLlama2FeatureExtractor
from videollama2_hf.image_processing_videollama2 import VideoLlama2ImageProcessor
from videollama2_hf.processing_videollama2 import VideoLlama2Processor
from videollama2_hf.prompt_videollama2 import build_chat_template
from videollama2_hf.tokenization_videollama2 import load_tokenizer
from videollama2_hf.video_processing_videollama2 import VideoLlama2VideoProcessor


GOLDENS = Path(__file__).parent / "goldens"
PROMPTS = json.loads((GOLDENS / "processing" / "prompts.json").read_text())
ORIGINAL_IDS = {"<image>": -200, "<video>": -201, "<audio>": -202}
SIZE = 56  # 4 x 4 patches
VIDEO_TOKENS, AUDIO_TOKENS = 5 * 3 * 3, 1496  # of 8 frames under stc_connector, of 30 s

IMAGE = Image.fromarray(np.arange(60 * 80 * 3, dtype=np.uint8).reshape(60, 80, 3))
FRAMES = [Image.fromarray(np.full((60, 80, 3), 20 * i, np.uint8)) for i in range(8)]
SOUND = np.sin(np.arange(16000) / 10).astype(np.float32)
IN_MEMORY = {"image": IMAGE, "video": FRAMES, "audio": SOUND}


def make_processor(template: str = "qwen2", system_message: str | None = None, **kwargs) -> VideoLlama2Processor:
    """A processor of a small model with one of the recorded templates and its tokenizer."""
    tokenizer = load_tokenizer(GOLDENS / "processing" / "tokenizers" / ("qwen2" if template == "qwen2" else "llama"))
    return VideoLlama2Processor(
        VideoLlama2ImageProcessor(size={"shortest_edge": SIZE}),
        VideoLlama2VideoProcessor(size={"shortest_edge": SIZE}, num_frames=8),
        VideoLlama2FeatureExtractor(),
        tokenizer,
        chat_template=build_chat_template(PROMPTS[template]["chat_template"], system_message),
        **{"has_audio": True, **kwargs},
    )


def user(*blocks) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": b} if isinstance(b, str) else b for b in blocks]}


def block(kind: str, source=None, **options) -> dict:
    return {"type": kind, kind: IN_MEMORY[kind] if source is None else source, **options}


def encode(processor, *conversations, add_generation_prompt=True, **kwargs):
    """Model inputs of one or several conversations."""
    return processor.apply_chat_template(
        list(conversations) if isinstance(conversations[0], list) else list(conversations[0]),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=add_generation_prompt,
        **kwargs,
    )


def write_video(path: Path, num_frames: int = 30, sound: str | None = "tone", rate: int = 10) -> str:
    """A short video whose frames grow brighter; `sound`: `"tone"`, `None` (no track) or `"broken"`."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=rate, width=96, height=64, pix_fmt="yuv420p")
        video.bit_rate = 2_000_000
        audio = None if sound is None else container.add_stream("aac", rate=16000, layout="mono")
        for index in range(num_frames):
            picture = np.full((64, 96, 3), 8 * index, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        if audio is not None:
            time = np.arange(16000 * num_frames // rate) / 16000
            tone = (8000 * np.sin(2 * np.pi * 440 * time)).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
            frame.sample_rate = 16000
            for packet in [*audio.encode(frame), *audio.encode()]:
                if sound == "broken":
                    damaged = av.Packet(b"\xa5" * packet.size)
                    damaged.stream, damaged.pts, damaged.dts = audio, packet.pts, packet.dts
                    damaged.time_base, damaged.duration = packet.time_base, packet.duration
                    packet = damaged
                container.mux(packet)
    return str(path)


def write_media(folder: Path) -> dict[str, str]:
    """Files of every kind, by name."""
    paths = {
        "loud": write_video(folder / "loud.mp4"),
        "silent": write_video(folder / "silent.mp4", sound=None),
        "broken": write_video(folder / "broken.mp4", sound="broken"),
        "image": str(folder / "image.png"),
        "gif": str(folder / "moving.gif"),
        "folder": str(folder / "frames"),
        "sound": str(folder / "sound.wav"),
    }
    IMAGE.save(paths["image"])
    FRAMES[0].save(paths["gif"], save_all=True, append_images=FRAMES[1:], duration=40)
    Path(paths["folder"]).mkdir()
    for index, frame in enumerate(FRAMES):
        frame.save(Path(paths["folder"]) / f"{index:03}.png")
    with av.open(paths["sound"], "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray((SOUND * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode()])
    return paths
