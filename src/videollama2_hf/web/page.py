"""What is on the page, and which function answers to what."""

from pathlib import Path
from typing import Any

import gradio as gr

from ..assets import EXAMPLE_CLIP
from .handlers import Handlers, Models, Talk, take_questions
from .preview import STEP
from .texts import EXAMPLE_QUESTIONS, LANGUAGES, TEXTS, choose_language


CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
# Of the reader's system, so that nothing is loaded from elsewhere.
_FONTS = ("system-ui", "Segoe UI", "Roboto", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")
THEME = gr.themes.Default(
    primary_hue="teal", neutral_hue="slate", font=_FONTS, font_mono=("ui-monospace", "monospace")
)
_DAY = 24 * 3600


def build_page(models: Models, max_new_tokens: int) -> gr.Blocks:
    """
    The page. One answer is given at a time, in the order of asking; previews are drawn meanwhile.

    Args:
        max_new_tokens: Longest answer, in tokens.
    """
    handlers, texts = Handlers(models, max_new_tokens), TEXTS["en"]
    examples: list | None = [{"text": question} for question in EXAMPLE_QUESTIONS] if EXAMPLE_CLIP.exists() else None
    # Conversations hold key-value caches, and uploads lie on the disk: both go a day after their last use at most.
    with gr.Blocks(title="VideoLLaMA 2", analytics_enabled=False, delete_cache=(3600, _DAY)) as page:
        talk = gr.State(Talk(), time_to_live=_DAY)
        with gr.Row(elem_id="head"):
            intro = gr.HTML(_draw_intro(texts), elem_id="intro")
            model = gr.Dropdown(
                models.names,
                value=models.names[0],
                label=texts["model"],
                visible=len(models.names) > 1,
                container=False,
                min_width=200,
                elem_id="model",
            )
            choices = [(name, code) for code, name in LANGUAGES.items()]
            language = gr.Radio(
                choices, value="en", label="Language", container=False, min_width=1, elem_id="language"
            )
        with gr.Row(elem_id="body"):
            with gr.Column(scale=5, min_width=320):
                file = gr.File(label=texts["file"], height=116, elem_id="file")
                player = gr.HTML(visible=False, elem_id="player")
                slider: dict[str, Any] = {"step": STEP, "min_width": 130, "buttons": []}
                with gr.Row(visible=False, elem_id="part") as part:
                    start = gr.Slider(0, 1, 0, label=texts["start"], elem_id="start", **slider)
                    end = gr.Slider(0, 1, 1, label=texts["end"], elem_id="end", **slider)
                preview = gr.HTML(visible=False, container=True, padding=True, elem_id="preview")
            with gr.Column(scale=6, min_width=320):
                conversation = gr.Chatbot(
                    show_label=False,
                    placeholder=_draw_welcome(texts, examples),
                    examples=examples,
                    buttons=["copy"],
                    latex_delimiters=[],
                    height="min(62vh, 620px)",
                    elem_id="conversation",
                )
                question = gr.Textbox(
                    placeholder=texts["question"],
                    show_label=False,
                    label=texts["question"],
                    submit_btn=True,
                    max_lines=5,
                    elem_id="question",
                )
                with gr.Row(elem_id="foot"):
                    status = gr.Markdown(elem_id="status", min_width=160)
                    new = gr.Button(texts["new"], size="sm", scale=0, min_width=150, elem_id="new")

        private: dict[str, Any] = {"api_visibility": "private"}

        def show_file(event: Any) -> Any:
            inputs, outputs = [file, model, language, talk], [player, preview, part, start, end, talk]
            return event(handlers.show_file, inputs, outputs, concurrency_limit=2, **private)

        def show_part(event: Any) -> None:
            options = {"trigger_mode": "always_last", "show_progress": "hidden", "concurrency_limit": 2, **private}
            event(handlers.show_part, [start, end, model, language, talk], preview, **options)

        def ask(event: Any) -> None:
            inputs = [question, start, end, model, language, conversation, talk]
            asked = event(handlers.begin_turn, inputs, [question, conversation, status, talk], **private)
            answering = asked.success(
                handlers.answer,
                [language, conversation, talk],
                [conversation, status, talk],
                **one_at_a_time,
                **private,
            )
            answering.then(take_questions, outputs=question, queue=False, **private)

        one_at_a_time: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        show_file(file.upload)
        show_file(file.clear)
        show_part(start.input)
        show_part(end.input)
        ask(question.submit)
        if examples:
            picked = conversation.example_select(_pick_example, outputs=[file, question], **private)
            ask(show_file(picked.then).success)
        # A flag, and not Gradio's `cancels`, which leaves "Error" on the page and may lose the next answer.
        question.stop(handlers.stop, talk, queue=False, **private)
        gr.on([new.click, conversation.clear], handlers.forget, talk, [conversation, status], queue=False, **private)
        loaded = model.change(handlers.load_model, [model, language], status, **one_at_a_time, **private)
        show_part(loaded.then)

        def translate(code: str) -> dict[Any, Any]:
            texts = TEXTS[code]
            labels = {model: "model", file: "file", start: "start", end: "end"}
            return {
                **{component: gr.update(label=texts[name]) for component, name in labels.items()},
                intro: _draw_intro(texts),
                question: gr.update(placeholder=texts["question"], label=texts["question"]),
                conversation: gr.update(placeholder=_draw_welcome(texts, examples)),
                new: gr.update(value=texts["new"]),
                status: "",
            }

        translated = [intro, model, file, start, end, question, conversation, new, status]
        spoken = language.change(translate, language, translated, queue=False, show_progress="hidden", **private)
        show_part(spoken.then)
        language.change(None, language, js="code => { document.documentElement.lang = code }")
        page.load(_find_language, outputs=language, queue=False, show_progress="hidden", **private)
    return page.queue(max_size=64)


def _pick_example(event: gr.SelectData) -> tuple[str, str]:
    return str(EXAMPLE_CLIP), event.value["text"]


def _find_language(request: gr.Request) -> str:
    return choose_language(request.headers.get("accept-language", ""))


def _draw_intro(texts: dict[str, str]) -> str:
    return f"<h1>VideoLLaMA 2</h1><p>{texts['intro']}</p>"


def _draw_welcome(texts: dict[str, str], examples: list | None) -> str:
    return texts["welcome"] + (f"\n\n{texts['try']}" if examples else "")


__all__ = ["CSS", "THEME", "build_page"]
