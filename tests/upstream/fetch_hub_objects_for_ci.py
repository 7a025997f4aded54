"""
Stand-in for the module by which upstream's processing suites get their media, which are on the Hub: media of the same
kinds, made here. Its name is the one that the suites import; see `transformers_tests`.
"""

import os
import tempfile
from pathlib import Path
from urllib.parse import urlparse

import av
import numpy as np
from PIL import Image

from transformers_tests.fetch import CACHE


WIDTH, HEIGHT, FPS, SAMPLE_RATE, SECONDS = 320, 240, 30, 44_100, 2


def url_to_local_path(url: str) -> str:
    """Path of a picture (.png, .jpg), video with sound (.mp4) or sound (.mp3, .wav) named as the one at `url`."""
    path = CACHE / "media" / Path(urlparse(url).path).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            if path.suffix in (".png", ".jpg"):
                Image.fromarray(_picture(0)).save(made)
            else:
                _write_media(made, with_pictures=path.suffix == ".mp4")
            os.replace(made, path)
    return str(path)


def _picture(index: int) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x + 4 * index, y + 2 * index, x + y], axis=-1).astype(np.uint8)


def _write_media(path: Path, with_pictures: bool) -> None:
    with av.open(str(path), "w") as container:
        if with_pictures:
            video = container.add_stream("mpeg4", rate=FPS, width=WIDTH, height=HEIGHT, pix_fmt="yuv420p")
        codec = {".mp4": "aac", ".mp3": "mp3", ".wav": "pcm_s16le"}[path.suffix]
        audio = container.add_stream(codec, rate=SAMPLE_RATE, layout="mono")
        if with_pictures:
            for index in range(FPS * SECONDS):
                container.mux(video.encode(av.VideoFrame.from_ndarray(_picture(index), format="rgb24")))
            container.mux(video.encode())
        time = np.arange(SAMPLE_RATE * SECONDS) / SAMPLE_RATE
        tone = (8_000 * np.sin(2 * np.pi * 440 * time)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
