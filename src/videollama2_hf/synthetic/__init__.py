"""
A synthetic audio-visual world drawn by code, and the small model that learns it: data for training, tests and
tutorials that need no download and have no licence.
"""

from importlib import import_module
from typing import Any


_MODULE_OF = {
    "draw_clip": "world",
    "ask": "questions",
    "caption": "questions",
    "draw_row": "rows",
    "generate": "rows",
    "to_messages": "rows",
    "render_clip": "rendering",
    "render_image": "rendering",
    "render_sound": "rendering",
    "build_config": "small_model",
    "build_model": "small_model",
    "build_processor": "small_model",
    "build_world_tokenizer": "small_model",
    "run_stage": "stages",
    "evaluate": "evaluation",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
