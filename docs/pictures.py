"""
Draws the pictures of the README and of the documentation, with the model and the clip that come with the package:

    uv run --extra test python docs/pictures.py [example] [web] [training] [ablation]

`web` needs a Chromium, as the tests of the web page do.
"""

import csv
import json
import math
import shutil
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from videollama2_hf.assets import EXAMPLE_CLIP, SMALL_MODEL
from videollama2_hf.web.texts import EXAMPLE_QUESTIONS


if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"


def draw_example() -> None:
    """What the model sees and hears of the clip: `example.png`."""
    from videollama2_hf.explaining import explain
    from videollama2_hf.session import Session

    clip = {"type": "video", "video": str(EXAMPLE_CLIP)}
    explanation = explain(Session.from_pretrained(SMALL_MODEL), "What do you see and hear?", clip)
    print(explanation.answer.text)
    explanation.figure().savefig(IMAGES / "example.png")


def draw_web() -> None:
    """The page with a conversation, on a desktop and on a phone: `web_desktop.png` and `web_phone.png`."""
    from playwright.sync_api import sync_playwright

    from videollama2_hf.web import launch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = launch([SMALL_MODEL], port=port, wait=False)
    installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        for name, width, height in (("desktop", 1160, 944), ("phone", 390, 844)):
            window = chromium.new_page(viewport={"width": width, "height": height})
            window.set_default_timeout(300_000)
            window.goto(f"http://127.0.0.1:{port}/")
            window.get_by_role("button", name=EXAMPLE_QUESTIONS[0]).click()
            for number, question in enumerate(EXAMPLE_QUESTIONS[1:], start=1):
                _wait_for_answer(window, number)
                window.fill("#question textarea", question)
                window.press("#question textarea", "Enter")
            _wait_for_answer(window, len(EXAMPLE_QUESTIONS))
            window.wait_for_selector("#preview .seen")
            window.wait_for_function("document.querySelector('video.player').readyState >= 2")
            window.wait_for_timeout(1000)  # for movements to end
            window.screenshot(path=IMAGES / f"web_{name}.png", full_page=True)
            print(*window.locator("#conversation [data-testid=bot]").all_inner_texts(), sep="\n")
        chromium.close()
    page.close(verbose=False)


def _wait_for_answer(window, number: int) -> None:
    window.wait_for_function(
        f"document.querySelectorAll('#conversation [data-testid=bot]').length == {number}"
        " && document.querySelector('#status').innerText.includes('tokens in')"
    )
    window.wait_for_selector("#question [data-testid=submit-button]")


def draw_training() -> None:
    """The losses in `small_model_log.csv` and `recipes_log.csv`: `small_model_loss.png` and `recipes_loss.png`."""
    for name in ("small_model", "recipes"):
        curves: dict[str, list[tuple[int, float]]] = {}
        with open(DOCS / f"{name}_log.csv", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                curves.setdefault(row["stage"], []).append((int(row["step"]), float(row["loss"])))
        _draw_losses(curves).savefig(IMAGES / f"{name}_loss.png")


def _draw_losses(curves: dict[str, list[tuple[int, float]]]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = math.ceil(len(curves) / 5)
    figure = Figure(figsize=(12, 2.1 * rows), layout="constrained", dpi=100)
    axes = figure.subplots(rows, math.ceil(len(curves) / rows)).flatten()
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    for axis, (stage, points) in zip(axes, curves.items()):
        axis.plot(*zip(*points), linewidth=1.2)
        axis.set_title(f"stage {stage}" if stage.isdecimal() else stage.replace("_", " "), fontsize=9)
        axis.set(yscale="log", xlabel="step", xlim=(0, None))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    return figure


def draw_ablation() -> None:
    """Means and standard deviations over the seeds, of `connector_ablation.json`: `connector_ablation.png`."""
    import numpy as np
    from matplotlib.figure import Figure

    from videollama2_hf.synthetic.ablation import CONNECTORS, SHOWN_SKILLS

    results = json.loads((DOCS / "connector_ablation.json").read_text(encoding="utf-8"))
    names = [name for name in CONNECTORS if name in results]
    figure = Figure(figsize=(12, 3.2), layout="constrained", dpi=100)
    axes = figure.subplots(1, 1 + len(SHOWN_SKILLS), sharey=True, sharex=True)
    for axis, skill in zip(axes, (None, *SHOWN_SKILLS)):
        for place, name in enumerate(names):
            values = [run["mean"] if skill is None else run["skills"][skill] for run in results[name].values()]
            axis.errorbar(np.mean(values), place, xerr=np.std(values, ddof=1), fmt="o", color="C0", capsize=3)
            axis.plot(values, [place + 0.22] * len(values), ".", color="0.6", markersize=4)
        axis.set_title(skill or "all skills", fontsize=9)
        axis.set(xlim=(0, 1))
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.savefig(IMAGES / "connector_ablation.png")


if __name__ == "__main__":
    pictures = {"example": draw_example, "web": draw_web, "training": draw_training, "ablation": draw_ablation}
    for name in sys.argv[1:] or pictures:
        pictures[name]()
