"""
What can be asked and told about a clip: questions with their answers, captions, multiple choice.

A question about picture and sound together never names what it asks about (shape, instrument, time, number), so its
text and one medium do not give the answer away.
"""

from dataclasses import dataclass, replace

import numpy as np

from .world import COLOURS, DIRECTIONS, INSTRUMENTS, SECONDS, SHAPES, SINGLE_SOUNDS, Clip, Sound, Thing


NUMBERS = ("zero", "one", "two", "three", "four", "five")
TIMES = ("near the start", "in the middle", "near the end")
TEXTURES = ("plain", "striped")
# Thirds of the frame, the middle one narrower: by row, then by column.
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
_EDGES = (0.4, 0.6)
YES_NO = ("no", "yes")

# Skill -> templates. Every skill is a row of the evaluation's table.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "colour": (
        "What {colour} is the object?",
        "What {colour} is the {shape}?",
        "Which {colour} does the {shape} have?",
    ),
    "shape": ("What shape is the object?", "What shape is the {colour_name} object?", "Which shape do you see?"),
    "texture": ("Is the {shape} plain or striped?", "Is the {colour_name} {shape} striped or plain?"),
    "colour of two": ("What {colour} is the {shape}?", "Which {colour} does the {shape} have?"),
    "shape of two": ("What shape is the {colour_name} object?", "Which shape is {colour_name}?"),
    "colour of several": ("What {colour} is the {shape}?", "Which {colour} does the {shape} have?"),
    "shape of several": ("What shape is the {colour_name} object?", "Which shape is {colour_name}?"),
    "motion": ("Which way does the {shape} move?", "Where does the {shape} move?", "In which direction does it go?"),
    "mover": ("What moves?", "Which object moves?", "What is moving?"),
    "mover and motion": ("What moves where?", "What moves, and in which direction?"),
    "first to appear": ("What appears first?", "Which object appears first?", "What comes first?"),
    "last to appear": ("What appears last?", "Which object appears second?", "What comes last?"),
    "target": ("What does the {shape} hit?", "What is hit by the {colour_name} {shape}?"),
    "time of event": (
        "When does the {shape} {event}?",
        "At which time does the {colour_name} {shape} {event}?",
        "When does it {event}?",
    ),
    "count": ("How many objects are there?", "How many objects do you see?", "Count the objects."),
    "colour before": ("What {colour} is the {shape} at first?", "Which {colour} does the {shape} have at the start?"),
    "colour after": ("What {colour} is the {shape} at last?", "Which {colour} does the {shape} turn into?"),
    "position": ("What is on the {side}?", "Which object is on the {side}?"),
    "place": ("Where is the {thing}?", "At which place is the {thing}?"),
    "place at first": ("Where is the {thing} at first?", "Where does the {thing} start?"),
    "place at last": ("Where is the {thing} at last?", "Where does the {thing} end?"),
    "sound": ("What do you hear?", "Which sound do you hear?", "What can be heard?"),
    "low or high": ("Is the tone low or high?", "Do you hear a low or a high tone?"),
    "rising or falling": ("Does the tone rise or fall?", "Is the tone rising or falling?"),
    "beeps": ("How many beeps do you hear?", "How often does it beep?", "Count the beeps."),
    "time of sound": ("When do you hear the sound?", "When does the sound start?", "At which time is the sound?"),
    "first sound": ("What do you hear first?", "Which sound comes first?"),
    "last sound": ("What do you hear last?", "Which sound comes second?"),
    "match": (
        "Does the sound match the object that moves?",
        "Does the instrument belong to the moving shape?",
        "Do the moving shape and the sound fit?",
    ),
    "synchrony": (
        "Do you hear the thud when they touch?",
        "Does the thud come at the right time?",
        "Are picture and sound in time?",
    ),
    "same number": ("Are there as many beeps as objects?", "Do you hear one beep for each object?"),
    "object with the sound": ("What appears when the sound starts?", "Which object comes with the sound?"),
}
AUDIO_SKILLS = ("sound", "low or high", "rising or falling", "beeps", "time of sound", "first sound", "last sound")
AUDIO_VISUAL_SKILLS = ("match", "synchrony", "same number", "object with the sound")
SKILLS = tuple(TEMPLATES)
# Those that one frame can answer.
STILL_SKILLS = (
    "colour",
    "shape",
    "texture",
    "colour of two",
    "shape of two",
    "colour of several",
    "shape of several",
    "count",
    "position",
    "place",
)

CAPTION_REQUESTS = {
    "image": ("Describe the image.", "What do you see?", "Describe what you see."),
    "video": ("Describe the video.", "What do you see?", "What happens in the video?"),
    "audio": ("Describe the sound.", "Tell me what you hear.", "Describe what you hear."),
    "audio_visual": ("What do you see and hear?", "Describe the video and its sound.", "Describe everything."),
}


@dataclass(frozen=True)
class Question:
    """One question: its text, its answer, the answers that a wrong one could be, and what it takes to answer it."""

    skill: str
    text: str
    answer: str
    choices: tuple[str, ...]

    @property
    def medium(self) -> str:
        """`"video"`, `"audio"` or `"audio_visual"`."""
        if self.skill in AUDIO_VISUAL_SKILLS:
            return "audio_visual"
        return "audio" if self.skill in AUDIO_SKILLS else "video"


def sound_name(sound: Sound) -> str:
    """A sound with its article: `a bell`, `noise`."""
    return sound.name if sound.name == "noise" else f"a {sound.name}"


SOUND_NAMES = tuple(name if name == "noise" else f"a {name}" for name in SINGLE_SOUNDS) + ("beeps", "silence")


def _spelling(generator: np.random.Generator) -> str:
    return "colour" if generator.random() < 0.5 else "color"


def _the(thing: Thing) -> str:
    return f"the {thing.name}"


def _a(thing: Thing) -> str:
    return f"a striped {thing.name}" if thing.striped else f"a {thing.name}"


def _position(thing: Thing, time: float) -> tuple[float, float]:
    times, xs, ys = zip(*thing.path)
    return float(np.interp(time, times, xs)), float(np.interp(time, times, ys))


def _place(thing: Thing, time: float) -> str:
    x, y = _position(thing, time)
    return PLACES[3 * sum(y > edge for edge in _EDGES) + sum(x > edge for edge in _EDGES)]


def _at(thing: Thing, time: float = 0.0) -> str:
    """`at the top left`, `in the middle`."""
    place = _place(thing, time)
    return "in the middle" if place == "middle" else f"at the {place}"


def _are(number: int, noun: str) -> str:
    """`is one object`, `are two objects`."""
    return f"is one {noun}" if number == 1 else f"are {NUMBERS[number]} {noun}s"


def _is_clear(thing: Thing, time: float) -> bool:
    """Whether a thing is not between two places."""
    return all(abs(coordinate - edge) > 0.03 for coordinate in _position(thing, time) for edge in _EDGES)


def _time(slot: int | None) -> str:
    assert slot is not None
    return TIMES[slot // 2]


def _seen_answers(clip: Clip) -> list[tuple[str, Thing, str, tuple[str, ...]]]:
    """(skill, thing asked about, answer, choices) of everything to see."""
    things = clip.things
    first, last = things[0], things[-1]
    distinct = tuple(_the(thing) for thing in things)
    answers: list[tuple[str, Thing, str, tuple[str, ...]]] = []
    if clip.scene == "count":
        answers.append(("count", first, NUMBERS[len(things)], NUMBERS[1:]))
        for thing in things if len(things) > 2 else ():
            if [other.shape for other in things].count(thing.shape) == 1:
                answers.append(("colour of several", thing, thing.colour, tuple(COLOURS)))
            if [other.colour for other in things].count(thing.colour) == 1:
                answers.append(("shape of several", thing, thing.shape, SHAPES))
    if clip.scene == "change":
        assert first.turns is not None
        answers.append(("colour before", first, first.colour, tuple(COLOURS)))
        answers.append(("colour after", first, first.turns[1], tuple(COLOURS)))
    elif len(things) == 1:
        answers.append(("colour", first, first.colour, tuple(COLOURS)))
    if len(things) == 1:
        answers.append(("shape", first, first.shape, SHAPES))
        answers.append(("texture", first, TEXTURES[first.striped], TEXTURES))
    elif clip.scene != "count":
        for thing in things:
            answers.append(("colour of two", thing, thing.colour, tuple(COLOURS)))
            answers.append(("shape of two", thing, thing.shape, SHAPES))
    if clip.scene == "move":
        direction = tuple(DIRECTIONS)[clip.variant]
        answers.append(("motion", first, direction, tuple(DIRECTIONS)))
        wheres = tuple(f"{_the(first)} moves {name}" for name in DIRECTIONS)
        answers.append(("mover and motion", first, wheres[clip.variant], wheres))
        if len(things) == 2:
            answers.append(("mover", first, _the(first), distinct))
    if clip.scene == "order":
        answers.append(("first to appear", first, _the(first), distinct))
        answers.append(("last to appear", last, _the(last), distinct))
    if clip.scene == "collide":
        answers.append(("target", first, _the(last), distinct))
    if clip.scene in ("bounce", "collide", "change"):
        answers.append(("time of event", first, _time(clip.slot), TIMES))
    if clip.scene in ("order", "pair"):
        answers += [("position", thing, _the(thing), distinct) for thing in things]
    moves = clip.scene in ("move", "bounce", "collide")
    for thing in things:
        if distinct.count(_the(thing)) > 1 or clip.scene == "change":
            continue
        if not moves and _is_clear(thing, 0.0):
            answers.append(("place", thing, _place(thing, 0.0), PLACES))
        for skill, time in (("place at first", 0.0), ("place at last", SECONDS)) if moves else ():
            if _is_clear(thing, time):
                answers.append((skill, thing, _place(thing, time), PLACES))
    return answers


def _heard_answers(clip: Clip) -> list[tuple[str, str, tuple[str, ...]]]:
    """(skill, answer, choices) of everything to hear."""
    sounds = clip.sounds
    if not sounds:
        return [("sound", "silence", SOUND_NAMES)]
    if clip.num_beeps:
        return [("sound", "beeps", SOUND_NAMES), ("beeps", NUMBERS[clip.num_beeps], NUMBERS[1:])]
    if len(sounds) == 2:
        names = (sound_name(sounds[0]), sound_name(sounds[1]))
        return [("first sound", names[0], SOUND_NAMES[:-2]), ("last sound", names[1], SOUND_NAMES[:-2])]
    name = sounds[0].name
    answers = [("sound", sound_name(sounds[0]), SOUND_NAMES), ("time of sound", _time(sounds[0].slot), TIMES)]
    if name in ("low tone", "high tone"):
        answers.append(("low or high", name.split()[0], ("low", "high")))
    if name in ("rising tone", "falling tone"):
        answers.append(("rising or falling", name.split()[0], ("rising", "falling")))
    return answers


def ask(clip: Clip, generator: np.random.Generator, medium: str | None = None) -> list[Question]:
    """
    Every question about a clip, each in one of its wordings, in random order.

    Args:
        medium: `"image"`, `"video"`, `"audio"`, or `None` for everything, questions about both together included.
    """
    found = []
    if medium != "audio":
        event = {"bounce": "bounce", "collide": "hit something", "change": "change"}.get(clip.scene, "")
        for skill, thing, answer, choices in _seen_answers(clip):
            if medium == "image" and skill not in STILL_SKILLS:
                continue
            side = "left" if thing.path[0][1] < 0.5 else "right"
            names = {"shape": thing.shape, "colour_name": thing.colour, "event": event, "side": side}
            is_only = [other.shape for other in clip.things].count(thing.shape) == 1
            names["thing"] = thing.shape if is_only and generator.random() < 0.5 else thing.name
            found.append((skill, names, answer, choices))
    if medium in (None, "audio"):
        found += [(skill, {}, answer, choices) for skill, answer, choices in _heard_answers(clip)]
    if medium is None and clip.relation is not None:
        if clip.relation == "which":
            thing = clip.things[0 if clip.related else 1]
            found.append(("object with the sound", {}, _the(thing), tuple(_the(thing) for thing in clip.things)))
        else:
            skill = {"number": "same number"}.get(clip.relation, clip.relation)
            found.append((skill, {}, YES_NO[clip.related], YES_NO))
    questions = []
    for index in generator.permutation(len(found)):
        skill, names, answer, choices = found[index]
        templates = TEMPLATES[skill]
        text = templates[generator.integers(len(templates))]
        questions.append(Question(skill, text.format(colour=_spelling(generator), **names), answer, choices))
    return questions


def with_choices(question: Question, generator: np.random.Generator, explained: bool = False) -> Question:
    """
    The same question as multiple choice, answered by a letter; all places of the answer are equally likely.

    Args:
        explained: Whether the answer comes in words first, as the question then asks for.
    """
    wrong = [choice for choice in question.choices if choice != question.answer]
    picked = [wrong[i] for i in generator.permutation(len(wrong))[:3]]
    place = int(generator.integers(len(picked) + 1))
    picked.insert(place, question.answer)
    letters = "ABCD"[: len(picked)]
    options = " ".join(f"{letter}. {choice}" for letter, choice in zip(letters, picked))
    return replace(
        question,
        skill="multiple choice",
        text=f"{question.text} {options}" + " Explain." * explained,
        answer=f"{question.answer}, so {letters[place]}" if explained else letters[place],
        choices=tuple(letters),
    )


def explain(clip: Clip, question: Question) -> Question | None:
    """A question about picture and sound with an answer that says why first; `None` for other questions."""
    if question.skill == "match":
        why = f"you see a {clip.things[0].shape} and hear {sound_name(clip.sounds[0])}"
    elif question.skill == "synchrony":
        why = f"they touch {_time(clip.slot)} and the thud is {_time(clip.sounds[0].slot)}"
    elif question.skill == "same number":
        why = (
            f"there {_are(len(clip.things), 'object')} and {NUMBERS[clip.num_beeps]} beep{'s' * (clip.num_beeps > 1)}"
        )
    else:
        return None
    return replace(question, text=f"{question.text} Explain.", answer=f"{why}, so {question.answer}")


def describe_picture(clip: Clip, still: bool = False) -> str:
    """What there is to see, in one sentence; `still` leaves out what happens."""
    first, last = clip.things[0], clip.things[-1]
    if clip.scene == "count" or still:
        names = [f"{_a(thing)} {_at(thing, SECONDS / 2)}" for thing in clip.things]
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        return f"there {_are(len(names), 'object')}: {listed}"
    if clip.scene == "move":
        direction = tuple(DIRECTIONS)[clip.variant]
        stands = f" and {_a(last)} stands {_at(last)}" if len(clip.things) == 2 else ""
        places = f"from the {_place(first, 0.0)} to the {_place(first, SECONDS)}"
        return f"{_a(first)} moves {direction} {places}{stands}"
    if clip.scene == "order":
        return f"first {_a(first)} appears {_at(first)}, then {_a(last)} {_at(last)}"
    if clip.scene == "bounce":
        return f"{_a(first)} bounces {_time(clip.slot)}"
    if clip.scene == "collide":
        return f"{_a(first)} hits {_a(last)} {_time(clip.slot)}"
    if clip.scene == "change":
        assert first.turns is not None
        return f"{_a(first)} turns {first.turns[1]} {_time(clip.slot)}"
    left, right = sorted((first, last), key=lambda thing: thing.path[0][1])
    return f"{_a(left)} is on the left and {_a(right)} is on the right"


def describe_sound(clip: Clip) -> str:
    """What there is to hear, in one sentence."""
    if not clip.sounds:
        return "you hear silence"
    if clip.num_beeps:
        return f"you hear {NUMBERS[clip.num_beeps]} beep{'s' * (clip.num_beeps > 1)}"
    if len(clip.sounds) == 2:
        return f"you hear {sound_name(clip.sounds[0])}, then {sound_name(clip.sounds[1])}"
    return f"you hear {sound_name(clip.sounds[0])} {_time(clip.sounds[0].slot)}"


def caption(clip: Clip, medium: str, generator: np.random.Generator) -> Question:
    """A request for a caption (`"image"`, `"video"`, `"audio"` or `"audio_visual"`) and the caption."""
    sentences = []
    if medium != "audio":
        sentences.append(describe_picture(clip, still=medium == "image"))
    if medium in ("audio", "audio_visual"):
        sentences.append(describe_sound(clip))
    requests = CAPTION_REQUESTS[medium]
    text = requests[generator.integers(len(requests))]
    return Question("caption", text, ". ".join(sentences), ())


def facts(generator: np.random.Generator) -> list[Question]:
    """What holds everywhere in this world: which instrument belongs to which shape."""
    questions = []
    for shape, instrument in zip(SHAPES, INSTRUMENTS):
        questions += [
            Question("facts", f"Which instrument belongs to the {shape}?", f"a {instrument}", ()),
            Question("facts", f"Which shape belongs to the {instrument}?", f"a {shape}", ()),
        ]
        other = INSTRUMENTS[generator.integers(4)]
        fits = YES_NO[other == instrument]
        questions.append(Question("facts", f"Does a {other} belong to a {shape}?", fits, YES_NO))
    return [questions[i] for i in generator.permutation(len(questions))]


def recall(generator: np.random.Generator) -> tuple[str, list[Question]]:
    """
    A text of pairs that say nothing about any clip, and questions that only who finds the place in it can answer: what
    belongs to a name, or to its shape or colour where that is enough, which name a shape or colour is part of, and the
    whole text again.
    """
    values = [*PLACES, *DIRECTIONS, *INSTRUMENTS, *TEXTURES, *TIMES, *NUMBERS]
    number = 2 + int(generator.integers(4))
    kind = generator.random() if number <= len(SHAPES) else 1.0
    if kind < 0.7:  # no shape twice, and all colours different or all the same
        colours = generator.permutation(len(COLOURS))[:number]
        if kind > 0.35:
            colours[:] = colours[0]
        names = list(zip(colours, generator.permutation(len(SHAPES))[:number]))
    else:
        drawn = generator.permutation(len(COLOURS) * len(SHAPES))[:number]
        names = [divmod(name, len(SHAPES)) for name in drawn]
    told = [values[value] for value in generator.permutation(len(values))[:number]]
    seen, shapes = [list(COLOURS)[colour] for colour, _ in names], [SHAPES[shape] for _, shape in names]
    questions = []
    for colour, shape, value in zip(seen, shapes, told):
        asked = {f"{colour} {shape}": value}
        if shapes.count(shape) == 1:
            asked[shape] = value
            questions.append(
                Question("recall", f"What {_spelling(generator)} is the {shape}?", colour, tuple(COLOURS))
            )
        if seen.count(colour) == 1:
            asked[f"{colour} object"] = value
            questions.append(Question("recall", f"What shape is the {colour} object?", shape, SHAPES))
        questions += [Question("recall", f"And the {name}?", value, tuple(values)) for name, value in asked.items()]
    text = ", ".join(f"{colour} {shape} {value}" for colour, shape, value in zip(seen, shapes, told))
    questions.append(Question("recall", "Repeat everything.", text, ()))
    return text, [questions[i] for i in generator.permutation(len(questions))]


def letters(generator: np.random.Generator) -> list[Question]:
    """Multiple choice without anything to find out: at which letter a word stands."""
    questions = []
    for values in (tuple(COLOURS), SHAPES, INSTRUMENTS, PLACES, TIMES, NUMBERS[1:], TEXTURES, tuple(DIRECTIONS)):
        answer = values[generator.integers(len(values))]
        question = Question("letters", f"Which letter is {answer}?", answer, values)
        questions.append(with_choices(question, generator))
    return [questions[i] for i in generator.permutation(len(questions))]


__all__ = [
    "AUDIO_SKILLS",
    "AUDIO_VISUAL_SKILLS",
    "CAPTION_REQUESTS",
    "SKILLS",
    "STILL_SKILLS",
    "TEMPLATES",
    "Question",
    "ask",
    "caption",
    "describe_picture",
    "describe_sound",
    "explain",
    "facts",
    "letters",
    "recall",
    "with_choices",
]
