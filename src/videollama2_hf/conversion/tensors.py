"""Tensors in weight files: read by their headers, copied in chunks, never executed and never held as a whole model."""

import hashlib
import json
import math
import os
import pickle
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)


CHUNK_SIZE = 2**18  # bytes; a multiple of every item size, and in the cache from reading to writing
_MAX_HEADER_SIZE = 100 * 2**20  # bytes; the limit of the safetensors library

# safetensors' names of dtypes.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# dtype -> unsigned integers of its size, everything but the sign, and the smallest such value that is not finite.
_NOT_FINITE: dict[str, tuple[Any, Any, int]] = {
    "F64": (np.uint64, np.uint64(0x7FFF_FFFF_FFFF_FFFF), 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, np.uint32(0x7FFF_FFFF), 0x7F80_0000),
    "F16": (np.uint16, np.uint16(0x7FFF), 0x7C00),
    "BF16": (np.uint16, np.uint16(0x7FFF), 0x7F80),
}


class ConversionError(ValueError):
    """The checkpoint cannot be converted; the message says what is wrong with it and what to do."""


@dataclass(frozen=True)
class StoredTensor:
    """
    A tensor in a file.

    Args:
        name: Its key in the file.
        file: The file.
        dtype: safetensors' name of its dtype.
        shape: Its shape.
        offset: Where its bytes begin in a safetensors file.
        values: The tensor itself, mapped from a PyTorch file, or small enough to be held.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int | None = None
    values: torch.Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes, in pieces of at most [`CHUNK_SIZE`]; a piece is valid until the next one is asked for."""
        if self.offset is None:
            data = as_bytes(self.load())
            for start in range(0, len(data), CHUNK_SIZE):
                yield data[start : start + CHUNK_SIZE]
            return
        buffer = memoryview(bytearray(min(CHUNK_SIZE, self.nbytes)))
        with open(self.file, "rb") as file:  # buffered: a read is as long as asked for
            file.seek(self.offset)
            left = self.nbytes
            while left:
                count = file.readinto(buffer[: min(left, CHUNK_SIZE)])
                if not count:
                    raise ConversionError(f"{self.file} ended while {self.name!r} was read; it is cut off. {_AGAIN}")
                left -= count
                yield buffer[:count]

    def load(self) -> torch.Tensor:
        """The tensor, mapped from its file: its memory is the file's, and writing to it does not change the file."""
        if self.values is not None:
            return self.values
        if not self.nbytes:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        data = np.memmap(self.file, np.uint8, mode="c", offset=self.offset or 0, shape=(self.nbytes,))
        return torch.from_numpy(data).view(DTYPES[self.dtype]).reshape(self.shape)

    def after(self, rows: int) -> "StoredTensor":
        """The tensor without its first rows."""
        shape = (max(self.shape[0] - rows, 0), *self.shape[1:])
        offset = None if self.offset is None else self.offset + self.nbytes - replace(self, shape=shape).nbytes
        values = None if self.values is None else self.values[rows:]
        return replace(self, shape=shape, offset=offset, values=values)

    def equals(self, other: "StoredTensor") -> bool:
        """Whether the other tensor has the same dtype, shape and bytes."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return self.digest() == other.digest()

    def digest(self) -> str:
        """SHA-256 of its bytes."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()


_AGAIN = "Copy or download it again."


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, as a safetensors file holds them."""
    if not tensor.numel():
        return memoryview(b"")
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def is_finite(chunk: memoryview, dtype: str) -> bool:
    """Whether all values in some bytes of a tensor are finite; always so for integers."""
    if dtype not in _NOT_FINITE:
        return True
    unsigned, magnitude, limit = _NOT_FINITE[dtype]
    values = np.frombuffer(chunk, unsigned)
    block = 1 << 17  # values; stays in the processor's cache
    return all((values[i : i + block] & magnitude).max() < limit for i in range(0, values.size, block))


def read_safetensors_header(path: Path) -> tuple[bytes, dict[str, Any], int]:
    """The header of a safetensors file, raw and parsed, and where its data begins; the file's size is checked."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _MAX_HEADER_SIZE):
            raise ConversionError(f"{path} is not a safetensors file, or it is cut off ({size:,} bytes). {_AGAIN}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = [entry for key, entry in header.items() if key != "__metadata__"]
        if not all(type(n) is int and n >= 0 for entry in entries for n in (*entry["shape"], *entry["data_offsets"])):
            raise ValueError("sizes are whole numbers")
        end = 0
        for first, last in sorted(tuple(entry["data_offsets"]) for entry in entries):
            if first != end:
                raise ValueError("tensors lie one behind the other")  # else one hides another, or bytes have no name
            end = last
        unknown = {entry["dtype"] for entry in entries} - set(DTYPES)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise ConversionError(f"The header of {path} is not a safetensors header. {_AGAIN}") from None
    if unknown:
        raise ConversionError(f"{path} holds tensors of dtype {sorted(unknown)}; known are {sorted(DTYPES)}.")
    if 8 + length + end != size:
        raise ConversionError(f"{path} has {size:,} bytes where its header asks for {8 + length + end:,}. {_AGAIN}")
    return raw, header, 8 + length


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    _, header, data = read_safetensors_header(path)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        tensor = StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), data + start)
        if tensor.nbytes != end - start:
            raise ConversionError(f"The header of {path} gives {name!r} a size that is not its shape's. {_AGAIN}")
        tensors[name] = tensor
    return tensors


def load_pickle(path: Path) -> Any:
    """What a PyTorch file holds, tensors mapped from the file; anything but tensors and plain values is refused."""
    try:
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden is not None:
            raise ConversionError(
                f"{path} holds more than tensors: reading it would run code from the file ({forbidden[1]}), so it was "
                "not read. Get the weights from a source you trust, or as safetensors."
            ) from None
        raise ConversionError(
            f"{path} is not a PyTorch file of tensors (perhaps a pointer of Git LFS, a web page or another pickle), "
            f"so it was not read. {_AGAIN}"
        ) from None
    except (FileNotFoundError, PermissionError):
        raise
    except Exception:  # a damaged file lets its readers raise anything
        raise ConversionError(f"{path} is not a PyTorch file, or it is cut off or damaged. {_AGAIN}") from None


def from_state_dict(state_dict: Any, path: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict that was read from a file."""
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ConversionError(
            f"{path} holds no weights by name, but {type(state_dict).__name__}"
            + (f" with {sorted(map(str, state_dict))[:5]}" if isinstance(state_dict, dict) else "")
            + ". Pass the file of weights itself."
        )
    unknown = {str(tensor.dtype) for tensor in state_dict.values() if tensor.dtype not in DTYPE_NAMES}
    if unknown or any(tensor.layout != torch.strided for tensor in state_dict.values()):
        raise ConversionError(
            f"{path} holds tensors of another kind ({sorted(unknown) or 'sparse'}) than dense numbers."
        )
    return {
        name: StoredTensor(name, path, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), values=tensor)
        for name, tensor in state_dict.items()
    }


def read_file(path: str | os.PathLike) -> dict[str, StoredTensor]:
    """The tensors of one weight file, safetensors or PyTorch's, by name."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return from_state_dict(load_pickle(path), path)


def find_weight_files(folder: Path) -> tuple[list[Path], Path | None]:
    """
    The weight files of a folder as transformers names them, safetensors before PyTorch's, and their index if they have
    one; no files if there are none.

    Raises:
        ConversionError: An index names a file that is missing or lies elsewhere.
    """
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / single).is_file():  # before an index, as transformers and so the original load them
            return [folder / single], None
        if (folder / index).is_file():
            names = sorted(set(_read_weight_map(folder / index).values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise ConversionError(f"{folder / index} names {missing}, which are missing in {folder}. {_AGAIN}")
            return [folder / name for name in names], folder / index
    return [], None


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ConversionError(f"{path} is not an index of weight files (a JSON object with `weight_map`).") from None
    outside = sorted(str(name) for name in names if not isinstance(name, str) or Path(name).name != name)
    if outside:
        raise ConversionError(f"{path} names {outside}, which are not files of its own folder. It was not followed.")
    return weight_map


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """
    All tensors of a checkpoint folder by name; empty if there are no weight files.

    Raises:
        ConversionError: Files that are missing, cut off or that disagree with their index.
    """
    files, index = find_weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in read_file(path).items():
            if name in tensors:
                raise ConversionError(f"{name!r} is in both {tensors[name].file.name} and {path.name} of {folder}.")
            tensors[name] = tensor
    if index is not None:
        weight_map = _read_weight_map(index)
        wrong = sorted(key for key in weight_map if key not in tensors or tensors[key].file.name != weight_map[key])
        if wrong:
            raise ConversionError(
                f"{index} and the files disagree about {len(wrong)} tensors: {', '.join(wrong[:5])}. {_AGAIN}"
            )
    return tensors


class SafetensorsWriter:
    """
    Writes one safetensors file tensor by tensor. The file has its name only when it is complete and on the disk.

    Args:
        path: The file.
        tensors: Name, dtype and shape of all tensors, in the order in which they will be written.

    Attributes:
        keep: Whether the file is kept when it is complete.
    """

    keep = True

    def __init__(self, path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]], header: bytes | None = None):
        self.path = path
        if header is None:
            entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            offset = 0
            for name, dtype, shape in tensors:
                size = int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize
                entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
                offset += size
            header = json.dumps(entries, separators=(",", ":")).encode()
            header += b" " * (-len(header) % 8)
        self._temporary = path.with_name(path.name + ".part")
        self._file = open(self._temporary, "wb", buffering=0)  # noqa: SIM115
        self._file.write(struct.pack("<Q", len(header)) + header)

    def write(self, chunk: memoryview) -> None:
        """Appends bytes of the current tensor."""
        while chunk:
            chunk = chunk[self._file.write(chunk) :]

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, error_type: type | None, *_: Any) -> None:
        keep = self.keep and error_type is None
        if keep:
            os.fsync(self._file.fileno())
        self._file.close()
        if keep:
            os.replace(self._temporary, self.path)
        else:
            self._temporary.unlink(missing_ok=True)
