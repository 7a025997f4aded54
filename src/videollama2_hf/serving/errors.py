"""Errors as OpenAI's clients understand them."""

from typing import Any


class RequestError(Exception):
    """
    A request that is not answered, and why.

    Args:
        message: What is wrong, what is allowed, and what to do.
        status: HTTP status: 4xx for what the client sent, 5xx for what the server cannot do.
        code: Short name of the error, for programs.
        param: Which part of the request is wrong, such as `messages[0].content[1]`.
        headers: To send with it.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers or {}

    def to_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


__all__ = ["RequestError"]
