"""
What a model saw and heard, and for every word of its answer where it looked: frames, their regions, seconds of sound.

Two ways of asking, which answer different questions; neither says why the model said the word:

- `"attention"`: how much the language model's attention read from each token when it chose the word.
- `"gradient"`: how much the word's log-probability changes, to first order, as each part of the pictures and of the
  sound is raised from nothing (the mean colour, silence) to what it is: input times gradient.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from transformers import DynamicCache

from .drawing import (
    SILENCE,
    draw_filter_banks,
    draw_frames,
    draw_image,
    make_figure,
)
from .explaining_page import render_page
from .modeling_videollama2 import VideoLlama2ForConditionalGeneration
from .session import Answer, EncodedMedia, Session
from .token_places import INPUT_NAMES, HeardSound, SeenFrames, describe_media


if TYPE_CHECKING:
    from matplotlib.figure import Figure

Method = Literal["attention", "gradient"]
_BLOCK = 32  # tokens of the answer whose attention is held at a time


@dataclass
class Word:
    """A word of the prompt or the answer: its text, the ids of its tokens and their positions in the conversation."""

    text: str
    token_ids: list[int]
    positions: list[int]


@dataclass
class Explanation:
    """
    Where a model looked.

    Args:
        question, answer: What was asked and said.
        method: `"attention"` or `"gradient"`.
        layers: Layers of the language model whose attention was averaged; `None` of the gradient.
        words: The words of the answer.
        media: Images, videos and sounds in reading order, a video's sound behind it. Their `maps` hold one map for
            every word, float32: (words, frames, rows, columns) of patches, and (words, steps, bands) of a sound.
        text: The words of the prompt, those of its template included, and then those of the answer.
        text_map: float32 (words, words of `text`).
        totals: float32 (words, media + 1): every medium's sum over its tokens, and that of the text. Of the attention
            they add up to 1. A map's sum is the total of its medium, less what tokens of mere padding have.
    """

    question: str
    answer: Answer
    method: Method
    layers: list[int] | None
    words: list[Word]
    media: list[SeenFrames | HeardSound]
    text: list[Word]
    text_map: torch.Tensor
    totals: torch.Tensor

    @property
    def num_text_tokens(self) -> int:
        """Tokens of the prompt that are no media."""
        return self.answer.num_prompt_tokens - sum(medium.num_tokens for medium in self.media)

    def figure(self, word: int | None = None) -> "Figure":
        """
        The media as a matplotlib figure: frames over a line of time, sounds below it with what is heard of them.

        Args:
            word: Number of a word of the answer, whose maps are laid over; `None`: the media alone.

        Raises:
            ValueError: There are no media, or no such word.
            ImportError: matplotlib is not installed.
        """
        if not self.media:
            raise ValueError("There are no media to draw: the question was text only.")
        if word is not None and not 0 <= word < len(self.words):
            raise ValueError(f"There is no word {word}; the answer has the words 0 to {len(self.words) - 1}.")
        heights = [2.6 if isinstance(medium, SeenFrames) else 2.2 for medium in self.media]
        figure, axes = make_figure(heights)
        for number, (axis, medium) in enumerate(zip(axes, self.media)):
            title = f"{medium.title}: {medium.num_tokens} tokens"
            if word is not None:
                title += f"; “{self.words[word].text}” {self.describe_total(word, number)}"
            axis.set_title(title, loc="left", fontsize=10)
            heat = None if word is None else medium.maps[word].numpy()
            if isinstance(medium, HeardSound):
                heat = None if word is None else medium.maps_of_sound()[word].numpy()
                length = medium.end - medium.start
                draw_filter_banks(axis, medium.spectrogram, length, "seconds", start=medium.start, heat=heat)
                for part in medium.parts:
                    axis.plot(
                        [part.start, part.end], [1, 1], color="C2", linewidth=3, marker="|", solid_capstyle="butt"
                    )
            elif medium.kind == "image":
                draw_image(axis, medium.pictures[0], None if heat is None else heat[0], medium.extent)
            else:
                times = medium.times, medium.end, medium.is_seconds, medium.start
                draw_frames(axis, medium.pictures, *times, heat=heat, extent=medium.extent)
        return figure

    def describe_total(self, word: int, medium: int) -> str:
        """`12.3 %` of the attention, or `+0.42`; of a medium, or of the text behind the last of them."""
        value = float(self.totals[word, medium])
        return f"{100 * value:.1f} %" if self.method == "attention" else f"{value:+.2f}".replace("-0.00", "0.00")

    def to_html(self) -> str:
        """One page that needs nothing else: no network, no file beside it, and no JavaScript."""
        return render_page(self)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the page of [`Explanation.to_html`]."""
        Path(path).write_text(self.to_html(), encoding="utf-8")


def explain(
    session: Session,
    question: str,
    *media: dict[str, Any],
    answer: Answer | str | None = None,
    method: Method = "attention",
    layers: Sequence[int] | None = None,
    **generation: Any,
) -> Explanation:
    """
    Where a model looks for every word of an answer. Reads the media once more, to show them.

    Args:
        session: The model.
        question: The text of the question.
        media: Content blocks of what it is about, such as `{"type": "video", "video": "clip.mp4"}`.
        answer: What [`Session.ask`] answered, or any text that the model might have answered. `None`: it is asked.
        method: `"attention"`, or `"gradient"`, which takes a pass back through the model for every word, and memory
            as in training.
        layers: Layers of the language model whose attention is averaged (with that of all their heads), from 0;
            negative ones count from the last. `None`: all.
        generation: Arguments of `generate`, where the model is asked.

    Raises:
        ValueError: An option is none of those, the answer is empty, or media are encoded already.
    """
    model, processor = session.model, session.processor
    if method not in get_args(Method):
        raise ValueError(f"Unknown method {method!r}; choose one of {', '.join(get_args(Method))}.")
    chosen = _check_layers(layers, model.config.get_text_config().num_hidden_layers)
    if any(isinstance(value, EncodedMedia) for block in media for value in block.values()):
        raise ValueError("Encoded media cannot be shown. Pass the media themselves.")
    if answer is None:
        answer = session.ask(question, *media, **generation)
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"return_metadata": True, "return_text_replacement_offsets": True},
    )
    prompt_ids = inputs["input_ids"][0].tolist()
    if isinstance(answer, str):
        ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        answer = Answer(answer, len(prompt_ids), num_new_tokens=len(ids), token_ids=ids)
    if not answer.token_ids:
        raise ValueError("The answer is empty, so there is nothing to explain. Pass an `answer`.")

    seen = list(describe_media(model.config, processor, messages, inputs))
    words = _split_words(processor.tokenizer, answer.token_ids, len(prompt_ids))
    text = [
        word
        for first, last in _text_spans(seen, len(prompt_ids))
        for word in _split_words(processor.tokenizer, prompt_ids[first:last], first)
    ] + words
    ids = torch.tensor([prompt_ids + answer.token_ids], device=model.device)
    tensors = {name: inputs[name] for name in (*INPUT_NAMES, "input_features_mask") if name in inputs}
    if method == "attention":
        weights = _compute_attention(model, ids, len(prompt_ids), words, tensors, chosen)
        for medium in seen:
            medium.maps = medium.place(weights[:, slice(*medium.span)])
        totals = [weights[:, slice(*medium.span)].sum(1) for medium in seen]
    else:
        weights = _compute_gradients(model, ids, len(prompt_ids), words, seen, tensors)
        totals = [medium.maps.flatten(1).sum(1) for medium in seen]
    text_map = torch.stack([weights[:, word.positions].sum(1) for word in text], dim=1)
    return Explanation(
        question=question,
        answer=answer,
        method=method,
        layers=chosen if method == "attention" else None,
        words=words,
        media=seen,
        text=text,
        text_map=text_map,
        totals=torch.stack([*totals, text_map.sum(1)], dim=1),
    )


def _check_layers(layers: Sequence[int] | None, number: int) -> list[int]:
    chosen = list(range(number)) if layers is None else list(layers)
    if not chosen or not all(isinstance(layer, int) and -number <= layer < number for layer in chosen):
        raise ValueError(f"layers are numbers from 0 to {number - 1} (or {-number} to -1), got {chosen}.")
    return sorted({layer % number for layer in chosen})


def _text_spans(media: list[SeenFrames | HeardSound], end: int) -> Iterator[tuple[int, int]]:
    """Where the prompt is text: first token, and the token after the last."""
    position = 0
    for first, last in [*(medium.span for medium in media), (end, end)]:
        if first > position:
            yield position, first
        position = last


def _split_words(tokenizer: Any, ids: list[int], first: int) -> list[Word]:
    """
    Tokens from position `first` on, in words: what stands between white space, every sign of a script that is written
    without it, and every special token.
    """
    words: list[Word] = []
    done, pending, ends = "", [], True
    for number in range(len(ids)):
        pending.append(number)
        text = tokenizer.decode(ids[: number + 1], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and number + 1 < len(ids):
            continue  # the middle of a character
        piece, done = text[len(done) :], text
        is_special = ids[number] in tokenizer.all_special_ids
        begins = ends or is_special or piece[:1].isspace() or "\u2e80" <= piece[:1] < "\ufb00"
        if not words or (begins and piece.strip() and words[-1].text):
            words.append(Word("", [], []))
        word = words[-1]
        word.text += piece.strip()
        word.token_ids += [ids[item] for item in pending]
        word.positions += [first + item for item in pending]
        pending, ends = [], is_special or piece[-1:].isspace()
    return words


@torch.no_grad()
def _compute_attention(
    model: VideoLlama2ForConditionalGeneration,
    ids: torch.Tensor,
    num_prompt: int,
    words: list[Word],
    tensors: dict[str, Any],
    layers: list[int],
) -> torch.Tensor:
    """
    Attention from where every word was chosen to every position: float32 (words, length), each row adds up to 1.

    A token is chosen where the one before it stands; a word of several tokens has their mean. Everything up to the
    first of these runs with the attention that the model has; the rest, a few rows, with one that gives its weights.
    """
    # Without a configuration the cache keeps what a sliding window would drop: all rows are equally long.
    cache = DynamicCache()
    if num_prompt > 1:
        model(input_ids=ids[:, : num_prompt - 1], past_key_values=cache, logits_to_keep=1, **tensors)
    language_model: Any = model.model.language_model
    implementation = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    rows = []
    try:
        for start in range(num_prompt - 1, ids.shape[1] - 1, _BLOCK):
            block = ids[:, start : min(start + _BLOCK, ids.shape[1] - 1)]
            outputs = model(input_ids=block, past_key_values=cache, output_attentions=True, logits_to_keep=1)
            attention = sum(outputs.attentions[layer][0].float().mean(0).cpu() for layer in layers) / len(layers)
            rows.append(torch.nn.functional.pad(attention, (0, ids.shape[1] - attention.shape[1])))
    finally:
        language_model.set_attn_implementation(implementation)
    weights = torch.cat(rows)
    return torch.stack([weights[[position - num_prompt for position in word.positions]].mean(0) for word in words])


def _compute_gradients(
    model: VideoLlama2ForConditionalGeneration,
    ids: torch.Tensor,
    num_prompt: int,
    words: list[Word],
    media: list[SeenFrames | HeardSound],
    tensors: dict[str, Any],
) -> torch.Tensor:
    """
    Input times gradient of every word's log-probability: of the text's embeddings float32 (words, length), of the
    media into their `maps`.
    """
    inputs, leaves = dict(tensors), {}
    for name in INPUT_NAMES:
        if name in tensors:
            leaves[name] = [item.detach().clone().requires_grad_() for item in tensors[name]]
            is_tensor = isinstance(tensors[name], torch.Tensor)
            inputs[name] = torch.stack(leaves[name]) if is_tensor else list(leaves[name])
    embedded: list[torch.Tensor] = []

    def keep(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    num_answer = ids.shape[1] - num_prompt
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        for parameter in frozen:  # their gradients are not wanted, nor what computing them needs kept
            parameter.requires_grad_(False)
        with torch.enable_grad():
            logits = model(input_ids=ids, logits_to_keep=num_answer + 1, **inputs).logits[0, :-1].float()
        scores = logits.log_softmax(-1).gather(1, ids[0, num_prompt:, None])[:, 0]
        sources = embedded + [leaves[_input_name(medium)].pop(0) for medium in media]
        of_text, of_media = [], [[] for _ in media]
        for word in words:
            score = scores[[position - num_prompt for position in word.positions]].sum()
            text, *gradients = torch.autograd.grad(score, sources, retain_graph=True, materialize_grads=True)
            of_text.append((text * embedded[0]).detach()[0].float().sum(-1).cpu())
            for medium, maps, source, gradient in zip(media, of_media, sources[1:], gradients):
                maps.append(medium.pool(_multiply(model, medium, source.detach(), gradient)[None])[0])
    finally:
        hook.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
    for medium, maps in zip(media, of_media):
        medium.maps = torch.stack(maps)
    return torch.stack(of_text)


def _input_name(medium: SeenFrames | HeardSound) -> str:
    if isinstance(medium, HeardSound):
        return "input_features"
    return "pixel_values" if medium.kind == "image" else "pixel_values_videos"


def _multiply(
    model: VideoLlama2ForConditionalGeneration,
    medium: SeenFrames | HeardSound,
    values: torch.Tensor,
    gradient: torch.Tensor,
) -> torch.Tensor:
    """Gradient times input: (frames, 3, height, width) of an image or a video, (time, mel bins) of a sound."""
    if isinstance(medium, SeenFrames):
        product = (gradient * values).float().cpu()
        return product if medium.kind == "video" else product[None]
    config: Any = model.config.audio_config
    # BEATs scales the gradient that enters each of its layers down, also where nothing trains.
    scale = config.layer_wise_gradient_decay_ratio**config.num_hidden_layers
    # From silence, not from the mean energy: BEATs normalises every patch, so that patches which are scaled about the
    # mean are the same to it, and that product is nothing everywhere.
    return (gradient * (values - SILENCE)).float().cpu() / scale


__all__ = ["Explanation", "Method", "Word", "explain"]
