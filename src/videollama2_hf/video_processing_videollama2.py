"""Which frames of a video, and their pixels: `pixel_values_videos` of VideoLLaMA 2 and Video-LLaVA."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlparse

import numpy as np
import PIL.Image
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, validate_kwargs
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.utils import auto_docstring
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from .image_processing_videollama2 import VideoLlama2PixelsMixin, load_image
from .media_videollama2 import is_video_clip, open_video


IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def uniform_frame_indices(total_num_frames: int, num_frames: int, endpoints: bool = False) -> np.ndarray:
    """
    `num_frames` indices spread evenly over `total_num_frames` frames; frames repeat when there are too few.

    The default takes the middle of `num_frames` equal segments (`frame_sample` in VideoLLaMA 2's `mm_utils.py`, where
    1e-6 makes halves round up). `endpoints=True` takes the first frame, the last one and evenly between them, rounded
    down (Video-LLaVA).
    """
    if total_num_frames < 1 or num_frames < 1:
        raise ValueError(
            f"Sampling needs at least one frame of at least one frame, got num_frames={num_frames} of a video with "
            f"{total_num_frames} frames."
        )
    if endpoints:
        return np.linspace(0, total_num_frames - 1, num_frames, dtype=int)
    segment = (total_num_frames - 1) / num_frames
    steps = np.arange(num_frames)
    return np.round((segment * steps + segment * (steps + 1)) / 2 + 1e-6).astype(int)


def fps_frame_indices(total_num_frames: int, video_fps: float, fps: float = 1.0) -> np.ndarray:
    """
    Indices of about `fps` frames per second, each in the middle of its step; never more frames than the video has.

    `fps=1` gives the original's indices (`frame_sample` with mode `fps`), which counts a video's frames per second in
    whole frames: 29.97 is taken as 29. The original divides by zero below one frame per second; here such a video
    gives all its frames.
    """
    if total_num_frames < 1 or not fps > 0 or not video_fps > 0:
        raise ValueError(
            f"Sampling by fps needs a video with frames and two positive rates, got {total_num_frames} frames at "
            f"{video_fps} fps and fps={fps}."
        )
    step = min(max((video_fps // 1 or video_fps) / fps, 1), total_num_frames)
    indices = np.arange(step // 2, total_num_frames, step).astype(int)
    return np.minimum(indices, total_num_frames - 1)


def time_window(
    total_num_frames: int, fps: float | None, start: float | None = None, end: float | None = None
) -> range:
    """
    Frames between `start` and `end` (seconds), as the original's `process_video` counts them.

    One frame early, that is: from `int(start * fps) - 1`, to `int(end * fps) - 1` inclusive. Negative times are taken
    as 0, `start > end` is swapped, `start == end` means one second, an end beyond the video is the video's end, and
    the window holds at least one frame.

    Raises:
        ValueError: The window begins behind the last frame, the frame rate is not known, or there are no frames.
    """
    if total_num_frames < 1:
        raise ValueError("The video has no frames.")
    if start is None and end is None:
        return range(total_num_frames)
    if not fps:
        raise ValueError(
            f"start={start} and end={end} are in seconds, but the frame rate of this video is not known; pass "
            "video_metadata with `fps` and `total_num_frames`, or choose the frames yourself."
        )
    start = max(start or 0, 0)
    if end is not None:
        start, end = sorted((start, max(end, 0)))
        end = start + 1 if end == start else end
    first = max(int(min(start * fps, total_num_frames + 1)) - 1, 0)
    if first >= total_num_frames:
        raise ValueError(
            f"The window starts at {start} s, but the video ends at {total_num_frames / fps:.2f} s "
            f"({total_num_frames} frames at {fps:g} fps); choose a start before that."
        )
    last = total_num_frames - 1 if end is None else int(min(end * fps, total_num_frames)) - 1
    return range(first, max(first, last) + 1)


def make_flat_list_of_videos(videos) -> list:
    """
    A flat list with one item per video, from one video or from a list of videos nested to any depth.

    A list whose items are all frames (PIL images, arrays of two or three dimensions, names of image files) is one
    video. An item of the result is such a list, an array of four dimensions, a `VideoClip`, or a source that the media
    module opens.
    """
    if isinstance(videos, (np.ndarray, torch.Tensor)):
        if not 3 <= videos.ndim <= 5:
            raise ValueError(
                "An array of frames has 4 dimensions (frames, height, width, 3) or (frames, 3, height, width), one "
                f"more for a batch of videos, one less for a single frame; got shape {tuple(videos.shape)}."
            )
        return list(videos) if videos.ndim == 5 else [videos if videos.ndim == 4 else videos[None]]
    if _is_frame(videos):
        return [[videos]]
    if not isinstance(videos, (list, tuple)):
        return [videos]
    if not videos:
        raise ValueError("Got an empty list of videos or frames.")
    if all(_is_frame(item) for item in videos):
        return [list(videos)]
    return [video for item in videos for video in make_flat_list_of_videos(item)]


def get_clip_source(clip):
    """
    The one video of a `VideoClip`, as an item of [`make_flat_list_of_videos`].

    Raises:
        ValueError: Its source holds several videos.
    """
    videos = make_flat_list_of_videos(clip.source)
    if len(videos) > 1:
        raise ValueError(f"A VideoClip is one video, but its source holds {len(videos)}; make one clip of each.")
    return videos[0]


def _is_frame(item) -> bool:
    if isinstance(item, (np.ndarray, torch.Tensor)):
        return item.ndim in (2, 3)
    if isinstance(item, (str, os.PathLike)):
        name = os.fspath(item)
        if name.startswith("data:"):
            return name.startswith("data:image/") and not name.startswith("data:image/gif")
        path = urlparse(name).path if name.startswith(("http://", "https://")) else name
        return path.lower().endswith(IMAGE_SUFFIXES)
    return isinstance(item, PIL.Image.Image)


def _open_frame(frame):
    return frame if isinstance(frame, (PIL.Image.Image, np.ndarray, torch.Tensor)) else load_image(frame)


def _make_flat_list_of_metadata(video_metadata, num_videos: int) -> list[VideoMetadata | None]:
    if video_metadata is None:
        return [None] * num_videos
    if isinstance(video_metadata, Mapping):
        video_metadata = [video_metadata]
    flat = []
    for item in video_metadata:
        flat.extend(item if isinstance(item, (list, tuple)) else [item])
    if len(flat) != num_videos:
        raise ValueError(
            f"Got {num_videos} videos but {len(flat)} entries of video_metadata; pass one for each video."
        )
    return [item if item is None else VideoMetadata(**item) for item in flat]


class VideoLlama2VideoProcessorKwargs(VideosKwargs, total=False):
    """
    start (`float`, *optional*):
        Second from which frames are taken; see [`time_window`].
    end (`float`, *optional*):
        Second until which frames are taken.
    max_frames (`int`, *optional*):
        With `fps`, the largest number of frames; a longer video gives this many, spread over all of it. The original
        cuts it after 32 frames.
    sample_endpoints (`bool`, *optional*, defaults to `False`):
        Whether `num_frames` frames begin at the first frame and end at the last (Video-LLaVA); see
        [`uniform_frame_indices`].
    flip_probability (`float`, *optional*, defaults to 0):
        Probability to mirror a whole video, a training augmentation drawn from torch's generator. Video-LLaVA applies
        it with 0.5, also at inference.
    temporal_window (`int`, *optional*):
        Number of frames that the video tower attends to together (Video-LLaVA): a video must give a multiple of it.
    do_pad_to_square (`bool`, *optional*, defaults to `False`):
        Whether to pad to a square first; see [`VideoLlama2ImageProcessorKwargs`].
    antialias (`bool`, *optional*, defaults to `True`):
        `False` is LanguageBind's rule of resizing; see [`VideoLlama2ImageProcessorKwargs`].
    exact (`bool`, *optional*, defaults to `False`):
        Whether to give the original's pixels bit for bit; see [`VideoLlama2ImageProcessorKwargs`].
    """

    start: float | int | None
    end: float | int | None
    max_frames: int | None
    sample_endpoints: bool | None
    flip_probability: float | int | None
    temporal_window: int | None
    do_pad_to_square: bool | None
    antialias: bool | None
    exact: bool | None


@auto_docstring(
    custom_intro="""
    Turns videos into `pixel_values_videos` (videos, frames, 3, height, width), float32; a list of (frames, 3, height,
    width) when the videos differ in their numbers of frames.

    A video may be

    - a `VideoClip`, whose `start`, `end`, `num_frames` and `fps` take precedence over the call's;
    - a path, URL, `data:` URI, bytes, file object, folder of frames or GIF: read by the media module, only the chosen
      frames, each of them resized as it arrives;
    - an array or tensor (frames, height, width, 3) or (frames, 3, height, width);
    - a list of frames: PIL images, arrays, or names of image files.

    `num_frames` frames are chosen unless `fps` is given; `do_sample_frames=False` takes every frame. A list or an
    array with more frames than asked is subsampled and one with fewer repeats frames, exactly as a file (the original
    keeps all of them, or appends black ones). With `return_metadata=True` the result holds `video_metadata`, one
    `VideoMetadata` per video with `frames_indices` and, where the frame rate is known, `timestamps`.

    The pixels are those of [`VideoLlama2ImageProcessor`]; see [`VideoLlama2PixelsMixin`] for the families of towers.
    """
)
class VideoLlama2VideoProcessor(VideoLlama2PixelsMixin, BaseVideoProcessor):
    valid_kwargs = VideoLlama2VideoProcessorKwargs
    model_input_names = ["pixel_values_videos"]
    num_frames = 8
    do_sample_frames = True
    sample_endpoints = False
    flip_probability = 0.0
    temporal_window = None

    def __init__(self, **kwargs: Unpack[VideoLlama2VideoProcessorKwargs]):
        super().__init__(**kwargs)

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        max_frames: int | None = None,
        sample_endpoints: bool | None = None,
        **kwargs,
    ) -> np.ndarray:
        """
        Indices of the frames to take, in ascending order.

        Without `num_frames` and `fps`, the processor's own: `fps` where it is set, else `num_frames`.

        Raises:
            ValueError: Both are given, the frame rate is needed but not known, or the window lies behind the video.
        """
        if num_frames is not None and fps is not None:
            raise ValueError(f"Pass num_frames or fps, not both; got num_frames={num_frames} and fps={fps}.")
        if num_frames is None and fps is None:
            num_frames, fps = (self.num_frames, None) if self.fps is None else (None, self.fps)
        max_frames = self.max_frames if max_frames is None else max_frames
        endpoints = self.sample_endpoints if sample_endpoints is None else sample_endpoints
        window = time_window(metadata.total_num_frames, metadata.fps, start, end)
        if fps is not None:
            if metadata.fps is None:
                raise ValueError(
                    f"Sampling with fps={fps} needs the frame rate of the video; pass video_metadata with `fps` and "
                    "`total_num_frames`, or use num_frames."
                )
            indices = fps_frame_indices(len(window), metadata.fps, fps)
            if max_frames is not None and len(indices) > max_frames:
                indices = uniform_frame_indices(len(window), max_frames, endpoints)
        elif num_frames is not None:
            indices = uniform_frame_indices(len(window), num_frames, endpoints)
        else:
            indices = np.arange(len(window))
        return indices + window.start

    def fetch_videos(self, video_url_or_urls, sample_indices_fn=None):
        """Frames (frames, height, width, 3), uint8, and metadata of one source, or lists of them."""
        if isinstance(video_url_or_urls, (list, tuple)):
            return list(zip(*[self.fetch_videos(source, sample_indices_fn) for source in video_url_or_urls]))
        with open_video(video_url_or_urls) as video:
            metadata = video.read_metadata()
            if sample_indices_fn is None:
                indices = np.arange(metadata.total_num_frames)
            else:
                indices = sample_indices_fn(metadata=metadata)
            metadata = dataclasses.replace(metadata, frames_indices=list(indices))
            return video.read_frames(indices), metadata

    def preprocess(self, videos, **kwargs: Unpack[VideoLlama2VideoProcessorKwargs]) -> BatchFeature:
        validate_kwargs(captured_kwargs=kwargs.keys(), valid_processor_keys=list(self.valid_kwargs.__annotations__))
        validate_typed_dict(self.valid_kwargs, kwargs)
        sampling = {name: kwargs.pop(name, None) for name in ("num_frames", "fps", "start", "end")}
        for name in set(self.valid_kwargs.__annotations__) - set(sampling):
            kwargs.setdefault(name, getattr(self, name, None))
        kwargs = self._standardize_kwargs(**kwargs)
        self._validate_preprocess_kwargs(**kwargs)

        videos = make_flat_list_of_videos(videos)
        video_metadata = _make_flat_list_of_metadata(kwargs["video_metadata"], len(videos))
        frames = []
        for index, video in enumerate(videos):
            pixels, video_metadata[index] = self._read_and_fit(video, video_metadata[index], sampling, **kwargs)
            if kwargs["flip_probability"] and torch.rand(()) < kwargs["flip_probability"]:
                pixels = pixels.flip(-1)
            frames.append(pixels)

        ragged = len({pixels.shape for pixels in frames}) > 1
        data = {
            "pixel_values_videos": [self.finish(pixels, **kwargs) for pixels in frames]
            if ragged
            else self.finish(torch.stack(frames), **kwargs)
        }
        skip = ["pixel_values_videos"] if ragged else None
        outputs = BatchFeature(data, tensor_type=kwargs["return_tensors"], skip_tensor_conversion=skip)
        if kwargs["return_metadata"]:
            outputs["video_metadata"] = video_metadata
        return outputs

    def _read_and_fit(
        self, video, metadata: VideoMetadata | None, sampling: dict, do_sample_frames: bool, **options
    ) -> tuple[torch.Tensor, VideoMetadata]:
        """Pads, resizes and crops the chosen frames of one video; see [`VideoLlama2PixelsMixin.fit`]."""
        if is_video_clip(video):
            clip = {name: getattr(video, name) for name in sampling}
            if clip["num_frames"] is not None or clip["fps"] is not None:
                sampling = {**sampling, "num_frames": None, "fps": None}
            sampling = {**sampling, **{name: value for name, value in clip.items() if value is not None}}
            video = get_clip_source(video)
        if not isinstance(video, (list, np.ndarray, torch.Tensor)):
            with open_video(video) as reader:
                metadata = reader.read_metadata(sampling["start"], sampling["end"])
                return self._fit_chosen(reader, metadata, sampling, do_sample_frames, **options)
        if metadata is None:
            metadata = VideoMetadata(total_num_frames=len(video))
        elif do_sample_frames and metadata.total_num_frames != len(video):
            raise ValueError(
                f"video_metadata gives {metadata.total_num_frames} frames, but {len(video)} frames were passed. Pass "
                "do_sample_frames=False for frames that are chosen already."
            )
        return self._fit_chosen(video, metadata, sampling, do_sample_frames, **options)

    def _fit_chosen(
        self,
        video: Any,
        metadata: VideoMetadata,
        sampling: dict,
        do_sample_frames: bool,
        temporal_window: int | None,
        do_convert_rgb: bool,
        input_data_format: str | None,
        device: torch.device | str | None,
        **options,
    ) -> tuple[torch.Tensor, VideoMetadata]:
        """The same of a video that is open, a list of frames or an array of them."""
        in_memory = isinstance(video, (list, np.ndarray, torch.Tensor))
        if do_sample_frames:
            indices = self.sample_frames(metadata, **sampling, **options)
            metadata = dataclasses.replace(metadata, frames_indices=indices.tolist())
        else:
            total = len(video) if in_memory else metadata.total_num_frames
            window = time_window(total, metadata.fps, sampling["start"], sampling["end"])
            indices = np.arange(window.start, window.stop)
            if metadata.frames_indices is None:
                metadata = dataclasses.replace(metadata, frames_indices=indices.tolist())
        if temporal_window and len(indices) % temporal_window:
            raise ValueError(
                f"This model's video tower takes windows of {temporal_window} frames, but this video gives "
                f"{len(indices)} frames. Choose num_frames={temporal_window} or another multiple of it, also in place "
                "of fps."
            )

        def fit(frames, data_format=input_data_format):
            frames = self.to_rgb_tensor(frames, do_convert_rgb, data_format)
            frames = frames if frames.ndim == 4 else frames[None]
            return self.fit(frames if device is None else frames.to(device), **options)

        unique, inverse = np.unique(indices, return_inverse=True)
        pixels: torch.Tensor | list[torch.Tensor]
        if isinstance(video, list):
            pixels = [fit(_open_frame(video[index]))[0] for index in unique]
        elif in_memory:
            pixels = fit(video if len(unique) == len(video) else video[unique])
        else:
            pixels = video.read_frames(unique, transform=lambda frame: fit(frame, ChannelDimension.LAST)[0])
        if isinstance(pixels, list):
            sizes = {tuple(frame.shape[-2:]) for frame in pixels}
            if len(sizes) > 1:
                raise ValueError(
                    f"The frames of one video come out in different sizes (height, width): {sorted(sizes)}. Resize "
                    "them to one size, with do_resize=True and the default crop or a size with height and width."
                )
            pixels = torch.stack(pixels)
        return (pixels if len(unique) == len(indices) else pixels[inverse]), metadata


__all__ = [
    "VideoLlama2VideoProcessor",
    "VideoLlama2VideoProcessorKwargs",
    "fps_frame_indices",
    "get_clip_source",
    "make_flat_list_of_videos",
    "time_window",
    "uniform_frame_indices",
]
