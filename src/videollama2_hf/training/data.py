"""Files and data sets of training rows, alone or mixed: which rows there are, and how each is read."""

import glob
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, overload

import numpy as np

from .conversations import RowFormat, to_messages


_INSTALL_HINT = "needs the package datasets: pip install videollama2-hf[train]"


@dataclass(frozen=True)
class DataSource:
    """
    A file or data set of rows.

    Args:
        path: A `.json`, `.jsonl` or `.parquet` file, WebDataset shards (`.tar`), a pattern of such names, a folder
            written by `datasets.Dataset.save_to_disk`, the name of a data set on the Hub, or the rows themselves: a
            `datasets.Dataset` or `IterableDataset`, or a list of dicts.
        media_root: Folder that relative paths of media start from. `None`: that of the file.
        format: How rows are written, see [`to_messages`].
        weight: How often every row is seen in an epoch. 2: twice; 0.5: half of the rows, drawn once, are seen.
        load_audio_from_video: Whether to hear videos whose rows do not say; `None` leaves it to the processor. In the
            original's joint stage audio-visual rows are heard, video rows are not.
        split: Split of a data set.
    """

    path: str | Any
    media_root: str | None = None
    format: RowFormat = "auto"
    weight: float = 1.0
    load_audio_from_video: bool | None = None
    split: str = "train"

    def __post_init__(self):
        if not self.weight > 0:
            raise ValueError(f"The weight of a source must be above 0, got {self.weight}; leave the source out.")

    @property
    def name(self) -> str:
        return os.fspath(self.path) if _is_path(self.path) else f"the {type(self.path).__name__}"

    @property
    def folder(self) -> str | None:
        """Where relative paths of media start; `None`: the working directory."""
        is_file = _is_path(self.path) and os.path.splitext(self.path)[1] != ""
        return os.path.dirname(os.path.abspath(self.path)) if self.media_root is None and is_file else self.media_root


class RawRow(NamedTuple):
    """A row as it is stored, and where."""

    source: DataSource
    number: int
    content: Mapping[str, Any]

    def read(self) -> dict[str, Any]:
        """
        The row as `id` (or `None`) and `messages`.

        Raises:
            ValueError: See [`to_messages`]; the message names the row.
        """
        source = self.source
        try:
            messages = to_messages(self.content, source.format, source.folder, source.load_audio_from_video)
        except ValueError as error:
            raise ValueError(f"{self.describe()}: {error}") from error
        return {"id": self.id, "messages": messages}

    @property
    def id(self) -> Any:
        if not isinstance(self.content, Mapping):
            return None
        return self.content.get("id", self.content.get("__key__"))

    def describe(self) -> str:
        number = f"Row {self.number}" + ("" if self.id is None else f" (id {self.id})")
        return f"{number} of {self.source.name}"


class Rows(Sequence):
    """
    The rows of one or several sources under one numbering, each read when it is asked for.

    Sources follow one another, each as often as its weight says; of a part of a source, `seed` decides which rows.
    """

    def __init__(self, sources: Sequence[DataSource], seed: int = 0):
        self.sources = list(sources)
        self.stored = [open_rows(source, streaming=False) for source in self.sources]
        for source, stored in zip(self.sources, self.stored):
            if not hasattr(stored, "__len__"):
                raise ValueError(f"The rows of {source.name} have no numbers; read them as a stream (streaming=True).")
            if len(stored) == 0:
                raise ValueError(f"There are no rows in {source.name}.")
        generator = np.random.default_rng(seed)
        chosen = [_choose(len(stored), source.weight, generator) for source, stored in zip(self.sources, self.stored)]
        self.source_of = np.repeat(np.arange(len(chosen)), [len(numbers) for numbers in chosen])
        self.number_of = np.concatenate(chosen)

    def __len__(self) -> int:
        return len(self.number_of)

    def raw(self, index: int) -> RawRow:
        """The row as it is stored."""
        source, number = int(self.source_of[index]), int(self.number_of[index])
        return RawRow(self.sources[source], number, self.stored[source][number])

    def __getitem__(self, index):
        """`{"id": ..., "messages": [...]}` of a row; raises as [`RawRow.read`]."""
        return self.raw(int(index)).read()


class RowStream(Iterable):
    """
    The rows of one or several sources in their order, none of them held.

    Of several sources, the next row is of one that is drawn by how many rows are to come from it, or among sources
    whose lengths are not known, evenly. Weights mean what they mean to [`Rows`].
    """

    def __init__(self, sources: Sequence[DataSource], seed: int = 0):
        self.sources, self.seed = list(sources), seed

    def __iter__(self) -> Iterator[RawRow]:
        generator = np.random.default_rng(self.seed)
        stored = [open_rows(source, streaming=True) for source in self.sources]
        if all(hasattr(rows, "__len__") for rows in stored):
            sizes = np.array([source.weight * len(rows) for source, rows in zip(self.sources, stored)], float)
        else:
            sizes = np.ones(len(stored))
        iterators = [_iterate(source, rows, generator) for source, rows in zip(self.sources, stored)]
        while sizes.any():
            drawn = int(generator.choice(len(sizes), p=sizes / sizes.sum())) if len(sizes) > 1 else 0
            row = next(iterators[drawn], None)
            if row is None:
                sizes[drawn] = 0
            else:
                yield row


@overload
def load_rows(data: Any, streaming: Literal[False] = False, seed: int = 0) -> Rows: ...


@overload
def load_rows(data: Any, streaming: Literal[True], seed: int = 0) -> RowStream: ...


def load_rows(data: Any, streaming: bool = False, seed: int = 0) -> Rows | RowStream:
    """
    Opens training data.

    Args:
        data: A [`DataSource`], a list of them (a mixture), or what the `path` of one takes.
        streaming: Whether to read the rows in their order only, which needs no space for them.
        seed: Decides the order of a mixed stream, and which rows are seen by a weight that is no whole number.

    Raises:
        ValueError, FileNotFoundError: There is no such file, or it is not what its name says.
    """
    is_mixture = isinstance(data, (list, tuple)) and len(data) > 0 and all(isinstance(s, DataSource) for s in data)
    sources = list(data) if is_mixture else [data if isinstance(data, DataSource) else DataSource(data)]
    return RowStream(sources, seed) if streaming else Rows(sources, seed)


def _choose(length: int, weight: float, generator: np.random.Generator) -> np.ndarray:
    """Numbers of the rows that are seen of a source of `length` rows."""
    whole = np.tile(np.arange(length), int(weight))
    part = generator.choice(length, round((weight - int(weight)) * length), replace=False)
    return np.concatenate([whole, np.sort(part)])


def _iterate(source: DataSource, stored: Iterable, generator: np.random.Generator) -> Iterator[RawRow]:
    """The rows that are seen of a source, in their order."""
    if isinstance(stored, Sequence):
        numbers = _choose(len(stored), source.weight, generator).tolist()
        return (RawRow(source, number, stored[number]) for number in numbers)
    return _iterate_unsized(source, stored, generator)


def _iterate_unsized(source: DataSource, stored: Iterable, generator: np.random.Generator) -> Iterator[RawRow]:
    """As [`_choose`]; since the length is not known, a part of the rows is that many on average."""
    whole, part = int(source.weight), source.weight - int(source.weight)
    for _ in range(whole):
        for number, content in enumerate(stored):
            yield RawRow(source, number, content)
    for number, content in enumerate(stored if part else ()):
        if generator.random() < part:
            yield RawRow(source, number, content)


def _is_path(data: Any) -> bool:
    return isinstance(data, (str, os.PathLike))


def open_rows(source: DataSource, streaming: bool) -> Any:
    """
    The rows of a source as they are stored: a sequence, or with `streaming` perhaps only something to iterate over.

    Raises:
        ValueError, FileNotFoundError: There is no such file, or it is not what its name says.
    """
    path = source.path
    if not _is_path(path):
        if isinstance(path, Sequence) and not isinstance(path, (bytes, bytearray)):
            return path
        return _without_decoding(path)
    path = os.fspath(path)
    files = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
    if not files:
        raise FileNotFoundError(f"No file matches the pattern {path}.")
    suffix = os.path.splitext(path)[1].lower()
    if suffix in (".json", ".jsonl", ".tar", ".parquet"):
        missing = [file for file in files if not os.path.isfile(file)]
        if missing:
            raise FileNotFoundError(f"There is no data file {missing[0]}.")
    if suffix == ".tar":
        return WebDatasetRows(files)
    if suffix == ".jsonl":
        return JsonLines(files)
    if suffix == ".json":
        return [row for file in files for row in _read_json(file)]
    return _load_dataset(path, files if suffix == ".parquet" else None, source.split, streaming)


def _load_dataset(path: str, parquet_files: list[str] | None, split: str, streaming: bool) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"Reading {path} {_INSTALL_HINT}.") from error
    if parquet_files is not None:
        loaded = datasets.load_dataset("parquet", data_files=parquet_files, split="train", streaming=streaming)
    elif os.path.isdir(path) and os.path.isfile(os.path.join(path, "state.json")):
        loaded = datasets.load_from_disk(path)
    elif os.path.splitext(path)[1] and not os.path.exists(path):
        raise FileNotFoundError(f"There is no data file {path}.")
    else:
        loaded = datasets.load_dataset(path, split=split, streaming=streaming)
    return _without_decoding(loaded)


def _without_decoding(dataset: Any) -> Any:
    """A data set whose media stay files: the processor reads them, and only the part of them that it needs."""
    if not hasattr(dataset, "features"):
        return dataset
    import datasets

    if isinstance(dataset, datasets.IterableDataset):
        return dataset.decode(False)
    for name, feature in dataset.features.items():
        undecoded = _undecoded(feature)
        if undecoded != feature:
            dataset = dataset.cast_column(name, undecoded)
    return dataset


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _undecoded(item) for name, item in feature.items()}
    if getattr(feature, "decode", False):
        return replace(feature, decode=False)
    return replace(feature, feature=_undecoded(feature.feature)) if hasattr(feature, "feature") else feature


def _read_json(file: str) -> list[Any]:
    with open(file, encoding="utf-8") as stream:
        try:
            rows = json.load(stream)
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file} must hold a list of rows, got a {type(rows).__name__}.")
    return rows


class JsonLines(Sequence):
    """The rows of JSON Lines files; only the place of every line is held, eight bytes a row."""

    def __init__(self, files: list[str]):
        self.files, self.starts = files, []
        for file in files:
            starts, position = [], 0
            with open(file, "rb") as stream:
                for line in stream:
                    if line.strip():
                        starts.append(position)
                    position += len(line)
            self.starts.append(np.array(starts, np.int64))
        self.ends = np.cumsum([len(starts) for starts in self.starts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index):
        file = int(np.searchsorted(self.ends, index, side="right"))
        number = index - (int(self.ends[file - 1]) if file else 0)
        with open(self.files[file], "rb") as stream:
            stream.seek(self.starts[file][number])
            line = stream.readline()
        try:
            return json.loads(line)
        except ValueError as error:
            raise ValueError(f"Line {number} of {self.files[file]} is not valid JSON: {error}.") from error


class WebDatasetRows(Sequence):
    """
    The samples of WebDataset shards on disk: files of one name up to the first dot are one sample.

    `datasets` can read shards too, but only where all samples have the same kinds of files, which rows of different
    media do not. Only the place of every file is held, so samples can be read in any order.
    """

    def __init__(self, shards: list[str]):
        self.shards = shards
        self.samples: list[tuple[int, str, dict[str, tuple[int, int]]]] = []
        for number, shard in enumerate(shards):
            try:
                with tarfile.open(shard, "r:") as archive:
                    members = [(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
            except tarfile.TarError as error:
                raise ValueError(f"{shard} is not a complete, uncompressed tar archive: {error}.") from error
            for name, start, size in members:
                folder, _, file = name.rpartition("/")
                stem, _, extension = file.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not self.samples or self.samples[-1][:2] != (number, key):
                    self.samples.append((number, key, {}))
                self.samples[-1][2][extension.lower()] = (start, size)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index):
        shard, key, members = self.samples[index]
        row: dict[str, Any] = {"__key__": key, "__url__": self.shards[shard]}
        with open(self.shards[shard], "rb") as stream:
            for name, (start, size) in members.items():
                stream.seek(start)
                row[name] = stream.read(size)
        if "json" not in row:
            raise ValueError(f"The sample {key} of {self.shards[shard]} has no file {key}.json with its dialogue.")
        try:
            row["json"] = json.loads(row["json"])
        except ValueError as error:
            raise ValueError(f"{key}.json in {self.shards[shard]} is not valid JSON: {error}.") from error
        return row


__all__ = ["DataSource", "RawRow", "RowStream", "Rows", "load_rows", "open_rows"]
