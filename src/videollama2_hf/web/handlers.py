"""What happens when someone uses the page. Every user has a [`Talk`]; nothing else is kept between two events."""

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from ..captioning import find_kind
from ..session import Answer, Chat, Session
from .preview import STEP, draw_player, draw_preview, draw_problem, find_duration, make_block, read_preview
from .texts import TEXTS


@dataclass
class Talk:
    """
    What the server keeps of one user.

    Args:
        path: The file that was read; `None` where there is none, or none that can be read.
        duration: Its seconds, a multiple of the sliders' step; `None` where it has none.
        chat: The conversation.
        about: The model of the conversation, and the content block that it is about.
        question: What is to be answered next.
        is_stopped: Whether that answer is to end early.
    """

    path: str | None = None
    duration: float | None = None
    chat: Chat | None = None
    about: tuple[str, dict[str, Any]] | None = None
    question: str = ""
    is_stopped: bool = False


class Models:
    """
    Models by their names: loaded when they are first needed, and kept.

    Raises:
        ValueError: There is none, or two have the same name.
    """

    def __init__(self, checkpoints: Sequence[str | os.PathLike]):
        names = [Path(name).name if os.path.isdir(name) else os.fspath(name) for name in checkpoints]
        if not names:
            raise ValueError("Say which model is to answer: a folder, or the name of a Hub repository.")
        if len(set(names)) < len(names):
            raise ValueError(f"Models are chosen by name, but two have the same: {', '.join(names)}. Rename a folder.")
        self.names = names
        self._checkpoints = dict(zip(names, checkpoints))
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Session:
        with self._lock:
            if name not in self._sessions:
                self._sessions[name] = Session.from_pretrained(self._checkpoints[name])
            return self._sessions[name]


class Handlers:
    """
    The functions behind the page's components: values of components in, values or updates of components out.

    Args:
        max_new_tokens: Longest answer, in tokens.
    """

    def __init__(self, models: Models, max_new_tokens: int):
        self.models = models
        self.max_new_tokens = max_new_tokens

    def show_file(self, path: str | None, model: str, language: str, talk: Talk) -> tuple[Any, ...]:
        """A file was chosen or taken away: the player, the preview, the row of sliders, both sliders, the talk."""
        talk.path = talk.duration = None
        hidden = gr.update(visible=False)
        if path is None:
            return hidden, hidden, hidden, gr.skip(), gr.skip(), talk
        texts, name = TEXTS[language], Path(path).name
        try:
            if find_kind(path) is None:
                raise ValueError(texts["unknown_kind"])
            duration = find_duration(path)
            preview = read_preview(self.models[model].processor, make_block(path))
        except (ValueError, OSError) as error:
            problem = f"{texts['unreadable'].format(name=name)} {_name_file(error, path)}"
            return hidden, gr.update(value=draw_problem(problem), visible=True), hidden, gr.skip(), gr.skip(), talk
        talk.path, talk.duration = path, duration
        sliders = [gr.update(maximum=duration or STEP, value=value) for value in (0, duration or STEP)]
        return (
            gr.update(value=draw_player(path), visible=True),
            gr.update(value=draw_preview(preview, texts), visible=True),
            gr.update(visible=duration is not None),
            *sliders,
            talk,
        )

    def show_part(self, start: float, end: float, model: str, language: str, talk: Talk) -> Any:
        """Another part, model or language was chosen: the preview."""
        if talk.path is None:
            return gr.skip()
        block = make_block(talk.path, start, end, talk.duration)
        try:
            html = draw_preview(read_preview(self.models[model].processor, block), TEXTS[language])
        except (ValueError, OSError) as error:
            html = draw_problem(_name_file(error, talk.path))
        return gr.update(value=html, visible=True)

    def load_model(self, model: str, language: str) -> str:
        """Another model was chosen: the line below the conversation."""
        try:
            self.models[model]
        except (ValueError, OSError, RuntimeError) as error:
            return _problem(TEXTS[language]["no_model"], str(error))
        return ""

    def begin_turn(
        self, question: str, start: float, end: float, model: str, language: str, history: list, talk: Talk
    ) -> tuple[Any, ...]:
        """A question was asked: the box for the next, the conversation on the page, the line below it, the talk."""
        texts, talk.question = TEXTS[language], ""
        if talk.path is None or not question.strip():
            return gr.skip(), gr.skip(), texts["no_file" if talk.path is None else "no_question"], talk
        about = (model, make_block(talk.path, start, end, talk.duration))
        if talk.chat is None or talk.about != about:  # a conversation is about one part of one file
            try:
                talk.chat, talk.about = self.models[model].chat(), about
            except (ValueError, OSError, RuntimeError) as error:
                return gr.skip(), gr.skip(), _problem(texts["no_model"], str(error)), talk
            history = [*history, {"role": "user", "content": _describe(about[1], texts)}]
        talk.question, talk.is_stopped = question.strip(), False
        history = [*history, {"role": "user", "content": _as_text(talk.question)}]
        return gr.update(value="", interactive=False, submit_btn=False, stop_btn=True), history, "", talk

    def answer(self, language: str, history: list, talk: Talk) -> Iterator[tuple[list, str, Talk]]:
        """The answer as it is said: the conversation on the page, the line below it, the talk."""
        texts, text, answer = TEXTS[language], "", None
        if not talk.question or talk.chat is None or talk.about is None:
            yield gr.skip(), gr.skip(), talk  # a generator that yields nothing would empty the conversation
            return
        chat, media = talk.chat, [] if talk.chat.messages else [talk.about[1]]
        try:
            with closing(chat.stream(talk.question, *media, max_new_tokens=self.max_new_tokens)) as stream:
                while not talk.is_stopped:
                    try:
                        text += next(stream)
                    except StopIteration as end:
                        answer = end.value
                        break
                    yield [*history, {"role": "assistant", "content": text.strip()}], "", talk
        except torch.OutOfMemoryError:
            yield history, _problem(texts["failed"], texts["no_memory"]), talk
        except (ValueError, OSError) as error:
            yield history, _problem(texts["failed"], _name_file(error, talk.path)), talk
        else:
            if talk.chat is not chat:  # forgotten meanwhile
                yield [], "", talk
            elif answer is None:
                said = [{"role": "assistant", "content": text.strip()}] if text else []
                yield [*history, *said], texts["stopped"], talk
            else:
                yield [*history, {"role": "assistant", "content": answer.text}], _describe_answer(answer, texts), talk

    def stop(self, talk: Talk) -> None:
        """The answer is to end early."""
        talk.is_stopped = True

    def forget(self, talk: Talk) -> tuple[list, str]:
        """A new conversation: the one on the page, the line below it."""
        talk.chat, talk.is_stopped = None, True
        return [], ""


def take_questions() -> Any:
    """The box for the next question, ready again."""
    return gr.update(interactive=True, submit_btn=True, stop_btn=False)


def _name_file(error: Exception, path: str | None) -> str:
    """What an error says, with the name of the user's file in place of where the server keeps it."""
    return str(error).replace(path, Path(path).name) if path else str(error)


def _problem(what: str, reason: str) -> str:
    return f"**{what}** {_as_text(reason)}"


def _describe(block: dict[str, Any], texts: dict[str, str]) -> str:
    """A file and which part of it, as Markdown."""
    name = Path(block[block["type"]]).name
    if "start" in block or "end" in block:
        end = texts["second"].format(seconds=block["end"]) if "end" in block else texts["its_end"]
        name = texts["part"].format(name=name, start=block.get("start", 0.0), end=end)
    return f"*{_as_text(name)}*"


def _describe_answer(answer: Answer, texts: dict[str, str]) -> str:
    numbers = {"new": answer.num_new_tokens, "reused": answer.num_reused_tokens, "prompt": answer.num_prompt_tokens}
    cut_off = texts["cut_off"].format(**numbers) + " " if answer.finish_reason == "length" else ""
    return cut_off + texts["status"].format(seconds=answer.seconds, **numbers)


def _as_text(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>#|~$&])", r"\\\1", text)


__all__ = ["Handlers", "Models", "Talk", "take_questions"]
