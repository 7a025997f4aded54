"""Features of frozen towers on disk: every medium is encoded once, and the connectors train from what was kept."""

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import logging

from ..media_videollama2 import MediaError
from ..messages_videollama2 import collect_media, prepare_messages
from ..processing_videollama2 import VideoLlama2Processor
from ..prompt_videollama2 import split_at_placeholders
from .data import RawRow, Rows
from .dataset import VideoLlama2Dataset, VideoLlama2IterableDataset
from .encoding import RowEncoder
from .fingerprints import FileDigests, check_is_constant, find_difference, get_fingerprint, replace_file


logger = logging.get_logger(__name__)

T = TypeVar("T", VideoLlama2Dataset, VideoLlama2IterableDataset)
Kind = Literal["image", "video", "audio", "track"]  # a track is the sound of a video

_INPUTS = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}


@dataclass(frozen=True)
class Medium:
    """An image, a video (its frames), a sound or the sound of a video, as a row names it."""

    kind: Kind
    content: Any

    @property
    def modality(self) -> str:
        return "audio" if self.kind == "track" else self.kind


class FeatureCache:
    """
    A folder of tower outputs, one file per medium, that training reads in place of media.

    What is kept is the `last_hidden_state` of the towers in their dtype, before the connectors, in files named by the
    content of the medium, the part of it that is taken and the options of its block. A medium that stands in many
    rows, or under several names, is encoded once.

    ```python
    cache = FeatureCache("features", model, dataset.encode.processor)
    cache.build(dataset, num_workers=4)
    dataset = cache.attach(dataset)  # rows with features; no medium is decoded, no tower runs
    ```

    Args:
        folder: Where the features are; made by the first use.
        model: The model whose towers are frozen (see [`prepare_for_training`]), whole: not yet sharded by FSDP, and
            not loaded under ZeRO-3. May be a PEFT model.
        processor: The processor that reads the rows (`dataset.encode.processor`).

    Raises:
        ValueError: A tower trains, frames are flipped at random, or the folder holds the features of another tower
            or of other settings of the processor.
    """

    def __init__(self, folder: str | os.PathLike, model: Any, processor: VideoLlama2Processor):
        self.folder = Path(folder)
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.processor = processor
        check_is_constant(self.model.model, processor)
        self._check_fingerprint(get_fingerprint(self.model, processor))
        self._digests = FileDigests(self.folder)

    def _check_fingerprint(self, expected: dict[str, Any]) -> None:
        path = self.folder / "cache.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, lambda new: new.write_text(json.dumps(expected, indent=1), encoding="utf-8"))
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        name = find_difference(found, expected)
        if name is not None:
            raise ValueError(
                f"The features in {self.folder} were made with another {name}, so they are not those of this model "
                "and processor. Delete the folder or choose another one, and build the cache again."
            )

    def build(
        self,
        dataset: VideoLlama2Dataset | VideoLlama2IterableDataset,
        num_workers: int = 0,
        show_progress: bool = True,
    ) -> int:
        """
        Encodes those media of a data set that are not in the cache yet; what an interrupted build wrote is kept.

        Under `torchrun` the processes share the work.

        Args:
            num_workers: Processes that read media ahead of the towers.

        Returns:
            How many media this process encoded.

        Raises:
            ValueError, OSError: A medium cannot be read, unless the data set skips those (`on_unreadable="skip"`).
        """
        rank, world_size = _get_rank()
        skips = dataset.on_unreadable == "skip"
        options = {"disable": not show_progress or rank != 0, "mininterval": 1.0}
        missing: dict[Path, tuple[Medium, RawRow]] = {}
        rows = dataset.rows
        raw_rows = (rows.raw(index) for index in range(len(rows))) if isinstance(rows, Rows) else rows
        num_rows = len(rows) if isinstance(rows, Rows) else None
        raw_rows = logging.tqdm(raw_rows, total=num_rows, desc="Looking for media", **options)
        for row in islice(raw_rows, rank, None, world_size):
            for medium in self._media(row.read()["messages"]):
                try:
                    path = self._path(medium)
                except (OSError, MediaError) as error:
                    if not skips:
                        raise type(error)(f"{row.describe()}: {error}") from error
                    continue  # the data set says which row it is when it comes to it
                if not path.exists():
                    missing.setdefault(path, (medium, row))
        self._digests.save(rank)

        reader: Any = _MediaReader(self.processor, [medium for medium, _ in missing.values()])
        reader = DataLoader(reader, batch_size=None, num_workers=num_workers)
        is_training = self.model.training
        self.model.eval()
        try:
            progress = logging.tqdm(zip(missing.items(), reader), total=len(missing), desc="Encoding media", **options)
            for (path, (medium, row)), inputs in progress:
                if isinstance(inputs, str) and not skips:
                    raise MediaError(f"{row.describe()}: {inputs}")
                path.parent.mkdir(exist_ok=True)
                if isinstance(inputs, str):
                    write = partial(Path.write_text, data=inputs, encoding="utf-8")
                    replace_file(path.with_suffix(".error"), write)
                else:
                    self._encode(path, medium, inputs)
        finally:
            self.model.train(is_training)
        if world_size > 1:
            torch.distributed.barrier()
        self._digests = FileDigests(self.folder)
        logger.info(f"{len(missing)} media were encoded into {self.folder}.")
        return len(missing)

    @torch.no_grad()
    def _encode(self, path: Path, medium: Medium, inputs: Mapping[str, torch.Tensor]) -> None:
        """Runs the tower on one medium, as the processor gives it, and writes the file."""
        modality = medium.modality
        pixels = inputs.get(_INPUTS[modality])
        metadata = {"shape": [0], "num_valid": 0}
        features = torch.empty(0)  # a silent video under missing_audio="drop"
        if pixels is not None:
            base, device = self.model.model, self.model.device
            encode, options = getattr(base, f"get_{modality}_features"), {}
            if modality == "audio":
                options["input_features_mask"] = inputs["input_features_mask"].to(device)
            features = encode(pixels.to(device), return_dict=True, **options).last_hidden_state
            features = features if modality == "video" else features[0]
            if modality == "audio":
                features = features[base.audio_tower.get_token_mask(options["input_features_mask"])[0]]
                metadata["num_valid"] = int(inputs["input_features_mask"].sum())
            metadata["shape"] = list(pixels.shape[1:])
        text = {name: json.dumps(value) for name, value in metadata.items()}
        replace_file(path, lambda new: save_file({"features": features.cpu().contiguous()}, new, text))

    def attach(self, dataset: T) -> T:
        """
        The same rows with features in place of media: `mm_encoder_outputs` of
        [`~VideoLlama2ForConditionalGeneration.forward`], which [`VideoLlama2DataCollator`] joins.

        A medium that is not in the cache, or has changed since, is an error when its row is asked for.
        """
        encode = dataset.encode
        processor = _RecallingProcessor(
            **{name: getattr(encode.processor, name) for name in signature(VideoLlama2Processor).parameters}
        )
        processor.cache = self
        attached = copy.copy(dataset)
        attached.encode = _CachedRowEncoder(processor, encode.prompt_format, encode.max_length, encode.max_text_length)
        return attached

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None}  # the workers that read the features need no model

    def find(self, medium: Medium) -> tuple[torch.Tensor, dict[str, Any]]:
        """
        Features of a medium, and the shape of the input that they were made of.

        Raises:
            ValueError: The medium is not in the cache; `MediaError` if it could not be read when the cache was built.
        """
        path = self._path(medium)
        if not path.exists():
            if path.with_suffix(".error").exists():
                raise MediaError(path.with_suffix(".error").read_text("utf-8"))
            raise ValueError(
                f"The {medium.kind} {_describe(medium.content)} is not in the feature cache {self.folder}: it was "
                "added or has changed since the cache was built. Build the cache again; what is there is kept."
            )
        with safe_open(path, framework="pt") as file:
            metadata = {name: json.loads(value) for name, value in file.metadata().items()}
            return file.get_tensor("features"), metadata

    def _media(self, messages: list[dict[str, Any]]) -> Iterator[Medium]:
        default = self.processor.load_audio_from_video and self.processor.has_audio
        images, videos, sounds, indices = collect_media([prepare_messages(messages)], default)
        yield from (Medium("image", image) for image in images[0])
        yield from (Medium("video", video) for video in videos[0])
        yield from (Medium("track", videos[0][index]) for index in indices if index is not None)
        yield from (Medium("audio", sound) for sound in sounds)

    def _path(self, medium: Medium) -> Path:
        """The file of a medium, there or not."""
        content, options = medium.content, {}
        if medium.kind != "image":
            options = {name: getattr(content, name) for name in content.__dataclass_fields__ if name != "source"}
            content = content.source
        if medium.kind == "track":
            options = {
                "start": options["start"],
                "end": options["end"],
                "missing": self.processor.missing_audio_policy,
            }
        key = [medium.kind, self._digests(content), sorted((k, v) for k, v in options.items() if v is not None)]
        name = hashlib.sha256(json.dumps(key, default=float).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"


class _MediaReader(Dataset):
    """Media as the processor gives them, or why they cannot be read; read by the workers of a `DataLoader`."""

    def __init__(self, processor: VideoLlama2Processor, media: list[Medium]):
        self.processor = processor
        self.media = media

    def __len__(self) -> int:
        return len(self.media)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor] | str:
        medium = self.media[index]
        heard = medium.kind == "track"
        arguments: dict[str, Any] = {medium.kind if medium.kind == "audio" else f"{medium.kind}s": [medium.content]}
        if medium.kind in ("video", "track"):
            # The frames of a video that is heard are another medium; two are the least that every connector takes.
            clip = replace(medium.content, num_frames=2, fps=None) if heard else medium.content
            arguments = {"videos": [clip], "load_audio_from_video": heard}
            arguments["audio_from_video_indices"] = [0] if heard else []
        try:
            return dict(self.processor(**arguments, return_tensors="pt"))
        except (OSError, ValueError) as error:
            return str(error)


class _RecallingProcessor(VideoLlama2Processor):
    """A processor that opens no media: it takes the features, and counts their placeholders, from a cache."""

    cache: FeatureCache

    def __call__(
        self, images=None, text=None, videos=None, audio=None, audio_from_video_indices=None, **kwargs
    ) -> BatchFeature:
        options = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        prompts = [split_at_placeholders(prompt) for prompt in ([text] if isinstance(text, str) else text)]
        heard = set(audio_from_video_indices or []) - {None}
        remaining = {
            self.image_token: iter([Medium("image", image) for row in images or [] for image in row]),
            self.video_token: iter([Medium("video", video) for row in videos or [] for video in row]),
            self.audio_token: iter([Medium("audio", sound) for sound in audio or []]),
        }
        features: dict[str, list[torch.Tensor]] = {}
        inputs: dict[str, list[torch.Tensor]] = {}
        expansions, num_videos = [], 0
        for token in [token for prompt in prompts for token in prompt[1::2]]:
            media = [next(remaining[token])]
            if media[0].kind == "video":
                media += [Medium("track", media[0].content)] if num_videos in heard else []
                num_videos += 1
            expansion = []
            for medium in media:
                found, metadata = self.cache.find(medium)
                if not len(found):
                    continue
                modality = medium.modality
                features.setdefault(modality, []).append(found)
                # Stands for the input, of which only the shape is asked from here on.
                blank = torch.empty(metadata["shape"], device="meta")
                if modality == "audio":
                    blank = (torch.arange(metadata["shape"][0]) < metadata["num_valid"]).long()
                inputs.setdefault("input_features_mask" if modality == "audio" else _INPUTS[modality], []).append(
                    blank
                )
                count = getattr(self, f"_num_{modality}_tokens")(blank)
                expansion.append((getattr(self, f"{modality}_token"), count))
            expansions.append(expansion)
        data = {**self._tokenize(prompts, expansions, options), **inputs, "mm_encoder_outputs": features}
        return BatchFeature(
            data,
            tensor_type=options["text_kwargs"].get("return_tensors"),
            skip_tensor_conversion=[*self.skip_tensor_conversion, *inputs, "mm_encoder_outputs"],
        )


class _CachedRowEncoder(RowEncoder):
    """[`RowEncoder`] whose media are `mm_encoder_outputs`: features by modality, without a batch dimension."""

    def __call__(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = super().__call__(messages)
        return {name: value for name, value in inputs.items() if name in ("input_ids", "labels", "mm_encoder_outputs")}


def _get_rank() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _describe(content: Any) -> str:
    source = getattr(content, "source", content)
    return str(source) if isinstance(source, (str, os.PathLike)) else f"in memory (a {type(source).__name__})"


__all__ = ["FeatureCache"]
