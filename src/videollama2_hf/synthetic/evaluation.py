"""
The table of the small model: how many questions of each kind it answers rightly about clips whose compositions no
training has seen, beside what chance, the text alone and another clip's media give.

Clips are written as files (H.264 and AAC, PNG, WAV) and read by the real processor. An answer counts if the model
would say exactly that, to the token that ends its turn, by greedy generation: every token of the right answer must be
its first choice, which one pass over question and answer tells.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .dataset import RowTokenizer, describe_media, draw_media
from .questions import AUDIO_VISUAL_SKILLS, SKILLS, STILL_SKILLS, Question, ask, with_choices
from .rendering import frame_times
from .rows import Row, write_medium
from .world import Clip, draw_clip


_KINDS = (*SKILLS, "multiple choice", *(f"image: {skill}" for skill in STILL_SKILLS))


@dataclass(frozen=True)
class Case:
    """One question of the test, the name of its table row, and the medium that it is asked about."""

    skill: str
    row: Row


@dataclass(frozen=True)
class SkillResult:
    """
    One row of the table; shares of questions answered rightly.

    Args:
        accuracy: With the question's own media.
        chance: Of guessing among the answers that the question can have.
        majority: Of always giving the most frequent answer.
        text_only: Without any media.
        shuffled: With the media of another question of this kind.
        shuffled_video, shuffled_audio: With another picture or another sound only, for questions about both.
    """

    skill: str
    count: int
    accuracy: float
    chance: float
    majority: float
    text_only: float
    shuffled: float
    shuffled_video: float | None = None
    shuffled_audio: float | None = None


def draw_cases(per_skill: int = 100, seed: int = 1, held_out: bool = True) -> list[Case]:
    """
    Questions of every kind, `per_skill` of each, one question a row. Seeds are the test's own: no training row has
    the same.

    Beside the skills of `questions.SKILLS` there are those that still images answer (`"image: ..."`), and
    `"multiple choice"`.
    """
    wanted = Counter(dict.fromkeys(_KINDS, per_skill))
    cases: list[Case] = []
    for index in range(400 * per_skill):
        if not +wanted:
            return cases
        generator = np.random.default_rng([987_654, seed, index])
        clip = draw_clip(generator, held_out)
        for skill, medium, question in _candidates(clip, generator):
            if wanted[skill] > 0:
                wanted[skill] -= 1
                cases.append(Case(skill, Row(clip, medium, (question,))))
    raise RuntimeError(f"The world gives too few questions of the kinds {', '.join(+wanted)}.")


def _candidates(clip: Clip, generator: np.random.Generator) -> list[tuple[str, str, Question]]:
    """(kind, medium, question): at most one of each kind, so that a clip does not weigh too much."""
    found: dict[str, tuple[str, str, Question]] = {}
    for question in ask(clip, generator):
        found.setdefault(question.skill, (question.skill, question.medium, question))
        found.setdefault("multiple choice", ("multiple choice", question.medium, with_choices(question, generator)))
    if clip.scene in ("count", "pair", "move"):
        for question in ask(clip, generator, "image"):
            name = f"image: {question.skill}"
            found.setdefault(name, (name, "image", question))
    return list(found.values())


class Evaluator:
    """
    Asks a model. Media are read from files once and encoded once.

    Args:
        model, processor: The model, in evaluation mode, and its processor.
        folder: Where to write the clips. `None`: nothing is written; media are drawn as files without loss would give
            them, which needs no PyAV.
        batch_size: Questions at once.
    """

    def __init__(self, model: Any, processor: Any, folder: Path | None, batch_size: int = 50):
        self.model, self.processor, self.folder, self.batch_size = model, processor, folder, batch_size
        self.tokenize = RowTokenizer(processor.tokenizer, model.config)
        self.features: dict[tuple[Clip, str], torch.Tensor] = {}

    def read(self, rows: Sequence[Row]) -> None:
        """Writes the files of rows, reads them with the processor and encodes them: pictures and sounds by clip."""
        whole = {"image": "image", "video": "audio_visual", "audio": "audio_visual"}
        needed = {(row.clip, kind) for row in rows for kind in _kinds(row.medium)}
        waiting = sorted(needed - set(self.features), key=lambda item: (item[1], repr(item[0])))
        paths: dict[tuple[Clip, str], Path] = {}
        for kind in ("image", "video", "audio"):
            clips = [clip for clip, wanted in waiting if wanted == kind]
            for start in range(0, len(clips), self.batch_size):
                piece = clips[start : start + self.batch_size]
                if self.folder is None:
                    self._keep(kind, piece, self._draw(kind, piece))
                    continue
                files = []
                for clip in piece:
                    key = (clip, whole[kind])
                    if key not in paths:
                        stem = self.folder / f"{len(os.listdir(self.folder)):06d}"
                        path = write_medium(Row(clip, whole[kind], ()), stem)
                        assert path is not None
                        paths[key] = path
                    files.append(str(paths[key]))
                self._keep(kind, piece, self._open(kind, files))

    @torch.inference_mode()
    def _keep(self, kind: str, clips: Sequence[Clip], inputs: Mapping[str, torch.Tensor]) -> None:
        get_features = getattr(self.model, f"get_{kind}_features")
        tokens = get_features(**{name: values.to(self.model.device) for name, values in inputs.items()}).pooler_output
        self.features |= {(clip, kind): tokens[i] for i, clip in enumerate(clips)}

    def _draw(self, kind: str, clips: Sequence[Clip]) -> Mapping[str, torch.Tensor]:
        times = frame_times(self.model.config.num_frames)
        config = self.model.config
        sizes = config.vision_config.image_size, config.audio_config.num_mel_bins
        return draw_media(describe_media([Row(clip, kind, ()) for clip in clips], times), *sizes)

    def _open(self, kind: str, files: list[str]) -> Mapping[str, torch.Tensor]:
        processor = self.processor
        if kind == "audio":
            extractor = processor.feature_extractor
            waveforms = [extractor.load_video_audio(file) for file in files]
            return extractor(waveforms, extractor.sampling_rate, return_tensors="pt")
        if kind == "image":
            images = processor.image_processor.fetch_images(files)
            return processor.image_processor(images, return_tensors="pt")
        return processor.video_processor(files, return_tensors="pt")

    @torch.inference_mode()
    def answers_rightly(self, rows: Sequence[Row], media: Sequence[Mapping[str, Clip]]) -> list[bool]:
        """
        Whether the model's greedy answers to one-question rows are the right ones.

        Args:
            media: For every row, the clip whose `"image"`, `"video"` and `"audio"` it is shown.
        """
        order = sorted(range(len(rows)), key=lambda i: (rows[i].medium, len(rows[i].questions[0].text)))
        right = [False] * len(rows)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            encoded = [self.tokenize(rows[i]) for i in batch]
            ids = pad_sequence([e["input_ids"] for e in encoded], batch_first=True, padding_value=0)
            labels = pad_sequence([e["labels"] for e in encoded], batch_first=True, padding_value=-100)
            labels[:, :-1][labels[:, 1:] == -100] = -100  # what follows the end of the turn is not generated
            mask = pad_sequence([torch.ones_like(e["input_ids"]) for e in encoded], batch_first=True)
            features = {
                kind: _Encoded(torch.stack([self.features[media[i][kind], kind] for i in batch if kind in media[i]]))
                for kind in ("image", "video", "audio")
                if any(kind in media[i] for i in batch)
            }
            device = self.model.device
            logits = self.model(
                input_ids=ids.to(device), attention_mask=mask.to(device), mm_encoder_outputs=features, use_cache=False
            ).logits
            predicted, target = logits[:, :-1].argmax(dim=-1).cpu(), labels[:, 1:]
            correct = ((predicted == target) | (target == -100)).all(dim=1)
            for i, is_right in zip(batch, correct.tolist()):
                right[i] = is_right
        return right


@dataclass
class _Encoded:
    """Encoded media as the model takes them."""

    pooler_output: torch.Tensor


def _kinds(medium: str) -> tuple[str, ...]:
    return ("video", "audio") if medium == "audio_visual" else () if medium == "text" else (medium,)


def evaluate(
    model: Any,
    processor: Any,
    per_skill: int = 100,
    seed: int = 1,
    held_out: bool = True,
    batch_size: int = 50,
    from_files: bool = True,
    media: tuple[str, ...] = ("image", "video", "audio", "audio_visual"),
) -> list[SkillResult]:
    """
    The table.

    Args:
        per_skill: Questions of every kind.
        seed: Of the questions.
        held_out: Whether clips are of compositions that training has not seen, or of others of the same seeds.
        from_files: Whether media go through files; see [`Evaluator`].
        media: Which questions are asked, by what they are about.
    """
    cases = [case for case in draw_cases(per_skill, seed, held_out) if case.row.medium in media]
    rows = [case.row for case in cases]
    own = [{kind: row.clip for kind in _kinds(row.medium)} for row in rows]
    other = _others(cases)
    with tempfile.TemporaryDirectory() as folder:
        evaluator = Evaluator(model, processor, Path(folder) if from_files else None, batch_size)
        evaluator.read(rows)
        right = evaluator.answers_rightly(rows, own)
        blind_rows = [Row(row.clip, "text", row.questions) for row in rows]
        blind = evaluator.answers_rightly(blind_rows, [{} for _ in rows])
        shuffled = [{kind: rows[j].clip for kind in media} for media, j in zip(own, other)]
        wrong = evaluator.answers_rightly(rows, shuffled)
        both = [i for i, case in enumerate(cases) if case.row.medium == "audio_visual"]
        partly = {}
        for kind in ("video", "audio"):
            mixed = [{**own[i], kind: shuffled[i][kind]} for i in both]
            partly[kind] = dict(zip(both, evaluator.answers_rightly([rows[i] for i in both], mixed)))
    results = []
    for skill in dict.fromkeys(case.skill for case in cases):
        chosen = [i for i, case in enumerate(cases) if case.skill == skill]
        answers = Counter(rows[i].questions[0].answer for i in chosen)
        is_joint = skill in AUDIO_VISUAL_SKILLS

        def share(values: Any, chosen: list[int] = chosen) -> float:
            return float(np.mean([values[i] for i in chosen]))

        results.append(
            SkillResult(
                skill,
                len(chosen),
                share(right),
                float(np.mean([1 / len(rows[i].questions[0].choices) for i in chosen])),
                answers.most_common(1)[0][1] / len(chosen),
                share(blind),
                share(wrong),
                share(partly["video"]) if is_joint else None,
                share(partly["audio"]) if is_joint else None,
            )
        )
    return sorted(results, key=lambda result: _KINDS.index(result.skill))


def _others(cases: Sequence[Case]) -> list[int]:
    """For every case another one of the same kind, and the same medium, whose media take the place of its own."""
    other = list(range(len(cases)))
    groups: dict[tuple[str, str], list[int]] = {}
    for i, case in enumerate(cases):
        groups.setdefault((case.skill, case.row.medium), []).append(i)
    for members in groups.values():
        for place, i in enumerate(members):
            other[i] = members[(place + 1) % len(members)]
    return other


def format_table(results: Sequence[SkillResult]) -> str:
    """The table in Markdown."""
    lines = [
        "| skill | questions | right | chance | majority | text only | other media | other video | other sound |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        numbers = list(vars(result).values())[2:]
        cells = ["" if number is None else f"{number:.2f}" for number in numbers]
        lines.append(f"| {result.skill} | {result.count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def evaluate_folder(
    model: str | os.PathLike,
    per_skill: int = 100,
    seed: int = 1,
    held_out: bool = True,
    from_files: bool = True,
    output: str | None = None,
) -> list[SkillResult]:
    """
    Loads a folder, prints its table and returns it.

    Args:
        output: A JSON file to write the numbers to.
    """
    from ..modeling_videollama2 import VideoLlama2ForConditionalGeneration
    from ..processing_videollama2 import VideoLlama2Processor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = VideoLlama2ForConditionalGeneration.from_pretrained(str(model), dtype=torch.float32).to(device).eval()
    processor = VideoLlama2Processor.from_pretrained(str(model))
    results = evaluate(loaded, processor, per_skill, seed, held_out, from_files=from_files)
    print(format_table(results))
    if output is not None:
        Path(output).write_text(json.dumps([vars(result) for result in results], indent=1) + "\n", encoding="utf-8")
    return results


__all__ = ["Case", "Evaluator", "SkillResult", "draw_cases", "evaluate", "evaluate_folder", "format_table"]
