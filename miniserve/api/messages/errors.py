"""Errors as the Anthropic API words them, for its routes."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

PATH = "/v1/messages"
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
"""By status; all others are `invalid_request_error`."""


class AnthropicErrorInfo(TypedDict):
    type: str
    message: str


class AnthropicErrorBody(TypedDict):
    type: Literal["error"]
    error: AnthropicErrorInfo


def speaks_anthropic(path: str) -> bool:
    """Whether clients of this route expect errors in this shape."""
    return path == PATH or path.startswith(f"{PATH}/")


def anthropic_body(status: int, message: str) -> AnthropicErrorBody:
    """The JSON object that clients get."""
    return {"type": "error", "error": {"type": KINDS.get(status, "invalid_request_error"), "message": message}}
