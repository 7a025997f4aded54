"""
Rows of the world as batches for training, without files: text is tokenised as the processor does, and pictures and
sound are drawn on the device that trains, from descriptions of a few hundred numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..configuration_videollama2 import VideoLlama2Config, get_num_audio_tokens
from .rendering import (
    describe_frames,
    describe_sounds,
    draw_frames,
    draw_sounds,
    frame_times,
    quantise,
    to_filter_banks,
)
from .rows import Row
from .world import SECONDS


DrawRow = Callable[[np.random.Generator], Row]
NUM_FILTER_BANK_FRAMES = 398
_MAX_KNOWN = 100_000


class RowTokenizer:
    """
    Input ids and labels of rows, equal to those of `training.RowEncoder` with the small model's processor.

    Args:
        prompt_format: `"chat"`, `"plain"` or `"plain_audio"`; see `training.RowEncoder`.
    """

    def __init__(self, tokenizer: Any, config: VideoLlama2Config, prompt_format: str = "chat"):
        self.prompt_format = prompt_format
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}
        video = [config.video_token_id] * config.num_visual_tokens("video")
        tower: Any = config.audio_config
        num_audio_tokens = get_num_audio_tokens(NUM_FILTER_BANK_FRAMES, tower.num_mel_bins, tower.patch_size)
        audio = [config.audio_token_id] * num_audio_tokens
        self.media = {
            "image": [config.image_token_id] * config.num_visual_tokens("image"),
            "video": video,
            "audio": audio,
            "audio_visual": video + audio,
            "text": [],
        }

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text; most pieces come again and again."""
        if text not in self.known:
            if len(self.known) >= _MAX_KNOWN:
                self.known.clear()
            self.known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.known[text]

    def __call__(self, row: Row, separate: bool = False) -> dict[str, torch.Tensor]:
        """
        `input_ids` and `labels`, int64 (length,).

        Args:
            separate: Whether every question is by itself: it sees the media or the text in front, but no other
                question and no answer that could tell what there is to see. Then there is also `branches`, int64
                (length,): 0 for what all see, and for the others the number of their question. For rows with media or
                a context.
        """
        media = self.media[row.medium]
        ids, labels, branches = [], [], []

        def add(tokens: list[int], is_label: bool, branch: int = 0) -> None:
            ids.extend(tokens)
            labels.extend(tokens if is_label else [-100] * len(tokens))
            branches.extend([branch] * len(tokens))

        lead = "\n" if media else ""
        if self.prompt_format == "plain":
            question = row.questions[0]
            add(media, False)
            add(self.encode(f"{lead}{question.text} {question.answer}"), True)
        if separate:
            # A full stop and the line break behind it are one token.
            shared = row.context.rstrip(".")
            lead = row.context[len(shared) :] + ("\n" if media or shared else "")
            add(self.encode("<|im_start|>user\n") + media + self.encode(shared), False)
            for number, question in enumerate(row.questions, 1):
                add(self.encode(f"{lead}{question.text}<|im_end|>\n<|im_start|>assistant\n"), False, number)
                add(self.encode(f"{question.answer}<|im_end|>\n"), True, number)
            return {
                name: torch.tensor(v) for name, v in zip(("input_ids", "labels", "branches"), (ids, labels, branches))
            }
        for turn, question in enumerate(row.questions if self.prompt_format != "plain" else ()):
            text = f"{row.context}\n{question.text}" if turn == 0 and row.context else question.text
            add(self.encode("<|im_start|>user\n"), False)
            if turn == 0:
                add(media, False)
                text = lead + text
            if self.prompt_format == "plain_audio":
                text = ""
            add(self.encode(f"{text}<|im_end|>\n<|im_start|>assistant\n"), False)
            add(self.encode(f"{question.answer}<|im_end|>\n"), True)
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


class WorldDataset(Dataset):
    """
    Rows by number; row `i` follows from `(seed, i)` alone, so a run that is continued sees what it would have.

    Args:
        separate: Share of the rows with media or a context whose questions are each by itself, see [`RowTokenizer`].
    """

    def __init__(self, tokenize: RowTokenizer, num_rows: int, seed: int, draw: DrawRow, separate: float = 0.0):
        self.tokenize, self.num_rows, self.seed, self.draw = tokenize, num_rows, seed, draw
        self.separate = separate

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = np.random.default_rng([self.seed, index])
        row = self.draw(generator)
        has_shared = row.medium != "text" or bool(row.context)
        return {"row": row, **self.tokenize(row, has_shared and generator.random() < self.separate)}


class WorldCollator:
    """
    Joins rows to a batch: `input_ids`, `labels`, `attention_mask`, and `drawn`, what [`draw_media`] makes media of.
    With rows whose questions are separate the mask is (rows, 1, length, length) and there are `position_ids`.

    Args:
        pieces: Rows of similar lengths come together in so many pieces of a batch, which then is `labels` and
            `pieces`, a list of batches: less padding, where a device is as fast on smaller ones.
    """

    def __init__(self, pad_token_id: int, num_frames: int = 8, pieces: int = 1):
        self.pad_token_id, self.times, self.pieces = pad_token_id, frame_times(num_frames), pieces

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if self.pieces == 1:
            return self._join(rows)
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        edges = [round(len(rows) * i / self.pieces) for i in range(self.pieces + 1)]
        pieces = [self._join(rows[start:stop]) for start, stop in zip(edges, edges[1:]) if start < stop]
        return {"labels": torch.cat([piece["labels"].flatten() for piece in pieces])[None], "pieces": pieces}

    def _join(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ids = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100),
        }
        if any("branches" in row for row in rows):
            branches = [row.get("branches", torch.zeros_like(row["input_ids"])) for row in rows]
            batch |= _separate(pad_sequence(branches, batch_first=True, padding_value=-1))
        else:
            batch["attention_mask"] = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        return {**batch, "drawn": describe_media([row["row"] for row in rows], self.times)}


def _separate(branches: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Mask and positions of rows whose questions do not see each other, as if each stood alone behind the media.

    Args:
        branches: int64 (rows, length); see [`RowTokenizer`], -1 for padding.
    """
    length = branches.shape[1]
    index = torch.arange(length)
    sees = (branches[:, None, :] == branches[:, :, None]) | (branches[:, None, :] == 0)
    sees &= (index[None, :] <= index[:, None]) & (branches[:, None, :] >= 0)
    num_shared = (branches == 0).sum(dim=1, keepdim=True)
    is_first = branches != torch.cat([branches[:, :1], branches[:, :-1]], dim=1)
    begins = torch.where(is_first, index, 0).cummax(dim=1).values
    positions = torch.where(branches > 0, index - begins + num_shared, index)
    # Added to the scores: every implementation of attention takes that, a boolean mask not all.
    mask = torch.zeros(sees.shape).masked_fill_(~sees, torch.finfo(torch.bfloat16).min)
    return {"attention_mask": mask[:, None], "position_ids": positions}


def describe_media(rows: Sequence[Row], times: np.ndarray) -> dict[str, Any]:
    """What [`draw_media`] needs to know of the images, videos and sounds of rows, each kind in reading order."""
    images = [row.clip for row in rows if row.medium == "image"]
    videos = [row.clip for row in rows if row.medium in ("video", "audio_visual")]
    sounds = [row.clip for row in rows if row.medium in ("audio", "audio_visual")]
    drawn: dict[str, Any] = {}
    if images:
        drawn["image"] = describe_frames(images, np.array([SECONDS / 2]))
    if videos:
        drawn["video"] = describe_frames(videos, times)
    if sounds:
        drawn["sound"] = describe_sounds(sounds)
    return drawn


@torch.no_grad()
def draw_media(
    drawn: dict[str, Any], side: int = 64, num_mel_bins: int = 64, imitate_codecs: bool = False
) -> dict[str, torch.Tensor]:
    """
    Model inputs of described media on their device: `pixel_values`, `pixel_values_videos`, `input_features` and
    `input_features_mask`, as the processor makes them of files that are coded without loss.

    Args:
        side: Of the pictures, in pixels.
        num_mel_bins: Of the filter banks.
        imitate_codecs: Whether half of the pictures lose what H.264 loses: colour at half the resolution, and some
            noise. For training.
    """
    device_type = next((next(iter(parts.values())).device.type for parts in drawn.values()), "cpu")
    with torch.autocast(device_type, enabled=False):  # drawn as precisely inside a forward in bfloat16
        return _draw(drawn, side, num_mel_bins, imitate_codecs)


def _draw(drawn: dict[str, Any], side: int, num_mel_bins: int, imitate_codecs: bool) -> dict[str, torch.Tensor]:
    inputs = {}
    for name, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if name in drawn:
            description = drawn[name]
            piece = 16 if description["radius"].device.type == "cpu" else len(description["radius"])
            names, parts = list(description), zip(*(value.split(piece) for value in description.values()))
            frames = torch.cat([draw_frames(dict(zip(names, part)), side) for part in parts])
            pixels = frames.float() / 127.5 - 1
            pixels = _imitate_codec(pixels) if imitate_codecs else pixels
            inputs[key] = pixels if name == "video" else pixels[:, 0]
    if "sound" in drawn:
        features = to_filter_banks(quantise(draw_sounds(drawn["sound"])), num_mel_bins)
        inputs["input_features"] = features
        inputs["input_features_mask"] = torch.ones(features.shape[:2], dtype=torch.long, device=features.device)
    return inputs


def _imitate_codec(pixels: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], device=pixels.device)[:, None, None]
    chosen = torch.rand(len(pixels), device=pixels.device) < 0.5
    coded = pixels[chosen].flatten(0, 1)
    if not len(coded):
        return pixels
    blurred = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(coded, 2), scale_factor=2.0)
    coded = blurred + ((coded - blurred) * weights).sum(dim=1, keepdim=True) + 0.02 * torch.randn_like(coded)
    pixels = pixels.clone()
    pixels[chosen] = coded.clamp(-1, 1).unflatten(0, (-1, pixels.shape[1]))
    return pixels


__all__ = ["RowTokenizer", "WorldCollator", "WorldDataset", "describe_media", "draw_media"]
