"""Errors in the format that OpenAI's clients expect."""

from __future__ import annotations

from typing import Any

from meteora_core.errors import DataError, MeteoraError, UsageError
from meteora_core.serving.jobs import Failed
from meteora_core.serving.scheduler import QueueFull
from meteora_core.text import printable, validation_message


class ApiError(MeteoraError):
    """An error with an HTTP status.

    Args:
        status: HTTP status.
        message: What happened, in one line.
        hint: What the client can do about it.
        param: Name of the invalid field.
        code: Error code in OpenAI's API.
    """

    def __init__(self, status: int, message: str, *, hint: str | None = None, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response, in the format of OpenAI's API."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        text = self.message if self.hint is None else f"{self.message} ({self.hint})"
        return {"error": {"message": printable(text, multiline=True), "type": kind, "param": self.param, "code": self.code}}


def api_error(error: BaseException) -> ApiError:
    """The error of the API for an error of the library."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(503, error.message, hint=error.hint, code="overloaded")
    if isinstance(error, UsageError | DataError):
        code = "context_length_exceeded" if "maximum context length" in error.message else None
        return ApiError(400, error.message, hint=error.hint, code=code)
    if isinstance(error, MeteoraError):
        return ApiError(500, error.message, hint=error.hint)
    return ApiError(500, f"the server failed: {type(error).__name__}")


def of_failure(failure: Failed) -> ApiError:
    """The error of the API for a request that failed in the scheduler."""
    if failure.server and isinstance(failure.error, UsageError):
        return ApiError(500, failure.error.message, hint=failure.error.hint)
    return api_error(failure.error)


def of_validation(error: Any) -> ApiError:
    """The error of the API for a body that does not conform to the protocol."""
    problems = error.errors()
    first = problems[0] if problems else {"loc": (), "msg": "the request is not valid", "type": ""}
    place = [str(part) for part in first["loc"] if part not in ("body", "query")]
    name = ".".join(place) or None
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unrecognized request argument: {name}", param=name, code="unknown_parameter")
    message = validation_message(str(first["msg"]))
    return ApiError(400, f"{name}: {message}" if name else message, param=name, code="invalid_value")
