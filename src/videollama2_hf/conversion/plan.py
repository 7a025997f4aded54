"""Where every tensor of a converted checkpoint comes from, and what is left out and why."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers.core_model_loading import revert_weight_conversion

from ..configuration_videollama2 import VideoLlama2Config
from ..modeling_videollama2 import VideoLlama2ForConditionalGeneration
from .lora import LowRank
from .sources import Dropped, Part, Source, complete_name
from .tensors import CHUNK_SIZE, DTYPE_NAMES, DTYPES, ConversionError, StoredTensor


COPY = "an equal copy of {}"
T = TypeVar("T")
_TABLE = re.compile(r"(.*audio_tower\.encoder\.layers\.)[1-9]\d*(\.self_attn\.relative_attention_bias\.weight)$")


@dataclass(frozen=True)
class PlannedTensor:
    """
    One tensor of the converted checkpoint.

    Args:
        target: Its name there.
        source: Where its values come from.
        part: Label of the part of the source that holds it.
        dtype: Its dtype there.
        rows: How many of the first rows are taken; `None`: all.
        change: A LoRA change that is merged.
    """

    target: str
    source: StoredTensor
    part: str
    dtype: str
    rows: int | None = None
    change: LowRank | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        rows, *others = self.source.shape or (0,)
        return self.source.shape if self.rows is None else (min(rows, self.rows), *others)

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are the source's first bytes."""
        return self.change is None and self.dtype == self.source.dtype


@dataclass(frozen=True)
class LeftOut:
    """A tensor that the converted checkpoint does not have; `same_as`: the name of what it equals there."""

    source: StoredTensor
    part: str
    reason: str
    same_as: str | None = None


@dataclass
class Plan:
    """All of a conversion, before anything is written."""

    source: Source
    tensors: list[PlannedTensor]
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def dtype(self) -> str:
        """The floating-point dtype of most bytes, as PyTorch names it."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors:
            dtype = DTYPES[tensor.dtype]
            if dtype.is_floating_point:
                sizes[dtype] = sizes.get(dtype, 0) + tensor.nbytes
        return str(max(sizes, key=sizes.__getitem__)).removeprefix("torch.")

    @property
    def peak_memory(self) -> int:
        """Bytes held at once: some chunks, or what merging or casting the largest tensor takes."""
        worst = 2 * CHUNK_SIZE
        for tensor in self.tensors:
            if not tensor.is_copy:
                count = torch.Size(tensor.shape).numel()
                # merged: the float32 weight, its change, their sum; then the result
                worst = max(worst, tensor.nbytes + (count * 4 * 3 if tensor.change is not None else 0))
        return worst

    def shards(self, max_shard_size: int) -> list[list[PlannedTensor]]:
        """The tensors in files of at most this many bytes (or of one tensor)."""
        return group_by_size([(tensor, tensor.nbytes) for tensor in self.tensors], max_shard_size)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for reports and to know it again."""
        return {
            "checkpoint": str(self.source.folder),
            "kind": self.source.kind,
            "tensors": [
                {
                    "target": tensor.target,
                    "source": tensor.source.name,
                    "file": tensor.source.file.name,
                    "part": tensor.part,
                    "shape": list(tensor.shape),
                    "source_dtype": tensor.source.dtype,
                    "dtype": tensor.dtype,
                    **({"rows": tensor.rows} if tensor.rows is not None else {}),
                    **({"merged": "LoRA"} if tensor.change is not None else {}),
                }
                for tensor in self.tensors
            ],
            "left_out": [
                {"source": item.source.name, "file": item.source.file.name, "part": item.part, "reason": item.reason}
                for item in self.left_out
            ],
            "bytes": self.nbytes,
            "peak_memory_bytes": self.peak_memory,
        }

    def describe(self) -> str:
        """The plan as a table for people: every tensor's source, target, shape and dtype; then what is left out."""
        rows = [("target", "source", "file", "shape", "dtype")]
        for tensor in self.tensors:
            dtype = tensor.dtype if tensor.dtype == tensor.source.dtype else f"{tensor.source.dtype} -> {tensor.dtype}"
            merged = " + LoRA" if tensor.change is not None else ""
            shape = " x ".join(map(str, tensor.shape))
            source = "the same" if tensor.source.name == tensor.target else tensor.source.name
            rows.append((tensor.target, source + merged, tensor.source.file.name, shape, dtype))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        if self.left_out:
            lines += ["", "Left out:"]
            lines += [f"  {item.source.name} ({item.source.file.name}): {item.reason}" for item in self.left_out]
        lines += [f"Note: {note}" for note in self.source.notes]
        files = sorted({str(tensor.source.file) for tensor in self.tensors})
        lines += [
            "",
            f"{len(self.tensors)} tensors, {self.nbytes:,} bytes, from {len(files)} files:",
            *(f"  {file}" for file in files),
            f"Memory needed beside Python's own: about {self.peak_memory / 1e6:,.0f} MB",
        ]
        return "\n".join(lines)


def group_by_size(items: Iterable[tuple[T, int]], limit: int) -> list[list[T]]:
    """Neighbours together, in groups of at most `limit` bytes or of one item."""
    groups: list[list[T]] = [[]]
    total = 0
    for item, size in items:
        if groups[-1] and total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(item)
        total += size
    return groups


def build_meta_model(config: VideoLlama2Config) -> VideoLlama2ForConditionalGeneration:
    """The model of a configuration without memory for its weights."""
    with torch.device("meta"):
        return VideoLlama2ForConditionalGeneration(config)


def expected_tensors(config: VideoLlama2Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a converted checkpoint: what `save_pretrained` writes after loading one."""
    model = build_meta_model(config)
    state_dict = {
        name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys
    }
    reverted = revert_weight_conversion(model, state_dict)
    return {complete_name(name): tuple(tensor.shape) for name, tensor in reverted.items()}


def build_plan(source: Source, dtype: str | None = None) -> Plan:
    """
    Decides about every tensor of a source.

    Args:
        source: The checkpoint.
        dtype: Dtype of all floating-point tensors, as PyTorch names it; `None`: each keeps its own.

    Raises:
        ConversionError: Tensors are left over, missing, empty or of another shape; all of them are listed.
    """
    wanted = None
    if dtype is not None:
        wanted = DTYPE_NAMES.get(getattr(torch, dtype, torch.bool))
        if wanted not in ("F64", "F32", "F16", "BF16"):
            raise ConversionError(f"Unknown dtype {dtype!r}; choose float32, float16 or bfloat16.")
    expected = expected_tensors(source.config)
    problems: list[str] = []
    chosen: dict[str, PlannedTensor] = {}
    left_out: list[LeftOut] = []
    later: list[tuple[Part, str, StoredTensor]] = []
    for part in source.parts:
        for name, tensor in part.tensors.items():
            target = part.rename(name)
            if isinstance(target, Dropped):
                left_out.append(LeftOut(tensor, part.label, target.reason))
            elif target in chosen or target not in expected:
                later.append((part, target, tensor))
            else:
                rows = source.rows.get(target)
                kept = wanted if wanted and DTYPES[tensor.dtype].is_floating_point else tensor.dtype
                planned = PlannedTensor(target, tensor, part.label, kept, rows)
                chosen[target] = planned
                if not tensor.nbytes:
                    problems.append(
                        f"{name} is empty ({list(tensor.shape)}), as ZeRO-3 leaves tensors behind; write whole "
                        "weights with DeepSpeed's zero_to_fp32.py"
                    )
                elif planned.shape != expected[target]:
                    problems.append(f"{name} has the shape {list(tensor.shape)}, expected {list(expected[target])}")
    for part, target, tensor in later:
        item = _explain(part, target, tensor, chosen, source)
        if isinstance(item, str):
            problems.append(item)
        else:
            left_out.append(item)
    problems += [f"{name} is missing" for name in expected if name not in chosen]
    if source.adapter is not None:
        problems += _add_changes(source, chosen)
    if problems:
        raise ConversionError(
            f"{source.folder} cannot be converted: {len(problems)} tensors are not as its configuration says.\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )
    return Plan(source, list(chosen.values()), left_out)


def _explain(
    part: Part, target: str, tensor: StoredTensor, chosen: dict[str, PlannedTensor], source: Source
) -> LeftOut | str:
    """Why a tensor that has no place of its own may be left out; a string says that it may not."""
    table = _TABLE.match(target)
    twin = f"{table[1]}0{table[2]}" if table else target
    if target == "lm_head.weight" and source.config.tie_word_embeddings:
        twin = "model.embed_tokens.weight"
    if twin not in chosen:
        return f"{tensor.name} ({tensor.file.name}) has no place in the model"
    is_equal = tensor.equals(chosen[twin].source)
    if twin != target and not is_equal:
        return f"{tensor.name} should equal {twin}, which is shared, but does not"
    if chosen[twin].source.name in part.tensors and chosen[twin].part == part.label and not is_equal:
        return f"{tensor.name} and {chosen[twin].source.name} of the same files are both {twin}, but differ"
    reason = COPY.format(twin) if is_equal else f"replaced by that of: {chosen[twin].part}"
    return LeftOut(tensor, part.label, reason, twin if is_equal else None)


def _add_changes(source: Source, chosen: dict[str, PlannedTensor]) -> Iterable[str]:
    """Notes every LoRA change at the tensor that it points at, wherever that is."""
    assert source.adapter is not None
    for name, change in source.adapter.changes.items():
        target = next(
            (to for part in source.parts if not isinstance(to := part.rename(name), Dropped) and to in chosen), None
        )
        if target is None:
            yield f"{name} is changed by LoRA but is not in the base"
        elif change.shape != chosen[target].shape:
            yield f"{name} has the shape {list(chosen[target].shape)}, its LoRA change {list(change.shape)}"
        else:
            planned = chosen[target]
            chosen[target] = PlannedTensor(target, planned.source, planned.part, planned.dtype, planned.rows, change)
