"""
Pictures and sound of clips: batches of them as tensors on any device, and single ones as files.

Frames are uint8 (clips, frames, 3, side, side). Sound is float32 (clips, 64000) in [-1, 1] at 16 kHz.
"""

import math
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .world import COLOURS, MAX_THINGS, SECONDS, SHAPES, SOUNDS, Clip


FRAME_RATE = 8
SAMPLING_RATE = 16000
NUM_SAMPLES = round(SECONDS * SAMPLING_RATE)
# Of sound files and of the tracks of videos: sounds that begin late ring out behind the fourth second otherwise.
_LONGEST = 10240
_NOISE = torch.randn(1 << 17, generator=torch.Generator().manual_seed(0))


def frame_times(num_frames: int = 8) -> np.ndarray:
    """Seconds of the frames that the video processor takes of a rendered file: (num_frames,)."""
    from ..video_processing_videollama2 import uniform_frame_indices

    return uniform_frame_indices(round(SECONDS * FRAME_RATE), num_frames) / FRAME_RATE


def describe_frames(clips: Sequence[Clip], times: np.ndarray) -> dict[str, torch.Tensor]:
    """
    What [`draw_frames`] needs to know of clips at `times` (seconds): small tensors, cheap to send to a device.

    `colour` is (clips, frames, things, 3), `place` (clips, frames, things, 2), `radius`, `striped` and `shape`
    (clips, things), `visible` (clips, frames, things), `background` (clips, 7).
    """
    count, frames = len(clips), len(times)
    colour = np.zeros((count, frames, MAX_THINGS, 3), np.float32)
    place = np.zeros((count, frames, MAX_THINGS, 2), np.float32)
    radius = np.ones((count, MAX_THINGS), np.float32)
    striped = np.zeros((count, MAX_THINGS), np.float32)
    shape = np.zeros((count, MAX_THINGS), np.int64)
    visible = np.zeros((count, frames, MAX_THINGS), np.float32)
    for i, clip in enumerate(clips):
        for j, thing in enumerate(clip.things):
            seconds, x, y = zip(*thing.path)
            place[i, :, j, 0] = np.interp(times, seconds, x)
            place[i, :, j, 1] = np.interp(times, seconds, y)
            colour[i, :, j] = COLOURS[thing.colour]
            if thing.turns is not None:
                colour[i, times >= thing.turns[0], j] = COLOURS[thing.turns[1]]
            radius[i, j], striped[i, j], shape[i, j] = thing.radius, thing.striped, SHAPES.index(thing.shape)
            visible[i, :, j] = times >= thing.appears
    arrays = {
        "colour": colour,
        "place": place,
        "radius": radius,
        "striped": striped,
        "shape": shape,
        "visible": visible,
        "background": np.array([clip.background for clip in clips], np.float32),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def cover(description: dict[str, torch.Tensor], thing: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How much of every pixel one thing covers, 0 to 1, and the brightness of its texture: both
    (clips, frames, side, side).
    """
    place, radius = description["place"][:, :, thing], description["radius"][:, thing, None, None, None]
    pixels = (torch.arange(side, device=place.device) + 0.5) / side
    x = (pixels - place[:, :, 0, None, None]) / radius
    y = (pixels[:, None] - place[:, :, 1, None, None]) / radius
    across, down = x.abs(), y.abs()
    distance = (x.square() + y.square()).sqrt() - 1
    shape = description["shape"][:, thing, None, None, None]
    square = torch.maximum(across, down) - 0.84
    triangle = torch.maximum(y - 0.62, 0.866 * across - 0.5 * y - 0.58)
    cross = torch.minimum(
        torch.maximum(across - 0.33, down - 1), torch.maximum(across - 1, down - 0.33)
    )  # the order of SHAPES
    for index, other in enumerate((square, triangle, cross), start=1):
        distance = torch.where(shape == index, other, distance)
    covered = (0.5 - distance * radius * side).clamp(0, 1) * description["visible"][:, :, thing, None, None]
    stripes = torch.sin((x + y) * (2 * math.pi / 0.85)) > 0
    brightness = 1 - 0.6 * (stripes * description["striped"][:, thing, None, None, None])
    return covered, brightness


def draw_frames(description: dict[str, torch.Tensor], side: int = 64) -> torch.Tensor:
    """Frames of what [`describe_frames`] gives, on its device: uint8 (clips, frames, 3, side, side)."""
    background = description["background"]
    frames = description["place"].shape[1]
    pixels = (torch.arange(side, device=background.device) + 0.5) / side
    amplitude, wave_x, wave_y, phase = (background[:, n, None, None] for n in range(3, 7))
    waves = 2 * math.pi * (wave_x * pixels + wave_y * pixels[:, None]) + phase
    picture = (background[:, :3, None, None] + (amplitude * torch.sin(waves))[:, None])[:, None]
    picture = picture.repeat(1, frames, 1, 1, 1)
    for thing in range(MAX_THINGS):
        clips = description["visible"][:, :, thing].any(dim=1).nonzero()[:, 0]
        if not len(clips):
            continue
        chosen = {name: values[clips] for name, values in description.items()}
        covered, brightness = cover(chosen, thing, side)
        colour = chosen["colour"][:, :, thing, :, None, None] * brightness[:, :, None]
        below = picture[clips]
        picture[clips] = below + covered[:, :, None] * (colour - below)
    return picture.round().clamp(0, 255).to(torch.uint8)


def describe_sounds(clips: Sequence[Clip]) -> dict[str, torch.Tensor]:
    """
    What [`draw_sounds`] needs to know of clips: `clip`, `name`, `onset` (sample), `pitch`, `level`, `seed` of every
    sound, each (sounds,), and `noise` (clips, 2): level and place in the table of noise.
    """
    names = list(SOUNDS)
    rows = [
        (i, names.index(s.name), round(s.onset * SAMPLING_RATE), s.pitch, s.level, s.seed)
        for i, clip in enumerate(clips)
        for s in clip.sounds
    ]
    columns = np.array(rows, np.float64).reshape(-1, 6).T
    kinds = (np.int64, np.int64, np.int64, np.float32, np.float32, np.int64)
    arrays = {
        name: torch.from_numpy(column.astype(kind))
        for name, column, kind in zip(("clip", "name", "onset", "pitch", "level", "seed"), columns, kinds)
    }
    arrays["noise"] = torch.tensor([(clip.noise, clip.noise_seed) for clip in clips])
    return arrays


def draw_sounds(description: dict[str, torch.Tensor]) -> torch.Tensor:
    """Waveforms of what [`describe_sounds`] gives, on its device: float32 (clips, 64000)."""
    noise_level, noise_seed = description["noise"].unbind(1)
    device = noise_level.device
    table = _NOISE.to(device)
    track = _read_noise(table, noise_seed.long(), NUM_SAMPLES) * noise_level[:, None]
    track = torch.nn.functional.pad(track, (0, _LONGEST)).flatten()
    for index, (name, (_, _, seconds)) in enumerate(SOUNDS.items()):
        chosen = description["name"] == index
        if not bool(chosen.any()):
            continue
        clip, onset, pitch, level, seed = (description[k][chosen] for k in ("clip", "onset", "pitch", "level", "seed"))
        samples = torch.arange(round(seconds * SAMPLING_RATE), device=device)
        noise = _read_noise(table, seed, len(samples))
        wave = _synthesise(name, samples / SAMPLING_RATE, pitch[:, None], noise, seconds)
        wave = wave * (level[:, None] / wave.abs().amax(dim=1, keepdim=True))
        places = (clip * (NUM_SAMPLES + _LONGEST) + onset)[:, None] + samples
        track = track.index_add(0, places.flatten(), wave.flatten())
    return track.view(-1, NUM_SAMPLES + _LONGEST)[:, :NUM_SAMPLES].clamp(-1, 1)


def _read_noise(table: torch.Tensor, start: torch.Tensor, length: int) -> torch.Tensor:
    return table[start[:, None] + torch.arange(length, device=table.device)]


def _synthesise(name: str, t: torch.Tensor, pitch: torch.Tensor, noise: torch.Tensor, seconds: float) -> torch.Tensor:
    """One sound per pitch (sounds, 1) at the seconds `t` (samples,), of any loudness: (sounds, samples)."""
    phase = 2 * math.pi * pitch * t
    # In and out within 10 ms, so that nothing clicks.
    fade = (torch.minimum(t, seconds - t) / 0.01).clamp(0, 1)
    if name == "bell":
        partials = ((1.0, 1.0, 4), (2.0, 0.6, 5), (2.76, 0.5, 7), (5.4, 0.3, 11))
        return fade * sum(level * torch.sin(k * phase) * torch.exp(-decay * t) for k, level, decay in partials)
    if name == "drum":
        skin = torch.sin(2 * math.pi * pitch * (t + 0.03 * (1 - torch.exp(-t / 0.03)))) * torch.exp(-t / 0.12)
        return fade * (skin + 0.25 * noise * torch.exp(-t / 0.04))
    if name == "flute":
        vibrato = 0.15 * pitch / 5 * torch.sin(2 * math.pi * 5 * t) * 0.05
        tone = torch.sin(phase + vibrato) + 0.15 * torch.sin(2 * phase)
        return (fade * (t / 0.08).clamp(max=1)) * (tone + 0.06 * noise)
    if name == "horn":
        tone = sum(torch.sin(k * phase) / k**0.7 for k in range(1, 11))
        return (fade * (t / 0.05).clamp(max=1)) * tone
    if name in ("rising tone", "falling tone"):  # to three times the pitch, or from there
        half = pitch / seconds * t.square()
        sweep = phase + 2 * math.pi * half if name == "rising tone" else 3 * phase - 2 * math.pi * half
        return fade * torch.sin(sweep)
    if name == "noise":
        return fade * noise
    if name == "thud":
        return fade * (torch.sin(phase) * torch.exp(-t / 0.06) + 0.4 * noise * torch.exp(-t / 0.008))
    return fade * torch.sin(phase)


def to_filter_banks(waveforms: torch.Tensor, num_mel_bins: int) -> torch.Tensor:
    """
    The feature extractor's filter banks of many waveforms at once, on their device: (clips, 64000) -> float32
    (clips, 398, num_mel_bins). Frames of one waveform behind the other are those of each alone, but for two across the
    seam.
    """
    from torchaudio.compliance import kaldi

    steps = waveforms.shape[1] // (SAMPLING_RATE // 100)
    pieces = []
    for piece in waveforms.split(len(waveforms) if waveforms.is_cuda else 16):  # what a processor's cache holds
        features = kaldi.fbank(piece.reshape(1, -1) * 2**15, num_mel_bins=num_mel_bins, sample_frequency=SAMPLING_RATE)
        features = torch.nn.functional.pad(features, (0, 0, 0, len(piece) * steps - len(features)))
        pieces.append(features.view(len(piece), steps, num_mel_bins)[:, : steps - 2])
    return torch.cat(pieces)


def quantise(waveforms: torch.Tensor) -> torch.Tensor:
    """Waveforms as a file of 16 bits holds them."""
    return (waveforms * 2**15).round().clamp(-(2**15), 2**15 - 1) / 2**15


def render_clip(clip: Clip, path: str | os.PathLike, side: int = 64, has_sound: bool = True) -> Path:
    """
    Writes one clip as a video file, four seconds at 8 frames a second: H.264 and AAC, or without loss (FFV1 and PCM)
    if the name ends in `.mkv`.

    Args:
        has_sound: Whether the file gets a sound track.
    """
    import av

    path = Path(path)
    is_lossless = path.suffix == ".mkv"
    times = np.arange(round(SECONDS * FRAME_RATE)) / FRAME_RATE
    frames = draw_frames(describe_frames([clip], times), side)[0].permute(0, 2, 3, 1).numpy()
    with av.open(str(path), "w") as container:
        codec, options = ("ffv1", {}) if is_lossless else ("libx264", {"crf": "16", "preset": "veryfast"})
        video: Any = container.add_stream(codec, rate=FRAME_RATE, options=options)
        video.width = video.height = side
        video.pix_fmt = "bgr0" if is_lossless else "yuv420p"
        audio: Any = None
        if has_sound:
            audio = container.add_stream("pcm_s16le" if is_lossless else "aac", rate=SAMPLING_RATE, layout="mono")
            if not is_lossless:
                audio.bit_rate = 96000
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(video.encode())
        if has_sound:
            samples = quantise(draw_sounds(describe_sounds([clip]))) * 2**15
            for start in range(0, NUM_SAMPLES, 1024):
                block = samples[:, start : start + 1024].to(torch.int16).numpy()
                chunk = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
                chunk.sample_rate, chunk.pts, chunk.time_base = SAMPLING_RATE, start, Fraction(1, SAMPLING_RATE)
                container.mux(audio.encode(chunk))
            container.mux(audio.encode())
    return path


def render_image(clip: Clip, path: str | os.PathLike, side: int = 64, time: float = SECONDS / 2) -> Path:
    """Writes one frame of a clip as a PNG file."""
    import PIL.Image

    frame = draw_frames(describe_frames([clip], np.array([time])), side)[0, 0]
    PIL.Image.fromarray(frame.permute(1, 2, 0).numpy()).save(path)
    return Path(path)


def render_sound(clip: Clip, path: str | os.PathLike) -> Path:
    """Writes the sound of a clip as a WAV file of 16 bits."""
    import wave

    samples = (quantise(draw_sounds(describe_sounds([clip])))[0] * 2**15).to(torch.int16).numpy()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes(samples.tobytes())
    return Path(path)


__all__ = [
    "FRAME_RATE",
    "NUM_SAMPLES",
    "SAMPLING_RATE",
    "cover",
    "describe_frames",
    "describe_sounds",
    "draw_frames",
    "draw_sounds",
    "frame_times",
    "quantise",
    "render_clip",
    "render_image",
    "render_sound",
    "to_filter_banks",
]
