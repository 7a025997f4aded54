"""One row of training data as model inputs with labels, and its number of tokens without reading its media."""

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch

from ..media_videollama2 import has_audio, read_video_metadata
from ..messages_videollama2 import prepare_messages
from ..processing_videollama2 import VideoLlama2Processor
from ..prompt_videollama2 import build_chat_template, encode_prompts, split_at_placeholders


PromptFormat = Literal["chat", "plain", "plain_audio"]

_PLAIN_TEMPLATE = build_chat_template("{{- messages[0]['content'] + ' ' + messages[1]['content'] -}}")


class RowTooLongError(ValueError):
    """A row that cannot be cut to the length allowed: media would be cut off, or nothing to learn is left."""


@dataclass
class RowEncoder:
    """
    Turns messages into the inputs of the model, without a batch dimension, and exact labels.

    Args:
        processor: The model's processor; it makes the prompt, reads the media and finds the assistant's tokens.
        prompt_format: `"chat"`: the chat template, and the labels are what the assistant says with the tokens that end
            its turn (`preprocess` in the original's `train.py`). The two formats of the first pretraining stages are
            `"plain"`, the question, a space and the answer without a template, where everything but the media is a
            label (`preprocess_plain`); and `"plain_audio"`, the chat template around a question of which only the
            media are kept (`preprocess_plain` of the audio-visual branch).
        max_length: Longest row in tokens, those of the media included; longer ones lose the end of their text. `None`:
            the longest prompt that the model takes.
        max_text_length: Longest row in tokens as the originals count, before placeholders are expanded: a medium (a
            video with its sound) is one token. `None`: no such limit.
    """

    processor: VideoLlama2Processor
    prompt_format: PromptFormat = "chat"
    max_length: int | None = None
    max_text_length: int | None = None

    def __post_init__(self):
        if self.prompt_format not in get_args(PromptFormat):
            raise ValueError(
                f"Unknown prompt_format {self.prompt_format!r}; choose one of {', '.join(get_args(PromptFormat))}."
            )
        for name in ("max_length", "max_text_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be a positive number of tokens or None, got {value}.")
        if self.max_length is None:
            self.max_length = self.processor.context_length
        # Rows are cut here, so the processor need not refuse long ones.
        self.processor = copy.copy(self.processor)
        self.processor.context_length = None

    def __call__(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Model inputs of one row: `input_ids` and `labels` (length,), and its media as the processor gives them.

        Raises:
            RowTooLongError: See there.
            ValueError: The messages are malformed, or media cannot be read (`MediaError`).
            OSError: A file is missing.
        """
        messages, template_kwargs = self._prepare(messages)
        is_chat = self.prompt_format != "plain"
        inputs = self.processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=is_chat,
            **template_kwargs,
        )
        ids = inputs.pop("input_ids")[0]
        del inputs["attention_mask"]
        if is_chat:
            supervised = inputs.pop("assistant_masks")[0].bool()
        else:
            supervised = ~self._is_medium(ids)
        labels = ids.masked_fill(~supervised, -100)
        length = self._allowed_length(ids, inputs)
        if self._is_medium(ids[length:]).any():
            raise RowTooLongError(
                f"The row has {len(ids)} tokens, {int(self._is_medium(ids).sum())} of them of its media, which would "
                f"be cut off at {length}. Raise {self._limits()}, lower num_frames (or fps), or shorten the text."
            )
        if (labels[:length] == -100).all():
            raise RowTooLongError(
                f"Nothing to learn from is left of the row when it is cut from {len(ids)} to {length} tokens. Raise "
                f"{self._limits()}, or shorten the text."
            )
        return {"input_ids": ids[:length], "labels": labels[:length], **inputs}

    def num_tokens(self, messages: list[dict[str, Any]], cut: bool = True) -> int:
        """
        Tokens of a row, those of its media included, without decoding any medium: for grouping rows by length.

        A file is looked into, and one frame decoded, only where its number of frames depends on its duration (`fps`),
        or where silent videos have no audio tokens (`missing_audio_policy="drop"`).

        Args:
            messages: The row.
            cut: Whether to count what `max_length` leaves of a longer row.
        """
        messages, template_kwargs = self._prepare(messages)
        prompt = self.processor.apply_chat_template(messages, **template_kwargs)
        add_bos_token = self.processor.add_bos_token and self.prompt_format != "plain"
        expansions = self._count_media(messages)
        encoded = encode_prompts(
            self.processor.tokenizer, [split_at_placeholders(prompt)], expansions, add_bos_token=add_bos_token
        )
        length = len(encoded[0].ids)
        return min(length, self.max_length) if cut and self.max_length is not None else length

    def _prepare(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Messages and arguments of `apply_chat_template` for the prompt format."""
        if self.prompt_format == "chat":
            return messages, {}
        if [message["role"] for message in messages] != ["user", "assistant"]:
            raise ValueError(
                f"The prompt format {self.prompt_format!r} takes one question and one answer, got the roles "
                f"{', '.join(message['role'] for message in messages)}."
            )
        if self.prompt_format == "plain":
            return messages, {"chat_template": _PLAIN_TEMPLATE, "processor_kwargs": {"add_special_tokens": False}}
        question, answer = messages
        blocks = question["content"] if not isinstance(question["content"], str) else []
        return [{**question, "content": [block for block in blocks if block.get("type") != "text"]}, answer], {}

    def _is_medium(self, ids: torch.Tensor) -> torch.Tensor:
        processor = self.processor
        placeholders = [processor.image_token_id, processor.video_token_id, processor.audio_token_id]
        return torch.isin(ids, torch.tensor(placeholders))

    def _limits(self) -> str:
        return "max_length" if self.max_text_length is None else "max_length or max_text_length"

    def _allowed_length(self, ids: torch.Tensor, inputs: dict[str, Any]) -> int:
        """How many tokens of a row the two limits leave."""
        length = len(ids) if self.max_length is None else min(len(ids), self.max_length)
        if self.max_text_length is None or len(ids) <= self.max_text_length:
            return length
        starts = self._starts_in_original_terms(ids.tolist(), inputs)
        return min(length, starts[self.max_text_length]) if len(starts) > self.max_text_length else length

    def _starts_in_original_terms(self, ids: list[int], inputs: dict[str, Any]) -> list[int]:
        """Where every token of the unexpanded prompt stands: one for each text token and for each medium."""
        processor = self.processor
        counts = {
            processor.image_token_id: [
                processor._num_image_tokens(pixels) for pixels in inputs.get("pixel_values", [])
            ],
            processor.video_token_id: [
                processor._num_video_tokens(pixels) for pixels in inputs.get("pixel_values_videos", [])
            ],
            processor.audio_token_id: [
                processor._num_audio_tokens(mask) for mask in inputs.get("input_features_mask", [])
            ],
        }
        starts, position = [], 0
        while position < len(ids):
            starts.append(position)
            token = ids[position]
            position += counts[token].pop(0) if token in counts else 1
            if token == processor.video_token_id and ids[position : position + 1] == [processor.audio_token_id]:
                position += counts[processor.audio_token_id].pop(0)  # the sound of the video, under one placeholder
        return starts

    def _count_media(self, messages: list[dict[str, Any]]) -> list[list[tuple[str, int]]]:
        """Placeholder tokens that stand for every medium of a row, with their numbers, in reading order."""
        processor = self.processor
        counts: list[list[tuple[str, int]]] = []
        for message in prepare_messages(messages):
            for block in message["content"] if isinstance(message["content"], list) else []:
                if block["type"] == "image":
                    numbers = processor._get_num_multimodal_tokens(image_sizes=[(1, 1)])
                    counts.append([(processor.image_token, numbers.num_image_tokens[0])])
                elif block["type"] == "video":
                    frames = self._count_frames(block["video"])
                    numbers = processor._get_num_multimodal_tokens(video_sizes=[(frames, 1, 1)])
                    counts.append([(processor.video_token, numbers.num_video_tokens[0])])
                    if self.is_heard(block):
                        counts[-1].append((processor.audio_token, self._num_sound_tokens))
                elif block["type"] == "audio":
                    counts.append([(processor.audio_token, self._num_sound_tokens)])
        return counts

    @cached_property
    def _num_sound_tokens(self) -> int:
        return self.processor._get_num_multimodal_tokens(audio_lengths=[0]).num_audio_tokens[0]  # all fill one window

    def _count_frames(self, clip: Any) -> int:
        video_processor = self.processor.video_processor
        num_frames, fps = clip.num_frames, clip.fps
        if num_frames is None and fps is None:
            fps = video_processor.fps
            num_frames = video_processor.num_frames if fps is None else None
        if num_frames is not None:
            return num_frames
        metadata = read_video_metadata(clip.source, clip.start, clip.end)
        return len(video_processor.sample_frames(metadata, fps=fps, start=clip.start, end=clip.end))

    def is_heard(self, block: dict[str, Any]) -> bool:
        """Whether a video, as a block of [`prepare_messages`], has audio tokens."""
        heard = block["load_audio_from_video"]
        if not (self.processor.load_audio_from_video if heard is None else heard) or not self.processor.has_audio:
            return False
        if self.processor.missing_audio_policy != "drop":
            return True
        source = block["video"].source
        return not isinstance(source, (list, tuple)) and not hasattr(source, "shape") and has_audio(source)


__all__ = ["PromptFormat", "RowEncoder", "RowTooLongError"]
