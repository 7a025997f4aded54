"""
The order in which rows are trained: grouped by length (media counted), as the original groups, or in a fixed mixture.

All orders follow from a seed and the epoch alone, so that a run that is continued sees the rows it would have seen.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Any

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """
    Indices in an order that depends on the seed and the epoch; a Trainer or a data loader of accelerate calls
    `set_epoch`.
    """

    def __init__(self, num_rows: int, seed: int = 0):
        self.num_rows = num_rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self, generator: torch.Generator) -> list[int]:
        """Indices of one epoch."""
        return torch.randperm(self.num_rows, generator=generator).tolist()

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(torch.Generator().manual_seed(self.seed + self.epoch)))


class LengthGroupedSampler(EpochSampler):
    """
    Batches of rows of similar length, so that little is padding; the longest row comes first.

    Args:
        lengths: Tokens of every row, those of its images, videos and sounds included.
        batch_size: Rows that are optimised together: per device x devices x accumulated batches.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0):
        super().__init__(len(lengths), seed)
        self.lengths = list(lengths)
        self.batch_size = batch_size

    def order(self, generator: torch.Generator) -> list[int]:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        return get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)


class ModalityLengthGroupedSampler(EpochSampler):
    """
    The original's `group_by_modality_length`, for parity: every batch over all devices holds rows with media or rows
    of text only, but for one left-over batch at the end; within it rows are sorted and dealt out to the devices.

    Args:
        lengths: Signed as the original's: positive for rows with media, negative for rows of text only.
        batch_size: Rows per device.
        world_size: Devices (the original multiplies by accumulated batches).
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, world_size: int = 1, seed: int = 0):
        super().__init__(len(lengths), seed)
        if 0 in lengths:
            raise ValueError(
                f"Row {list(lengths).index(0)} has length 0; give every row with media a positive length."
            )
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.world_size = world_size

    def order(self, generator: torch.Generator) -> list[int]:
        groups = [[i for i, n in enumerate(self.lengths) if n > 0], [i for i, n in enumerate(self.lengths) if n < 0]]
        if not all(groups):  # one kind only; of text alone the original sorts the negative lengths
            return self._shuffle(range(self.num_rows), self.lengths, generator)
        size = self.batch_size * self.world_size
        lengths = [abs(n) for n in self.lengths]
        batches, rest = [], []
        for group in groups:
            shuffled = self._shuffle(group, lengths, generator)
            parts = [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
            batches += parts[:-1]
            rest += parts[-1]
        order = torch.randperm(len(batches), generator=generator).tolist()
        return [i for batch in order for i in batches[batch]] + sorted(rest)

    def _shuffle(self, rows: Sequence[int], lengths: Sequence[int], generator: torch.Generator) -> list[int]:
        size = self.batch_size * self.world_size
        order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        dealt = []
        for start in range(0, len(order), size):
            batch = sorted(order[start : start + size], key=lambda i: lengths[i], reverse=True)
            dealt += self._deal(batch, lengths)
        return dealt

    def _deal(self, batch: list[int], lengths: Sequence[int]) -> list[int]:
        """Rows of one sorted batch to the devices: each to the one with the least so far."""
        if len(batch) % self.world_size != 0:
            return [i for device in range(self.world_size) for i in batch[device :: self.world_size]]
        share = len(batch) // self.world_size
        hands: list[list[int]] = [[] for _ in range(self.world_size)]
        for i in batch:
            open_hands = [hand for hand in hands if len(hand) < share]
            min(open_hands, key=lambda hand: sum(lengths[j] for j in hand)).append(i)
        return [i for hand in hands for i in hand]


class ModalityMixSampler(EpochSampler):
    """
    Batches in which the modalities stand in a fixed ratio; audio-visual : video : audio = 2 : 1 : 1 in the paper's
    joint tuning (the original's `MixSampler`).

    An epoch shows every row of the modality that lasts longest once; rows of the others come again, in a new order.

    Args:
        modalities: Of every row, see [`get_row_modality`].
        mix: Rows per modality; a batch is a whole number of such mixtures.
        batch_size: Rows per device.

    Raises:
        ValueError: A batch is no whole number of mixtures, a modality of the mixture has no rows, or a row has a
            modality that the mixture does not name.
    """

    def __init__(self, modalities: Sequence[str], mix: Mapping[str, int], batch_size: int, seed: int = 0):
        super().__init__(len(modalities), seed)
        mix = {modality: count for modality, count in mix.items() if count}
        unit = sum(mix.values())
        ratio = " : ".join(f"{count} {modality}" for modality, count in mix.items())
        if not unit or batch_size % unit != 0:
            raise ValueError(
                f"A batch of {batch_size} rows per device cannot be mixed {ratio or '(nothing)'}; choose a "
                f"multiple of {unit or 1}."
            )
        self.rows: dict[str, list[int]] = {modality: [] for modality in mix}
        for i, modality in enumerate(modalities):
            if modality not in self.rows:
                raise ValueError(
                    f"Row {i} is {modality!r}, but the mixture is {ratio}. Give the modality a share, or leave such "
                    "rows out."
                )
            self.rows[modality].append(i)
        missing = [modality for modality, rows in self.rows.items() if not rows]
        if missing:
            raise ValueError(f"The mixture is {ratio}, but no row is {' or '.join(missing)}; add data or change it.")
        self.mix = mix
        self.num_units = max(ceil(len(self.rows[modality]) / count) for modality, count in mix.items())

    def __len__(self) -> int:
        return self.num_units * sum(self.mix.values())

    def order(self, generator: torch.Generator) -> list[int]:
        streams = {modality: _repeat_shuffled(rows, generator) for modality, rows in self.rows.items()}
        return [
            next(streams[modality])
            for _ in range(self.num_units)
            for modality, count in self.mix.items()
            for _ in range(count)
        ]


def _repeat_shuffled(rows: list[int], generator: torch.Generator) -> Iterator[int]:
    while True:
        for i in torch.randperm(len(rows), generator=generator).tolist():
            yield rows[i]


def get_row_modality(row: Mapping[str, Any], hears_videos: bool) -> str:
    """
    Modality of a row of messages: `"audio_visual"`, `"video"` (a row with images counts as one), `"audio"` or
    `"text"`.

    Args:
        row: `{"messages": [...]}` with typed content blocks.
        hears_videos: Whether the sound of a video is heard where its block does not say (`load_audio_from_video`).
    """
    sees = hears = False
    for message in row["messages"]:
        for block in message["content"] if not isinstance(message["content"], str) else ():
            if block["type"] == "video":
                heard = block.get("load_audio_from_video")
                sees, hears = True, hears or (hears_videos if heard is None else heard)
            elif block["type"] == "image":
                sees = True
            elif block["type"] == "audio":
                hears = True
    if sees and hears:
        return "audio_visual"
    return "video" if sees else "audio" if hears else "text"


def get_signed_word_count(row: Mapping[str, Any]) -> int:
    """
    Length of a row of messages by the original's `modality_lengths`: its words, a placeholder being one; negative for
    rows of text only. (VideoLLaMA 2 forgets videos and sounds there; Video-LLaVA, whose recipe groups, does not.)
    """
    words, media = 0, 0
    for message in row["messages"]:
        blocks = message["content"]
        for block in [{"type": "text", "text": blocks}] if isinstance(blocks, str) else blocks:
            if block["type"] == "text":
                words += len(block["text"].split())
            else:
                media += 1
    return words + media if media else -max(words, 1)


__all__ = [
    "EpochSampler",
    "LengthGroupedSampler",
    "ModalityLengthGroupedSampler",
    "ModalityMixSampler",
    "get_row_modality",
    "get_signed_word_count",
]
