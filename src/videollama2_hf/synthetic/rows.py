"""
Rows of training and test data: what is shown and heard, and what is said about it, as chat messages and as files.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .questions import (
    AUDIO_SKILLS,
    AUDIO_VISUAL_SKILLS,
    SKILLS,
    STILL_SKILLS,
    Question,
    ask,
    caption,
    describe_picture,
    describe_sound,
    explain,
    facts,
    letters,
    recall,
    with_choices,
)
from .rendering import render_clip, render_image, render_sound
from .world import SCENES, Clip, draw_clip


MEDIA = ("image", "video", "audio", "audio_visual", "text")
# The shares of the published joint stage (2 : 1 : 1), images and text among the videos.
DEFAULT_MIX = {"audio_visual": 4.0, "video": 1.2, "image": 0.3, "text": 1.4, "audio": 1.8}
# For pictures and sound together more of those that may be tied, most of all by the instrument of what moves.
_SCENES = {
    "image": ("count", "pair", "move", "change"),
    "audio_visual": ("move", "move", "bounce", "collide", "count", "order", "change"),
}
# Of the drills: a bounce and a hit are timed well enough without.
_DRILLED_SCENES = {"time of event": ("change",)}
# What the caption of a clip does not tell.
_UNTOLD = ("object with the sound",)
_MAX_TURNS = 8
_MAX_DRILLED = 12
# What `draw_drill` can ask for.
DRILLS = (*SKILLS, "multiple choice")


@dataclass(frozen=True)
class Row:
    """
    One row.

    Args:
        medium: What of the clip is given: `"image"` (one frame), `"video"` (without sound), `"audio"`,
            `"audio_visual"` or `"text"` (nothing; `context` may tell it).
        questions: The turns of the conversation.
        context: Text in front of the first question.
    """

    clip: Clip
    medium: str
    questions: tuple[Question, ...]
    context: str = ""


def draw_row(
    generator: np.random.Generator,
    mix: Mapping[str, float] | None = None,
    held_out: bool = False,
    captions: float = 0.2,
    max_turns: int = _MAX_TURNS,
) -> Row:
    """
    A random row.

    Args:
        mix: Weight of every medium; `None`: `DEFAULT_MIX`.
        held_out: Whether clips are of the test's compositions.
        captions: Share of rows that begin with a request for a caption.
        max_turns: Questions in a row, at most.
    """
    mix = DEFAULT_MIX if mix is None else mix
    weights = np.array(list(mix.values()), float)
    medium = list(mix)[generator.choice(len(weights), p=weights / weights.sum())]
    clip, context = _draw_clip(generator, medium, held_out), ""
    if medium == "text":
        kind = generator.random()
        if kind < 0.2:
            questions = (facts if kind < 0.1 else letters)(generator)
            return Row(clip, medium, tuple(questions[: 1 + generator.integers(max_turns)]))
        if kind < 0.5:
            text, questions = recall(generator)
            return Row(clip, medium, tuple(questions[:max_turns]), text)
        context = f"{describe_picture(clip)}. {describe_sound(clip)}."
        questions = [question for question in ask(clip, generator) if _is_told(clip, question)]
    else:
        questions = ask(clip, generator, None if medium == "audio_visual" else medium)
    for question in [question for question in questions if question.skill in AUDIO_VISUAL_SKILLS]:
        if generator.random() < 0.6:  # not only behind answers that give it away
            questions.remove(question)
            questions.insert(0, question)
        explained = explain(clip, question)
        if explained is not None:  # the rarest questions and the hardest: once with the reason, once without
            questions.insert(questions.index(question) + int(generator.integers(2)), explained)
    varied = []
    turns = 1 + generator.integers(max_turns, size=2).max()  # rather many: media are costly, turns are not
    for question in questions[:turns]:
        # Most of them about texts, where the answer is easy and only the letter has to be found.
        share = 0.4 if medium == "text" else 0.12
        is_choice = not question.text.endswith("Explain.") and generator.random() < share
        varied.append(with_choices(question, generator, generator.random() < 0.3) if is_choice else question)
    if medium != "text" and generator.random() < captions:
        varied = [caption(clip, medium, generator), *varied][:max_turns]
    return Row(clip, medium, tuple(_misspell(question, generator) for question in varied), context)


def draw_drill(generator: np.random.Generator, skill: str, held_out: bool = False) -> Row:
    """
    A random row that asks for one skill only, in several wordings. What does not come among everything else may come
    by rows of this kind.

    Args:
        skill: One of `SKILLS`, or `"multiple choice"`.

    Raises:
        ValueError: There is no such skill.
    """
    if skill not in DRILLS:
        raise ValueError(f"There is no skill {skill!r} to drill; choose from {', '.join(DRILLS)}.")
    is_choice = skill == "multiple choice"  # of every skill
    fits = {
        "audio_visual": True,
        "audio": is_choice or skill in AUDIO_SKILLS,
        "video": is_choice or skill not in AUDIO_SKILLS + AUDIO_VISUAL_SKILLS,
        "image": is_choice or skill in STILL_SKILLS,
    }
    media = [medium for medium, fitting in fits.items() if fitting]
    medium = media[generator.integers(len(media))]
    while True:
        clip = _draw_clip(generator, medium, held_out, _DRILLED_SCENES.get(skill))
        asked = [
            with_choices(question, generator) if is_choice else question
            for _ in range(3)
            for question in ask(clip, generator, None if medium == "audio_visual" else medium)
            if is_choice or question.skill == skill
        ]
        if asked:
            questions = list({question.text: question for question in asked}.values())
            return Row(clip, medium, tuple(questions[:_MAX_DRILLED]))


def _draw_clip(
    generator: np.random.Generator, medium: str, held_out: bool, scenes: tuple[str, ...] | None = None
) -> Clip:
    clip = draw_clip(generator, held_out, scenes or _SCENES.get(medium, SCENES), relations=medium != "audio")
    if medium == "image" and clip.scene == "change":  # one frame does not show a change
        clip = replace(clip, scene="move", things=(replace(clip.things[0], turns=None),))
    return clip


def draw_caption_row(generator: np.random.Generator, mix: Mapping[str, float], held_out: bool = False) -> Row:
    """A random row that is one caption, for the stages that train a new connector."""
    row = draw_row(generator, mix, held_out, max_turns=1)
    return replace(row, questions=(caption(row.clip, row.medium, generator),))


def _is_told(clip: Clip, question: Question) -> bool:
    if question.skill == "position":
        return clip.scene == "pair"
    if question.skill == "place":
        return clip.scene in ("count", "order")
    if question.skill in ("place at first", "place at last"):  # of a thing that stands beside it, too
        return clip.scene == "move"
    if question.skill == "mover" or question.skill == "time of event":
        return True
    return question.skill not in _UNTOLD


def _misspell(question: Question, generator: np.random.Generator) -> Question:
    """Now and then without a capital letter or a question mark, as people type."""
    drawn = generator.random()
    text = question.text
    if drawn < 0.2 and question.skill != "multiple choice":
        text = text.rstrip("?.")
    if drawn < 0.15:
        text = text[0].lower() + text[1:]
    return replace(question, text=text)


def to_messages(row: Row, path: str | None = None) -> list[dict[str, Any]]:
    """
    A row as chat messages.

    Args:
        path: The row's file. `None` for a row of text.
    """
    content: list[dict[str, Any]] = []
    if row.medium in ("video", "audio_visual"):
        content.append({"type": "video", "video": path, "load_audio_from_video": row.medium == "audio_visual"})
    elif row.medium != "text":
        content.append({"type": row.medium, row.medium: path})
    messages: list[dict[str, Any]] = []
    for turn, question in enumerate(row.questions):
        blocks = content if turn == 0 else []
        text = f"{row.context}\n{question.text}" if turn == 0 and row.context else question.text
        messages.append({"role": "user", "content": [*blocks, {"type": "text", "text": text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    return messages


def generate(
    output_dir: str | os.PathLike,
    num_rows: int,
    seed: int = 0,
    held_out: bool = False,
    mix: Mapping[str, float] | None = None,
    side: int = 64,
    captions_only: bool = False,
) -> Path:
    """
    Writes a folder of training data: `data.jsonl` with a row of messages per line, and `media/` with its videos,
    images and sounds. Paths in the rows are relative to the folder. The same seed writes the same rows.

    Args:
        captions_only: Whether a row is one caption, as the stages take it that train a new connector.

    Returns:
        The path of `data.jsonl`.

    Raises:
        ValueError: `num_rows` is below 1, or `mix` names an unknown medium.
    """
    if num_rows < 1:
        raise ValueError(f"The number of rows must be at least 1, got {num_rows}.")
    unknown = sorted(set(mix or ()) - set(MEDIA))
    if unknown:
        raise ValueError(f"There is no medium {unknown[0]!r}; choose from {', '.join(MEDIA)}.")
    if captions_only and "text" in (DEFAULT_MIX if mix is None else mix):
        raise ValueError("A text has no caption; name other media with `captions_only`.")
    folder = Path(output_dir)
    (folder / "media").mkdir(parents=True, exist_ok=True)
    draw: Any = draw_caption_row if captions_only else draw_row
    with open(folder / "data.jsonl", "w", encoding="utf-8") as file:
        for index in range(num_rows):
            row = draw(np.random.default_rng([seed, index]), mix, held_out)
            path = write_medium(row, folder / "media" / f"{index:06d}", side)
            name = None if path is None else path.relative_to(folder).as_posix()
            skills = [question.skill for question in row.questions]
            line = {"id": f"{seed}-{index}", "messages": to_messages(row, name), "skills": skills}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return folder / "data.jsonl"


def write_medium(row: Row, stem: Path, side: int = 64) -> Path | None:
    """Writes the file of a row to `stem` with the ending of its kind; `None` for a row of text."""
    if row.medium in ("video", "audio_visual"):
        return render_clip(row.clip, stem.with_suffix(".mp4"), side, has_sound=row.medium == "audio_visual")
    if row.medium == "image":
        return render_image(row.clip, stem.with_suffix(".png"), side)
    if row.medium == "audio":
        return render_sound(row.clip, stem.with_suffix(".wav"))
    return None


__all__ = [
    "DEFAULT_MIX",
    "DRILLS",
    "MEDIA",
    "Row",
    "draw_caption_row",
    "draw_drill",
    "draw_row",
    "generate",
    "to_messages",
    "write_medium",
]
