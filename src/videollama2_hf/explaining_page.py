"""
An explanation as one page of HTML that needs nothing else.

Every picture lies in it as a data URI, once; a word's maps are small pictures laid over them by CSS. Which word is
shown is a radio button, so that choosing one needs no script; the script only adds that pointing at a word shows it.
"""

import base64
from collections.abc import Iterator
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .drawing import SILENCE, to_colours
from .token_places import HeardSound, SeenFrames


if TYPE_CHECKING:
    from .explaining import Explanation

STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
SCRIPT = """
let kept = document.querySelector('.word:checked');
for (const label of document.querySelectorAll('.words label')) {
  const radio = document.getElementById(label.htmlFor);
  label.onmouseenter = () => { radio.checked = true; };
  label.onmouseleave = () => { if (kept) kept.checked = true; };
  label.onclick = radio.onchange = () => { kept = radio; };
}
"""


def render_page(explanation: "Explanation") -> str:
    """The page of an explanation; see [`Explanation.to_html`]."""
    words = range(len(explanation.words))
    radio = '<input class="word" type="radio" name="word" id="w{}"{}>'
    radios = "".join(radio.format(n, "" if n else " checked") for n in words)
    labels = " ".join(f'<label for="w{n}">{escape(explanation.words[n].text) or "␣"}</label>' for n in words)
    blocks = "".join(_render_media(explanation))
    has_sound = any(isinstance(medium, HeardSound) for medium in explanation.media)
    legend = " Of sounds, low tones are below; what the model hears is marked in green." if has_sound else ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in describe(explanation))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(explanation.question)}</title>"
        f"<style>{STYLE}{''.join(_render_rules(explanation))}</style></head><body>\n{radios}<main>"
        f"<h1>{escape(explanation.question)}</h1>"
        f'<p class="soft">Choose a word of the answer to see where the model looked for it.{legend}</p>'
        f'<div class="words">{labels}</div>{"".join(_render_totals(explanation))}\n{blocks}\n'
        f"<section><h2>How to read this</h2><ul>{notes}</ul></section>"
        f'<section><h2>Tokens</h2><div class="scroll">{_render_counts(explanation)}</div></section>'
        f'<section><details><summary>All words</summary><div class="scroll">{_render_table(explanation)}</div>'
        f"</details></section></main>\n<script>{SCRIPT}</script></body></html>\n"
    )


def describe(explanation: "Explanation") -> list[str]:
    """What the colours and numbers mean, how fine they are, and what cannot be concluded from them."""
    if explanation.method == "attention":
        notes = [
            "Colour marks what had more than an even share of the language model's attention within a medium when the "
            "word was chosen; full colour is the strongest place (or twice the even share). The numbers say how much "
            f"the whole medium had. Both are means over the heads of {len(explanation.layers or [])} layers and over "
            "the tokens of a word; all numbers of a word add up to 100 %.",
            "Attention is not causation. A place that was read much need not have changed the answer, and one that "
            "was read little may have decided it: what it shows may have reached other tokens before. Much attention "
            "on the first tokens of the prompt is usual and means little.",
        ]
    else:
        notes = [
            "Colour is input times gradient: orange parts raise the log-probability of the word, to first order, and "
            "blue ones lower it, compared with the mean colour instead of a picture and silence instead of a sound. "
            "The numbers are the sums over a medium, in nats.",
            "The gradient is taken at this input alone. It is noisy, and close to zero where the model is sure of the "
            "word; it says what a small change would do, not what the answer would be without a thing.",
        ]
    for medium in explanation.media:
        describe_medium = _describe_frames if isinstance(medium, SeenFrames) else _describe_sound
        notes.append(f"{medium.title}: {' '.join(describe_medium(medium, explanation.method))}")  # type: ignore
    return notes


def _describe_frames(medium: SeenFrames, method: str) -> Iterator[str]:
    rows, columns = medium.patch_grid
    patch = round(medium.pictures.shape[1] * medium.extent) // rows
    if method == "gradient":
        yield f"The map has one value for every patch of {patch} x {patch} pixels of every frame."
        return
    frames, vertical, horizontal = (int((window > 0).sum(1).max()) for window in medium.windows)
    pixels = f"{vertical * patch} x {horizontal * patch} pixels"
    plural = "s" if frames > 1 else ""
    yield f"One token stands for {pixels} of {frames} frame{plural}; the map is no finer."
    if medium.kind == "image" and medium.token_grid[0] > 1:
        yield "The image enters as a video of equal frames, whose maps are added up."
    if frames > 1 and medium.kind == "video":
        yield "Frames that share their tokens have the same map."
    if medium.frames_mixed > 1:
        yield f"Attention over time has mixed {medium.frames_mixed} frames at a time before."
    yield "Every token may hold something of the rest of its frames, because the vision tower looks at whole frames."
    if medium.num_class_tokens:
        yield "The class token of a frame is spread over all of it."
    if (medium.windows[0].sum(1) == 0).any() and medium.kind == "video":
        yield "Some tokens stand before the first frame or behind the last; they count in the number, not in the map."
    if any((window.sum(0) == 0).any() for window in medium.windows[1:]):
        yield "No token stands for the last row and column of patches, at the lower and right edge."
    unseen = medium.unseen_frames()
    if unseen:
        yield f"No token stands for frame {', '.join(str(frame + 1) for frame in unseen)}: the model does not see it."


def _describe_sound(medium: HeardSound, method: str) -> Iterator[str]:
    if not medium.parts:
        yield f"There is no sound; the model hears {medium.seconds:g} s of silence."
        return
    heard = sum(part.end - part.start for part in medium.parts)
    parts = "one part" if len(medium.parts) == 1 else f"{len(medium.parts)} parts"
    rest = medium.seconds - heard
    silence = f", and {rest:.1f} s of silence behind" if rest > 0.05 else ""
    yield f"Of {medium.end - medium.start:.1f} s the model hears {parts}, {heard:.1f} s altogether{silence}."
    bins = medium.features.shape[1] // medium.grid[1]
    value = "One token stands for" if method == "attention" else "The map has one value for"
    yield f"{value} {medium.step_seconds:.2g} s and {bins} of {medium.features.shape[1]} mel bins."
    if method == "attention":
        yield "Every token may hold something of any other second, because BEATs hears the window as one."


# Numbers


def _render_totals(explanation: "Explanation") -> Iterator[str]:
    names = [*(medium.title for medium in explanation.media), "text"]
    strongest = float(explanation.totals.abs().max()) or 1.0
    for word in range(len(explanation.words)):
        yield f'<div class="total t{word}">'
        for number, name in enumerate(names):
            value = float(explanation.totals[word, number])
            side = ' class="less"' if value < 0 else ""
            yield (
                f"<div><span>{escape(name)}</span><b>{explanation.describe_total(word, number)}</b>"
                f'<i{side} style="width:{100 * abs(value) / strongest:.1f}%"></i></div>'
            )
        order = explanation.text_map[word].abs().argsort(descending=True)[:5]
        most = ", ".join(f"“{escape(explanation.text[i].text)}”" for i in order if explanation.text_map[word, i] != 0)
        yield f'<p class="soft">Of the text, most: {most}</p></div>' if most else "</div>"


def _render_counts(explanation: "Explanation") -> str:
    rows = []
    for medium in explanation.media:
        grid: tuple[int, ...]
        if isinstance(medium, HeardSound):
            grid, axes = medium.grid, "time x mel bands"
        else:
            grid = medium.token_grid
            axes = "time x rows x columns" + (", and class tokens" if medium.num_class_tokens else "")
        rows.append((medium.title, medium.num_tokens, f"{' x '.join(map(str, grid))} ({axes})"))
    rows.append(("text of the prompt", explanation.num_text_tokens, "template included"))
    rows.append(("answer", explanation.answer.num_new_tokens, ""))
    cells = (f'<tr><td>{escape(row[0])}</td><td class="number">{row[1]}</td><td>{row[2]}</td></tr>' for row in rows)
    return f"<table>{''.join(cells)}</table>"


def _render_table(explanation: "Explanation") -> str:
    """Every word with its numbers and pictures, for paper and wherever nothing can be chosen."""
    names = [*(medium.title for medium in explanation.media), "text"]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for word, content in enumerate(explanation.words):
        cells = []
        for number, name in enumerate(names):
            strip = ""
            if number < len(explanation.media):
                width, height = _strip_size(explanation.media[number])
                strip = (
                    f'<div class="strip" role="img" aria-label="{escape(name)}" style="width:{width}px;'
                    f'height:{height}px;background-image:var(--m{number}),var(--p{number})"></div>'
                )
            cells.append(f"<td>{strip}{explanation.describe_total(word, number)}</td>")
        rows.append(f'<tr class="r{word}"><th>{escape(content.text)}</th>{"".join(cells)}</tr>')
    return f"<table><tr><th>word</th>{head}</tr>{''.join(rows)}</table>"


# Pictures


def _to_uri(pixels: np.ndarray, kind: str = "PNG", **options) -> str:
    """Pixels, uint8 (height, width) or (height, width, 3 or 4), as a data URI."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _to_photo(picture: np.ndarray, width: int) -> np.ndarray:
    """A picture (height, width, 3) in [0, 1], no wider than `width`."""
    image = Image.fromarray((picture * 255).round().astype(np.uint8))
    size = min(width, image.width)
    return np.asarray(image.resize((size, max(1, round(size * image.height / image.width)))))


def _to_grey(features: np.ndarray) -> np.ndarray:
    """Filter banks (time, mel bins) as a picture, the lowest bin at the bottom; never so light that heat is lost."""
    heard = features[features > SILENCE + 1]
    floor = float(np.percentile(heard, 1)) if heard.size else SILENCE
    scaled = (features.T[::-1] - floor) / max(float(features.max()) - floor, 4.0)
    return (200 * scaled.clip(0, 1)).round().astype(np.uint8)


def _render_rules(explanation: "Explanation") -> Iterator[str]:
    """The rules of CSS that show the chosen word, and its maps: `--m0`, ... of the media, `--h1` of a heard window."""
    small = "".join(f"--p{number}:url({_make_strip(medium)});" for number, medium in enumerate(explanation.media))
    yield f":root{{{small}}}\n"
    of_sounds = {n: m.maps_of_sound().numpy() for n, m in enumerate(explanation.media) if isinstance(m, HeardSound)}
    for word in range(len(explanation.words)):
        maps = []
        for number, medium in enumerate(explanation.media):
            colours = to_colours(medium.maps[word].numpy())
            if isinstance(medium, SeenFrames):
                maps.append(f"--m{number}:url({_to_uri(np.concatenate(list(colours), axis=1))})")
                continue
            colours_of_sound = to_colours(of_sounds[number][word])
            maps.append(f"--m{number}:url({_to_uri(colours_of_sound.transpose(1, 0, 2)[::-1])})")
            if not medium.fills_window():
                maps.append(f"--h{number}:url({_to_uri(colours.transpose(1, 0, 2)[::-1])})")
        chosen = f"#w{word}:checked~main"
        yield f"{chosen},.r{word}{{{';'.join(maps)}}}\n{chosen} .t{word}{{display:block}}\n"
        yield f"{chosen} label[for=w{word}]{{background:var(--accent);border-color:var(--accent);color:#fff}}\n"
        yield f"#w{word}:focus-visible~main label[for=w{word}]{{outline:3px solid #0084ff}}\n"


def _strip_size(medium: SeenFrames | HeardSound) -> tuple[int, int]:
    """Width and height of a medium in the table, in pixels."""
    if isinstance(medium, HeardSound):
        return 220, 40
    height, width = medium.pictures.shape[1:3]
    side = max(24, min(64, 480 // len(medium.pictures)))
    return side * len(medium.pictures), round(side * height / width)


def _make_strip(medium: SeenFrames | HeardSound) -> str:
    """A medium as one small picture: what a map covers, nothing more."""
    width, height = _strip_size(medium)
    if isinstance(medium, HeardSound):
        return _to_uri(np.asarray(Image.fromarray(_to_grey(medium.spectrogram)).resize((2 * width, 2 * height))))
    covered = [round(size * medium.extent) for size in medium.pictures.shape[1:3]]
    photos = [_to_photo(p[: covered[0], : covered[1]], 2 * width // len(medium.pictures)) for p in medium.pictures]
    return _to_uri(np.concatenate(photos, axis=1), "JPEG", quality=75)


def _render_media(explanation: "Explanation") -> Iterator[str]:
    """A block for every medium; a video and its sound share one, and its line of time."""
    media = list(enumerate(explanation.media))
    while media:
        number, medium = media.pop(0)
        title = f"<h2>{escape(medium.title)}</h2>"
        if isinstance(medium, HeardSound):
            axis = medium.start, medium.end
            lane = _render_sound(number, medium, axis) + _render_ticks(axis, True)
            yield f"<section>{title}{_scroll(lane, 340)}{_render_window(number, medium)}</section>"
        elif medium.kind == "image":
            heat = _render_heat(number, medium, 0)
            photo = _to_uri(_to_photo(medium.pictures[0], 768), "JPEG", quality=85)
            picture = f'<img alt="{escape(medium.title)}" src="{photo}">'
            yield f'<section>{title}<div class="image">{picture}{heat}</div></section>'
        else:
            axis, below, window = (medium.start, medium.end), "", ""
            if media and isinstance(sound := media[0][1], HeardSound) and sound.title == f"sound of {medium.title}":
                place, _ = media.pop(0)
                if sound.parts:
                    axis = min(axis[0], sound.start), max(axis[1], sound.end)
                below, window = _render_sound(place, sound, axis), _render_window(place, sound)
            lane = _render_frames(number, medium, axis) + _render_ticks(axis, medium.is_seconds) + below
            yield f"<section>{title}{_scroll(lane, 76 * len(medium.pictures))}{window}</section>"


def _scroll(lane: str, width: int) -> str:
    """What is on one line of time, at least so many pixels wide."""
    return f'<div class="scroll"><div class="lane" style="min-width:{width}px">{lane}</div></div>'


def _place(time: float, axis: tuple[float, float]) -> float:
    """Where on an axis a second is, in percent."""
    return 100 * (time - axis[0]) / max(axis[1] - axis[0], 1e-9)


def _render_heat(number: int, medium: SeenFrames, frame: int) -> str:
    frames, size = len(medium.pictures), 100 * medium.extent
    place = 100 * frame / (frames - 1) if frames > 1 else 0
    return (
        f'<div class="heat" style="width:{size:.4g}%;height:{size:.4g}%;background-image:var(--m{number});'
        f'background-size:{100 * frames}% 100%;background-position:{place:.4f}% 0"></div>'
    )


def _render_frames(number: int, medium: SeenFrames, axis: tuple[float, float]) -> str:
    """Frames side by side, and lines from them to where they are in time."""
    figures, lines = [], []
    for frame, (picture, time) in enumerate(zip(medium.pictures, medium.times)):
        photo = _to_uri(_to_photo(picture, 224), "JPEG", quality=80)
        when = f"{time:.2f} s" if medium.is_seconds else f"frame {time:.0f}"
        figures.append(
            f'<figure><div><img alt="{escape(medium.title)}, {when}" src="{photo}">'
            f"{_render_heat(number, medium, frame)}</div><figcaption>{when}</figcaption></figure>"
        )
        middle = 1000 * (frame + 0.5) / len(medium.pictures)
        lines.append(f'<line x1="{middle:.1f}" y1="0" x2="{10 * _place(time, axis):.1f}" y2="26"/>')
    drawn = f'<svg viewBox="0 0 1000 26" preserveAspectRatio="none" aria-hidden="true">{"".join(lines)}</svg>'
    return f'<div class="frames">{"".join(figures)}</div>{drawn}'


def _render_ticks(axis: tuple[float, float], is_seconds: bool) -> str:
    unit = " s" if is_seconds else ""
    ticks = (f"<span style=left:{20 * i}%>{time:.3g}{unit}</span>" for i, time in enumerate(np.linspace(*axis, 6)))
    return f'<div class="ticks">{"".join(ticks)}</div>'


def _render_sound(number: int, medium: HeardSound, axis: tuple[float, float]) -> str:
    """The spectrogram of a sound where it is in time, what is not heard of it pale, and above it the parts heard."""
    if not medium.parts:
        return '<p class="soft">No sound track: the model hears silence.</p>'
    left, width = _place(medium.start, axis), _place(medium.end, axis) - _place(medium.start, axis)
    inside = medium.start, medium.end
    bars, free, cuts, position = [], [], [], medium.start
    for part in medium.parts:
        row = next((row for row, end in enumerate(free) if end <= part.start), len(free))
        free[row : row + 1] = [part.end]
        first, last = _place(part.start, inside), _place(part.end, inside)
        bars.append(
            f'<i title="{part.start:.2f} to {part.end:.2f} s" style="top:{7 * row}px;left:{first:.3f}%;'
            f'width:{last - first:.3f}%"></i>'
        )
        cuts.append((position, part.start))
        position = max(position, part.end)
    pale = "".join(
        f'<div class="cut" style="left:{_place(a, inside):.3f}%;right:{100 - _place(b, inside):.3f}%"></div>'
        for a, b in [*cuts, (position, medium.end)]
        if b > a
    )
    photo = _to_uri(_to_grey(medium.spectrogram))
    return (
        f'<div style="margin-left:{left:.3f}%;width:{width:.3f}%">'
        f'<div class="parts" style="height:{7 * len(free) + 2}px">{"".join(bars)}</div>'
        f'<div class="sound"><img alt="{escape(medium.title)}" src="{photo}">{pale}'
        f'<div class="heat" style="background-image:var(--m{number})"></div></div></div>'
    )


def _render_window(number: int, medium: HeardSound) -> str:
    """The window as it is heard, where that is not the sound as it is."""
    if medium.fills_window():
        return ""
    axis = 0.0, medium.seconds
    marks = "".join(f'<div class="mark" style="left:{_place(part.at, axis):.3f}%"></div>' for part in medium.parts[1:])
    heard = sum(part.end - part.start for part in medium.parts)
    silence = f"silence from {heard:.1f} s on" if medium.seconds - heard > 0.05 else "no silence behind"
    how = "parts one behind the other, " if len(medium.parts) > 1 else ""
    covered = 100 * medium.grid[0] * medium.step_seconds / medium.seconds
    photo = _to_uri(_to_grey(medium.features))
    return (
        f'<p class="soft">As the model hears it: {how}{silence if medium.parts else "silence"}</p>'
        f'<div class="sound"><img alt="{escape(medium.title)} as heard" src="{photo}">{marks}'
        f'<div class="heat" style="width:{covered:.2f}%;background-image:var(--h{number})"></div></div>'
        f"{_render_ticks(axis, True)}"
    )


__all__ = ["describe", "render_page"]
