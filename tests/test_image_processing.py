"""Pixels against the original's recordings, against Pillow, and from every kind of source."""

import base64
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from videollama2_hf.image_processing_videollama2 import VideoLlama2ImageProcessor, load_image
from videollama2_hf.media_videollama2 import MediaError


GOLDENS = Path(__file__).parent / "goldens"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
LANGUAGEBIND = {"size": {"shortest_edge": 224}, "antialias": False}


@pytest.fixture(scope="module")
def recorded():
    folder = GOLDENS / "processing"
    return load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")


@pytest.fixture(scope="module")
def video_llava():
    return load_file(GOLDENS / "video_llava" / "goldens.safetensors")


def pixel_cases():
    manifest = json.loads((GOLDENS / "processing" / "manifest.json").read_text())
    return [name for name in manifest["outputs"] if name.startswith("px.")]


def processor_of(tower: str, **options) -> VideoLlama2ImageProcessor:
    """`clip336` or `siglip384` as a processor."""
    if tower.startswith("clip"):
        return VideoLlama2ImageProcessor(size={"shortest_edge": int(tower[4:])}, **options)
    size = int(tower[6:])
    options = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **options}
    return VideoLlama2ImageProcessor(size={"height": size, "width": size}, **options)


def levels(processor, pixels: torch.Tensor) -> torch.Tensor:
    """Normalised pixels as levels, 0 to 255."""
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    return (pixels * std[:, None, None] + mean[:, None, None]) * 255


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Waves with a little noise: as smooth as a photograph."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = [
        np.sin(a * x + b * y + c)[..., None] * rng.uniform(5, 25, 3).astype(np.float32)
        for a, b, c in rng.uniform(-0.2, 0.2, (8, 3))
    ]
    return np.clip(110 + sum(waves) + rng.normal(0, 3, (height, width, 3)), 0, 255).astype(np.uint8)


def pillow_reference(image: np.ndarray, size: tuple[int, int], color=None) -> np.ndarray:
    """expand2square of the original, then Pillow's own resize to (height, width)."""
    image = Image.fromarray(image)
    if color is not None:
        side = max(image.size)
        square = Image.new("RGB", (side, side), color)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))


@pytest.mark.parametrize("name", pixel_cases())
def test_recorded_pixels(recorded, name):
    """Bit-equal with `exact`, within one level without: also of the black frames that the original appends."""
    inputs, outputs = recorded
    _, tower, image, aspect, *black = name.split(".")
    pixels = inputs[f"img.{image}"]
    if black:  # the original makes them with width and height exchanged
        pixels = torch.zeros_like(pixels).transpose(0, 1)
    stride = 12 if tower in ("clip336", "siglip384") else 1

    exact = processor_of(tower, do_pad_to_square=aspect == "pad", exact=True)
    values = exact(pixels, return_tensors="pt")["pixel_values"][..., ::stride, ::stride]
    assert values.dtype == torch.float32
    assert torch.equal(values, outputs[name])

    fast = processor_of(tower, do_pad_to_square=aspect == "pad")
    values = fast(pixels, return_tensors="pt")["pixel_values"][..., ::stride, ::stride]
    difference = (levels(fast, values) - levels(fast, outputs[name])).abs()
    assert difference.max() < 1.01
    assert (difference < 0.01).float().mean() > 0.99


@pytest.mark.parametrize("tower", ["clip336", "siglip384"])
@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("height, width", [(1080, 1920), (960, 540), (241, 320), (360, 361)])
def test_fast_pixels_are_within_one_level_of_exact_ones(tower, pad, height, width):
    image = picture(height, width)
    exact, fast = (
        processor_of(tower, do_pad_to_square=pad, exact=exact)(image, return_tensors="pt")["pixel_values"]
        for exact in (True, False)
    )
    processor = processor_of(tower)
    difference = (levels(processor, exact) - levels(processor, fast)).abs()
    assert difference.max() < 1.01
    assert (difference < 0.01).float().mean() > (0.998 if pad and height == 1080 else 0.99)


@pytest.mark.parametrize("height, width", [(540, 960), (64, 97), (64, 40), (90, 90), (7, 300)])
@pytest.mark.parametrize("color", [None, (122, 116, 104)])
def test_exact_pixels_are_pillows(height, width, color):
    """In all cases where the versions of Pillow agree: the width is resized first."""
    image = picture(height, width)
    processor = VideoLlama2ImageProcessor(
        size={"height": 90, "width": 90}, do_pad_to_square=color is not None, exact=True, do_normalize=False
    )
    values = processor(image, return_tensors="pt")["pixel_values"][0]
    expected = torch.tensor(pillow_reference(image, (90, 90), color)).permute(2, 0, 1)
    assert torch.equal((values * 255).round().to(torch.uint8), expected)


def test_exact_resize_of_a_tall_image_does_not_depend_on_the_version_of_pillow():
    """Pillow 13 resizes the height first where it cuts more than twice as much as the width; older ones never."""
    image = picture(90, 50)
    processor = VideoLlama2ImageProcessor(size={"height": 70, "width": 70}, exact=True, do_normalize=False)
    values = processor(image, return_tensors="pt")["pixel_values"][0]
    height_first = Image.fromarray(image).resize((50, 70), Image.Resampling.BICUBIC)
    expected = np.asarray(height_first.resize((70, 70), Image.Resampling.BICUBIC))
    assert np.array_equal((values * 255).round().byte().permute(1, 2, 0).numpy(), expected)


def test_languagebind_pixels(video_llava):
    """Video-LLaVA's image transform, with and without padding, enlarged and reduced."""
    image = video_llava["preprocess.image.rgb"]
    for name, pad in (("centre_crop", False), ("pad", True)):
        processor = VideoLlama2ImageProcessor(**LANGUAGEBIND, do_pad_to_square=pad)
        values = processor(image, return_tensors="pt")["pixel_values"][0, :, ::8, ::8]
        torch.testing.assert_close(values, video_llava[f"preprocess.image.{name}.s8"], rtol=0, atol=2e-6)

    manifest = json.loads((GOLDENS / "video_llava" / "manifest.json").read_text())
    x, y = np.meshgrid(np.arange(480), np.arange(360))
    big = ((x * x // 7 + y * 5 * (x // 3) + y * y // 3)[..., None] * np.array([1, 3, 5]) % 256).astype(np.uint8)
    assert hashlib.sha256(big.tobytes()).hexdigest() == manifest["preprocess.big"]["sha256"]
    values = VideoLlama2ImageProcessor(**LANGUAGEBIND)(big, return_tensors="pt")["pixel_values"][0, :, ::8, ::8]
    torch.testing.assert_close(values, video_llava["preprocess.big.centre_crop.s8"], rtol=0, atol=2e-6)


def test_languagebind_crop_offset_is_rounded_half_to_even():
    """torchvision's CenterCrop, which LanguageBind uses, takes 2 of 3 odd columns off the left; CLIP's takes 1."""
    columns = torch.arange(227, dtype=torch.uint8).expand(3, 224, 227)
    for antialias, first in ((True, 1), (False, 2)):
        processor = VideoLlama2ImageProcessor(
            size={"shortest_edge": 224}, antialias=antialias, do_rescale=False, do_normalize=False
        )
        assert processor(columns, return_tensors="pt")["pixel_values"][0, 0, 0, 0] == first


@pytest.mark.parametrize(
    "config, shape",
    [
        # openai/clip-vit-large-patch14-336, as it was saved in 2022: sizes are integers.
        (
            {
                "crop_size": 336,
                "do_center_crop": True,
                "do_normalize": True,
                "do_resize": True,
                "feature_extractor_type": "CLIPFeatureExtractor",
                "image_mean": list(CLIP_MEAN),
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "resample": 3,
                "size": 336,
            },
            (336, 336),
        ),
        (
            {
                "crop_size": {"height": 56, "width": 56},
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": 56},
                "do_convert_rgb": True,
                "rescale_factor": 0.00392156862745098,
            },
            (56, 56),
        ),
        # google/siglip-so400m-patch14-384: no crop is mentioned, none is made.
        (
            {
                "do_normalize": True,
                "do_rescale": True,
                "do_resize": True,
                "image_mean": [0.5, 0.5, 0.5],
                "image_processor_type": "SiglipImageProcessor",
                "image_std": [0.5, 0.5, 0.5],
                "processor_class": "SiglipProcessor",
                "resample": 3,
                "rescale_factor": 0.00392156862745098,
                "size": {"height": 384, "width": 384},
            },
            (384, 384),
        ),
    ],
)
def test_configs_of_vision_repositories_load_as_they_are(config, shape, tmp_path):
    processor = VideoLlama2ImageProcessor.from_dict(config)
    assert processor(picture(120, 200), return_tensors="pt")["pixel_values"].shape == (1, 3, *shape)
    assert tuple(processor.image_mean) == tuple(config.get("image_mean", CLIP_MEAN))
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "VideoLlama2ImageProcessor"
    assert VideoLlama2ImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()


def test_options_survive_saving(tmp_path):
    processor = VideoLlama2ImageProcessor(**LANGUAGEBIND, do_pad_to_square=True, exact=True)
    processor.save_pretrained(tmp_path)
    loaded = VideoLlama2ImageProcessor.from_pretrained(tmp_path)
    assert (loaded.antialias, loaded.do_pad_to_square, loaded.exact) == (False, True, True)
    assert loaded.size == {"shortest_edge": 224}


def test_size_decides_the_crop():
    image = picture(60, 90)
    processor = VideoLlama2ImageProcessor()

    def shape(**options):
        return tuple(processor(image, return_tensors="pt", **options)["pixel_values"].shape[-2:])

    assert shape() == (336, 336)
    assert shape(size={"shortest_edge": 30}) == (30, 30)
    assert shape(size={"shortest_edge": 30}, do_center_crop=False) == (30, 45)
    assert shape(size={"shortest_edge": 30}, crop_size={"height": 20, "width": 24}) == (20, 24)
    assert shape(size={"height": 30, "width": 40}) == (30, 40)
    assert shape(do_resize=False) == (60, 90)
    assert shape(do_resize=False, do_pad_to_square=True) == (90, 90)


def test_a_batch_equals_its_images():
    images = [picture(60, 90, 1), picture(90, 60, 2), picture(60, 90, 3)]
    for options in ({}, {"do_pad_to_square": True}, {"exact": True}, {"antialias": False}):
        processor = VideoLlama2ImageProcessor(size={"shortest_edge": 48}, **options)
        together = processor(images, return_tensors="pt", disable_grouping=False)["pixel_values"]
        alone = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])
        assert torch.equal(together, alone)


def test_every_kind_of_input_gives_the_same_pixels(tmp_path):
    array = picture(40, 60)
    image = Image.fromarray(array)
    path = tmp_path / "picture.png"
    image.save(path)
    content = path.read_bytes()
    encoded = base64.b64encode(content).decode()
    processor = VideoLlama2ImageProcessor(size={"shortest_edge": 24})
    expected = processor(image, return_tensors="pt")["pixel_values"]
    tensor = torch.from_numpy(array)
    sources = [array, array.transpose(2, 0, 1), tensor, tensor.permute(2, 0, 1), str(path), path, content, encoded]
    read_only = array.copy()
    read_only.flags.writeable = False
    sources += [
        read_only,
        array[..., ::-1].copy()[..., ::-1],
        bytearray(content),
        io.BytesIO(content),
        f"data:image/png;base64,{encoded}",
        [[image]],
        tensor[None],
    ]
    for source in sources:
        assert torch.equal(processor(source, return_tensors="pt")["pixel_values"], expected), type(source)
    mixed = processor([str(path), image, array], return_tensors="pt")["pixel_values"]
    assert torch.equal(mixed, expected.expand(3, -1, -1, -1))
    gray = processor(array[..., 0], return_tensors="pt")["pixel_values"]
    assert gray.shape == (1, 3, 24, 24)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_modes_are_converted_as_pillow_does(mode):
    """As `Image.open(path).convert("RGB")` in the original: transparency is dropped, not blended with white."""
    image = Image.fromarray(picture(40, 60)).convert("L" if mode in ("LA", "I", "F") else "RGB").convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(40)
    processor = VideoLlama2ImageProcessor(size={"shortest_edge": 24})
    expected = processor(np.asarray(image.convert("RGB")), return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(image, return_tensors="pt")["pixel_values"], expected)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.linspace(0, 65535, 60).astype(np.uint16)[None].repeat(40, 0)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "png")
    processor = VideoLlama2ImageProcessor(do_resize=False, do_normalize=False, do_rescale=False)
    pixels = processor(buffer.getvalue(), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[0, 0, 0], torch.from_numpy((values[0] >> 8).astype(np.uint8)))


def test_files_are_turned_upright_and_images_are_not(tmp_path):
    image = Image.fromarray(picture(40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    processor = VideoLlama2ImageProcessor(do_resize=False)
    assert processor(str(path), return_tensors="pt")["pixel_values"].shape[-2:] == (60, 40)
    assert processor(Image.open(path), return_tensors="pt")["pixel_values"].shape[-2:] == (40, 60)


def test_float_pixels_give_what_uint8_gives():
    image = torch.from_numpy(picture(40, 60)).permute(2, 0, 1)
    for pad in (True, False):
        processor = VideoLlama2ImageProcessor(size={"shortest_edge": 48}, do_pad_to_square=pad)
        expected = processor(image, return_tensors="pt")["pixel_values"]
        scaled = processor(image / 255, do_rescale=False, return_tensors="pt")["pixel_values"]
        # No rounding between the passes, so up to a level and a half apart.
        torch.testing.assert_close(scaled, expected, rtol=0, atol=1.5 / 255 / 0.26)


def test_errors_say_what_to_do(tmp_path):
    processor = VideoLlama2ImageProcessor()
    with pytest.raises(FileNotFoundError, match=r"There is no image file 'missing\.png'"):
        processor("missing.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(MediaError, match="not an image that Pillow can read"):
        processor(tmp_path / "text.png")
    with pytest.raises(TypeError, match="int"):
        load_image(3)
    image = picture(40, 60)
    with pytest.raises(ValueError, match="exact=True works on RGB pixels of dtype uint8"):
        processor(image.astype(np.float32), exact=True)
    with pytest.raises(ValueError, match=r"size must be \{'shortest_edge': n\}"):
        processor(image, size={"longest_edge": 30})
    with pytest.raises(ValueError, match="use do_pad_to_square"):
        processor(image, do_pad=True, pad_size=20)
