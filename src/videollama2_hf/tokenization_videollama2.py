"""
Tokenizers of original checkpoints, exactly.

The originals tokenise with SentencePiece itself (`use_fast=False`). transformers 5 turns a `tokenizer.model` into a
fast tokenizer without the scores of its pieces, and without the space that SentencePiece puts in front of a text that
begins with one; it loses the latter even where a faithful `tokenizer.json` lies beside it. Prompts with indented code
or runs of spaces then differ from the original's. The functions here lose nothing.
"""

import json
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast
from transformers.utils import cached_file


# SentencePiece's `ModelProto.SentencePiece.Type`.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BPE_MODEL_TYPE = 2
# Files beside `tokenizer.model` that transformers reads special tokens, settings and the chat template from.
_SETTING_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


# Arguments of `from_pretrained` that say where files come from.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class _SentencePieceModel(NamedTuple):
    pieces: list[tuple[str, float, int]]  # text, score, type
    trainer: dict[int, Any]  # fields of TrainerSpec and NormalizerSpec by their number
    normalizer: dict[int, Any]


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _read_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of one protocol buffer message; its 32-bit fields are floats here."""
    value: Any
    position = 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, position = _read_varint(data, position)
        elif wire_type == 5:
            value, position = struct.unpack_from("<f", data, position)[0], position + 4
        elif wire_type in (1, 2):
            length, position = (8, position) if wire_type == 1 else _read_varint(data, position)
            value, position = data[position : position + length], position + length
        else:
            raise ValueError(f"unexpected wire type {wire_type}")
        yield number, value


def _read_model(path: str | os.PathLike) -> _SentencePieceModel:
    data = Path(path).read_bytes()
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _read_fields(data):
            if number == 1:
                piece = dict(_read_fields(value))
                pieces.append((piece[1].decode("utf-8"), piece.get(2, 0.0), piece.get(3, _NORMAL)))
            elif number == 2:
                trainer = dict(_read_fields(value))
            elif number == 3:
                normalizer = dict(_read_fields(value))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error) as error:
        raise ValueError(f"{path} is not a SentencePiece model: {error}.") from error
    if not pieces:
        raise ValueError(f"{path} is not a SentencePiece model: it has no pieces.")
    return _SentencePieceModel(pieces, trainer, normalizer)


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """
    Merges in the order in which SentencePiece applies them: by the score of the piece that they make.

    Pieces of equal score (in Mistral's and Llama's vocabularies: the runs of spaces) are merged from the left, which
    a list of merges expresses by putting the longer left part first: a run that has begun grows before another begins.
    """
    mergeable = {text for text, _, kind in pieces if kind == _NORMAL}
    merges = []
    for rank, (text, score, kind) in enumerate(pieces):
        if kind != _NORMAL:
            continue
        for split in range(1, len(text)):
            left, right = text[:split], text[split:]
            if left in mergeable and right in mergeable:
                merges.append((-score, -split, rank, left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _special_tokens(model: _SentencePieceModel) -> dict[str, str]:
    tokens = {"unk_token": next(text for text, _, kind in model.pieces if kind == _UNKNOWN)}
    for name, number, default in (("bos_token", 41, 1), ("eos_token", 42, 2)):  # bos_id and eos_id of TrainerSpec
        index = model.trainer.get(number, default)
        if index < len(model.pieces):  # -1, written as 2 ** 64 - 1: the model has none
            tokens[name] = model.pieces[index][0]
    return tokens


def build_sentencepiece_backend(path: str | os.PathLike, legacy: bool = True) -> Tokenizer:
    """
    A `tokenizers.Tokenizer` that gives SentencePiece's ids for a BPE `tokenizer.model`.

    Args:
        path: The SentencePiece model file.
        legacy: What transformers' slow Llama tokenizer calls so. True: every stretch of text between special tokens
            begins with SentencePiece's dummy space. False: only the text as a whole does.

    Raises:
        ValueError: The file is no SentencePiece model, or one whose normalisation or pieces have no equivalent here.
    """
    model = _read_model(path)
    kinds = {kind for _, _, kind in model.pieces}
    charsmap, removes_spaces = model.normalizer.get(2, b""), model.normalizer.get(4, 1)
    if model.trainer.get(3, 1) != _BPE_MODEL_TYPE or charsmap or removes_spaces or kinds & {_USER_DEFINED, _UNUSED}:
        raise ValueError(
            f"{path} is a SentencePiece model that is not converted here (a unigram model, text normalisation, or "
            "user-defined or unused pieces). Put the tokenizer.json of the same tokenizer beside it."
        )
    special = _special_tokens(model)

    tokenizer = Tokenizer(
        BPE(
            vocab={text: index for index, (text, _, _) in enumerate(model.pieces)},
            merges=_merges(model.pieces),
            unk_token=special["unk_token"],
            fuse_unk=True,
            byte_fallback=_BYTE in kinds,
        )
    )
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    decoding: list[Any] = []
    if model.normalizer.get(3, 1):  # add_dummy_prefix
        if legacy:
            steps.insert(0, normalizers.Prepend("▁"))
        else:
            # Special tokens are matched behind the normaliser, so that it sees the text as a whole. It must not touch
            # a text that begins with one, nor the special tokens themselves, to which it is applied as well.
            special_tokens = "|".join(map(_escape, special.values()))
            steps.insert(0, normalizers.Replace(Regex(rf"\A(?!{special_tokens})"), "▁"))
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *decoding]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=not legacy) for text in special.values()])
    return tokenizer


def _escape(text: str) -> str:
    return "".join(character if character.isalnum() else f"\\{character}" for character in text)


def load_sentencepiece_tokenizer(path: str | os.PathLike, **kwargs) -> PreTrainedTokenizerFast:
    """
    The fast tokenizer of a `tokenizer.model`, with the ids of SentencePiece.

    Special tokens, the chat template and `legacy` are read from the files of transformers that lie beside it. The
    tokenizer is saved as a plain `tokenizer.json`, which loads anywhere.

    Args:
        path: The SentencePiece model file.
        **kwargs: Settings of the tokenizer that override the files'.

    Raises:
        ValueError: See [`build_sentencepiece_backend`].
    """
    return _load_sentencepiece_tokenizer(path, {name: Path(path).with_name(name) for name in _SETTING_FILES}, **kwargs)


def _load_sentencepiece_tokenizer(model: str | os.PathLike, files: dict, **kwargs) -> PreTrainedTokenizerFast:
    settings = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, file in files.items():
            if file is None or not Path(file).is_file():
                continue
            content = Path(file).read_text(encoding="utf-8")
            if name == "tokenizer_config.json":
                settings = json.loads(content)
                settings.pop("tokenizer_class", None)
                content = json.dumps(settings)
            Path(folder, name).write_text(content, encoding="utf-8")
        legacy = kwargs.pop("legacy", settings.get("legacy"))
        # None means True in the versions of transformers that the originals run on.
        backend = build_sentencepiece_backend(model, legacy=legacy is None or legacy)
        backend.save(str(Path(folder, "tokenizer.json")))
        special = {} if settings else _special_tokens(_read_model(model))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **{**special, **kwargs})
    # The defaults of the slow Llama tokenizer. Held by the post-processor that tokenizer.json keeps.
    tokenizer.add_bos_token = settings.get("add_bos_token", True)
    tokenizer.add_eos_token = settings.get("add_eos_token", False)
    tokenizer.name_or_path = str(Path(model).parent)
    return tokenizer


def load_tokenizer(checkpoint: str | os.PathLike, **kwargs) -> PreTrainedTokenizerBase:
    """
    The tokenizer of an original checkpoint, from a folder or a Hub repository, with the original's ids.

    A `tokenizer.json` is used as it is, a `tokenizer.model` through [`load_sentencepiece_tokenizer`], and anything
    else by `AutoTokenizer`.

    Args:
        checkpoint: Folder or name of a repository.
        **kwargs: Arguments of `AutoTokenizer.from_pretrained`.
    """
    hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}

    def find(name: str) -> str | None:
        return cached_file(str(checkpoint), name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)

    if find("tokenizer.json") is not None:
        settings = {name: value for name, value in kwargs.items() if name != "config"}
        return PreTrainedTokenizerFast.from_pretrained(checkpoint, **settings)
    model = find("tokenizer.model")
    if model is None:
        return AutoTokenizer.from_pretrained(checkpoint, **kwargs)
    settings = {name: value for name, value in kwargs.items() if name not in (*HUB_ARGUMENTS, "config", "use_fast")}
    return _load_sentencepiece_tokenizer(model, {name: find(name) for name in _SETTING_FILES}, **settings)


__all__ = ["build_sentencepiece_backend", "load_sentencepiece_tokenizer", "load_tokenizer"]
