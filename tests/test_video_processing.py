"""Which frames are taken, against the original's recordings; and the same pixels from every kind of video."""

import base64
import io
import json
import random
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers.video_utils import VideoMetadata

from videollama2_hf.image_processing_videollama2 import VideoLlama2ImageProcessor
from videollama2_hf.media_videollama2 import VideoClip, VideoReader
from videollama2_hf.video_processing_videollama2 import (
    VideoLlama2VideoProcessor,
    fps_frame_indices,
    make_flat_list_of_videos,
    time_window,
    uniform_frame_indices,
)


GOLDENS = Path(__file__).parent / "goldens"
SMALL = {"size": {"shortest_edge": 24}}


def picture(height: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = sum(np.sin(a * x + b * y)[..., None] * rng.uniform(10, 60, 3) for a, b in rng.uniform(-0.3, 0.3, (3, 2)))
    return np.clip(128 + waves, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """40 frames (40, 36, 64, 3), every one different."""
    return np.stack([picture(36, 64, seed) for seed in range(40)])


@pytest.fixture(scope="module")
def video_file(frames, tmp_path_factory) -> tuple[Path, np.ndarray]:
    """An mp4 of 10 frames a second, and what a player shows of it."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 36, "yuv420p", 12
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with av.open(path) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return path, np.stack(decoded)


@pytest.fixture(scope="module")
def video_llava():
    return load_file(GOLDENS / "video_llava" / "goldens.safetensors")


def recorded_indices() -> list[dict]:
    return json.loads((GOLDENS / "processing" / "frame_indices.json").read_text())


def sampled(case: dict) -> list[int]:
    """The recording's sampling: without a number of frames the original takes about one a second."""
    metadata = VideoMetadata(total_num_frames=case["total_frames"], fps=case["fps"])
    how = {"fps": 1} if case["num_frames"] is None else {"num_frames": case["num_frames"]}
    processor = VideoLlama2VideoProcessor()
    return processor.sample_frames(metadata, start=case["start"], end=case["end"], **how).tolist()


def test_recorded_frame_indices():
    """All 455 recordings. The original then cuts to 32 frames; here nothing is cut."""
    cases = [case for case in recorded_indices() if "indices" in case]
    assert len(cases) == 455
    for case in cases:
        assert sampled(case) == case["indices"], case


def test_recorded_frame_indices_where_the_original_crashes():
    """
    107 recordings. A window behind the end is refused with the reason. The others (an end before the first frame, a
    video below one frame per second sampled by the second) have an answer, which the original misses by an empty
    list or a division by zero.
    """
    refused = 0
    for case in recorded_indices():
        if "indices" in case:
            continue
        begin = min(time for time in (case["start"] or 0, case["end"]) if time is not None)
        if int(begin * case["fps"]) - 1 >= case["total_frames"]:
            with pytest.raises(ValueError, match="choose a start before that"):
                sampled(case)
            refused += 1
            continue
        indices = sampled(case)
        window = time_window(case["total_frames"], case["fps"], case["start"], case["end"])
        assert len(window) > 0 and window.start >= 0 and window.stop <= case["total_frames"]
        if case["num_frames"] is None:  # below one frame per second: every frame of the window
            assert case["fps"] < 1 and indices == list(window)
        else:  # start = end = 0 at half a frame per second: the first frame
            assert indices == [0] * case["num_frames"]
    assert refused == 72


def test_video_llava_frame_indices():
    manifest = json.loads((GOLDENS / "video_llava" / "manifest.json").read_text())
    for total, expected in manifest["preprocess.video.frame_indices"].items():
        assert uniform_frame_indices(int(total), 8, endpoints=True).tolist() == expected


def test_properties_of_uniform_indices():
    rng = random.Random(0)
    for _ in range(500):
        total, count, endpoints = rng.randint(1, 5000), rng.randint(1, 200), rng.random() < 0.5
        indices = uniform_frame_indices(total, count, endpoints)
        assert len(indices) == count and (np.diff(indices) >= 0).all()
        assert indices[0] >= 0 and indices[-1] < total
        steps = np.diff(indices)
        assert count < 3 or steps.max() - steps.min() <= 2  # even, up to rounding at both ends of a step
        if total >= count:
            assert len(set(indices.tolist())) >= count - 1
        if endpoints and count > 1:
            assert indices[0] == 0 and indices[-1] == total - 1


def test_properties_of_fps_indices():
    rng = random.Random(1)
    for _ in range(500):
        total, video_fps, fps = rng.randint(1, 5000), rng.uniform(0.1, 60), rng.choice([0.25, 0.5, 1, 2, 3.7, 100])
        indices = fps_frame_indices(total, video_fps, fps)
        assert 1 <= len(indices) <= total and (np.diff(indices) > 0).all()
        assert indices[0] >= 0 and indices[-1] < total
        # About fps frames per second; whole frames per second are counted, so up to twice as many below 2 fps.
        whole = np.floor(video_fps) if video_fps >= 1 else video_fps
        assert abs(len(indices) - total * min(fps / whole, 1)) <= 1


def test_properties_of_time_windows():
    rng = random.Random(2)
    for _ in range(500):
        total, fps = rng.randint(1, 2000), rng.uniform(0.2, 60)
        duration = total / fps
        start = rng.choice([None, rng.uniform(-5, duration)])
        end = rng.choice([None, rng.uniform(-5, 2 * duration), float("inf")])
        window = time_window(total, fps, start, end)
        assert 0 <= window.start < window.stop <= total
        if end is not None and end > max(start or 0, 0):
            assert window.start <= max(start or 0, 0) * fps
            assert window.stop <= max(int(min(end * fps, total)), window.start + 1)
    assert time_window(300, 25.0, 2.5, 7.5) == range(61, 187)
    assert time_window(300, 25.0, 7.5, 2.5) == time_window(300, 25.0, 2.5, 7.5)
    assert time_window(300, 25.0, 3, 3) == time_window(300, 25.0, 3, 4)


def test_number_of_frames_asked_for():
    processor = VideoLlama2VideoProcessor(num_frames=4)
    metadata = VideoMetadata(total_num_frames=100, fps=10.0)
    assert len(processor.sample_frames(metadata)) == 4
    assert len(processor.sample_frames(metadata, num_frames=64)) == 64
    assert len(processor.sample_frames(metadata, fps=2)) == 20
    assert len(processor.sample_frames(VideoMetadata(6000, fps=10.0), fps=1)) == 600
    assert processor.sample_frames(metadata, fps=2, max_frames=5).tolist() == uniform_frame_indices(100, 5).tolist()
    by_second = VideoLlama2VideoProcessor(fps=1, max_frames=6)
    assert len(by_second.sample_frames(metadata)) == 6
    assert len(by_second.sample_frames(metadata, num_frames=7)) == 7
    with pytest.raises(ValueError, match="num_frames or fps, not both"):
        processor.sample_frames(metadata, num_frames=4, fps=1)
    with pytest.raises(ValueError, match="needs the frame rate"):
        processor.sample_frames(VideoMetadata(total_num_frames=8), fps=1)
    with pytest.raises(ValueError, match="frame rate of this video is not known"):
        processor.sample_frames(VideoMetadata(total_num_frames=8), start=1)
    with pytest.raises(ValueError, match="num_frames=0"):
        processor.sample_frames(metadata, num_frames=0)


def test_video_llava_pixels(video_llava):
    image = video_llava["preprocess.image.rgb"]
    video = torch.stack([image.roll(3 * index, 1) for index in range(19)])
    processor = VideoLlama2VideoProcessor(
        size={"shortest_edge": 224}, antialias=False, resample=Image.Resampling.BILINEAR, sample_endpoints=True
    )

    def pixels(video, stride, **options):
        values = processor(video, **options)["pixel_values_videos"]
        return values[0].transpose(0, 1)[..., ::stride, ::stride]

    close = {"rtol": 0, "atol": 2e-6}
    torch.testing.assert_close(pixels(video, 8), video_llava["preprocess.video.unflipped.s8"], **close)
    mirrored = pixels(video, 8, flip_probability=1.0)
    torch.testing.assert_close(mirrored, video_llava["preprocess.video.seed0.s8"], **close)

    x, y = np.meshgrid(np.arange(480), np.arange(360))
    big = ((x * x // 7 + y * 5 * (x // 3) + y * y // 3)[..., None] * np.array([1, 3, 5]) % 256).astype(np.uint8)
    video = np.stack([np.roll(big, 16 * index, 1) for index in range(8)])
    torch.testing.assert_close(pixels(video, 16), video_llava["preprocess.bigvideo.unflipped.s16"], **close)


def test_flipping_is_off_by_default_and_leaves_the_generator_alone(frames):
    state = torch.get_rng_state()
    VideoLlama2VideoProcessor(**SMALL)(frames)
    assert torch.equal(torch.get_rng_state(), state)
    processor = VideoLlama2VideoProcessor(**SMALL, flip_probability=0.5)
    flips = {processor(frames[:1])["pixel_values_videos"][0, 0, 0, 0, 0].item() for _ in range(30)}
    assert len(flips) == 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_pad_to_square": True},
        {"exact": True},
        {"exact": True, "do_pad_to_square": True},
        {"antialias": False, "resample": Image.Resampling.BILINEAR},
        {"size": {"height": 24, "width": 24}, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)},
    ],
)
def test_frames_have_the_pixels_of_images(frames, options):
    options = {**SMALL, **options}
    video = VideoLlama2VideoProcessor(**options, num_frames=5)(frames)["pixel_values_videos"]
    assert video.shape == (1, 5, 3, 24, 24) and video.dtype == torch.float32
    chosen = frames[uniform_frame_indices(len(frames), 5)]
    images = VideoLlama2ImageProcessor(**options)(list(chosen), return_tensors="pt")["pixel_values"]
    assert torch.equal(video[0], images)


def test_every_kind_of_file_gives_the_same_pixels(video_file):
    path, decoded = video_file
    processor = VideoLlama2VideoProcessor(**SMALL, num_frames=6)
    expected = processor(decoded, return_tensors="pt")["pixel_values_videos"]
    content = path.read_bytes()
    uri = f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
    for source in (str(path), path, content, io.BytesIO(content), uri, VideoClip(str(path)), [[str(path)]]):
        outputs = processor(source, return_tensors="pt", return_metadata=True)
        assert torch.equal(outputs["pixel_values_videos"], expected), type(source)
        metadata = outputs["video_metadata"][0]
        assert metadata.frames_indices == uniform_frame_indices(40, 6).tolist()
        assert metadata.timestamps == [index / 10 for index in metadata.frames_indices]
    exact = processor(path, exact=True)["pixel_values_videos"]
    assert torch.equal(exact, processor(decoded, exact=True)["pixel_values_videos"])


def test_every_kind_of_memory_gives_the_same_pixels(frames, tmp_path):
    processor = VideoLlama2VideoProcessor(**SMALL, num_frames=6)
    expected = processor(frames)["pixel_values_videos"]
    tensor = torch.from_numpy(frames)
    images = [Image.fromarray(frame) for frame in frames]
    paths = []
    for index, image in enumerate(images):
        paths.append(tmp_path / f"frame_{index:03}.png")
        image.save(paths[-1])
    names = [str(path) for path in paths]
    sources = [tensor, tensor.permute(0, 3, 1, 2), tensor[None], images, list(frames), list(tensor), paths, names]
    sources += [[names], str(tmp_path), VideoClip(images), tuple(images), [images]]
    for source in sources:
        assert torch.equal(processor(source)["pixel_values_videos"], expected)


def test_gif(frames, tmp_path):
    """A GIF shorter than `num_frames` repeats frames, as any video does (the original appends black ones)."""
    path = tmp_path / "short.gif"
    images = [Image.fromarray(frame).quantize(64) for frame in frames[:5]]
    images[0].save(path, save_all=True, append_images=images[1:], duration=40)
    processor = VideoLlama2VideoProcessor(**SMALL, num_frames=8)
    outputs = processor(path, return_metadata=True)
    assert outputs["video_metadata"][0].frames_indices == [0, 1, 1, 2, 2, 3, 3, 4]
    expected = processor([image.convert("RGB") for image in images])["pixel_values_videos"]
    torch.testing.assert_close(outputs["pixel_values_videos"], expected, rtol=0, atol=1.01 / 255 / 0.26)


def test_recorded_folder_of_frames(frames, tmp_path):
    """3 frames per second, in the order of the sorted names."""
    cases = json.loads((GOLDENS / "processing" / "manifest.json").read_text())["cases"]
    for index in range(10):
        Image.fromarray(frames[index]).save(tmp_path / f"{index:05}.png")
    processor = VideoLlama2VideoProcessor(**SMALL, num_frames=4)
    for name, window in (("frame_folder", {}), ("frame_folder_s1_e2.5", {"start": 1, "end": 2.5})):
        outputs = processor(str(tmp_path), return_metadata=True, **window)
        assert outputs["video_metadata"][0].frames_indices == cases[name]["selected"]
        expected = processor(frames[cases[name]["selected"]], do_sample_frames=False)["pixel_values_videos"]
        assert torch.equal(outputs["pixel_values_videos"], expected)


def test_a_clip_takes_precedence_over_the_call(video_file):
    path, decoded = video_file
    processor = VideoLlama2VideoProcessor(**SMALL)

    def indices(clip, **options):
        return processor(clip, return_metadata=True, **options)["video_metadata"][0].frames_indices

    assert len(indices(VideoClip(path))) == 8
    assert len(indices(VideoClip(path), num_frames=3)) == 3
    assert len(indices(VideoClip(path, num_frames=5), fps=1)) == 5
    assert indices(VideoClip(path, fps=1), num_frames=3) == [5, 15, 25, 35]
    assert indices(VideoClip(path, start=1, end=2, num_frames=2), start=0, end=4) == [12, 17]
    assert indices(VideoClip(path, start=1), end=2, do_sample_frames=False) == list(range(9, 20))
    with pytest.raises(ValueError, match="one video, but its source holds 2"):
        processor(VideoClip([str(path), str(path)]))


def test_few_and_many_frames_in_memory(frames):
    """Subsampled and repeated as a file is (the original: kept as they are, or black frames appended)."""
    processor = VideoLlama2VideoProcessor(**SMALL)
    for source in (frames, list(frames)):
        many = processor(source, num_frames=4)["pixel_values_videos"]
        few = processor(source[:3], num_frames=6)["pixel_values_videos"]
        assert many.shape[1] == 4 and few.shape[1] == 6
        assert torch.equal(few[0, [0, 1, 5]], processor(source[:3], do_sample_frames=False)["pixel_values_videos"][0])
        assert torch.equal(few[0, 1], few[0, 2])
    assert processor(frames, do_sample_frames=False)["pixel_values_videos"].shape[1] == 40


def test_batches(frames, video_file):
    path, decoded = video_file
    processor = VideoLlama2VideoProcessor(**SMALL, num_frames=4)
    wide, tall = frames[:10], frames.transpose(0, 2, 1, 3)
    batch = [[wide, str(path)], [list(tall)]]
    together = processor(batch, return_tensors="pt")["pixel_values_videos"]
    assert together.shape == (3, 4, 3, 24, 24)
    alone = [processor(video)["pixel_values_videos"] for video in (wide, path, tall)]
    assert torch.equal(together, torch.cat(alone))

    ragged = processor([VideoClip(path, num_frames=2), VideoClip(path, num_frames=3)], return_tensors="pt")
    assert [tuple(video.shape) for video in ragged["pixel_values_videos"]] == [(2, 3, 24, 24), (3, 3, 24, 24)]
    array = processor(wide, return_tensors="np")["pixel_values_videos"]
    assert isinstance(array, np.ndarray) and array.shape == (1, 4, 3, 24, 24)


def test_frames_with_metadata_as_servers_pass_them(frames):
    """Frames that are chosen already come with the metadata of the whole video and do_sample_frames=False."""
    processor = VideoLlama2VideoProcessor(**SMALL)
    metadata = {"total_num_frames": 300, "fps": 30.0, "duration": 10.0, "frames_indices": [0, 100, 200]}
    outputs = processor(
        frames[:3], video_metadata=metadata, do_sample_frames=False, return_metadata=True, return_tensors="pt"
    )
    assert outputs["pixel_values_videos"].shape[:2] == (1, 3)
    assert outputs["video_metadata"][0].frames_indices == [0, 100, 200]
    with pytest.raises(ValueError, match="do_sample_frames=False for frames that are chosen already"):
        processor(frames[:3], video_metadata=metadata)
    with pytest.raises(ValueError, match="2 videos but 1 entries"):
        processor([frames[:3], frames[:3]], video_metadata=metadata)
    metadata = [{"total_num_frames": 40, "fps": 10.0}, VideoMetadata(total_num_frames=40, fps=20.0)]
    outputs = processor([frames, frames], video_metadata=metadata, start=1, end=2, num_frames=1, return_metadata=True)
    assert [item.frames_indices for item in outputs["video_metadata"]] == [[14], [29]]


def test_frames_are_resized_as_they_arrive(video_file, monkeypatch):
    """What is held of a file is as large as the model's input, however large its frames are."""
    path, _ = video_file
    seen = []

    def read_frames(self, indices, transform):
        seen.append(transform(torch.zeros(1080, 1920, 3, dtype=torch.uint8)))
        return torch.stack(seen * len(indices))

    monkeypatch.setattr(VideoReader, "read_frames", read_frames)
    VideoLlama2VideoProcessor(**SMALL)(path)
    assert seen[0].shape == (3, 24, 24) and seen[0].dtype == torch.uint8


def test_flat_list_of_videos(frames):
    image = Image.fromarray(frames[0])
    for one in (frames, image, frames[0], [image, image], list(frames[:2]), "a.mp4", b"...", ["a.jpg", "b.JPG"]):
        assert len(make_flat_list_of_videos(one)) == 1
    urls = ["https://example.com/1.png?width=2", "https://example.com/2.png"]
    assert make_flat_list_of_videos([[urls]]) == [urls]
    assert make_flat_list_of_videos([["a.mp4", "b.mp4"], ["c.gif"]]) == ["a.mp4", "b.mp4", "c.gif"]
    assert len(make_flat_list_of_videos([[image, image], ["a.mp4", frames]])) == 3
    assert len(make_flat_list_of_videos(np.stack([frames, frames]))) == 2
    with pytest.raises(ValueError, match="shape"):
        make_flat_list_of_videos(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="empty list"):
        make_flat_list_of_videos([])


def test_frames_of_different_sizes(frames):
    processor = VideoLlama2VideoProcessor(**SMALL, num_frames=2)
    video = [Image.fromarray(frames[0]), Image.fromarray(frames[1]).resize((40, 50))]
    assert processor(video)["pixel_values_videos"].shape == (1, 2, 3, 24, 24)
    with pytest.raises(ValueError, match="come out in different sizes"):
        processor(video, do_resize=False)


def test_saving(tmp_path):
    options = {"num_frames": 16, "antialias": False, "sample_endpoints": True, "do_pad_to_square": True, "resample": 2}
    processor = VideoLlama2VideoProcessor(**SMALL, **options)
    processor.save_pretrained(tmp_path)
    loaded = VideoLlama2VideoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert all(getattr(loaded, name) == value for name, value in options.items())


def test_fetch_videos_needs_no_other_decoder(video_file):
    path, decoded = video_file
    processor = VideoLlama2VideoProcessor(num_frames=3)
    frames, metadata = processor.fetch_videos(str(path), sample_indices_fn=processor.sample_frames)
    assert np.array_equal(frames.numpy(), decoded[metadata.frames_indices])
    (first, second), _ = processor.fetch_videos([str(path), path])
    assert np.array_equal(first.numpy(), decoded) and torch.equal(first, second)
