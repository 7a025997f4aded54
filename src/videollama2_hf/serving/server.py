"""The application that `videollama2 serve` runs, and running it."""

import os
import socket
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from ..session import Session
from .errors import RequestError
from .gate import Gate
from .handler import ChatHandler, OneModel
from .limits import Limits


def build_app(
    session: Session,
    name: str,
    limits: Limits | None = None,
    api_key: str | None = None,
    allowed_hosts: Collection[str] = (),
) -> Gate:
    """
    An ASGI application that answers as OpenAI's API does.

    It has `POST /v1/chat/completions`, `GET /v1/models` and `GET /health`.

    Args:
        session: The model.
        name: The model's name for clients.
        limits: What the server takes on.
        api_key: What clients must send. `None`: nothing.
        allowed_hosts: From where media may be downloaded; nothing else is.
    """
    limits = limits or Limits()
    manager = OneModel(session, name, created=int(time.time()))
    state = GenerationState()
    unused: Any = None  # handlers of routes that the gate does not let through
    app = build_server(
        manager,
        ChatHandler(manager, state, limits, allowed_hosts),
        completion_handler=unused,
        response_handler=unused,
        transcription_handler=unused,
        systemone_handler=unused,
        generation_state=state,
    )
    for kind in (RequestError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _respond)
    return Gate(app, limits, api_key)


async def _respond(request: Request, error: Exception) -> JSONResponse:
    """Any error in OpenAI's form; what is not the client's fault goes into the log, without a word of it outside."""
    if isinstance(error, RequestValidationError):
        error = RequestError("The body must be a JSON object, sent with the header Content-Type: application/json.")
    elif isinstance(error, HTTPException):
        error = RequestError(str(error.detail), status=error.status_code)
    elif not isinstance(error, RequestError):
        error = RequestError("The server failed; its log says why.", status=500)  # the gate logs the traceback
    return JSONResponse(error.to_dict(), status_code=error.status, headers=error.headers)


class Server(uvicorn.Server):
    """uvicorn's server, which says when it is ready, and ends what is being answered when it is told to stop."""

    def __init__(self, gate: Gate, announce: Callable[[], None] = lambda: None):
        super().__init__(uvicorn.Config(gate, log_level="warning", ws="none", server_header=False))
        self.gate = gate
        self.announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.gate.close()
        await super().shutdown(sockets)


def open_socket(host: str, port: int) -> socket.socket:
    """
    A socket that is bound but does not listen yet; port 0 is any free one.

    Raises:
        OSError: The address is taken or is not of this machine.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    opened = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise OSError(f"Cannot listen on {host} port {port}: {error.strerror}. Choose another with --port.") from error
    return opened


def serve(
    model: str | os.PathLike,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    api_key: str | None = None,
    allowed_hosts: Collection[str] = (),
    revision: str | None = None,
    dtype: str | None = None,
    say: Callable[[str], Any] = print,
) -> None:
    """
    Serves a model until Ctrl-C.

    Args:
        model: Folder or Hub repository; clients call it by the name of the folder, or of the repository.
        port: 0 for any free one.
        revision, dtype: As in [`Session.from_pretrained`].
        say: Takes the message that says that the server is ready.

    Raises:
        OSError: The address cannot be used.
        ValueError: The model cannot be loaded, or the API key is empty or not ASCII.
    """
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
        raise ValueError("The API key must be printable ASCII, and not empty.")
    opened = open_socket(host, port)
    try:
        name = Path(os.path.abspath(model)).name if os.path.isdir(model) else str(model)
        gate = build_app(
            Session.from_pretrained(model, revision=revision, dtype=dtype), name, limits, api_key, allowed_hosts
        )
        text = describe_start(name, host, opened.getsockname()[1], api_key is not None)
        with suppress(KeyboardInterrupt):  # uvicorn raises it once all is shut down
            Server(gate, lambda: say(text)).run(sockets=[opened])
    finally:
        opened.close()


def describe_start(name: str, host: str, port: int, has_key: bool) -> str:
    """What to tell the person who started a server: the address, the model, and a request to copy."""
    # Addresses that mean every interface are none that a client can connect to.
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    key = ' -H "Authorization: Bearer $VIDEOLLAMA2_API_KEY"' if has_key else ""
    lines = [
        f"{name} answers at http://{reachable}:{port}/v1 (Ctrl-C ends it). Try:",
        "",
        f"curl http://{reachable}:{port}/v1/chat/completions{key} -H 'Content-Type: application/json' "
        """-d '{"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32}'""",
    ]
    if not has_key and host not in ("127.0.0.1", "localhost", "::1"):
        lines += ["", "Everybody who reaches this address can use the model: --api-key asks for a key."]
    return "\n".join(lines)


__all__ = ["Server", "build_app", "describe_start", "open_socket", "serve"]
