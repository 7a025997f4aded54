"""
The part of `transformers serve` that answers, with a `Session` in the place of its own reading of messages.

What transformers has is used as it is: the routes, the thread on which the model runs, streaming, the form of answers.
Its reading of messages is replaced, because it opens any path or URL that a stranger names, asks for 32 frames of
every video, reads media while all other connections wait, and drops what it does not know.
"""

import asyncio
import json
import logging
import re
import threading
from collections.abc import AsyncIterator, Collection
from contextvars import ContextVar
from typing import Any

from transformers import StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState

from ..session import MEDIA_TYPES, Session, StopOnEvent
from .content import check_fields, read_messages
from .errors import RequestError
from .limits import Limits


logger = logging.getLogger("uvicorn.error")
# Set when nobody waits for the answer to the request any more; the gate puts one there for every request.
STOP: ContextVar[threading.Event] = ContextVar("STOP")
_STREAM_ERROR = re.compile(r'data: \{"error": "(.*)"\}\n\n\Z', flags=re.DOTALL)


class OneModel(ModelManager):
    """The one model that is loaded already, under one name."""

    def __init__(self, session: Session, name: str, created: int):
        super().__init__()
        self.session, self.name, self.created = session, name, created

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:
        return [{"id": self.name, "object": "model", "created": self.created, "owned_by": "videollama2-hf"}]


class ChatHandler(ChatCompletionHandler):
    """
    Answers chat completions.

    Args:
        limits: What a request may ask for.
        allowed_hosts: From where media may be downloaded.
    """

    def __init__(
        self,
        model_manager: OneModel,
        generation_state: GenerationState,
        limits: Limits,
        allowed_hosts: Collection[str] = (),
    ):
        super().__init__(model_manager, generation_state)
        self.session, self.name = model_manager.session, model_manager.name
        self.limits, self.allowed_hosts = limits, tuple(allowed_hosts)

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """The response to a request, streamed or whole; a `RequestError` where it is refused."""
        stop = STOP.get()
        body = check_fields(body, self.name, self.limits)
        inputs = await asyncio.to_thread(self._read, body, stop)
        arguments = {
            "request_id": request_id,
            "model": self.session.model,
            "processor": self.session.processor,
            "model_id": self.name,
            "inputs": inputs | {"stopping_criteria": StoppingCriteriaList([StopOnEvent(stop)])},
            "gen_config": self._build_generation_config(body, self.session.model.generation_config),
            "gen_manager": self.generation_state.get_manager(self.name),
        }
        if not body.get("stream"):
            return await self._non_streaming(**arguments)
        response = self._streaming(**arguments)
        response.body_iterator = finish_stream(response.body_iterator)
        return response

    def _read(self, body: dict[str, Any], stop: threading.Event) -> dict[str, Any]:
        """What `generate` takes; media are encoded one by one, until they are too many for the model."""
        try:
            messages = read_messages(body, self.limits, self.allowed_hosts, stop.is_set)
            limit = self.session.processor.context_length
            num_tokens = 0
            for block in (block for message in messages for block in message["content"]):
                if block["type"] not in MEDIA_TYPES:
                    continue
                if stop.is_set():
                    raise RequestError("The request has ended.", status=503)
                encoded = self.session.encode(block)
                num_tokens += encoded.num_tokens
                if limit is not None and num_tokens > limit:
                    raise RequestError(
                        f"The media take {num_tokens} tokens or more, but the model takes {limit}. Send fewer of "
                        "them, or ask for fewer frames.",
                        code="context_length_exceeded",
                    )
                kind = block["type"]
                block.clear()
                block.update({"type": kind, kind: encoded})
            return self.session.prepare([messages])
        except ValueError as error:
            raise RequestError(str(error)) from error

    def _build_generation_config(self, body: dict, model_generation_config: Any, use_cb: bool = False) -> Any:
        """Greedy, as a `Session` answers, unless the request asks for sampling; never longer than is allowed."""
        config = super()._build_generation_config(body, model_generation_config, use_cb)
        temperature = body.get("temperature")
        asks = temperature is not None or body.get("top_p") is not None
        config.do_sample = asks and (1.0 if temperature is None else temperature) >= 0.01
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        config.max_new_tokens = asked or self.limits.max_new_tokens
        return config


async def finish_stream(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """A stream of events as OpenAI's: errors are objects, and `[DONE]` comes last."""
    async for chunk in chunks:
        broken = _STREAM_ERROR.search(chunk)
        if broken is not None:
            logger.error("The model failed: %s", broken[1])
            error = RequestError("The server failed; its log says why.", status=500).to_dict()
            chunk = f"{chunk[: broken.start()]}data: {json.dumps(error)}\n\n"
        yield chunk
    yield "data: [DONE]\n\n"


__all__ = ["STOP", "ChatHandler", "OneModel", "finish_stream"]
