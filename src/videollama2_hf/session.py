"""
Questions about media: a model with its processor, media that are encoded once, conversations that go on where they
stopped. The command line, the web page and batch jobs all answer through this module.
"""

import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .modeling_videollama2 import VideoLlama2ForConditionalGeneration
from .processing_videollama2 import VideoLlama2Processor
from .prompt_videollama2 import encode_prompts, split_at_placeholders


MEDIA_TYPES = ("image", "video", "audio")
_SOURCES = ("image", "video", "audio", "url", "path", "base64")


@dataclass(frozen=True)
class EncodedMedia:
    """
    One medium as the language model reads it.

    Args:
        features: Modality and features (tokens, hidden_size), in reading order: a video, and then its sound.
        fingerprint: Of the medium, its options, the processor's settings and the model.
    """

    features: tuple[tuple[str, torch.Tensor], ...]
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        """How many tokens of the prompt it takes."""
        return sum(len(features) for _, features in self.features)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file that [`EncodedMedia.load`] reads."""
        tensors = {f"{i}.{name}": features.cpu().contiguous() for i, (name, features) in enumerate(self.features)}
        save_file(tensors, path, metadata={"fingerprint": self.fingerprint})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "EncodedMedia":
        """
        Raises:
            ValueError: The file was not written by [`EncodedMedia.save`].
        """
        with safe_open(path, framework="pt") as file:
            fingerprint = (file.metadata() or {}).get("fingerprint")
            if fingerprint is None:
                raise ValueError(f"{path} does not hold encoded media; `EncodedMedia.save` writes such files.")
            names = sorted(file.keys(), key=lambda name: int(name.split(".")[0]))
            return cls(tuple((name.split(".")[1], file.get_tensor(name)) for name in names), fingerprint)


@dataclass
class Answer:
    """
    What a model said.

    Args:
        text: The answer.
        num_prompt_tokens: Tokens of the prompt, media included.
        num_reused_tokens: Those of them that were in the cache already.
        num_new_tokens: Tokens of the answer.
        finish_reason: `"stop"`, or `"length"` where the answer was cut off.
        first_token_seconds, seconds: Time to the first token and to the last.
        token_ids: Ids of the answer's tokens, without the one that ends it.
    """

    text: str
    num_prompt_tokens: int = 0
    num_reused_tokens: int = 0
    num_new_tokens: int = 0
    finish_reason: str = "stop"
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    token_ids: list[int] = field(default_factory=list)


class Session:
    """
    A model and its processor.

    ```python
    session = Session.from_pretrained("DAMO-NLP-SG/VideoLLaMA2.1-7B-AV")
    chat = session.chat()
    print(chat.ask("What is playing?", {"type": "video", "video": "concert.mp4", "start": 10, "end": 30}).text)
    print(chat.ask("And who sings?").text)  # no tower runs, only the new text is read
    ```

    Args:
        max_encoded: How many encoded media are kept for the next question about them; the least recently used goes.
    """

    def __init__(
        self, model: VideoLlama2ForConditionalGeneration, processor: VideoLlama2Processor, max_encoded: int = 16
    ):
        self.model = model.eval()
        self.processor = processor
        self.max_encoded = max_encoded
        self._encoded: OrderedDict[str, EncodedMedia] = OrderedDict()
        self._model_fingerprint = _digest(
            model.config.to_diff_dict(), getattr(model, "name_or_path", ""), str(model.dtype), processor.to_dict()
        )
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls, checkpoint: str | os.PathLike, *, revision: str | None = None, dtype: Any = None, **model_kwargs: Any
    ) -> "Session":
        """
        Loads model and processor of any checkpoint that this package reads.

        Args:
            dtype: Dtype of the weights. `None`: bfloat16 on a GPU, float32 on a CPU.
            model_kwargs: Other arguments of the model's `from_pretrained`, such as `quantization_config`. Without
                `device_map` the model is put on the GPU if there is one.
        """
        if dtype is None:
            dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        if torch.cuda.is_available():
            model_kwargs.setdefault("device_map", "auto")
        processor = VideoLlama2Processor.from_pretrained(checkpoint, **({"revision": revision} if revision else {}))
        model = VideoLlama2ForConditionalGeneration.from_pretrained(
            checkpoint, revision=revision or "main", dtype=dtype, **model_kwargs
        )
        return cls(model, processor)

    def chat(self, system: str | None = None) -> "Chat":
        """A new conversation."""
        return Chat(self, system)

    def ask(self, question: str, *media: dict[str, Any], **generation: Any) -> Answer:
        """One question about some media; see [`Chat.ask`]."""
        return self.chat().ask(question, *media, **generation)

    def ask_many(self, questions: Sequence[str], *media: dict[str, Any], **generation: Any) -> list[Answer]:
        """
        Many questions about the same media, each by itself: the media are encoded once, what all prompts begin with is
        read once, and the questions are answered as one batch.
        """
        if not questions:
            return []
        prompts = [self._read([{"role": "user", "content": [*media, _text(question)]}]) for question in questions]
        shared = min(len(prompt.ids) for prompt in prompts) - 1
        for prompt in prompts[1:]:
            shared = next((i for i in range(shared) if prompt.ids[i] != prompts[0].ids[i]), shared)
        cache = self._new_cache()
        starts = _starts(prompts[0], self)
        is_whole = all(start + medium.num_tokens <= shared for start, medium in zip(starts, prompts[0].media))
        # In a sliding window the padding behind what is shared would take the place of what was said.
        if len(prompts) < 2 or not is_whole or any(layer.is_sliding for layer in cache.layers):
            return self._generate(self._pad(prompts), time.perf_counter(), **generation)
        started = time.perf_counter()
        ids = torch.tensor([prompts[0].ids[:shared]], device=self.model.device)
        with torch.inference_mode():
            encoded = _as_encoder_outputs(prompts[0].media)
            self.model(input_ids=ids, mm_encoder_outputs=encoded, past_key_values=cache, logits_to_keep=1)
        settings = generation.get("generation_config") or self.model.generation_config
        num_beams = generation.get("num_beams") or settings.num_beams or 1
        cache.batch_repeat_interleave(len(prompts) * num_beams)
        ends = self._pad([_Prompt(prompt.ids[shared:], []) for prompt in prompts])
        inputs = {
            "input_ids": torch.cat([ids.expand(len(prompts), -1), ends["input_ids"]], dim=1),
            "attention_mask": nn.functional.pad(ends["attention_mask"], (shared, 0), value=1),
        }
        return self._generate({**inputs, "mm_encoder_outputs": {}, "past_key_values": cache}, started, **generation)

    def encode(self, block: dict[str, Any]) -> EncodedMedia:
        """
        One medium as the language model reads it, kept for the next time.

        Args:
            block: A content block of [`VideoLlama2Processor.apply_chat_template`]; an [`EncodedMedia`] in place of the
                medium is returned as it is.

        Raises:
            ValueError: The block holds encoded media of another model or processor.
        """
        source = next((block[name] for name in _SOURCES if name in block), None)
        if isinstance(source, EncodedMedia):
            if source.fingerprint.split(":")[0] != self._model_fingerprint:
                raise ValueError(
                    "These media were encoded by another model or with other settings of the processor. Encode them "
                    "again with this session."
                )
            return source
        key = f"{self._model_fingerprint}:{_digest(block)}"
        with self._lock:
            if key in self._encoded:
                self._encoded.move_to_end(key)
                return self._encoded[key]
        messages = [{"role": "user", "content": [block]}]
        inputs = self.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        tensors = {name: inputs[name] for name in inputs if name not in ("input_ids", "attention_mask")}
        outputs = self.model.encode_media(**tensors)
        order = [name for name in MEDIA_TYPES if name in outputs]  # a video comes before its sound
        encoded = EncodedMedia(tuple((name, outputs[name].pooler_output[0]) for name in order), key)
        with self._lock:
            self._encoded[key] = encoded
            while len(self._encoded) > self.max_encoded:
                self._encoded.popitem(last=False)
        return encoded

    def answer(self, conversations: list[list[dict[str, Any]]], **generation: Any) -> list[Answer]:
        """
        The next turn of each of some conversations, as one batch.

        Args:
            conversations: Messages as [`VideoLlama2Processor.apply_chat_template`] takes them.
            generation: Arguments of `generate`, such as `max_new_tokens`.
        """
        return self._generate(self.prepare(conversations), time.perf_counter(), **generation)

    def _generate(self, inputs: dict[str, Any], started: float, **generation: Any) -> list[Answer]:
        with torch.inference_mode():
            output = self.model.generate(**inputs, **_defaults(generation))
        seconds = time.perf_counter() - started
        answers = []
        num_prompt = inputs["attention_mask"].sum(dim=1).tolist()
        for length, ids in zip(num_prompt, output[:, inputs["input_ids"].shape[1] :].tolist()):
            answers.append(self._to_answer(ids, length, 0, seconds, seconds))
        return answers

    def prepare(self, conversations: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """
        What `generate` takes to answer some conversations, as one batch: `input_ids` and `attention_mask`
        (batch, length), padded on the left, and the encoded media as `mm_encoder_outputs`.

        Args:
            conversations: Messages as [`VideoLlama2Processor.apply_chat_template`] takes them.
        """
        return self._pad([self._read(messages) for messages in conversations])

    def _pad(self, prompts: list["_Prompt"]) -> dict[str, Any]:
        padded = self.processor.tokenizer.pad(
            {"input_ids": [prompt.ids for prompt in prompts]}, padding_side="left", return_tensors="pt"
        ).to(self.model.device)
        media = [medium for prompt in prompts for medium in prompt.media]
        return {**padded, "mm_encoder_outputs": _as_encoder_outputs(media)}

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config.get_text_config())

    def _read(self, messages: list[dict[str, Any]]) -> "_Prompt":
        """The prompt of a conversation, its media encoded."""
        media = [self.encode(block) for block in _media_blocks(messages)]
        text = self.processor.apply_chat_template(_without_encoded(messages), add_generation_prompt=True)
        tokens = {name: getattr(self.processor, f"{name}_token") for name in MEDIA_TYPES}
        expansions = [[(tokens[name], len(features)) for name, features in medium.features] for medium in media]
        prompt = encode_prompts(
            self.processor.tokenizer,
            [split_at_placeholders(text)],
            expansions,
            add_bos_token=self.processor.add_bos_token,
        )[0]
        limit = self.processor.context_length
        if limit is not None and len(prompt.ids) > limit:
            raise ValueError(
                f"The conversation has {len(prompt.ids)} tokens, but the model takes {limit}: {prompt.describe()}. "
                "Begin a new one, or ask for fewer frames."
            )
        return _Prompt(prompt.ids, media)

    def _to_answer(self, ids: list[int], num_prompt: int, num_reused: int, first: float, seconds: float) -> Answer:
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        end = next((i for i, token in enumerate(ids) if token in ends), None)
        kept = ids if end is None else ids[:end]
        text = self.processor.decode(kept, skip_special_tokens=True).strip()
        reason = "length" if end is None else "stop"
        return Answer(text, num_prompt, num_reused, len(kept), reason, first, seconds, kept)


@dataclass
class _Prompt:
    ids: list[int]
    media: list[EncodedMedia]


@dataclass
class Chat:
    """
    A conversation. What was read and said stays in the key-value cache, so a further question costs its own tokens.

    Args:
        session: The model.
        system: A system message, where the chat template takes one.
    """

    session: Session
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self):
        if self.system is not None:
            self.messages.insert(0, {"role": "system", "content": self.system})
        self._forget()

    def _forget(self) -> None:
        self._cache = self.session._new_cache()
        self._cached_ids: list[int] = []
        self._cached_media: list[EncodedMedia] = []

    def ask(self, question: str, *media: dict[str, Any], **generation: Any) -> Answer:
        """
        The answer to the next question.

        Args:
            question: The text of the turn.
            media: Content blocks of what the turn is about, such as `{"type": "video", "video": "clip.mp4"}`.
            generation: Arguments of `generate`, such as `max_new_tokens` or `do_sample`.
        """
        stream = self.stream(question, *media, **generation)
        while True:
            try:
                next(stream)
            except StopIteration as end:
                return end.value

    def stream(self, question: str, *media: dict[str, Any], **generation: Any) -> Generator[str, None, Answer]:
        """
        As [`Chat.ask`], but piece by piece as it is said; the generator returns the [`Answer`]. Closing it early stops
        the model, and the turn is as if it had not been asked.
        """
        turn = {"role": "user", "content": [*media, _text(question)]}
        model, messages = self.session.model, [*self.messages, turn]
        started = time.perf_counter()
        prompt = self.session._read(messages)
        num_reused = self._reuse(prompt)
        starts = _starts(prompt, self.session)
        new_media = [medium for medium, start in zip(prompt.media, starts) if start >= num_reused]
        streamer = TextIteratorStreamer(
            self.session.processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=None
        )
        stop = threading.Event()
        result: dict[str, Any] = {}

        def generate() -> None:
            try:
                with torch.inference_mode():
                    ids = torch.tensor([prompt.ids], device=model.device)
                    result["ids"] = model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        mm_encoder_outputs=_as_encoder_outputs(new_media),
                        past_key_values=self._cache,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([StopOnEvent(stop)]),
                        **_defaults(generation),
                    )[0].tolist()
            except BaseException as error:  # it belongs to the caller's thread
                result["error"] = error
            finally:
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        first = None
        finished = False
        try:
            for piece in streamer:
                first = time.perf_counter() - started if first is None else first
                if piece:
                    yield piece
            finished = True
        finally:
            stop.set()
            thread.join()
            if not finished or "error" in result:
                self._forget()
        if "error" in result:
            raise result["error"]
        ids = result["ids"]
        self._cached_ids = ids[: self._cache.get_seq_length()]
        seconds = time.perf_counter() - started
        answer = self.session._to_answer(
            ids[len(prompt.ids) :], len(prompt.ids), num_reused, seconds if first is None else first, seconds
        )
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer

    def _reuse(self, prompt: _Prompt) -> int:
        """Cuts the cache to what the prompt shares with it; how many tokens that are, at least one less than all."""
        common = 0
        for cached, wanted in zip(self._cached_ids, prompt.ids[:-1]):
            if cached != wanted:
                break
            common += 1
        # Placeholders of different media look the same: a medium counts only if it is whole and was there before.
        known = [medium.fingerprint for medium in self._cached_media]
        for i, (medium, start) in enumerate(zip(prompt.media, _starts(prompt, self.session))):
            is_known = i < len(known) and known[i] == medium.fingerprint
            if start < common and (not is_known or start + medium.num_tokens > common):
                common = start
        excess = self._cache.get_seq_length() - common
        if excess > 0:
            if common == 0 or any(layer.is_sliding for layer in self._cache.layers):
                self._forget()  # what a sliding window has dropped cannot be brought back
                common = 0
            else:
                self._cache.crop(-excess)
        self._cached_media = prompt.media
        return common


class StopOnEvent(StoppingCriteria):
    """Ends the generation at the next token once an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)  # type: ignore


def _defaults(generation: dict[str, Any]) -> dict[str, Any]:
    """The original answers greedily, with at most 2048 tokens (`mm_infer`)."""
    copies = generation.get("num_return_sequences") or 1
    if copies != 1:
        raise ValueError(
            f"A session gives one answer to a question, but `num_return_sequences` is {copies}: call `model.generate` "
            "with what `Session.prepare` returns."
        )
    return {"do_sample": False, "max_new_tokens": 2048, **generation}


def _text(question: str) -> dict[str, Any]:
    return {"type": "text", "text": question}


def _starts(prompt: _Prompt, session: Session) -> list[int]:
    """Where in the prompt each medium begins."""
    placeholders = {getattr(session.processor, f"{name}_token_id") for name in MEDIA_TYPES}
    starts, position = [], 0
    for medium in prompt.media:
        while prompt.ids[position] not in placeholders:
            position += 1
        starts.append(position)
        position += medium.num_tokens
    return starts


def _as_encoder_outputs(media: list[EncodedMedia]) -> dict[str, BaseModelOutputWithPooling]:
    features: dict[str, list[torch.Tensor]] = {}
    for medium in media:
        for name, values in medium.features:
            features.setdefault(name, []).append(values)
    return {name: BaseModelOutputWithPooling(pooler_output=values) for name, values in features.items()}  # type: ignore


def _media_blocks(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for message in messages:
        content = message.get("content")
        for block in content if isinstance(content, list) else []:
            if isinstance(block, dict) and block.get("type") in MEDIA_TYPES:
                yield block


def _without_encoded(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages that the chat template takes: it asks of a medium only that there is one."""
    changed = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            content = [
                {"type": block["type"], block["type"]: "encoded"} if block.get("type") in MEDIA_TYPES else block
                for block in content
            ]
        changed.append({**message, "content": content})
    return changed


def _digest(*values: Any) -> str:
    """A name for some values; files by path, size and time of change, arrays and bytes by content."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(f"{key}=".encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            digest.update(b"[")
            for item in value:
                add(item)
        elif isinstance(value, (bytes, bytearray)):
            digest.update(value)
        elif hasattr(value, "read"):
            position = value.tell()
            add(value.read())
            value.seek(position)
        elif hasattr(value, "tobytes"):
            digest.update(str((getattr(value, "dtype", None), getattr(value, "shape", None) or value.size)).encode())
            digest.update(value.tobytes())
        elif isinstance(value, torch.Tensor):
            add(value.detach().cpu().contiguous().view(torch.uint8).numpy())
        elif isinstance(value, (str, os.PathLike)):
            digest.update(os.fspath(value).encode())
            if len(os.fspath(value)) < 4096 and os.path.exists(value):
                paths = sorted(Path(value).iterdir()) if os.path.isdir(value) else [Path(value)]
                digest.update(json.dumps([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]).encode())
        else:
            digest.update(repr(value).encode())
        digest.update(b";")

    add(values)
    return digest.hexdigest()


__all__ = ["Answer", "Chat", "EncodedMedia", "Session", "StopOnEvent"]
