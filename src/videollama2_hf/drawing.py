"""
Media as they enter the model, drawn with matplotlib: images, the frames of videos over a line of time, and the filter
banks of sounds, each with or without a map of heat over it.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A filter bank of silence: the logarithm of the smallest energy that `kaldi.fbank` takes.
SILENCE = math.log(torch.finfo(torch.float32).eps)


def make_figure(heights: list[float]) -> "tuple[Figure, list[Axes]]":
    """
    A figure of panels one above the other, each of its own height in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib: pip install videollama2-hf[train].") from error
    figure = Figure(figsize=(12, sum(heights) + 0.6 * len(heights)), layout="constrained", dpi=100)
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    return figure, list(axes)


def to_pictures(pixels: torch.Tensor, processor: Any) -> np.ndarray:
    """
    Normalised pixels (frames, 3, height, width) as pictures (frames, height, width, 3), float32 in [0, 1].

    Args:
        processor: The image or video processor that normalised them.
    """
    mean, std = (torch.tensor(list(values)).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return (pixels.detach().cpu().float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def frame_times(metadata: Any, num_frames: int) -> tuple[list[float], float, bool]:
    """
    When the frames of a video are shown, when it ends, and whether these are seconds; numbers of frames if not.

    Args:
        metadata: `VideoMetadata` of the video processor, with the indices of the frames taken.
        num_frames: How many were taken.
    """
    rate = metadata.fps or 1.0
    indices = metadata.frames_indices if metadata.frames_indices is not None else range(num_frames)
    return [index / rate for index in indices], metadata.total_num_frames / rate, metadata.fps is not None


def draw_image(axis: "Axes", picture: np.ndarray, heat: np.ndarray | None = None, extent: float = 1.0) -> None:
    """One picture (height, width, 3); see [`draw_frames`] for the rest."""
    height, width = picture.shape[:2]
    axis.imshow(picture, extent=(0, width, 0, height))
    if heat is not None:
        _draw_heat(axis, to_colours(heat), (0, extent * width, (1 - extent) * height, height))
    axis.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axis.set_anchor("W")
    axis.set_axis_off()


def draw_frames(
    axis: "Axes",
    pictures: np.ndarray,
    times: list[float],
    end: float,
    is_seconds: bool,
    start: float = 0.0,
    heat: np.ndarray | None = None,
    extent: float = 1.0,
) -> None:
    """
    Frames side by side, each tied to its second on a line of time below.

    Args:
        pictures: (frames, height, width, 3) in [0, 1].
        times, end, is_seconds: What [`frame_times`] gives.
        start: Where the line of time begins.
        heat: (frames, rows, columns); see [`to_colours`].
        extent: Which part of a picture's height and width the heat covers, from its upper left corner.
    """
    from matplotlib.ticker import MaxNLocator

    number, (height, width) = len(pictures), pictures.shape[1:3]
    colours = None if heat is None else to_colours(heat)
    tall, span = height / width, max(end - start, 1e-9)
    for place, (picture, time) in enumerate(zip(pictures, times)):
        left, right, top = place + 0.03, place + 0.97, 0.94 * tall
        axis.imshow(picture, extent=(left, right, 0, top), aspect="auto")
        if colours is not None:
            _draw_heat(axis, colours[place], (left, left + extent * (right - left), (1 - extent) * top, top))
        on_line = (time - start) / span * number
        axis.plot([place + 0.5, on_line], [0, -0.35 * tall], color="0.6", linewidth=0.8)
        axis.plot(on_line, -0.35 * tall, "o", color="C3", markersize=3)
    axis.plot([0, number], [-0.35 * tall] * 2, color="black", linewidth=1)
    ticks = [time for time in MaxNLocator(8).tick_values(start, end) if start <= time <= end]
    axis.set_xticks([(time - start) / span * number for time in ticks], [f"{time:.3g}" for time in ticks])
    axis.set(xlim=(0, number), ylim=(-0.42 * tall, tall), yticks=[], xlabel="seconds" if is_seconds else "frames")
    axis.set_aspect("equal")
    for side in ("top", "left", "right", "bottom"):
        axis.spines[side].set_visible(False)


def draw_filter_banks(
    axis: "Axes",
    features: np.ndarray,
    seconds: float,
    label: str = "seconds of the window that the model hears",
    start: float = 0.0,
    heat: np.ndarray | None = None,
    extent: float = 1.0,
) -> None:
    """
    Log-mel filter banks (time, mel bins), from second `start` on.

    Args:
        seconds: How long they are.
        label: What the axis of time means.
        heat: (steps, bands); see [`to_colours`].
        extent: Which part of the seconds the heat covers, from the first on.
    """
    values = features.T
    top = max(float(values.max()), 0.0)
    image = axis.imshow(
        values,
        origin="lower",
        aspect="auto",
        extent=(start, start + seconds, 0, len(values)),
        cmap="magma" if heat is None else "gray",
        vmin=SILENCE,
        vmax=top if heat is None else top + 0.4 * (top - SILENCE),  # never so light that heat is lost
    )
    if heat is not None:
        _draw_heat(axis, to_colours(heat.T[::-1]), (start, start + extent * seconds, 0, len(values)))
    axis.set(xlabel=label, ylabel="mel bin", xlim=(start, start + seconds), ylim=(0, len(values)))
    axis.figure.colorbar(image, ax=axis, pad=0.01, label="log energy")


def to_colours(heat: np.ndarray) -> np.ndarray:
    """
    A map of any shape as uint8 (*shape, 4), colours to lay over a picture.

    Of a map that is nowhere negative (attention), orange is what has more than an even share: the fuller, the more,
    and full at the strongest place, or at twice the even share where none has as much. Of any other map, orange is
    positive and blue negative, full at the strongest place.
    """
    strength = abs(heat)
    if heat.min() >= 0 and heat.max() > 0:
        strength = (heat / heat.mean() - 1).clip(0)
        strength /= max(strength.max(), 1.0)
    elif heat.any():
        strength = strength / strength.max()
    colours = np.zeros((*heat.shape, 4), np.uint8)
    colours[..., :3] = np.where(heat[..., None] >= 0, (255, 98, 0), (0, 132, 255))
    colours[..., 3] = np.round(190 * strength)
    return colours


def _draw_heat(axis: "Axes", colours: np.ndarray, extent: tuple[float, float, float, float]) -> None:
    axis.imshow(colours, extent=extent, aspect="auto", interpolation="nearest")


__all__ = [
    "SILENCE",
    "draw_filter_banks",
    "draw_frames",
    "draw_image",
    "frame_times",
    "make_figure",
    "to_colours",
    "to_pictures",
]
