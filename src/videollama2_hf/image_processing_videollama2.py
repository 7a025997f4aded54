"""Pixels of VideoLLaMA 2 and Video-LLaVA: one implementation of pad, resize, crop and normalise, images and frames."""

import base64
import os
from io import BytesIO

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    is_valid_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType, auto_docstring, is_torchvision_available, logging

from .media_videollama2 import MediaError, MediaSource, fetch_media, name_source


if is_torchvision_available():
    from torchvision.transforms.v2 import functional as tvF
    from transformers.image_utils import pil_torch_interpolation_mapping

logger = logging.get_logger(__name__)


class VideoLlama2ImageProcessorKwargs(ImagesKwargs, total=False):
    """
    do_pad_to_square (`bool`, *optional*, defaults to `False`):
        Whether to pad to a square with the mean colour first (`expand2square` of the original's `mm_utils.py`). The
        original trains its second stage with it and never uses it at inference.
    antialias (`bool`, *optional*, defaults to `True`):
        `False` is LanguageBind's rule (Video-LLaVA): resize in float, without antialiasing and without clamping, and
        round the crop offset as torchvision does.
    exact (`bool`, *optional*, defaults to `False`):
        Whether to resize and normalise with the original's own arithmetic (Pillow, then float64 rescaling): equal to
        it bit for bit, six to ten times slower than the default, which is within 1 of 255 levels of it. Without
        antialiasing both are the same.
    """

    do_pad_to_square: bool | None
    antialias: bool | None
    exact: bool | None


class VideoLlama2PixelsMixin:
    """
    The pixels that images and frames share. In front of `TorchvisionBackend` or `BaseVideoProcessor`.

    Three families of vision towers are expressed by the same few options:

    | tower | `size` | `resample` | `antialias` | mean, std |
    |---|---|---|---|---|
    | CLIP | `{"shortest_edge": 336}` | bicubic | yes | CLIP's |
    | SigLIP | `{"height": 384, "width": 384}` | bicubic | yes | 0.5, 0.5 |
    | LanguageBind | `{"shortest_edge": 224}` | bicubic (images), bilinear (videos) | no | CLIP's |

    `size={"shortest_edge": n}` is followed by a centre crop to n x n, unless `do_center_crop` or `crop_size` say
    otherwise.
    """

    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 336}
    default_to_square = False
    resample = PILImageResampling.BICUBIC
    do_center_crop = None
    crop_size = None
    do_rescale = True
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_pad_to_square = False
    antialias = True
    exact = False

    def _validate_preprocess_kwargs(self, size=None, do_resize=None, do_pad=None, **kwargs):
        super()._validate_preprocess_kwargs(size=size, do_resize=do_resize, **kwargs)
        if do_resize and set(dict(size)) not in ({"shortest_edge"}, {"height", "width"}):
            raise ValueError(f"size must be {{'shortest_edge': n}} or {{'height': n, 'width': m}}, got {dict(size)}.")
        if do_pad:
            raise ValueError("do_pad is not supported; use do_pad_to_square to pad to a square before the resize.")

    def to_rgb_tensor(self, image, do_convert_rgb: bool = True, input_data_format=None) -> torch.Tensor:
        """
        A PIL image or an array as a tensor (channels, height, width) that keeps its dtype.

        PIL images are converted as PIL does (`Image.convert("RGB")`, the original's conversion: transparency is
        dropped, not blended), except that 16-bit grey is scaled instead of clipped to white. Arrays follow suit: one
        channel is repeated, a fourth one is dropped.
        """
        if isinstance(image, PIL.Image.Image):
            if do_convert_rgb and image.mode != "RGB":
                if image.mode.startswith("I;16"):
                    image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                image = image.convert("RGB")
            image = np.array(image)
            input_data_format = ChannelDimension.LAST
        if isinstance(image, np.ndarray):
            # torch takes neither read-only arrays nor reversed ones (BGR to RGB by [..., ::-1]).
            is_plain = image.flags.writeable and min(image.strides) >= 0
            image = torch.from_numpy(image if is_plain else image.copy())
        if image.ndim == 2:
            image, input_data_format = image[None], ChannelDimension.FIRST
        if input_data_format is None:
            input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        # A permuted view, not a copy: the resize kernels are fastest on pixels whose channels lie together.
        if ChannelDimension(input_data_format) == ChannelDimension.LAST:
            image = image.movedim(-1, -3)
        if do_convert_rgb and image.shape[-3] == 1:
            return image.expand(*image.shape[:-3], 3, *image.shape[-2:])
        return image[..., :3, :, :] if do_convert_rgb else image

    def fit(
        self,
        images: torch.Tensor,
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int,
        do_center_crop: bool | None,
        crop_size: SizeDict | None,
        do_pad_to_square: bool | None,
        image_mean: float | tuple[float, ...],
        antialias: bool | None,
        exact: bool | None,
        do_rescale: bool | None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Pads, resizes and crops images of one size, as far as the options ask for it.

        Args:
            images: (images, channels, height, width).

        Returns:
            (images, channels, new height, new width); uint8 stays uint8, except that `antialias=False` gives float32.
        """
        if exact and antialias and (images.dtype != torch.uint8 or images.shape[1] != 3):
            raise ValueError(
                f"exact=True works on RGB pixels of dtype uint8, as Pillow does; got {images.shape[1]} channels of "
                f"{images.dtype}. Convert them, or leave exact=False."
            )
        if do_rescale and images.is_floating_point() and images.max() <= 1:
            logger.warning_once(
                "Got pixels between 0 and 1, which do_rescale=True divides by 255 once more; pass do_rescale=False."
            )
        height, width = images.shape[-2:]
        if do_pad_to_square:
            height = width = max(height, width)
        new_height, new_width = height, width
        if do_resize and size.shortest_edge:
            new_height, new_width = (int(size.shortest_edge * n / min(height, width)) for n in (height, width))
        elif do_resize:
            new_height, new_width = size.height, size.width
        color = torch.tensor([int(255 * mean) for mean in np.atleast_1d(image_mean)], device=images.device)
        if images.is_floating_point() and not do_rescale:
            color = color / 255

        if antialias:
            images = _pad_and_resize(images, (height, width), (new_height, new_width), color, resample, bool(exact))
        else:
            images = _pad_axis(_pad_axis(images, -2, height, color), -1, width, color)
            images = tvF.resize(
                images.to(torch.float32),
                [new_height, new_width],
                interpolation=pil_torch_interpolation_mapping[resample],
                antialias=False,
            )

        if do_center_crop is None:
            do_center_crop = crop_size is not None or (do_resize and size.shortest_edge is not None)
        if do_center_crop:
            if crop_size is None:
                crop_size = SizeDict(height=size.shortest_edge, width=size.shortest_edge)
            if antialias:
                images = self.center_crop(images, crop_size)
            else:
                images = tvF.center_crop(images, [crop_size.height, crop_size.width])
        return images

    def finish(
        self,
        images: torch.Tensor,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
        exact: bool | None,
        **kwargs,
    ) -> torch.Tensor:
        """Rescales and normalises pixels (..., channels, height, width) of any batch to float32."""
        images = images.contiguous()
        if not exact:
            return self.rescale_and_normalize(images, do_rescale, rescale_factor, do_normalize, image_mean, image_std)
        # transformers' CLIPImageProcessor at the original's version: rescale in float64, normalise in float32.
        if do_rescale:
            images = (images.to(torch.float64) * rescale_factor).to(torch.float32)
        if do_normalize:
            mean, std = (
                torch.tensor(np.atleast_1d(value), dtype=torch.float32, device=images.device)
                for value in (image_mean, image_std)
            )
            images = images.to(torch.float32).sub(mean[:, None, None]).div_(std[:, None, None])
        return images


def _pad_and_resize(
    images: torch.Tensor,
    padded_size: tuple[int, int],
    new_size: tuple[int, int],
    color: torch.Tensor,
    resample: int,
    exact: bool,
) -> torch.Tensor:
    """Pads images (N, C, H, W) with `color`, then resizes them, antialiased; sizes are (height, width)."""
    (height, width), (new_height, new_width) = padded_size, new_size
    # Pillow (from version 13) resizes along the height first where that cuts much more than along the width, else
    # along the width first. The order matters: pixels between the two passes are rounded.
    passes = [(-1, width, new_width), (-2, height, new_height)]
    if height - new_height > max(0, 2 * (width - new_width)):
        passes.reverse()
    # torchvision is off by one level in a few pixels of each pass. A second pass that reduces averages that out; one
    # that enlarges could make it two levels, so there the first pass is Pillow's.
    _, length, new_length = passes[1]
    is_rgb = images.dtype == torch.uint8 and images.shape[1] == 3 and images.device.type == "cpu"
    use_pillow = exact or (is_rgb and new_length > length)
    for axis, length, new_length in passes:
        # A border of one colour is unchanged by the pass along the other axis, so it is added only before its own.
        images = _pad_axis(images, axis, length, color)
        images = _resize_axis(images, axis, new_length, resample, use_pillow)
        use_pillow = exact
    return images


def _pad_axis(images: torch.Tensor, axis: int, length: int, color: torch.Tensor) -> torch.Tensor:
    """Pads images (N, C, H, W) with `color` (C,) along one axis to `length`; the odd pixel goes to the end."""
    if images.shape[axis] == length:
        return images
    shape = list(images.shape)
    shape[axis] = length
    padded = torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)
    before = (length - images.shape[axis]) // 2
    after = before + images.shape[axis]
    for start, stop in ((0, before), (after, length)):
        padded.narrow(axis, start, stop - start).copy_(color[:, None, None])
    padded.narrow(axis, before, after - before).copy_(images)
    return padded


def _resize_axis(images: torch.Tensor, axis: int, length: int, resample: int, use_pillow: bool) -> torch.Tensor:
    """Resizes images (N, C, H, W) along one axis, antialiased, with Pillow or torchvision."""
    if images.shape[axis] == length:
        return images
    size = list(images.shape[-2:])
    size[axis] = length
    if not use_pillow:
        return tvF.resize(images, size, interpolation=pil_torch_interpolation_mapping[resample], antialias=True)
    resized = [
        np.asarray(PIL.Image.fromarray(np.ascontiguousarray(image)).resize(size[::-1], resample))
        for image in images.movedim(1, -1).cpu().numpy()
    ]
    return torch.from_numpy(np.stack(resized)).movedim(-1, 1)


def load_image(source: MediaSource) -> PIL.Image.Image:
    """
    Opens an image file and turns it upright (EXIF orientation).

    Args:
        source: What the media module reads (a path, an http(s) URL, a `data:` URI, bytes or a binary file object), or
            a base64 string.

    Raises:
        FileNotFoundError: There is no such file.
        MediaError: The download fails, or the data is not an image that Pillow can read, or it is cut off.
        TypeError: The source is of another type.
    """
    media, name = fetch_media(source), name_source(source)
    if isinstance(media, str) and not os.path.exists(media):
        try:
            media = base64.b64decode(media, validate=True)
        except ValueError:
            raise FileNotFoundError(f"There is no image file {name}, and it is not base64 either.") from None
    try:
        image = PIL.Image.open(BytesIO(media) if isinstance(media, bytes) else media)
    except (PIL.UnidentifiedImageError, IsADirectoryError) as error:
        raise MediaError(f"{name} is not an image that Pillow can read.") from error
    try:
        image.load()  # not later, where the name is not known
    except (OSError, SyntaxError) as error:
        raise MediaError(f"{name} is cut off or damaged: {error}.") from error
    return PIL.ImageOps.exif_transpose(image)


@auto_docstring(
    custom_intro="""
    Turns images into `pixel_values` (images, 3, height, width), float32.

    The defaults are CLIP ViT-L/14-336's. The `preprocessor_config.json` of a CLIP or SigLIP repository, which is what
    original checkpoints refer to, loads as it is: `VideoLlama2ImageProcessor(**config)`. See
    [`VideoLlama2PixelsMixin`] for the three families of towers and [`VideoLlama2ImageProcessorKwargs`] for the
    options beyond transformers' own.

    Images may be PIL images of any mode, arrays or tensors (height, width, 3) or (3, height, width), or anything that
    [`load_image`] opens. The EXIF orientation is applied to files, which the original ignores; a PIL image is taken
    as it is.
    """
)
class VideoLlama2ImageProcessor(VideoLlama2PixelsMixin, TorchvisionBackend):
    valid_kwargs = VideoLlama2ImageProcessorKwargs
    model_input_names = ["pixel_values"]

    def __init__(self, **kwargs: Unpack[VideoLlama2ImageProcessorKwargs]):
        super().__init__(**kwargs)

    def fetch_images(self, image_url_or_urls):
        """Opens whatever is not an image object yet, in lists nested to any depth; see [`load_image`]."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if not is_valid_image(image_url_or_urls):
            return load_image(image_url_or_urls)
        if not isinstance(image_url_or_urls, PIL.Image.Image) and image_url_or_urls.ndim == 2:
            return image_url_or_urls[None]
        return image_url_or_urls

    def process_image(self, image, do_convert_rgb=None, input_data_format=None, device=None, **kwargs) -> torch.Tensor:
        """One image as a tensor (channels, height, width) on `device`."""
        image = self.to_rgb_tensor(image, do_convert_rgb, input_data_format)
        return image if device is None else image.to(device)

    def _preprocess(
        self,
        images: list[torch.Tensor],
        disable_grouping: bool | None = None,
        return_tensors: str | TensorType | None = None,
        **kwargs,
    ) -> BatchFeature:
        groups, order = group_images_by_shape(images, disable_grouping=disable_grouping)
        groups = {shape: self.finish(self.fit(stacked, **kwargs), **kwargs) for shape, stacked in groups.items()}
        pixel_values = reorder_images(groups, order)
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)


__all__ = ["VideoLlama2ImageProcessor", "VideoLlama2ImageProcessorKwargs", "VideoLlama2PixelsMixin", "load_image"]
