"""
An OpenAI-compatible server: `transformers serve`, with the launcher that a class outside transformers needs, and the
limits that a server needs which strangers can reach. See docs/serving.md.
"""

from .errors import RequestError
from .limits import Limits
from .server import build_app, serve


__all__ = ["Limits", "RequestError", "build_app", "serve"]
