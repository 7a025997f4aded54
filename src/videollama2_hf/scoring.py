"""Whether answers are right: exact match, the reference within the answer, the letter of a choice; and the table."""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal


History = Literal["answers", "reference", "none"]


# References of more words are hardly ever said word by word.
_LONG_REFERENCE = 10
_SMALL_GROUP = 20
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_OPTION = re.compile(r"(?:^|(?<=\s))\(?([A-Z])[.):]\s+")
_LETTER_AT_THE_START = re.compile(r"\W*([A-Z])(?:\W*$|\s*[.):,])")
_LETTER_IN_BRACKETS = re.compile(r"\(([A-Z])\)")
_LONE_LETTER = re.compile(r"(?<!\w)([A-Z])(?![\w'])")


@dataclass(frozen=True)
class Score:
    """
    How an answer compares with its reference.

    Args:
        right: What counts: the letter of a multiple choice, an exact match elsewhere.
        exact: The answer equals the reference, see [`normalise`].
        contains: The reference's words stand in the answer, one after the other.
        letter: The option that the answer names; `None` if none, or if there is no choice.
    """

    right: bool
    exact: bool
    contains: bool
    letter: str | None = None


def normalise(text: str) -> str:
    """Lower case, without English articles and punctuation (but in numbers: 3.5), words joined by one space."""
    text = unicodedata.normalize("NFKC", text).casefold()
    kept = []
    for place, character in enumerate(text):
        in_number = character in ".,:" and text[place - 1 : place].isdigit() and text[place + 1 : place + 2].isdigit()
        is_dropped = unicodedata.category(character).startswith("P") and not in_number
        kept.append(" " if is_dropped and character in "-/_" else "" if is_dropped else character)
    words = _ARTICLES.sub(" ", "".join(kept)).split()
    return " ".join(words or "".join(kept).split())  # an answer may be the letter A


def score(answer: str, reference: str, options: dict[str, str] | None = None) -> Score:
    """
    Compares an answer with its reference.

    Args:
        options: Text of each option by its letter, where the question is a multiple choice; see [`find_options`].
    """
    given, wanted = normalise(answer), normalise(reference)
    exact, contains = given == wanted, f" {wanted} " in f" {given} "
    if not options:
        return Score(exact, exact, contains)
    letter = find_letter(answer, options)
    return Score(letter is not None and letter == find_letter(reference, options), exact, contains, letter)


def find_options(question: str) -> dict[str, str]:
    """
    The options that a question lists, `A. red B. blue` or `(A) red` line by line: text by letter, in order from A.
    Empty where there are not at least two.
    """
    options: dict[str, str] = {}
    places = []
    for match in _OPTION.finditer(question):
        if match[1] == string.ascii_uppercase[len(places)]:
            places.append(match)
    for place, following in zip(places, [*places[1:], None]):
        text = question[place.end() : None if following is None else following.start()]
        options[place[1]] = (text.strip().splitlines() or [""])[0].strip()
    return options if len(options) > 1 else {}


def find_letter(answer: str, options: dict[str, str]) -> str | None:
    """
    The option that an answer names. In this order: a letter that it begins with or has in brackets, the only
    option whose text stands in it, a letter that stands by itself.

    The original's evaluation (`inference_video_mcqa_*.py`) takes the first capital letter of the options' range,
    also one inside a word, then an option's text, and counts an answer that names none as C. Answers that are only
    a letter, which is what its prompt asks for, are read the same.
    """
    answer = re.sub("answer", "", answer, flags=re.IGNORECASE).strip()
    for pattern, search in ((_LETTER_AT_THE_START, re.match), (_LETTER_IN_BRACKETS, re.search)):
        found = search(pattern, answer)
        if found is not None and found[1] in options:
            return found[1]
    given = normalise(answer)
    texts = {letter: normalise(text) for letter, text in options.items()}
    named = {letter: text for letter, text in texts.items() if text and f" {text} " in f" {given} "}
    # "dark blue" names that and not "blue".
    longest = [
        letter
        for letter, text in named.items()
        if not any(text != other and text in other for other in named.values())
    ]
    if len(longest) == 1:
        return longest[0]
    return next((letter for letter in _LONE_LETTER.findall(answer) if letter in options), None)


@dataclass
class EvaluationReport:
    """
    The results, and what became of the rest.

    Args:
        results: A dict for every question, as the output has it: `row` and `turn` (from 0), `id`, `group`, `media`,
            `question`, `options`, `reference`, `answer`, the fields of a [`Score`], `num_prompt_tokens`,
            `num_new_tokens`, `finish_reason`, and the `settings` of the run.
        num_before: Results that the output had already.
        num_questions: Questions of the data.
        failed: Rows whose media could not be read or that are too long, and why.
        history: What stands before a later question of a row.
    """

    results: list[dict[str, Any]] = field(default_factory=list)
    num_before: int = 0
    num_questions: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    history: History = "answers"

    def table(self) -> list[dict[str, Any]]:
        """
        A row for every group and one, `"all"`, for all questions: `group`, `questions`, and shares of them: `right`,
        `guess` (right by always giving the group's most frequent reference, or an option by chance) and `contains`.
        """
        groups: dict[str, list[dict[str, Any]]] = {}
        for result in self.results:
            groups.setdefault(result["group"], []).append(result)
        rows = [_summarise(name, groups[name]) for name in sorted(groups)] if len(groups) > 1 else []
        if not self.results:
            return rows
        total = _summarise("all", self.results)
        if rows:
            total["guess"] = sum(row["guess"] * row["questions"] for row in rows) / total["questions"]
        return [*rows, total]

    def to_dict(self) -> dict[str, Any]:
        """The table and its notes as plain values."""
        return {
            "table": self.table(),
            "num_questions": self.num_questions,
            "num_answered": len(self.results),
            "failed": self.failed,
            "notes": list(self._notes()),
        }

    def describe(self) -> str:
        """The table, and in words what its numbers are of."""
        rows = self.table()
        if not rows:
            return "No question was answered."
        width = max(len("group"), *(len(row["group"]) for row in rows))
        lines = [f"{'group':<{width}}  questions   right   guess  contains"]
        for row in rows:
            lines.append(
                f"{row['group']:<{width}}  {row['questions']:>9}{row['right']:>8.1%}{row['guess']:>8.1%}"
                f"{row['contains']:>10.1%}"
            )
        num_right, count = sum(result["right"] for result in self.results), len(self.results)
        low, high = _confidence_interval(num_right, count)
        num_choices = sum(bool(result["options"]) for result in self.results)
        lines += [
            "",
            f"{num_right} of {count} answers are right: {num_right / count:.1%}. Of so many questions, that is "
            f"between {low:.1%} and {high:.1%} with a confidence of 95 %.",
        ]
        rules = []
        if num_choices < count:
            rules.append("the whole answer is the reference, but for upper case, punctuation and articles")
        if num_choices:
            rules.append(f"the answer names the right option ({num_choices} questions are multiple choice)")
        lines += [
            f"right: {'; or '.join(rules)}.",
            "guess: what always giving the most frequent reference of the group (of a choice: any option) would get.",
            "contains: the words of the reference stand in the answer, whatever else it says.",
        ]
        return "\n".join(lines + [f"Note: {note}" for note in self._notes()])

    def _notes(self) -> Iterator[str]:
        num_missing = self.num_questions - len(self.results)
        if num_missing:
            yield f"{num_missing} of {self.num_questions} questions are not in these numbers: they could not be asked."
        small = [row for row in self.table()[:-1] if row["questions"] < _SMALL_GROUP]
        if small:
            yield (
                f"{len(small)} groups have fewer than {_SMALL_GROUP} questions: their shares say little, and guessing "
                "looks too good there."
            )
        num_cut = sum(result["finish_reason"] == "length" for result in self.results)
        if num_cut:
            yield f"{num_cut} answers were cut off; more new tokens may change the result."
        num_later = sum(result["turn"] > 0 for result in self.results)
        before = {
            "answers": "the earlier ones stand before them, with the model's own answers",
            "reference": "the earlier ones stand before them, with the right answers",
            "none": "each was asked by itself",
        }
        if num_later:
            yield f"{num_later} questions are not the first of their row; {before[self.history]}."
        num_long = sum(
            len(result["reference"].split()) > _LONG_REFERENCE for result in self.results if not result["options"]
        )
        if num_long:
            yield (
                f"{num_long} references have more than {_LONG_REFERENCE} words; of them hardly any answer equals, so "
                "these numbers say little about them."
            )


def _summarise(name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of [`EvaluationReport.table`]."""
    count = len(results)
    guesses = sum(1 / len(result["options"]) for result in results if result["options"])
    references = Counter(normalise(result["reference"]) for result in results if not result["options"])
    guesses += max(references.values(), default=0)
    shares = {key: sum(result[key] for result in results) / count for key in ("right", "contains")}
    return {"group": name, "questions": count, "right": shares["right"], "guess": guesses / count} | {
        "contains": shares["contains"]
    }


def _confidence_interval(num_right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    share = num_right / count
    centre, scale = share + z * z / (2 * count), 1 + z * z / count
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (centre - half) / scale, (centre + half) / scale


__all__ = ["EvaluationReport", "History", "Score", "find_letter", "find_options", "normalise", "score"]
