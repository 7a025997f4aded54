"""Sound to filter banks: the recordings of the original, the choice of clips as properties, the class's contract."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch
from safetensors.torch import load_file

from videollama2_hf.feature_extraction_videollama2 import (
    VideoLlama2FeatureExtractor,
    full_clip_windows,
    reference_clip_windows,
    resample_fourier,
)
from videollama2_hf.media_videollama2 import NoAudioTrackError, read_audio_file, read_audio_track


FOLDER = Path(__file__).parent / "goldens" / "processing_av"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())
CASES, OUTPUTS = MANIFEST["cases"], load_file(FOLDER / "outputs.safetensors")
FILES = [name for name in CASES if name.startswith("file.")]
VIDEOS = [name for name in CASES if name.startswith("video.") and name != "video.no_audio_track"]
RATE = 16000


def wav_path(case: str) -> Path:
    return FOLDER / "wav" / (case.split(".", 1)[1] + ".flac")


def sweep(seconds: float, rate: int) -> np.ndarray:
    """The sweeps that are recorded as a formula only, `float64` (1, samples)."""
    time = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * (100 * time + (7000 - 100) / (2 * seconds) * time**2)
    return np.round(0.6 * 32767 * np.sin(phase)).astype(np.int16)[None] / 32768.0


def load_case(case: str) -> tuple[np.ndarray, int]:
    if wav_path(case).exists():
        return read_audio_file(wav_path(case))
    rate = CASES["file." + case.split(".", 1)[1]]["sr"]
    return sweep(float(case.split("_")[1][:-1]), rate), rate


def recorded(case: str, features: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of what is stored of a case's features and the same rows of `features`."""
    pairs = []
    for name, golden in OUTPUTS.items():
        if name.startswith(f"{case}.fbank"):
            step = int(name.rpartition("every")[2]) if "every" in name else 1
            pairs.append((golden, features[::step][: len(golden)]))
    assert pairs
    return pairs


def assert_equal_bf16(features: torch.Tensor, golden: torch.Tensor):
    """
    Equal to what was rounded to bfloat16, on every processor: torchaudio's mel filters follow from float32 logarithms,
    whose last bit moves features by 3e-4, and a bin that is 30 nats below the loudest one of its frame is the rounding
    noise of a float32 Fourier transform.
    """
    golden = golden.float()
    floor = golden.amax(dim=1, keepdim=True) - 30 / (2 * 6.55582)
    is_noise = golden < floor
    torch.testing.assert_close(features[~is_noise], golden[~is_noise], rtol=2**-8, atol=5e-4)
    assert torch.all((features < floor + 0.1)[is_noise])


@pytest.fixture(scope="module")
def extractor() -> VideoLlama2FeatureExtractor:
    return VideoLlama2FeatureExtractor()


@pytest.mark.parametrize("case", FILES)
def test_sound_files_equal_the_original(case, extractor):
    waveform, rate = load_case(case)
    assert waveform.dtype == np.float64 and rate == CASES[case]["sr"] and waveform.shape[1] == CASES[case]["samples"]
    if "random_start" in CASES[case]:  # where the original starts to hear is random; what it then hears is not
        waveform = waveform[:, CASES[case]["random_start"] :]
    outputs = extractor(waveform, sampling_rate=rate, return_tensors="pt")
    assert outputs["input_features"].dtype == torch.float32
    assert list(outputs["input_features"].shape) == CASES[case]["shape"]
    features = outputs["input_features"][0]
    for golden, ours in recorded(case, features):
        if golden.dtype == torch.bfloat16:
            assert_equal_bf16(ours, golden)
        else:  # another processor's logarithms move the edges of a few mel filters
            assert ((ours - golden).abs() > 1e-6).float().mean() < 0.25
            torch.testing.assert_close(ours, golden, rtol=0, atol=5e-4)
    if "tail_min_max" in CASES[case]:
        tail = features[CASES[case]["stored_rows"] :].bfloat16().float()
        assert [tail.min(), tail.max()] == pytest.approx(CASES[case]["tail_min_max"], abs=0)


@pytest.mark.parametrize("case", VIDEOS)
def test_sound_of_videos_equals_the_original(case, extractor):
    if wav_path(case).exists():
        track = read_audio_track(wav_path(case))
        heard = extractor.load_video_audio(wav_path(case))
    else:
        track = load_case(case)[0][0].astype(np.float32)
        heard = np.concatenate([track[first:last] for first, last in reference_clip_windows(len(track))])
    assert track.dtype == heard.dtype == np.float32
    assert len(track) == CASES[case]["decoded_samples"]
    assert len(heard) == CASES[case]["concatenated_samples"]
    assert reference_clip_windows(len(track)) == [tuple(clip) for clip in CASES[case]["clip_sample_ranges"]]
    if f"{case}.decoded_head" in OUTPUTS:
        np.testing.assert_array_equal(track[:2000], OUTPUTS[f"{case}.decoded_head"].numpy())

    features = extractor(heard, sampling_rate=RATE, return_tensors="pt")["input_features"][0]
    for golden, ours in recorded(case, features):
        assert_equal_bf16(ours, golden)
    silence = features[len(heard) // 160 :]
    assert torch.all(silence.bfloat16() == CASES[case]["tail_value"])


def test_sound_of_an_mp4_equals_the_original(extractor):
    heard = extractor.load_video_audio(FOLDER / "av_3s.mp4")
    features = extractor(heard, sampling_rate=RATE, return_tensors="pt")["input_features"]
    assert list(features.shape) == CASES["mp4_va"]["audio"]
    assert_equal_bf16(features[0, ::10], OUTPUTS["mp4.audio_every10"])


def test_video_without_sound(extractor):
    with pytest.raises(NoAudioTrackError):
        extractor.load_video_audio(
            b"GIF89a\x01\x00\x01\x00\x80\x00\x00\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\x01\x00"
            b"\x01\x00\x00\x02\x02D\x01\x00;"
        )
    features = extractor(extractor.silent_waveform(), sampling_rate=RATE)["input_features"]
    assert len(extractor.silent_waveform()) == 16 * RATE
    assert list(features.shape) == CASES["video.no_audio_track"]["shape"]
    assert np.unique(features) == pytest.approx(MANIFEST["eps_fill"]["float32"], abs=1e-6)


@pytest.mark.parametrize("num_samples", [0, 1, 31999, 32000, 32001, 45678, 160000, 479999, 480001, 9_600_001])
@pytest.mark.parametrize("num_clips, duration", [(8, 2.0), (1, 2.0), (5, 0.5)])
def test_reference_windows(num_samples, num_clips, duration):
    windows = reference_clip_windows(num_samples, RATE, num_clips, duration)
    size = int(duration * RATE)
    assert len(windows) == num_clips and windows[0] == (0, size)
    for number, (first, last) in enumerate(windows):
        exact = Fraction(number * max(num_samples - size, 0), num_clips)
        assert -1 <= first - exact <= 0 and last - first in (size, size + 1)
        assert last <= max(num_samples, size)


@pytest.mark.parametrize("num_samples", [0, 1, 479999, 480000, 480001, 480007, 1_000_003, 9_600_001])
@pytest.mark.parametrize("num_clips", [1, 2, 7, 8])
def test_full_windows(num_samples, num_clips):
    windows = full_clip_windows(num_samples, RATE, num_clips)
    assert sum(last - first for first, last in windows) == min(num_samples, 30 * RATE)
    assert windows[0][0] == 0
    if num_samples <= 30 * RATE:
        assert windows == [(0, num_samples)]
        return
    assert len(windows) == num_clips
    gaps = [second[0] - first[1] for first, second in zip(windows, windows[1:])]
    assert num_clips == 1 or (min(gaps) >= 0 and max(gaps) - min(gaps) <= 1 and windows[-1][1] == num_samples)


@pytest.mark.parametrize("length", [3, 480, 481, 660, 661, 330750])
@pytest.mark.parametrize("num_samples", [7, 480, 481, 660, 661, 480000])
def test_resampling_equals_scipy(length, num_samples):
    waveform = np.random.RandomState(0).randn(length)
    np.testing.assert_allclose(
        resample_fourier(waveform, num_samples), scipy.signal.resample(waveform, num_samples), rtol=0, atol=1e-12
    )


def test_precision_follows_the_waveform(extractor):
    waveform, rate = load_case("file.sweep_3s_16k")
    double = extractor(waveform, sampling_rate=rate)["input_features"]
    single = extractor(waveform.astype(np.float32), sampling_rate=rate)["input_features"]
    # Nearly empty bands of a pure tone are where float32 fails, by the amount that was recorded.
    assert np.abs(double - single).max() == pytest.approx(CASES["file.sweep_3s_16k"]["diff_f32_vs_f64"], rel=0.2)
    half = extractor(waveform.astype(np.float16), sampling_rate=rate)["input_features"]
    assert half.dtype == np.float32


def test_full_mode_hears_the_whole_track():
    reference = VideoLlama2FeatureExtractor()
    extractor = VideoLlama2FeatureExtractor(audio_mode="full")
    path = wav_path("video.sweep_3s_16k")
    track = read_audio_track(path)
    np.testing.assert_array_equal(extractor.load_video_audio(path), track)
    np.testing.assert_array_equal(reference.load_video_audio(path, audio_mode="full"), track)
    waveform, rate = extractor.load_audio_file(path)
    np.testing.assert_array_equal(waveform, track)
    assert rate == RATE

    noise = np.random.RandomState(0).uniform(-0.5, 0.5, 40 * RATE).astype(np.float32)
    noise[-5 * RATE :] = 0  # the last clip of 3.75 s is silent
    loudest = extractor(noise, sampling_rate=RATE)["input_features"][0].max(axis=-1)
    assert np.all(loudest[-370:] < -15) and np.all(loudest[:-380] > 0)
    loudest = reference(noise, sampling_rate=RATE)["input_features"][0].max(axis=-1)
    assert np.all(loudest > 0)  # the first 30 seconds


@pytest.mark.parametrize("audio_mode", ["reference", "full"])
def test_part_of_a_file(audio_mode):
    extractor = VideoLlama2FeatureExtractor(audio_mode=audio_mode)
    path = wav_path("video.stereo_2s_44k")
    waveform, rate = extractor.load_audio_file(path, start=0.5, end=1.25)
    whole, _ = extractor.load_audio_file(path)
    np.testing.assert_array_equal(waveform, whole[..., round(0.5 * rate) : round(1.25 * rate)])
    assert rate == (44100 if audio_mode == "reference" else RATE)
    heard = extractor.load_video_audio(path, start=0.5, end=1.25)
    track = read_audio_track(path)[8000:20000]
    np.testing.assert_array_equal(heard, np.tile(track, 8) if audio_mode == "reference" else track)
    assert len(extractor.load_video_audio(path, start=5.0)) == 0


def test_long_files_are_read_up_to_the_window(tmp_path, extractor):
    soundfile = pytest.importorskip("soundfile")
    long = np.random.RandomState(0).uniform(-0.5, 0.5, (40 * 8000, 2))
    soundfile.write(tmp_path / "long.wav", long, 8000, subtype="PCM_16")
    waveform, rate = extractor.load_audio_file(tmp_path / "long.wav", start=5)
    whole, _ = soundfile.read(tmp_path / "long.wav")
    np.testing.assert_array_equal(waveform, whole[5 * rate : 35 * rate].T)


def test_batch_of_different_rates_equals_each_alone(extractor):
    waveforms, rates = zip(*[load_case(f"file.{name}") for name in ("stereo_2s_44k", "mono_1.5s_8k", "noise_2s_16k")])
    batch = extractor(list(waveforms), sampling_rate=list(rates), return_tensors="pt")
    assert batch["input_features_mask"].dtype == torch.int64 and torch.all(batch["input_features_mask"] == 1)
    assert batch["input_features_mask"].shape == batch["input_features"].shape[:2] == (3, 2998)
    for waveform, rate, features in zip(waveforms, rates, batch["input_features"]):
        alone = extractor(torch.from_numpy(waveform), sampling_rate=rate, return_tensors="pt")["input_features"]
        assert torch.equal(alone[0], features)
    mono = extractor(waveforms[0][0].tolist(), sampling_rate=rates[0])["input_features"]
    np.testing.assert_array_equal(mono[0], batch["input_features"][0])


def test_empty_waveform_is_silence(extractor):
    empty = extractor([np.zeros(0, np.float32), np.zeros((2, 0))], sampling_rate=RATE)["input_features"]
    silence = extractor(extractor.silent_waveform(), sampling_rate=RATE)["input_features"]
    np.testing.assert_allclose(empty, np.broadcast_to(silence, empty.shape), rtol=0, atol=1e-6)


def test_fetch_audio(extractor):
    path = wav_path("file.stereo_2s_44k")
    fetched = extractor.fetch_audio([str(path), [path.read_bytes()], path.open("rb"), path])
    reference = extractor(*extractor.load_audio_file(path))["input_features"]
    for window in (fetched[0], fetched[1][0], fetched[2], fetched[3]):
        assert window.dtype == np.float64 and window.shape == (480000,)
        np.testing.assert_array_equal(extractor(window, sampling_rate=RATE)["input_features"], reference)
    assert extractor.fetch_audio(str(path), sampling_rate=8000).shape == (240000,)
    array, tensor, numbers = np.zeros(3), torch.zeros(3), [0.0, 0.5]
    assert extractor.fetch_audio(array) is array and extractor.fetch_audio(tensor) is tensor
    assert extractor.fetch_audio(numbers) is numbers
    assert extractor.fetch_audio([array, tensor])[1] is tensor


def test_missing_rate_is_warned_about(extractor, monkeypatch):
    from videollama2_hf import feature_extraction_videollama2 as module

    warnings = []
    monkeypatch.setattr(module.logger, "warning", warnings.append)
    features = extractor(np.full(1600, 0.1))["input_features"]
    assert len(warnings) == 1 and "16000 Hz" in warnings[0]
    np.testing.assert_array_equal(features, extractor(np.full(1600, 0.1), sampling_rate=RATE)["input_features"])
    assert len(warnings) == 1


@pytest.mark.parametrize(
    "waveform, rate, message",
    [
        (np.zeros(16, np.int16), RATE, "divide 16-bit samples by 32768"),
        (np.zeros((1600, 2)), RATE, r"\(channels, samples\), got \(1600, 2\)"),
        (np.zeros((1, 2, 3, 4)), RATE, r"\(channels, samples\), got \(2, 3, 4\)"),
        (np.zeros(16), 0, "must be positive"),
        ([np.zeros(16)] * 2, [RATE], "1 sampling rates for 2 waveforms"),
        ([], RATE, "at least one waveform"),
    ],
)
def test_wrong_input(waveform, rate, message, extractor):
    with pytest.raises(ValueError, match=message):
        extractor(waveform, sampling_rate=rate)


def test_unknown_mode(extractor):
    for make in (
        lambda: VideoLlama2FeatureExtractor(audio_mode="fast"),
        lambda: extractor(np.zeros(16), sampling_rate=RATE, audio_mode="fast"),
    ):
        with pytest.raises(ValueError, match="choose 'reference' or 'full'"):
            make()


def test_saving(tmp_path):
    extractor = VideoLlama2FeatureExtractor(chunk_length=10, audio_mode="full", num_clips=4, clip_duration=1.5)
    extractor.save_pretrained(tmp_path)
    loaded = VideoLlama2FeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    assert (loaded.chunk_length, loaded.audio_mode, loaded.num_clips, loaded.clip_duration) == (10, "full", 4, 1.5)
    assert loaded(np.zeros(1600), sampling_rate=RATE)["input_features"].shape == (1, 998, 128)
    assert loaded.model_input_names == ["input_features", "input_features_mask"]


def test_odd_but_valid_waveforms_and_rates():
    wave = np.sin(np.arange(16000) / 10).astype(np.float32)
    extractor = VideoLlama2FeatureExtractor(chunk_length=2)
    expected = extractor(wave, 16000)["input_features"]
    half = extractor(torch.tensor(wave).bfloat16(), 16000)["input_features"]
    assert np.array_equal(half, extractor(torch.tensor(wave).bfloat16().float(), 16000)["input_features"])
    pair = extractor([wave, wave], torch.tensor([16000, 8000]))["input_features"]
    assert np.array_equal(pair[:1], expected) and not np.array_equal(pair[1:], expected)
    assert VideoLlama2FeatureExtractor(chunk_length=1.5)(wave, 16000)["input_features"].shape == (1, 148, 128)


@pytest.mark.parametrize(
    ("raw_speech", "message"),
    [
        (np.zeros((0, 100), np.float32), r"got \(0, 100\)"),
        (1.0, r"got \(\)"),
        (np.full(100, np.nan, np.float32), "NaN or Inf"),
    ],
)
def test_what_is_no_waveform_is_refused(raw_speech, message):
    with pytest.raises(ValueError, match=message):
        VideoLlama2FeatureExtractor()(raw_speech, 16000)
