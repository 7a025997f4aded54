"""
The synthetic world: what a clip of four seconds shows and sounds like, drawn from a seed.

A clip is a scene (things of a colour, a shape and a texture that move, appear, bounce, collide, change or stand) and
sounds. Some clips tie the two together: a thud when something bounces or not, an instrument that belongs to a shape or
not, as many beeps as things or not, a sound when one of two things appears. Whether they fit is drawn so that each
medium by itself has the same distribution in both cases: the sound's time, name or number is the picture's, or the
picture's turned by a number of steps on a circle.

Every scene is a composition (colour, shape, variant). One in eight is held out: training never draws it, the test
draws nothing else. The rule keeps every single attribute uniform. Instruments are held out with their times.
"""

from dataclasses import dataclass

import numpy as np


SECONDS = 4.0
COLOURS = {
    "red": (225, 45, 45),
    "green": (50, 185, 70),
    "blue": (60, 95, 240),
    "yellow": (240, 225, 50),
    "purple": (170, 60, 215),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# The instrument of a shape is the one at its place.
INSTRUMENTS = ("bell", "drum", "flute", "horn")
SCENES = ("move", "order", "bounce", "collide", "count", "change", "pair")
# Sound -> (pitch in Hz from, to; seconds)
SOUNDS = {
    "bell": (500, 1100, 0.6),
    "drum": (90, 150, 0.4),
    "flute": (480, 850, 0.55),
    "horn": (170, 330, 0.55),
    "low tone": (150, 300, 0.55),
    "high tone": (900, 1800, 0.55),
    "rising tone": (250, 500, 0.6),
    "falling tone": (250, 500, 0.6),
    "noise": (0, 0, 0.55),
    "thud": (50, 75, 0.25),
    "beep": (600, 1500, 0.12),
}
SINGLE_SOUNDS = tuple(name for name in SOUNDS if name != "beep")
NUM_SLOTS = 6
MAX_THINGS = 5


def slot_time(slot: int) -> float:
    """Second of a time slot: 0.75 for slot 0, 3.25 for slot 5."""
    return 0.75 + 0.5 * slot


def is_held_out(colour: int, shape: int, variant: int) -> bool:
    """
    Whether a composition is only for the test: 12 of the 96 indices (6 colours, 4 shapes, 4 variants), 2 of each
    colour and 3 of each shape and variant.
    """
    return colour % 2 == shape % 2 and variant == (shape + colour // 2) % 4


def is_instrument_held_out(instrument: int, slot: int) -> bool:
    """Whether an instrument at a time slot is only for the test: two of its six slots."""
    return (slot - instrument) % 3 == 0


@dataclass(frozen=True)
class Thing:
    """
    Something to see. `path` holds (second, x, y) between which it moves straight; lengths are fractions of the frame's
    side. It is there from second `appears` on, and from second `turns[0]` has the colour `turns[1]`.
    """

    colour: str
    shape: str
    striped: bool
    radius: float
    path: tuple[tuple[float, float, float], ...]
    appears: float = 0.0
    turns: tuple[float, str] | None = None

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Sound:
    """Something to hear: `onset` in seconds, `pitch` in Hz, `level` its peak, `seed` its place in the noise table."""

    name: str
    onset: float
    pitch: float
    level: float
    seed: int

    @property
    def slot(self) -> int:
        return round((self.onset - 0.75) / 0.5)


@dataclass(frozen=True)
class Clip:
    """
    One clip.

    Args:
        scene: One of `SCENES`.
        variant: Direction of `move`, `bounce` and `collide`; shape of the second thing of `order` and `pair`; number
            of things of `count`, and index of the new colour of `change`, modulo 4.
        slot: Time slot of the event of `bounce`, `collide`, `change`; of the second appearance of `order`.
        relation: What ties picture and sound: `"match"`, `"synchrony"`, `"number"`, `"which"`, or `None`.
        related: Whether they fit; for `"which"`, whether the sound is that of the first thing.
        background: Colour (3), then amplitude, two frequencies and a phase of its texture.
        noise: Level of the noise behind everything.
    """

    scene: str
    variant: int
    things: tuple[Thing, ...]
    sounds: tuple[Sound, ...]
    slot: int | None
    relation: str | None
    related: bool
    background: tuple[float, ...]
    noise: float
    noise_seed: int

    @property
    def num_beeps(self) -> int:
        return sum(sound.name == "beep" for sound in self.sounds)

    @property
    def composition(self) -> tuple[int, int, int]:
        """Indices of the first thing's colour and shape, and the variant."""
        return list(COLOURS).index(self.things[0].colour), SHAPES.index(self.things[0].shape), self.variant


class _Draw:
    """Shorthands on a generator."""

    def __init__(self, generator: np.random.Generator):
        self.generator = generator

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.generator.random())

    def integer(self, stop: int) -> int:
        return int(self.generator.integers(stop))

    def chance(self, probability: float) -> bool:
        return float(self.generator.random()) < probability

    def other(self, index: int, count: int) -> int:
        """An index below `count` that is not `index`, all equally likely."""
        return (index + 1 + self.integer(count - 1)) % count


def draw_clip(
    generator: np.random.Generator,
    held_out: bool = False,
    scenes: tuple[str, ...] = SCENES,
    relations: bool = True,
) -> Clip:
    """
    A random clip.

    Args:
        held_out: Whether to draw from the compositions of the test or of the training.
        scenes: Scenes to choose from, all equally likely.
        relations: Whether picture and sound may be tied together; else they are independent.
    """
    draw = _Draw(generator)
    scene = scenes[draw.integer(len(scenes))]
    while True:
        colour, shape, variant = draw.integer(6), draw.integer(4), draw.integer(4)
        if scene in ("order", "pair") and variant == shape:
            continue
        number = 0
        if scene == "count":
            number = 1 + draw.integer(MAX_THINGS)
            variant = number % 4
        if scene == "change":
            number = draw.other(colour, 6)
            variant = number % 4
        if is_held_out(colour, shape, variant) == held_out:
            break
    slot: int | None = None
    if scene in ("bounce", "collide", "change"):
        slot = draw.integer(NUM_SLOTS)
    relation = {"move": "match", "bounce": "synchrony", "collide": "synchrony", "count": "number", "order": "which"}
    tie = relation.get(scene) if relations and draw.chance(0.8) else None
    related = draw.chance(0.5)
    if scene in ("move", "bounce", "collide"):
        things = _moving_things(draw, scene, colour, shape, list(DIRECTIONS.values())[variant], slot)
    elif scene == "count":
        things = _counted_things(draw, colour, shape, number)
    elif scene == "change":
        turns = (slot_time(slot or 0) - 0.05, list(COLOURS)[number])
        things = [_thing(draw, colour, shape, _still(draw.uniform(0.2, 0.8), draw.uniform(0.2, 0.8)), turns=turns)]
    else:
        things, slot = _two_things(draw, scene, colour, shape, variant)
    sounds = _related_sounds(draw, tie, related, shape, slot, len(things), things, held_out)
    if tie is None:
        sounds = _random_sounds(draw, held_out)
    background = tuple(draw.uniform(5, 75) for _ in range(3)) + (
        draw.uniform(0, 25),
        draw.uniform(-5, 5),
        draw.uniform(-5, 5),
        draw.uniform(0, 6.3),
    )
    noise = 0.0 if draw.chance(0.15) else 10 ** draw.uniform(-4.5, -2.7)
    return Clip(
        scene, variant, tuple(things), tuple(sounds), slot, tie, related, background, noise, draw.integer(1 << 16)
    )


def _still(x: float, y: float) -> tuple[tuple[float, float, float], ...]:
    return ((0.0, x, y), (SECONDS, x, y))


def _thing(draw: _Draw, colour: int, shape: int, path, radius: float | None = None, **kwargs) -> Thing:
    radius = draw.uniform(0.115, 0.15) if radius is None else radius
    return Thing(list(COLOURS)[colour], SHAPES[shape], draw.chance(0.5), radius, path, **kwargs)


def _oriented(direction: tuple[int, int], along: float, across: float) -> tuple[float, float]:
    """(x, y) of a place `along` a direction, measured from the side that it comes from."""
    dx, dy = direction
    along = along if dx + dy > 0 else 1 - along
    return (along, across) if dx else (across, along)


def _moving_things(
    draw: _Draw, scene: str, colour: int, shape: int, direction: tuple[int, int], slot: int | None
) -> list[Thing]:
    second = None
    across = draw.uniform(0.22, 0.32) if draw.chance(0.5) else draw.uniform(0.68, 0.78)
    if scene == "move":
        distance = draw.uniform(0.35, 0.62)
        start = draw.uniform(0.17, 0.83 - distance)
        points = [(0.0, start), (SECONDS, start + distance)]
        if draw.chance(0.5):
            second = [(0.0, draw.uniform(0.2, 0.8))]
            across_second = 1 - across
    else:
        event = slot_time(slot or 0)
        if scene == "bounce":
            wall = 0.86
            speed = min(0.68 / max(event, SECONDS - event), draw.uniform(0.22, 0.34))
            points = [(0.0, wall - speed * event), (event, wall), (SECONDS, wall - speed * (SECONDS - event))]
        else:
            speed, start, gap = 0.13, 0.14, 0.24
            contact = start + speed * event
            points = [(0.0, start), (event, contact), (SECONDS, contact)]
            second = [(0.0, contact + gap), (event, contact + gap), (SECONDS, start + gap + speed * SECONDS)]
            across_second = across

    def path(points: list[tuple[float, float]], across: float):
        return tuple((time, *_oriented(direction, along, across)) for time, along in points)

    radius = 0.125 if scene == "collide" else None
    things = [_thing(draw, colour, shape, path(points, across), radius)]
    if second is not None:
        things.append(_thing(draw, draw.other(colour, 6), draw.other(shape, 4), path(second, across_second), radius))
    return things


def _counted_things(draw: _Draw, colour: int, shape: int, number: int) -> list[Thing]:
    cells = draw.generator.permutation(9)[:number]
    is_mixed = draw.chance(0.5)
    things = []
    for index, cell in enumerate(cells):
        if is_mixed and index:
            colour, shape = draw.integer(6), draw.integer(4)
        x, y = (0.18 + 0.32 * int(n) + draw.uniform(-0.03, 0.03) for n in divmod(int(cell), 3))
        things.append(_thing(draw, colour, shape, _still(x, y), draw.uniform(0.1, 0.125)))
    return things


def _two_things(draw: _Draw, scene: str, colour: int, shape: int, shape_2: int) -> tuple[list[Thing], int | None]:
    """Two things beside each other, the first on either side; in `order` they appear one after the other."""
    sides = (0.25, 0.75) if draw.chance(0.5) else (0.75, 0.25)
    places = [_still(side + draw.uniform(-0.07, 0.07), draw.uniform(0.2, 0.8)) for side in sides]
    appears, slot = (0.0, 0.0), None
    if scene == "order":
        first = draw.integer(NUM_SLOTS - 2)
        slot = first + 2 + draw.integer(NUM_SLOTS - 2 - first)
        appears = (slot_time(first) - 0.05, slot_time(slot) - 0.05)
    colours, shapes = (colour, draw.other(colour, 6)), (shape, shape_2)
    return [_thing(draw, colours[i], shapes[i], places[i], appears=appears[i]) for i in (0, 1)], slot


def _sound(draw: _Draw, name: str, onset: float) -> Sound:
    low, high, _ = SOUNDS[name]
    return Sound(name, onset, draw.uniform(low, high), draw.uniform(0.25, 0.7), draw.integer(1 << 16))


def _instrument(draw: _Draw, instrument: int, held_out: bool) -> Sound:
    slots = [slot for slot in range(NUM_SLOTS) if is_instrument_held_out(instrument, slot) == held_out]
    return _sound(draw, INSTRUMENTS[instrument], slot_time(slots[draw.integer(len(slots))]))


def _beeps(draw: _Draw, number: int) -> list[Sound]:
    onset, gap, pitch = draw.uniform(0.2, 0.7), draw.uniform(0.4, 0.65), draw.uniform(*SOUNDS["beep"][:2])
    level = draw.uniform(0.25, 0.7)
    return [Sound("beep", onset + gap * i, pitch, level, draw.integer(1 << 16)) for i in range(number)]


def _related_sounds(
    draw: _Draw,
    relation: str | None,
    related: bool,
    shape: int,
    slot: int | None,
    number: int,
    things: list[Thing],
    held_out: bool,
) -> list[Sound]:
    if relation == "match":
        return [_instrument(draw, shape if related else draw.other(shape, 4), held_out)]
    if relation == "synchrony":  # not at the same time: 2, 3 or 4 of 6 slots further on a circle
        assert slot is not None
        heard = slot if related else (slot + 2 + draw.integer(3)) % NUM_SLOTS
        return [_sound(draw, "thud", slot_time(heard))]
    if relation == "number":
        heard = number if related else 1 + draw.other(number - 1, MAX_THINGS)
        return _beeps(draw, heard)
    if relation == "which":
        names = ("low tone", "high tone", "noise", "thud", "rising tone", "falling tone")
        return [_sound(draw, names[draw.integer(len(names))], things[0 if related else 1].appears + 0.05)]
    return []


def _random_sounds(draw: _Draw, held_out: bool) -> list[Sound]:
    """Silence, beeps, one sound, or two sounds one after the other."""
    kind = draw.integer(16)
    if kind == 0:
        return []
    if kind <= 3:
        return _beeps(draw, 1 + draw.integer(MAX_THINGS))
    if kind <= 5:
        first, second = (int(n) for n in draw.generator.permutation(len(SINGLE_SOUNDS))[:2])
        slots = draw.integer(2), 3 + draw.integer(3)
        return [_sound(draw, SINGLE_SOUNDS[n], slot_time(slot)) for n, slot in zip((first, second), slots)]
    name = SINGLE_SOUNDS[kind - 6]
    if name in INSTRUMENTS:
        return [_instrument(draw, INSTRUMENTS.index(name), held_out)]
    return [_sound(draw, name, slot_time(draw.integer(NUM_SLOTS)))]


__all__ = [
    "COLOURS",
    "DIRECTIONS",
    "INSTRUMENTS",
    "MAX_THINGS",
    "NUM_SLOTS",
    "SCENES",
    "SECONDS",
    "SHAPES",
    "SINGLE_SOUNDS",
    "SOUNDS",
    "Clip",
    "Sound",
    "Thing",
    "draw_clip",
    "is_held_out",
    "is_instrument_held_out",
    "slot_time",
]
