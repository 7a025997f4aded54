"""Questions of a data file, answered and scored: batches of answers, written as they come, gone on with."""

import json
import os
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from .captioning import read_whole_lines
from .scoring import EvaluationReport, History, find_letter, find_options, score
from .session import MEDIA_TYPES, Answer, Session
from .training.data import RawRow, Rows, load_rows
from .training.dataset import UnreadablePolicy


_OPTION_KEYS = ("options", "candidates", "choices")
# The prompt of the original's multiple-choice evaluations (inference_video_mcqa_mvbench.py).
_CHOICE_PROMPT = (
    "Question: {question}\nOptions:\n{options}\n"
    "Answer with the option's letter from the given choices directly and only give the best option."
)


def evaluate(
    session: Session,
    data: Any,
    output: str | os.PathLike | None = None,
    group_by: str | None = None,
    history: History = "answers",
    batch_size: int = 8,
    on_unreadable: UnreadablePolicy = "skip",
    block_options: dict[str, Any] | None = None,
    limit: int | None = None,
    show_progress: bool | None = None,
    **generation: Any,
) -> EvaluationReport:
    """
    Answers the questions of data and compares the answers with those in the data.

    Rows of the same media follow each other, so that these are encoded once; `batch_size` rows are answered at once,
    each its next question. A run that was interrupted goes on where it stopped if it is started again with the same
    `output`.

    Args:
        data: What [`load_rows`] takes: rows of `messages` or `conversations`, every answer of which is the reference
            to the question before it; or rows of `question`, `answer` and perhaps `options` (`candidates`, `choices`:
            a list), beside their media under `image`, `video` and `audio`. There `answer` is a text, or of options a
            letter, a text of theirs, or a number from 0; the prompt is the original's for multiple choice.
        output: A `.jsonl` file, written line by line.
        group_by: Column of the data that the table is grouped by; a list there has an entry per question. `None`:
            `skills`, where rows have it.
        history: What stands before a later question of a row: the earlier ones with the model's own `"answers"` or
            with the right ones (`"reference"`); or nothing (`"none"`).
        on_unreadable: What to do about a row whose media cannot be read or that is too long: `"stop"` raises its
            error, `"skip"` lists it.
        block_options: Options of every video's content block (`num_frames`, `load_audio_from_video`, ...).
        limit: Only the first rows.
        show_progress: Whether to show a bar. `None`: on a terminal.
        generation: Arguments of `generate`, such as `max_new_tokens`.

    Raises:
        ValueError: The data are not what is said above, or the output is of another run.
    """
    for name, value, allowed in (("history", history, History), ("on_unreadable", on_unreadable, UnreadablePolicy)):
        if value not in get_args(allowed):
            raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {value!r}.")
    rows = data if isinstance(data, Rows) else load_rows(data)
    settings = {
        "model": str(getattr(session.model, "name_or_path", "")),
        "dtype": str(session.model.dtype).removeprefix("torch."),
        "history": history,
        **(block_options or {}),
        **generation,
    }
    done = {} if output is None else _read_done(Path(output), settings)
    order, num_questions = _plan(rows, limit, group_by, done)
    report = EvaluationReport(sorted(done.values(), key=_place), len(done), num_questions, history=history)
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
    waiting, active = iter(order), list[_Dialogue]()
    is_hidden = None if show_progress is None else not show_progress
    with (
        open(os.devnull if output is None else output, "a", encoding="utf-8") as file,
        tqdm(total=num_questions, initial=report.num_before, unit="question", disable=is_hidden) as progress,
    ):

        def fail(dialogue: _Dialogue, error: Exception) -> None:
            if on_unreadable == "stop":
                raise ValueError(f"{dialogue.name}: {error}") from error
            report.failed[dialogue.name] = str(error)
            progress.update(len(dialogue.questions) - dialogue.turn)

        while True:
            while len(active) < batch_size and (number := next(waiting, None)) is not None:
                dialogue = _Dialogue.read(rows.raw(number), number, history, group_by)
                while (number, dialogue.turn) in done:
                    dialogue.answers.append(done[number, dialogue.turn]["answer"])
                if dialogue.turn < len(dialogue.questions):
                    try:
                        dialogue.encode_media(session, block_options or {})
                    except (OSError, ValueError) as error:
                        fail(dialogue, error)
                    else:
                        active.append(dialogue)
            if not active:
                break
            answered = []
            for dialogue, answer in zip(active, _answer(session, active, generation)):
                if isinstance(answer, Exception):
                    fail(dialogue, answer)
                    continue
                result = dialogue.add(answer) | {"settings": settings}
                file.write(json.dumps(result, ensure_ascii=False, default=str) + "\n")
                report.results.append(result)
                progress.update()
                answered.append(dialogue)
            file.flush()
            active = [dialogue for dialogue in answered if dialogue.turn < len(dialogue.questions)]
    report.results.sort(key=_place)
    return report


def _place(result: dict[str, Any]) -> tuple[int, int]:
    """Row and turn of a result."""
    return result["row"], result["turn"]


@dataclass
class _Dialogue:
    """A row that is being asked; `turn` is the number of its next question."""

    number: int
    name: str
    id: Any
    system: list[dict[str, Any]]
    questions: list[dict[str, Any]]
    references: list[str]
    groups: list[str]
    history: History
    media: list[dict[str, Any]]
    answers: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, raw: RawRow, number: int, history: History = "none", group_by: str | None = None) -> "_Dialogue":
        raw = _with_dialogue(raw)
        messages = raw.read()["messages"]
        system = [message for message in messages if message["role"] == "system"]
        questions = [message for message in messages if message["role"] == "user"]
        references = [_text(message) for message in messages if message["role"] == "assistant"]
        groups = _read_groups(raw, group_by, len(questions))
        media = [_describe_medium(block) for question in questions for block in _media(question)]
        return cls(number, raw.describe(), raw.id, system, questions, references, groups, history, media)

    @property
    def turn(self) -> int:
        return len(self.answers)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation up to the next question."""
        if self.history == "none":
            return [*self.system, self.questions[self.turn]]
        said = self.references if self.history == "reference" else self.answers
        turns = [*self.system]
        for question, text in zip(self.questions, said[: self.turn]):
            turns += [question, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        return [*turns, self.questions[self.turn]]

    def encode_media(self, session: Session, options: dict[str, Any]) -> None:
        """Puts encoded media in the place of the blocks, so that they stay as long as the row is asked."""
        shown: list[dict[str, Any]] = []
        for question in self.questions:
            content: list[dict[str, Any]] = []
            for block in _join_sounds(question["content"]):
                if block["type"] in MEDIA_TYPES:
                    block = block | options if block["type"] == "video" else block
                    block = {"type": block["type"], block["type"]: session.encode(block)}
                content.append(block)
            question["content"] = [*shown, *content]
            if self.history == "none":  # a later question is about what was shown before, too
                shown += _media({"content": content})

    def add(self, answer: Answer) -> dict[str, Any]:
        """Notes an answer; its line of the output."""
        turn, reference = self.turn, self.references[self.turn]
        question = _text(self.questions[turn])
        options = find_options(question)
        options = options if find_letter(reference, options) else {}
        self.answers.append(answer.text)
        return {
            "row": self.number,
            "turn": turn,
            "id": self.id,
            "group": self.groups[turn],
            "media": self.media,
            "question": question,
            "options": options,
            "reference": reference,
            "answer": answer.text,
            **vars(score(answer.text, reference, options)),
            "num_prompt_tokens": answer.num_prompt_tokens,
            "num_new_tokens": answer.num_new_tokens,
            "finish_reason": answer.finish_reason,
        }


def _answer(session: Session, dialogues: list[_Dialogue], generation: dict[str, Any]) -> list[Answer | Exception]:
    """An answer for each, or why there is none: one that is too long must not keep the others from theirs."""
    try:
        return list(session.answer([dialogue.messages for dialogue in dialogues], **generation))
    except ValueError as error:
        if len(dialogues) == 1:
            return [error]
    return [answer for dialogue in dialogues for answer in _answer(session, [dialogue], generation)]


def _plan(
    rows: Rows, limit: int | None, group_by: str | None, done: dict[tuple[int, int], dict[str, Any]]
) -> tuple[list[int], int]:
    """
    Numbers of the rows, those of the same media together, and how many questions they have. Results that are there
    get their groups; those of rows that are not asked are taken out of `done`.
    """
    places: dict[str, list[int]] = {}
    known: dict[tuple[int, int], dict[str, Any]] = {}
    num_questions = 0
    for number in range(len(rows) if limit is None else min(limit, len(rows))):
        dialogue = _Dialogue.read(rows.raw(number), number, group_by=group_by)
        num_questions += len(dialogue.questions)
        key = json.dumps(dialogue.media) if all("source" in medium for medium in dialogue.media) else f"row {number}"
        places.setdefault(key if dialogue.media else f"row {number}", []).append(number)
        for turn, (question, reference) in enumerate(zip(dialogue.questions, dialogue.references)):
            result = done.pop((number, turn), None)
            if result is None:
                continue
            if (result["question"], result["reference"]) != (_text(question), reference):
                raise ValueError(
                    f"The output holds an answer to another question for {dialogue.name}: it is of other data. Choose "
                    "another output."
                )
            known[number, turn] = result | {"group": dialogue.groups[turn]}
    done.clear()
    done.update(known)
    return [number for numbers in places.values() for number in numbers], num_questions


def _read_done(output: Path, settings: dict[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    """Results of the output by row and turn; the rest of a line that an interruption left is cut off."""
    wanted = json.loads(json.dumps(settings, default=str))
    results = {}
    for number, line in enumerate(read_whole_lines(output)):
        try:
            result = json.loads(line)
            place, before = _place(result), result["settings"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"Line {number + 1} of {output} is not one that an evaluation writes. Choose another output."
            ) from None
        changed = [name for name in {**before, **wanted} if before.get(name) != wanted.get(name)]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{output} was written with {name}={before.get(name)!r}, this run has {wanted.get(name)!r}. Choose "
                "another output, or the same settings."
            )
        results[place] = result
    return results


def _with_dialogue(raw: RawRow) -> RawRow:
    """A row of `question` and `answer` as one of `conversations`; others as they are."""
    content = raw.content
    if not isinstance(content, Mapping) or content.get("question") is None or "messages" in content:
        return raw
    if content.get("conversations") is not None or content.get("answer") is None:
        return raw
    question, answer = str(content["question"]).strip(), content["answer"]
    key = next((key for key in _OPTION_KEYS if content.get(key) is not None), None)
    if key is not None:
        texts = [re.sub(r"^\(?[A-Z][.):]\s+", "", str(option)).strip() for option in content[key]]
        letters = string.ascii_uppercase[: len(texts)]
        answer = _find_answer(raw, answer, dict(zip(letters, texts)))
        listed = "\n".join(f"({letter}) {text}" for letter, text in zip(letters, texts))
        question = _CHOICE_PROMPT.format(question=question, options=listed)
    blocks: list[dict[str, Any]] = []
    for kind in MEDIA_TYPES:
        for name in (kind, f"{kind}s"):
            media = content.get(name)
            blocks += [{"type": kind}] * (len(media) if isinstance(media, (list, tuple)) else int(media is not None))
    turns = [
        {"role": "user", "content": [*blocks, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": str(answer)}]},
    ]
    return raw._replace(content={**content, "messages": turns}, source=replace(raw.source, format="messages"))


def _find_answer(raw: RawRow, answer: Any, options: dict[str, str]) -> str:
    """The letter of the right option."""
    letters = list(options)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
        return letters[answer]
    texts = [letter for letter, text in options.items() if text == str(answer).strip()]
    letter = texts[0] if len(texts) == 1 else find_letter(str(answer), options)
    if letter is None:
        raise ValueError(
            f"{raw.describe()}: the answer {answer!r} is none of the options {', '.join(options.values())}; write a "
            "letter, the text of an option, or its number from 0."
        )
    return letter


def _read_groups(raw: RawRow, group_by: str | None, count: int) -> list[str]:
    content = raw.content.get("json", raw.content)
    value = content.get(group_by or "skills")
    if value is None and group_by is not None:
        raise ValueError(f"{raw.describe()} has no column {group_by!r} to group by; it has {', '.join(content)}.")
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise ValueError(
                f"{raw.describe()} has {count} questions, but {len(value)} entries in {group_by or 'skills'!r}."
            )
        return [str(entry) for entry in value]
    return ["all" if value is None else str(value)] * count


def _text(message: dict[str, Any]) -> str:
    return "".join(block["text"] for block in message["content"] if block["type"] == "text").strip()


def _media(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [block for block in message["content"] if block["type"] in MEDIA_TYPES]


def _join_sounds(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An empty block of sound behind a video says that the video is heard."""
    joined: list[dict[str, Any]] = []
    for block in content:
        if block == {"type": "audio"} and joined and joined[-1]["type"] == "video":
            joined[-1] = joined[-1] | {"load_audio_from_video": True}
        else:
            joined.append(block)
    return joined


def _describe_medium(block: dict[str, Any]) -> dict[str, Any]:
    """A medium as the output has it: its kind, its options, and its source where that is a name."""
    kind = block["type"]
    source = next(
        (block[key] for key in (kind, "path", "url") if isinstance(block.get(key), (str, os.PathLike))), None
    )
    options = {name: value for name, value in block.items() if name not in (*MEDIA_TYPES, "path", "url", "base64")}
    return options if source is None else {**options, "source": os.fspath(source)}


__all__ = ["EvaluationReport", "History", "evaluate"]
