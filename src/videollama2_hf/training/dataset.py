"""Training data as the data sets of PyTorch: every row becomes model inputs with labels when it is asked for."""

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers.utils import logging

from ..media_videollama2 import MediaError, NoAudioTrackError
from ..processing_videollama2 import VideoLlama2Processor
from .data import RawRow, Rows, RowStream, load_rows
from .encoding import RowEncoder, RowTooLongError


logger = logging.get_logger(__name__)

UnreadablePolicy = Literal["stop", "skip"]

# What is wrong with single rows of large collections. Anything else is wrong with the data or the settings as a whole.
_ROW_ERRORS = (MediaError, NoAudioTrackError, OSError, RowTooLongError)
_MAX_WORKERS = 1024


class VideoLlama2Dataset(Dataset):
    """
    Rows by number as model inputs with labels, without a batch dimension; [`VideoLlama2DataCollator`] joins them.

    Media are read when a row is asked for, so in the workers of a `DataLoader`.

    Args:
        data: What [`load_rows`] takes, a mixture included, or what it gives.
        processor: The model's processor.
        on_unreadable: What to do about a row whose media cannot be read, or that is too long. `"stop"`: raise its
            error. `"skip"`: leave it out of its batch, log it and count it, see `skipped`. Only where nothing is left
            of a batch, the rows that follow are tried until one can be read, so that all processes take the same
            number of steps; that is logged too.
        seed: See [`load_rows`].
        **encoding: `prompt_format`, `max_length`, `max_text_length`; see [`RowEncoder`].
    """

    def __init__(
        self,
        data: Any,
        processor: VideoLlama2Processor,
        on_unreadable: UnreadablePolicy = "stop",
        seed: int = 0,
        **encoding: Any,
    ):
        self.rows = data if isinstance(data, Rows) else load_rows(data, seed=seed)
        self.encode = RowEncoder(processor, **encoding)
        self.on_unreadable = _check_policy(on_unreadable)
        # In shared memory, so that it knows what the workers skipped.
        self._is_skipped = torch.zeros(len(self.rows), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Model inputs of a row. One that cannot be read is an error here, whatever the policy for batches is."""
        return _encode(self.encode, self.rows.raw(index))

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Model inputs of a batch, as a `DataLoader` asks for them."""
        if self.on_unreadable == "stop":
            return [self[index] for index in indices]
        batch = [row for row in map(self._try, indices) if row is not None]
        for distance in range(1, len(self) if not batch else 0):
            index = (indices[-1] + distance) % len(self)
            row = self._try(index)
            if row is not None:
                logger.warning(f"{self.rows.raw(index).describe()} stands in for a batch of unreadable rows.")
                return [row]
        if not batch:
            raise RuntimeError("No row of the data set can be read. `videollama2 data check --media` says why.")
        return batch

    def _try(self, index: int) -> dict[str, Any] | None:
        try:
            return self[index]
        except _ROW_ERRORS as error:
            logger.warning(f"Skipped: {error}")
            self._is_skipped[index] = True
            return None

    @property
    def skipped(self) -> list[int]:
        """Numbers of the rows that were skipped so far, in all workers of this process."""
        return self._is_skipped.nonzero().flatten().tolist()

    def num_tokens(self, index: int) -> int:
        """Tokens of a row, those of its media included, without decoding media; see [`RowEncoder.num_tokens`]."""
        return self.encode.num_tokens(self.rows[index]["messages"])


class VideoLlama2IterableDataset(IterableDataset):
    """
    [`VideoLlama2Dataset`] for data that are read in their order: each worker of a `DataLoader` takes its share of the
    rows, and unreadable rows are left out by the policy `"skip"`.

    Args:
        data, processor, on_unreadable, seed, **encoding: See [`VideoLlama2Dataset`]; `seed` also decides the order.
        shuffle_buffer: Rows (without their media) to hold and draw from, for an order that is not that of the file.
    """

    def __init__(
        self,
        data: Any,
        processor: VideoLlama2Processor,
        on_unreadable: UnreadablePolicy = "stop",
        seed: int = 0,
        shuffle_buffer: int = 0,
        **encoding: Any,
    ):
        self.rows = data if isinstance(data, RowStream) else load_rows(data, streaming=True, seed=seed)
        self.encode = RowEncoder(processor, **encoding)
        self.on_unreadable = _check_policy(on_unreadable)
        self.seed, self.shuffle_buffer, self.epoch = seed, shuffle_buffer, 0
        self._num_skipped = torch.zeros(_MAX_WORKERS, dtype=torch.long).share_memory_()  # by worker

    def set_epoch(self, epoch: int) -> None:
        """Another order for every epoch; `Trainer` calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for raw in islice(self._shuffle(iter(self.rows)), number, None, num_workers):
            try:
                yield _encode(self.encode, raw)
            except _ROW_ERRORS as error:
                if self.on_unreadable == "stop":
                    raise
                logger.warning(f"Skipped: {error}")
                self._num_skipped[number] += 1

    def _shuffle(self, rows: Iterator[RawRow]) -> Iterator[RawRow]:
        if not self.shuffle_buffer:
            yield from rows
            return
        generator = random.Random(f"{self.seed} {self.epoch}")
        held = list(islice(rows, self.shuffle_buffer))
        for row in rows:
            place = generator.randrange(len(held))
            yield held[place]
            held[place] = row
        generator.shuffle(held)
        yield from held

    @property
    def num_skipped(self) -> int:
        """How many rows were skipped so far, in all workers of this process."""
        return int(self._num_skipped.sum())


def _check_policy(policy: UnreadablePolicy) -> UnreadablePolicy:
    if policy not in get_args(UnreadablePolicy):
        raise ValueError(f"on_unreadable must be 'stop' or 'skip', got {policy!r}.")
    return policy


def _encode(encode: RowEncoder, raw: RawRow) -> dict[str, Any]:
    """Model inputs of a row; an error names the row and keeps its class."""
    messages = raw.read()["messages"]
    try:
        return encode(messages)
    except _ROW_ERRORS as error:
        kind = type(error) if isinstance(error, ValueError) else OSError
        raise kind(f"{raw.describe()}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{raw.describe()}: {error}") from error


__all__ = ["VideoLlama2Dataset", "VideoLlama2IterableDataset"]
