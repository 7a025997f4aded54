"""What stands in front of the application: who may ask, how much at a time, how many wait, and for how long."""

import asyncio
import hmac
import json
import logging
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from .errors import RequestError
from .handler import STOP
from .limits import Limits


logger = logging.getLogger("uvicorn.error")  # where the server's own messages go

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# How long a client is told that its request has ended; one may have stopped reading.
_FAREWELL_SECONDS = 5.0
# What the application of transformers has besides would load other models, unload this one, or read messages in its
# own way.
_ROUTES = {"/v1/chat/completions": "POST", "/v1/models": "GET", "/health": "GET"}


class Gate:
    """
    An ASGI application around another one.

    One request is answered at a time, in the order in which they came. A request whose client has gone, whose time is
    over, or that is there when the server ends, stops at the next token.

    Args:
        application: Answers what comes through.
        api_key: What clients must send as `Authorization: Bearer ...`. `None`: nothing.
    """

    def __init__(self, application: Application, limits: Limits, api_key: str | None = None):
        self.application = application
        self.limits = limits
        self.api_key = api_key
        self._turn = asyncio.Semaphore(1)
        self._num_requests = 0
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Ends the requests that are there; to be called on the thread of the event loop."""
        self._closing.set()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.application(scope, receive, send)
            return
        try:
            self._check(scope)
            if scope["method"] == "GET":
                await self.application(scope, receive, send)
            else:
                await self._handle(scope, receive, send)
        except RequestError as error:
            await send_error(send, error)

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        method = _ROUTES.get(scope["path"])
        if method is None:
            raise RequestError(f"There is no {scope['path']} here; there are {', '.join(_ROUTES)}.", status=404)
        if scope["method"] != method:
            message = f"{scope['path']} takes {method}, not {scope['method']}."
            raise RequestError(message, status=405, headers={"allow": method})
        if self.api_key is not None and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
                raise RequestError(
                    "The API key is missing or wrong; send it as the header Authorization: Bearer KEY.",
                    status=401,
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )

    async def _handle(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if self._num_requests > self.limits.max_queue:
            raise RequestError(
                f"One request is being answered and {self.limits.max_queue} wait, which is the most. Try again later.",
                status=429,
                code="queue_full",
                headers={"retry-after": "1"},
            )
        self._num_requests += 1
        try:
            body = await self._read_body(receive)
            if body is not None:
                await self._answer(scope, body, receive, send)
        finally:
            self._num_requests -= 1

    async def _read_body(self, receive: Receive) -> bytes | None:
        """The body of a request; `None` where the client went away."""
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(self.limits.max_request_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    size += len(message.get("body", b""))
                    # What is too large is read to its end all the same: clients listen when they have sent it.
                    if size <= self.limits.max_upload_bytes:
                        body += message.get("body", b"")
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise RequestError(
                f"The upload took more than {self.limits.max_request_seconds:g} seconds.", status=408
            ) from None
        if size > self.limits.max_upload_bytes:
            raise RequestError(
                f"The request has {size} bytes; this server takes up to {self.limits.max_upload_bytes}. Send a "
                "shorter part of the media, or smaller frames.",
                status=413,
                code="upload_too_large",
            )
        return bytes(body)

    async def _answer(self, scope: MutableMapping[str, Any], body: bytes, receive: Receive, send: Send) -> None:
        stop = threading.Event()
        STOP.set(stop)
        unread = [body]
        has_turn = has_begun = is_sending = has_ended = False

        async def replay() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await asyncio.Future()  # never: whether the client goes away is watched here

        async def forward(message: Message) -> None:
            nonlocal has_begun, is_sending
            if not has_ended:
                has_begun = is_sending = True
                await send(message)
                is_sending = False

        async def work() -> None:
            nonlocal has_turn
            async with self._turn:
                has_turn = True
                await self.application(scope, replay, forward)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        answer, gone, closing = (asyncio.create_task(task) for task in (work(), watch(), self._closing.wait()))
        try:
            await asyncio.wait(
                {answer, gone, closing},
                timeout=self.limits.max_request_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not answer.done():
                has_ended = True
                stop.set()
                if not has_turn or is_sending:  # nothing of it runs on the model's thread, or only until stopped
                    answer.cancel()
                if not gone.done():
                    error = self._describe_end(closing.done())
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_FAREWELL_SECONDS):
                            await (send_stream_error(send, error) if has_begun else send_error(send, error))
            await asyncio.wait({answer})  # until then the model is busy
            if not answer.cancelled() and answer.exception() is not None:  # the client has been told already
                logger.error("A request failed.", exc_info=answer.exception())
        finally:
            stop.set()
            gone.cancel()
            closing.cancel()

    def _describe_end(self, is_closing: bool) -> RequestError:
        if is_closing:
            return RequestError("The server is shutting down.", status=503, code="shutting_down")
        return RequestError(
            f"Waiting and answering took more than {self.limits.max_request_seconds:g} seconds, which is the most. "
            "Ask for fewer frames, a shorter part, or a shorter answer.",
            status=504,
            code="request_timeout",
            headers={"x-should-retry": "false"},  # OpenAI's clients would ask again
        )


async def send_error(send: Send, error: RequestError) -> None:
    """An error as a whole response."""
    headers = {"content-type": "application/json", **error.headers}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": json.dumps(error.to_dict()).encode()})


async def send_stream_error(send: Send, error: RequestError) -> None:
    """An error as the last event of a stream that has begun."""
    body = f"data: {json.dumps(error.to_dict())}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": False})


__all__ = ["Gate", "send_error"]
