"""Errors as a client of OpenAI's API expects them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from ..errors import ContextOverflowError, FlrcError, UsageError


class ApiError(Exception):
    """Something to answer a request with.

    Args:
        status: Of HTTP.
        message: One sentence.
        param: Field of the request at fault.
        code: For programs.
        headers: To send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @classmethod
    def of(cls, error: FlrcError) -> ApiError:
        """Return what an error of the runtime is to a client: its own fault, or the server's."""
        if isinstance(error, ContextOverflowError):
            return cls(400, str(error), param="messages", code="context_length_exceeded")
        if isinstance(error, UsageError):
            return cls(400, str(error))
        return cls(500, str(error))

    def body(self) -> dict[str, object]:
        """Return the JSON body."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
