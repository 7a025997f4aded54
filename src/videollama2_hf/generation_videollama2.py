"""
Generation with media: what `generate` does for VideoLLaMA 2 beyond transformers' loop.

Media are encoded once and repeated for beams, prompts without their media are refused, and logits processors see what
the original's see.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from transformers.generation import GenerationMixin
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling


MODALITIES = ("image", "video", "audio")
MODEL_INPUTS = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}


def count_tokens(features: torch.Tensor | Sequence[torch.Tensor]) -> list[int]:
    """Tokens of every medium in a `pooler_output`."""
    return [len(item) for item in features]


def describe_mismatch(modality: str, num_placeholders: int, features: torch.Tensor | Sequence[torch.Tensor]) -> str:
    """What to say where the placeholders of a prompt and the features of its media differ in number."""
    lengths = count_tokens(features)
    return (
        f"The {modality} placeholders in `input_ids` and the {modality} features do not match: {num_placeholders} "
        f"placeholders, {sum(lengths)} features ({lengths} per {modality}). Use the processor that was saved with the "
        "model, and leave out media that are in the cache already."
    )


def describe_missing_media(modality: str) -> str:
    """What to say where a prompt has placeholders of a modality that was not given."""
    return (
        f"`input_ids` contain {modality} placeholders, but no {modality} was given: pass `{MODEL_INPUTS[modality]}` "
        f"or the encoded {modality} in `mm_encoder_outputs`."
    )


class FiniteLogitsCheck(LogitsProcessor):
    """Stops the generation when the model has broken down, instead of decoding the same token for ever."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not torch.isfinite(scores).all():
            cause = (
                "The usual cause is float16, which these models overflow: load with dtype=torch.bfloat16 (as trained) "
                "or torch.float32."
                if self.dtype == torch.float16
                else f"The model runs in {self.dtype}, so look for NaN or Inf in its weights and inputs."
            )
            raise FloatingPointError(
                f"The logits for token {input_ids.shape[1]} contain NaN or Inf. {cause} Pass "
                "remove_invalid_values=True to generate all the same."
            )
        return scores


class GeneratedTokensOnly(LogitsProcessor):
    """Shows a processor that indexes the vocabulary by the ids seen so far only those behind the prompt."""

    def __init__(self, processor: LogitsProcessor, prompt_length: int):
        self.processor = processor
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return self.processor(input_ids[:, self.prompt_length :], scores)


class VideoLlama2GenerationMixin(GenerationMixin):
    """`generate` for a model with images, videos and sound (see [`VideoLlama2ForConditionalGeneration`])."""

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        # transformers encodes images and videos ahead of the loop, but not sound, and it writes into the caller's
        # dictionary. Here all three are encoded once, and the caller's encodings stay as they are.
        names = (*MODEL_INPUTS.values(), "input_features_mask", "mm_encoder_outputs")
        inputs = {name: model_kwargs.pop(name, None) for name in names}
        model_kwargs["mm_encoder_outputs"] = self.encode_media(**inputs)
        return model_kwargs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.LongTensor | None, dict[str, Any]]:
        # A prompt whose media were forgotten would be answered all the same. What is in a cache already has its media.
        cache = model_kwargs.get("past_key_values")
        if input_ids is not None and (cache is None or cache.get_seq_length() == 0):
            for modality, mask in self.model.get_placeholder_masks(input_ids).items():
                if (model_kwargs.get("mm_encoder_outputs") or {}).get(modality) is None and mask.any():
                    raise ValueError(describe_missing_media(modality))
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _expand_multimodal_outputs(
        self,
        input_ids: torch.LongTensor | None,
        mm_encoder_output: dict[str, BaseModelOutputWithPooling],
        expand_size: int = 1,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict[str, BaseModelOutputWithPooling]:
        # A row's media are repeated as a group, once for every copy of the row: [A B] -> [A B A B]. A row may have any
        # number of them, so the placeholders say which belong to it.
        if input_ids is not None and input_ids.numel() == 0:
            input_ids = None
        masks = self.model.get_placeholder_masks(input_ids, inputs_embeds)
        expanded = {}
        for modality, outputs in mm_encoder_output.items():
            features = outputs.pooler_output
            num_placeholders = int(masks[modality].sum())
            if num_placeholders != sum(count_tokens(features)):
                raise ValueError(describe_mismatch(modality, num_placeholders, features))
            ends = {end: i + 1 for i, end in enumerate(accumulate(count_tokens(features)))}
            row_ends = [ends.get(int(total), 0) for total in masks[modality].sum(-1).cumsum(0)]
            order = [
                item
                for start, end in zip([0, *row_ends[:-1]], row_ends)
                for _ in range(expand_size)
                for item in range(start, end)
            ]
            items = [features[item] for item in order]
            expanded[modality] = replace(
                outputs, pooler_output=torch.stack(items) if isinstance(features, torch.Tensor) and items else items
            )
        return expanded

    def _get_logits_processor(self, generation_config, input_ids_seq_length=None, **kwargs) -> LogitsProcessorList:
        encoder_input_ids = kwargs.get("encoder_input_ids")
        if encoder_input_ids is not None and encoder_input_ids.dim() == 2:
            # Ids beyond the vocabulary cannot index the scores; -1 would switch these processors off for the whole
            # prompt, so a placeholder stands for the row's first token, which is part of the prompt anyway.
            is_text = encoder_input_ids < self.config.text_config.vocab_size
            kwargs["encoder_input_ids"] = encoder_input_ids.where(is_text, encoder_input_ids[:, :1] * is_text[:, :1])
        processors = super()._get_logits_processor(generation_config, input_ids_seq_length, **kwargs)
        prompt_length = input_ids_seq_length or 0
        for i, processor in enumerate(processors):
            # The original generates from embeddings, so these two only ever see what was generated.
            if isinstance(processor, RepetitionPenaltyLogitsProcessor):
                processor.prompt_ignore_length = prompt_length
            elif isinstance(processor, NoRepeatNGramLogitsProcessor):
                processors[i] = GeneratedTokensOnly(processor, prompt_length)
        if not generation_config.remove_invalid_values:
            processors.insert(0, FiniteLogitsCheck(self.dtype))
        placeholders = [getattr(self.config, f"{modality}_token_id") for modality in MODALITIES]
        inside = [token_id for token_id in placeholders if token_id < self.config.text_config.vocab_size]
        if inside:
            processors.append(SuppressTokensLogitsProcessor(inside, device=kwargs.get("device")))
        return processors


__all__ = ["VideoLlama2GenerationMixin"]
