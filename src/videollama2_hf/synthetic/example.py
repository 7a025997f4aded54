"""
The clip that comes with the package: a shape moves, another one stands, and the moving one's instrument plays. Its
composition is one of the test's, which no training has seen.
"""

import os
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .questions import ask, describe_picture, describe_sound
from .rendering import render_clip
from .world import Clip, draw_clip


if TYPE_CHECKING:
    from ..session import Session

# Seed of the clip that is shipped: what `find_example` found with the shipped model.
EXAMPLE_SEED = 1
# What README, documentation and notebooks ask about it, and the kind of each question.
QUESTIONS = {
    "What do you see and hear?": "caption",
    "What moves?": "mover",
    "In which direction does it go?": "motion",
    "What moves, and in which direction?": "mover and motion",
    "What do you hear?": "sound",
    "When do you hear the sound?": "time of sound",
}


def draw_example(seed: int = EXAMPLE_SEED) -> Clip:
    """The clip of a seed."""
    generator = np.random.default_rng([2406, 7476, seed])
    while True:
        clip = draw_clip(generator, held_out=True, scenes=("move",))
        if len(clip.things) == 2 and clip.relation == "match" and clip.related:
            return clip


def get_answers(clip: Clip) -> dict[str, str]:
    """The right answers to [`QUESTIONS`]."""
    answers = {question.skill: question.answer for question in ask(clip, np.random.default_rng(0))}
    answers["caption"] = f"{describe_picture(clip)}. {describe_sound(clip)}"
    return {question: answers[skill] for question, skill in QUESTIONS.items()}


def write_example(path: str | os.PathLike, seed: int = EXAMPLE_SEED) -> Path:
    """Writes the clip of a seed as mp4 (H.264 and AAC)."""
    return render_clip(draw_example(seed), path, side=256)


def find_example(session: "Session") -> Iterator[tuple[int, dict[str, str]]]:
    """
    Asks a model about one clip after the other: every question by itself, and all in one conversation.

    Yields:
        The clip's seed, and the questions that were answered wrongly, with those answers.
    """
    for seed in count():
        right, wrong = get_answers(draw_example(seed)), {}
        with tempfile.TemporaryDirectory() as folder:
            path = write_example(Path(folder) / "clip.mp4", seed)
            clip = {"type": "video", "video": session.encode({"type": "video", "video": str(path)})}
        alone, chat = session.ask_many(list(QUESTIONS), clip, max_new_tokens=48), session.chat()
        for question, answer in zip(QUESTIONS, alone):
            again = chat.ask(question, *([] if chat.messages else [clip]), max_new_tokens=48)
            for said in (answer, again):
                if said.text != right[question]:
                    wrong[question] = said.text
        yield seed, wrong


__all__ = ["EXAMPLE_SEED", "QUESTIONS", "draw_example", "find_example", "get_answers", "write_example"]
