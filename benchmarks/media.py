"""
Reading media: exact frames, their pixels, and sound, against decord, transformers' reader, Pillow and ffmpeg.

    python benchmarks/media.py                  # generates its clips: an hour of CPU time
    python benchmarks/media.py --folder CLIPS   # keeps the clips there, and takes those that are there
    python benchmarks/media.py --short          # tiny clips, one round, for tests: equality only

The references `ffmpeg` and `decord` need `imageio-ffmpeg` and `decord`; a row whose reference is not installed says so
(`pip install --target FOLDER --no-deps decord`, then `PYTHONPATH=FOLDER`). One thread, CPU seconds, variants in turns:
a ratio is how many times more CPU time the reference takes in the same round. Whatever a row says, it fails if the
results differ. Results: `results/media.{json,md}`.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from common import RESULTS, describe_machine, measure, memory_row, peak_memory, time_row, write_results
from PIL import Image
from torchvision.transforms.v2 import functional as tvF
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.video_utils import load_video

from videollama2_hf import VideoLlama2FeatureExtractor, VideoLlama2VideoProcessor
from videollama2_hf.feature_extraction_videollama2 import reference_clip_windows
from videollama2_hf.frame_decoding_videollama2 import decode_runs, plan_runs
from videollama2_hf.media_videollama2 import (
    VideoReader,
    open_video,
    read_audio_track,
    read_frames,
    read_video_metadata,
)
from videollama2_hf.video_processing_videollama2 import uniform_frame_indices


@dataclass(frozen=True)
class Clip:
    """A clip to generate: moving texture with noise in H.264, two noisy tones in AAC."""

    width: int
    height: int
    seconds: int
    rate: int
    noise_bands: bool = True  # 64 kbit/s, where the encoder replaces bands of noise, or 128 without that
    repeats: int = 1  # the packets follow each other as many times


CLIPS = {
    "360p.mp4": Clip(640, 360, 600, 30),
    "360p_plain_sound.mp4": Clip(640, 360, 600, 30, noise_bands=False),
    "360p_hour.mp4": Clip(640, 360, 600, 30, repeats=6),
    "1080p_long.mp4": Clip(1920, 1080, 120, 30, repeats=5),
}
SHORT_CLIPS = {
    "360p.mp4": Clip(96, 64, 80, 5),
    "360p_plain_sound.mp4": Clip(96, 64, 80, 5, noise_bands=False),
    "360p_hour.mp4": Clip(96, 64, 80, 5, repeats=6),
    "1080p_long.mp4": Clip(192, 108, 20, 5, repeats=2),
}


def main(short: bool, folder: Path, results: Path, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    make_clips(SHORT_CLIPS if short else CLIPS, folder)
    rows = []
    for row in all_rows(folder, 1 if short else rounds, short):
        print({key: value for key, value in row.items() if key != "note"}, flush=True)
        rows.append(row)
        if not short:
            machine = describe_machine("torch", "torchvision", "transformers", "av", "pillow", "decord")
            write_results("media", "Reading media", rows, machine, results)
    return rows


def all_rows(folder: Path, rounds: int, short: bool) -> Iterator[dict[str, Any]]:
    # First, before anything else leaves holes in the memory.
    yield frames_memory(folder / "1080p_long.mp4")
    yield streaming_memory(folder / "360p.mp4", folder / "360p_hour.mp4")
    for name, target in (("360p.mp4", 2.2), ("1080p_long.mp4", 2.0)):
        yield frames_against_decord(folder / name, rounds, target)
    yield frames_against_transformers(folder / "360p.mp4", 1)
    for tower in ("CLIP", "SigLIP"):
        yield preprocessing(tower, (1920, 1080), rounds)
    for name in ("360p_plain_sound.mp4", "360p.mp4"):
        yield sound(folder / name, rounds, heard_only=True)
    yield sound(folder / "360p.mp4", rounds, heard_only=False)


# Rows


def frames_against_decord(path: Path, rounds: int, target: float) -> dict[str, Any]:
    indices = _indices(path)
    step = f"16 exact frames, {_describe(path)}"
    if find_spec("decord") is None:
        return time_row(step, "decord", target, note="decord is not installed")
    import decord

    def read_with_decord() -> np.ndarray:
        return decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy()

    measured = measure({"ours": lambda: read_frames(path, indices), "reference": read_with_decord}, rounds)
    check = _same(measured["ours"]["result"].numpy(), measured["reference"]["result"])
    return time_row(step, "decord", target, measured, check)


def frames_against_transformers(path: Path, rounds: int) -> dict[str, Any]:
    indices = _indices(path)

    def read_with_transformers() -> np.ndarray:
        return load_video(str(path), backend="pyav", sample_indices_fn=lambda metadata, **kwargs: indices)[0]

    measured = measure({"ours": lambda: read_frames(path, indices), "reference": read_with_transformers}, rounds)
    check = _same(measured["ours"]["result"].numpy(), measured["reference"]["result"])
    return time_row(f"16 exact frames, {_describe(path)}", "transformers' pyav reader", 10, measured, check)


def frames_memory(path: Path) -> dict[str, Any]:
    indices = _indices(path)

    def resize(frame: torch.Tensor) -> torch.Tensor:
        resized = tvF.resize(frame.movedim(-1, 0), [336], tvF.InterpolationMode.BICUBIC, antialias=True)
        return tvF.center_crop(resized, [336, 336])

    read_frames(path, [0], resize)  # what is loaded once
    resized, ours = peak_memory(lambda: read_frames(path, indices, resize))
    resized_late, reference = peak_memory(lambda: torch.stack([resize(frame) for frame in read_frames(path, indices)]))
    decoder = peak_memory(lambda: decode_only(path, indices))[1]
    step = f"peak memory of reading 16 frames, {_describe(path)}"
    row = memory_row(step, "the same reader, frames resized at the end", 5, ours, reference)
    note = (
        f"Decoding alone takes {decoder / 1e6:.3g} MB in both (the decoder's own frames, and FFmpeg's index of the "
        f"file); beyond that the ratio is {(reference - decoder) / max(ours - decoder, 1):.2g}."
    )
    return row | {"check": _same(resized, resized_late), "note": note}


def decode_only(path: Path, indices: np.ndarray) -> int:
    """The number of frames, none of which is converted or kept."""
    with open_video(path) as video:
        assert isinstance(video, VideoReader) and video.table is not None
        runs = plan_runs(video.container, video.stream, video.table, set(indices.tolist()))
        return sum(1 for _ in decode_runs(video.container, video.stream, runs))


def streaming_memory(path: Path, long_path: Path) -> dict[str, Any]:
    """A frame a minute, one at a time. `long_path` begins with what is in `path`."""

    def stream(source: Path) -> list[float]:
        with open_video(source) as video:
            num_frames = video.read_metadata().total_num_frames
            frames = video.iter_frames(range(0, num_frames, max(round(num_frames / _minutes(source)), 1)))
            return [float(frame.float().mean()) for _, frame in frames]

    means = stream(path)
    long_means, ours = peak_memory(lambda: stream(long_path))
    reference = peak_memory(lambda: decode_only(long_path, np.array([0])))[1]
    step = f"peak memory of a frame a minute, one at a time, {_describe(long_path)}"
    row = memory_row(step, "opening the file and decoding its first frame", 0.5, ours, reference)
    note = "What grows with the length is FFmpeg's index of the packets, which it reads when it opens the file."
    return row | {"check": _same(long_means[: len(means)], means), "note": note}


def preprocessing(tower: str, size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Padded to a square with the mean colour, resized and normalised; the original pads with Pillow."""
    frame = np.random.default_rng(0).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    frame = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) // 2
    frame += np.random.default_rng(1).integers(0, 100, frame.shape, np.uint8)
    if tower == "CLIP":
        options, pillow = (
            {"size": {"shortest_edge": 336}},
            CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        )
    else:
        mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        options = {"size": {"height": 384, "width": 384}, **mean}
        pillow = SiglipImageProcessorPil(size={"height": 384, "width": 384}, resample=Image.Resampling.BICUBIC, **mean)
    processor = VideoLlama2VideoProcessor(do_pad_to_square=True, do_sample_frames=False, **options)
    color = tuple(int(255 * mean) for mean in processor.image_mean)
    frames = torch.from_numpy(np.stack([frame, frame[::-1], frame[:, ::-1], frame[::-1, ::-1]]))

    def process_with_pillow() -> torch.Tensor:
        squares = []
        for image in frames.numpy():
            squares.append(Image.new("RGB", (max(size), max(size)), color))
            corner = (max(size) - size[0]) // 2, (max(size) - size[1]) // 2
            squares[-1].paste(Image.fromarray(image), corner)
        return pillow(squares, return_tensors="pt")["pixel_values"]

    def process() -> torch.Tensor:
        return processor(frames, return_tensors="pt")["pixel_values_videos"][0]

    process(), process_with_pillow()
    measured = measure({"ours": process, "reference": process_with_pillow}, rounds)
    std = torch.tensor(processor.image_std)[:, None, None]
    levels = ((measured["ours"]["result"] - measured["reference"]["result"]) * std * 255).abs().round()
    equal = float((levels == 0).float().mean())
    assert levels.max() <= 1 and equal >= 0.997, (float(levels.max()), equal)
    check = f"within {int(levels.max())} level, {equal:.2%} equal"
    return time_row(f"pad, resize, normalise 4 frames, {size[0]}x{size[1]}, {tower}", "Pillow", 8, measured, check)


def sound(path: Path, rounds: int, heard_only: bool) -> dict[str, Any]:
    extractor = VideoLlama2FeatureExtractor()
    bands = "without noise bands" if "plain" in path.name else "with noise bands"
    what = f"8 clips of the sound, AAC {bands}" if heard_only else "the whole sound"
    step, target = f"{what}, {_describe(path)}", 10 if heard_only else 1.8
    if find_spec("imageio_ffmpeg") is None:
        return time_row(step, "ffmpeg subprocess", target, note="imageio-ffmpeg is not installed")
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-threads", "1", "-i", str(path)]
    command += ["-vn", "-ac", "1", "-ar", "16000", "-f", "s16le", "-"]

    def read_with_ffmpeg() -> np.ndarray:
        output = subprocess.run(command, check=True, capture_output=True).stdout
        return np.frombuffer(output, np.int16).astype(np.float32) / 32768

    ours = (lambda: extractor.load_video_audio(path)) if heard_only else (lambda: read_audio_track(path))
    measured = measure({"ours": ours, "reference": read_with_ffmpeg}, rounds)
    expected = measured["reference"]["result"]
    if heard_only:
        expected = np.concatenate([expected[first:last] for first, last in reference_clip_windows(len(expected))])
    note = ""
    if heard_only and "plain" not in path.name:
        note = (
            "The noise depends on a random generator that runs through every packet, so every packet is decoded; only "
            "what is heard is resampled. Decoding alone is nearly all of our time: the limit of anything exact."
        )
    elif not heard_only:
        note = (
            "Both run libavcodec and libswresample. These alone take about three quarters of our time, the rest is "
            "demuxing and a Python call for each packet; resampling many packets at a time gained 15 %."
        )
    return time_row(step, "ffmpeg subprocess", target, measured, _same(measured["ours"]["result"], expected), note)


# What the rows share


def _same(ours: Any, reference: Any) -> str:
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(reference))
    return "equal"


def _indices(path: Path) -> np.ndarray:
    return uniform_frame_indices(read_video_metadata(path).total_num_frames, 16)


def _minutes(path: Path) -> float:
    return read_video_metadata(path).duration / 60


def _describe(path: Path) -> str:
    metadata = read_video_metadata(path)
    return f"{_minutes(path):.3g} min of {metadata.width}x{metadata.height} H.264"


# Clips


def make_clips(clips: dict[str, Clip], folder: Path):
    """Generate the clips that `folder` does not hold."""
    for name, clip in clips.items():
        path, part = folder / name, folder / f"part_{name}"
        if path.exists():
            continue
        base = folder / f"{clip.height}_{clip.noise_bands}.mp4"
        if not base.exists():
            encode_clip(clip, part)
            part.rename(base)
        repeat_clip(base, part, clip.repeats)
        part.rename(path)


def encode_clip(clip: Clip, path: Path):
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, ((clip.height + 512) // 8, (clip.width + 512) // 8), np.uint8)
    texture = np.asarray(Image.fromarray(texture).resize((clip.width + 512, clip.height + 512)))
    grain = [rng.integers(0, 9, (clip.height, clip.width), np.uint8) for _ in range(7)]
    options = {"preset": "veryfast", "bf": "3", "g": "250", "crf": "26", "threads": "1"}
    with av.open(str(path), "w") as output:
        video: Any = output.add_stream("libx264", rate=clip.rate, options=options)
        video.width, video.height, video.pix_fmt = clip.width, clip.height, "yuv420p"
        audio: Any = output.add_stream(
            "aac", rate=48000, layout="stereo", options={"aac_pns": str(int(clip.noise_bands))}
        )
        for number in range(clip.seconds * clip.rate):
            row, column = (int(200 + 200 * np.sin(number / period)) for period in (97, 61))
            luma = texture[row : row + clip.height, column : column + clip.width] // 2 + 60 + grain[number % 7]
            chroma = np.full((clip.height // 2, clip.width), 120 + number // clip.rate % 20, np.uint8)
            picture = av.VideoFrame.from_ndarray(np.concatenate([luma, chroma]), format="yuv420p")
            picture.pts = number
            output.mux(video.encode(picture))
            count = 48000 // clip.rate
            times = (np.arange(count) + number * count) / 48000
            tones = 0.3 * np.sin(2 * np.pi * np.outer([300, 500], times) + np.sin(3 * times))
            samples = (tones + 0.05 * rng.standard_normal((2, count))).astype(np.float32)
            piece = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
            piece.sample_rate, piece.pts = 48000, number * count
            output.mux(audio.encode(piece))
        output.mux(video.encode(None))
        output.mux(audio.encode(None))


def repeat_clip(source: Path, path: Path, repeats: int):
    """Write the packets of a clip several times, one after the other."""
    with av.open(str(source)) as clip, av.open(str(path), "w") as output:
        streams = {stream.index: output.add_stream_from_template(stream) for stream in clip.streams}
        lengths = {stream.index: stream.duration for stream in clip.streams}
        for number in range(repeats):
            clip.seek(0)
            for packet in clip.demux():
                # The encoders' delay comes once: behind it, packets of the next round would be out of order.
                if packet.dts is None or (number and packet.is_discard):
                    continue
                index = packet.stream.index
                packet.pts += number * lengths[index]
                packet.dts += number * lengths[index]
                packet.stream = streams[index]
                output.mux(packet)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--short", action="store_true", help="tiny clips, one round, nothing written")
    parser.add_argument("--folder", type=Path, help="where the clips are, or are made")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the tables go")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        clips = arguments.folder or Path(temporary)
        clips.mkdir(parents=True, exist_ok=True)
        main(arguments.short, clips, arguments.results, arguments.rounds)
