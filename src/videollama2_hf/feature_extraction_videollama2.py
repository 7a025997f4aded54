"""Feature extractor of VideoLLaMA 2: which seconds of a sound are heard, and their Kaldi filter banks."""

import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import TensorType, logging

from .media_videollama2 import MediaSource, read_audio_file, read_audio_track


logger = logging.get_logger(__name__)

AudioMode = Literal["reference", "full"]


def reference_clip_windows(
    num_samples: int, sampling_rate: int = 16000, num_clips: int = 8, clip_duration: float = 2.0
) -> list[tuple[int, int]]:
    """
    The clips of a sound track of `num_samples` that the original hears, as (first sample, sample after the last).

    Clip `i` starts at `i / num_clips` of the last possible start, so that the end of the track is not heard, and clips
    overlap if the track is short. A track shorter than one clip gives `num_clips` times the whole track: the windows
    then reach beyond it. As the original's sampler (pytorchvideo's `ConstantClipsPerVideoSampler`), the duration is
    rounded to a float and everything after is exact, which can shift a clip by one sample.
    """
    last_start = Fraction(max(num_samples / sampling_rate - Fraction(clip_duration), 0))
    starts = [last_start / num_clips * number for number in range(num_clips)]
    return [(int(s * sampling_rate), int((s + Fraction(clip_duration)) * sampling_rate)) for s in starts]


def full_clip_windows(
    num_samples: int, sampling_rate: int = 16000, num_clips: int = 8, total_duration: float = 30.0
) -> list[tuple[int, int]]:
    """
    Clips of a sound track of `num_samples` that together last `total_duration` seconds, as (first sample, sample after
    the last): evenly spread, without overlap, from the first sample to the last. The whole track if it is not longer.
    """
    total = round(total_duration * sampling_rate)
    if num_samples <= total:
        return [(0, num_samples)]
    bounds = [total * number // num_clips for number in range(num_clips + 1)]
    skipped = [(num_samples - total) * number // max(num_clips - 1, 1) for number in range(num_clips)]
    return [(bounds[i] + skipped[i], bounds[i + 1] + skipped[i]) for i in range(num_clips)]


def resample_fourier(waveform: np.ndarray, num_samples: int) -> np.ndarray:
    """
    Resample a periodic signal, `float64` (samples,), to `num_samples` by cutting or extending its spectrum, as
    `scipy.signal.resample` does.
    """
    length = len(waveform)
    if length == num_samples:
        return waveform
    kept = min(length, num_samples)
    spectrum = np.zeros(num_samples // 2 + 1, np.complex128)
    spectrum[: kept // 2 + 1] = np.fft.rfft(waveform)[: kept // 2 + 1]
    if (
        kept % 2 == 0
    ):  # one bin holds the two halves of the highest frequency: both when going down, half when going up
        spectrum[kept // 2] *= 2.0 if num_samples < length else 0.5
    return np.fft.irfft(spectrum, num_samples) * (num_samples / length)


class VideoLlama2FeatureExtractor(SequenceFeatureExtractor):
    r"""
    Turns sound into the log-mel filter banks that BEATs reads (`videollama2/mm_utils.py`, `process_audio_file` and
    `process_audio_from_video`). Every sound becomes one window of `chunk_length` seconds, filled up with silence, that
    BEATs attends to entirely.

    Filter banks are computed in the precision of the waveform: `float64` for sound files and `float32` for the sound
    of videos, which is how the original treats them, and matters where a frequency band is all but empty. A waveform
    at another rate is resampled *after* it was filled up, as the original does: silence is then not quite silent.

    Args:
        feature_size (`int`): Mel bins.
        sampling_rate (`int`): Rate in Hz that sound is resampled to.
        padding_value (`float`): Value of the samples that fill the window, and of features in `pad`.
        chunk_length (`int`): Seconds in the window.
        audio_mode (`str`): What is heard of a sound that is longer than the window, and of the sound of any video.
            `"reference"` does as the original: of a video `num_clips` clips of `clip_duration` seconds, one after the
            other; of a file its first channel, and the beginning (where the original takes a random part).
            `"full"`: of both the whole track mixed down to mono, or if it is longer than the window, `num_clips` clips
            that fill the window, evenly spread from the beginning to the end.
        num_clips (`int`): Clips of a sound.
        clip_duration (`float`): Seconds in a clip of the `"reference"` mode.
    """

    model_input_names = ["input_features", "input_features_mask"]

    def __init__(
        self,
        feature_size: int = 128,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        chunk_length: int = 30,
        audio_mode: AudioMode = "reference",
        num_clips: int = 8,
        clip_duration: float = 2.0,
        **kwargs,
    ):
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)
        self.chunk_length = chunk_length
        self.audio_mode = _check_mode(audio_mode)
        self.num_clips = num_clips
        self.clip_duration = clip_duration

    def __call__(
        self,
        raw_speech: np.ndarray | torch.Tensor | list[float] | Sequence[np.ndarray | torch.Tensor | list[float]],
        sampling_rate: int | Sequence[int] | None = None,
        return_tensors: str | TensorType | None = None,
        audio_mode: AudioMode | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Compute filter banks.

        Args:
            raw_speech: One waveform or a list of waveforms: floating point in [-1, 1), (samples,) or
                (channels, samples), of which the first channel is heard. An array of two dimensions is one waveform.
            sampling_rate: Rate of the waveforms in Hz, or one rate for each.
            return_tensors: `"pt"` or `"np"` (the default).
            audio_mode: Overrides `self.audio_mode` for waveforms longer than the window.
            kwargs: Ignored. Padding and truncation are not a choice: every sound fills the same window.

        Returns:
            `input_features` `float32` (clips, time, mel bins) and `input_features_mask` `int64` (clips, time), which
            is 1 everywhere. 30 seconds are 2998 time steps.
        """
        waveforms = _as_waveforms(raw_speech)
        if sampling_rate is None:
            logger.warning(
                f"`sampling_rate` was not passed to {type(self).__name__}; the waveforms are taken to be at "
                f"{self.sampling_rate} Hz. Pass it: a wrong rate cannot be noticed here."
            )
            sampling_rate = self.sampling_rate
        rates = [int(rate) for rate in np.atleast_1d(sampling_rate)]
        if np.ndim(sampling_rate) == 0:
            rates *= len(waveforms)
        if len(rates) != len(waveforms):
            raise ValueError(f"Got {len(rates)} sampling rates for {len(waveforms)} waveforms; pass one for each.")
        features = [
            self._filter_banks(self._fill_window(waveform, rate, self.sampling_rate, audio_mode))
            for waveform, rate in zip(waveforms, rates)
        ]
        input_features = np.stack(features)
        mask = np.ones(input_features.shape[:2], np.int64)
        return BatchFeature(
            {"input_features": input_features, "input_features_mask": mask}, tensor_type=return_tensors
        )

    def load_video_audio(
        self,
        source: MediaSource,
        start: float | None = None,
        end: float | None = None,
        audio_mode: AudioMode | None = None,
    ) -> np.ndarray:
        """
        Read what is heard of the sound of a video, `float32` (samples,) at `self.sampling_rate`, ready for `__call__`.

        `start` and `end` are seconds; the original ignores them for sound. Sound that ended before `start` gives an
        empty waveform, which `__call__` takes for silence.

        Raises:
            NoAudioTrackError: The video has no audio track. The original puts [`silent_waveform`] in its place.
            MediaError: The track is damaged.
        """
        is_full = self._mode(audio_mode) == "full"

        def select(num_samples: int) -> list[tuple[int, int]]:
            if is_full:
                return full_clip_windows(num_samples, self.sampling_rate, self.num_clips, self.chunk_length)
            return reference_clip_windows(num_samples, self.sampling_rate, self.num_clips, self.clip_duration)

        return read_audio_track(source, self.sampling_rate, start, end, select)

    def load_audio_file(
        self,
        source: MediaSource,
        start: float | None = None,
        end: float | None = None,
        audio_mode: AudioMode | None = None,
    ) -> tuple[np.ndarray, int]:
        """
        Read what is heard of a sound file: the waveform and its rate, ready for `__call__`.

        In the `"reference"` mode `float64` (channels, samples) at the rate of the file, else `float32` (samples,) at
        `self.sampling_rate`. `start` and `end` are seconds. Raises as [`load_video_audio`].
        """
        if self._mode(audio_mode) == "full":
            return self.load_video_audio(source, start, end, audio_mode), self.sampling_rate
        return read_audio_file(source, start, max(start or 0, 0) + self.chunk_length if end is None else end)

    def silent_waveform(self) -> np.ndarray:
        """The silence that the original hears in a video without sound: all its clips, `float32` (samples,) of 0."""
        return np.zeros(round(self.num_clips * self.clip_duration * self.sampling_rate), np.float32)

    def fetch_audio(self, audio_url_or_urls: Any, sampling_rate: int | None = None) -> Any:
        """
        Read sound files with PyAV; arrays, tensors and lists of floats are returned as they are.

        A file becomes the window that `__call__` computes filter banks of, at `sampling_rate` (default:
        `self.sampling_rate`): `float64` in the `"reference"` mode, so that nothing of it is lost.
        """
        audio = audio_url_or_urls
        if isinstance(audio, (list, tuple)) and not (len(audio) > 0 and isinstance(audio[0], float)):
            return [self.fetch_audio(item, sampling_rate=sampling_rate) for item in audio]
        if isinstance(audio, (str, bytes, bytearray, memoryview, os.PathLike)) or hasattr(audio, "read"):
            waveform, rate = self.load_audio_file(audio)
            return self._fill_window(waveform, rate, sampling_rate or self.sampling_rate)
        return audio

    def _mode(self, audio_mode: AudioMode | None) -> AudioMode:
        return self.audio_mode if audio_mode is None else _check_mode(audio_mode)

    def _fill_window(
        self, waveform: np.ndarray, rate: int, target_rate: int, audio_mode: AudioMode | None = None
    ) -> np.ndarray:
        """First channel, cut or filled up to the window, then resampled: (samples,) in the dtype of the waveform."""
        if rate <= 0:
            raise ValueError(f"The sampling rate must be positive (in Hz), got {rate}.")
        waveform = waveform if waveform.ndim == 1 else waveform[0]
        size = round(self.chunk_length * rate)
        if self._mode(audio_mode) == "full":
            windows = full_clip_windows(len(waveform), rate, self.num_clips, self.chunk_length)
            waveform = np.concatenate([waveform[first:last] for first, last in windows])
        waveform = waveform[:size]
        waveform = np.pad(waveform, (0, size - len(waveform)), constant_values=self.padding_value)
        if rate == target_rate:
            return waveform
        # The number of samples is librosa's, with its rounding.
        num_samples = int(np.ceil(size * (float(target_rate) / rate)))
        return resample_fourier(waveform.astype(np.float64), num_samples).astype(waveform.dtype)

    def _filter_banks(self, waveform: np.ndarray) -> np.ndarray:
        """Log-mel filter banks of a window: `float32` (time, mel bins), computed in the dtype of the waveform."""
        try:
            from torchaudio.compliance import kaldi
        except (ImportError, OSError, RuntimeError) as error:  # the latter two: built for another torch
            raise ImportError(
                f"{type(self).__name__} needs a torchaudio that fits the installed torch: `pip install torchaudio`."
            ) from error
        features = kaldi.fbank(
            torch.from_numpy(waveform)[None] * 2**15,
            num_mel_bins=self.feature_size,
            sample_frequency=self.sampling_rate,
            frame_length=25,
            frame_shift=10,
        )
        return features.float().numpy()


def _check_mode(audio_mode: AudioMode) -> AudioMode:
    if audio_mode not in ("reference", "full"):
        raise ValueError(f"Unknown audio_mode {audio_mode!r}; choose 'reference' or 'full'.")
    return audio_mode


def _as_waveforms(raw_speech: Any) -> list[np.ndarray]:
    """One waveform or several as a list of `float32` or `float64` arrays (samples,) or (channels, samples)."""
    if not isinstance(raw_speech, (list, tuple)):
        is_single = np.ndim(raw_speech) < 3
    elif len(raw_speech) > 0:
        is_single = np.ndim(raw_speech[0]) == 0
    else:
        raise ValueError("`raw_speech` is empty; pass at least one waveform.")
    waveforms = []
    for waveform in [raw_speech] if is_single else raw_speech:
        if isinstance(waveform, torch.Tensor):
            waveform = waveform.detach().cpu()
            waveform = (waveform.float() if waveform.dtype == torch.bfloat16 else waveform).numpy()
        waveform = np.asarray(waveform)
        if waveform.dtype.kind != "f" and waveform.size > 0:
            raise ValueError(
                f"Waveforms must be floating point in [-1, 1), got {waveform.dtype}; divide 16-bit samples by 32768."
            )
        if waveform.ndim not in (1, 2) or (
            waveform.ndim == 2 and not 1 <= waveform.shape[0] <= max(waveform.shape[1], 32)
        ):
            raise ValueError(
                f"Waveforms must have the shape (samples,) or (channels, samples), got {waveform.shape}; transpose "
                "arrays with the channels last."
            )
        if not np.isfinite(waveform).all():
            raise ValueError("A waveform contains NaN or Inf; samples must be finite, in [-1, 1).")
        waveforms.append(waveform if waveform.dtype == np.float64 else waveform.astype(np.float32))
    return waveforms


__all__ = ["VideoLlama2FeatureExtractor", "full_clip_windows", "reference_clip_windows"]
