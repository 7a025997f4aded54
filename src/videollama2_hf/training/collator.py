"""Rows of training data to batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..processing_videollama2 import VideoLlama2Processor
from .conversations import RowFormat, to_messages
from .encoding import RowEncoder


class VideoLlama2DataCollator:
    """
    Joins rows to a batch for [`VideoLlama2ForConditionalGeneration`], for `Trainer` (with
    `remove_unused_columns=False`) and TRL's `SFTTrainer`.

    Rows may hold any number of media of any kind, or none. Text is padded on the right; padding, questions and media
    are -100 in `labels`.

    Args:
        processor: The model's processor.
        packing: Whether to put the rows of a batch one behind the other into one row without padding. Positions begin
            anew with every row, from which transformers' attention (eager, sdpa, flash, flex) knows that rows do not
            see each other. The loss is that of the padded batch. For stages whose rows are short. The model must not
            use a cache (`use_cache=False`, which `Trainer` sets), or the rows do see each other.
        pad_to_multiple_of: Pads the length of a batch to a multiple of this number.
        media_root, format, load_audio_from_video: How to read rows that are not encoded yet; see [`to_messages`].
        **encoding: How to encode them, see [`RowEncoder`]: `prompt_format`, `max_length`, `max_text_length`.
    """

    def __init__(
        self,
        processor: VideoLlama2Processor,
        packing: bool = False,
        pad_to_multiple_of: int | None = None,
        media_root: str | None = None,
        format: RowFormat = "auto",
        load_audio_from_video: bool | None = None,
        **encoding: Any,
    ):
        if packing and pad_to_multiple_of is not None:
            raise ValueError(
                "A packed batch has no padding, so packing=True and pad_to_multiple_of exclude each other."
            )
        self.encode = RowEncoder(processor, **encoding)
        self.packing = packing
        self.pad_to_multiple_of = pad_to_multiple_of
        self.reading: dict[str, Any] = {
            "format": format,
            "media_root": media_root,
            "load_audio_from_video": load_audio_from_video,
        }

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        A batch of rows: what [`VideoLlama2Dataset`] gives, or rows of any format that [`to_messages`] reads.

        Returns:
            `input_ids`, `labels` and `attention_mask` (batch, length), and as far as there are such media
            `pixel_values`, `pixel_values_videos`, `input_features` and `input_features_mask`, in reading order over
            the batch; of rows from a [`FeatureCache`], `mm_encoder_outputs`. With `packing`, `position_ids` in place
            of `attention_mask`, and a batch of one row.
        """
        if not rows:
            raise ValueError("There is no row to make a batch of.")
        encoded = [row if "input_ids" in row else self.encode(to_messages(row, **self.reading)) for row in rows]
        batch = self._pack(encoded) if self.packing else self._pad(encoded)
        return {**batch, **_join_media(encoded)}

    def _pad(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        fill = {"input_ids": self.encode.processor.tokenizer.pad_token_id, "labels": -100, "attention_mask": 0}
        batch = {}
        for name, value in fill.items():
            values = [torch.ones_like(row["input_ids"]) if name == "attention_mask" else row[name] for row in rows]
            batch[name] = pad_sequence(values, batch_first=True, padding_value=value)
            missing = -batch[name].shape[1] % (self.pad_to_multiple_of or 1)
            if missing:
                batch[name] = torch.nn.functional.pad(batch[name], (0, missing), value=value)
        return batch

    def _pack(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        flatten = DataCollatorWithFlattening(return_tensors="pt")
        return dict(flatten([{name: row[name] for name in ("input_ids", "labels")} for row in rows]))


def _join_media(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The media of all rows, each kind by itself; a list where videos differ in their numbers of frames."""
    joined: dict[str, Any] = {}
    for name in ("pixel_values", "pixel_values_videos", "input_features", "input_features_mask"):
        media = [medium for row in rows if row.get(name) is not None for medium in row[name]]
        if media:
            joined[name] = _stack(media)
    features: dict[str, list[torch.Tensor]] = {}
    for row in rows:
        for modality, media in (row.get("mm_encoder_outputs") or {}).items():
            features.setdefault(modality, []).extend(media)
    if features:
        joined["mm_encoder_outputs"] = {
            modality: BaseModelOutputWithPooling(last_hidden_state=_stack(media))
            for modality, media in features.items()
        }
    return joined


def _stack(media: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    return torch.stack(media) if len({medium.shape for medium in media}) == 1 else media


__all__ = ["VideoLlama2DataCollator"]
