"""Errors as the OpenAI API words them: `{"error": {"message", "type", "param", "code"}}`, whatever went wrong.

Routes of the Anthropic API tell the same errors in that API's shape (anthropic_errors.py).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException, RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException as RoutingError
from starlette.responses import Response
from typing_extensions import TypedDict

from miniserve.api.messages.errors import anthropic_body, speaks_anthropic
from miniserve.dispatcher import EngineError
from miniserve.sampling_params import ParameterError
from miniserve.scheduler.scheduler import QueueFull

RETRY_SECONDS = 5
GZIP = b"\x1f\x8b"


class ErrorInfo(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    error: ErrorInfo


class ApiError(HTTPException):
    """An answer other than 200. `message` is for the person who wrote the request; `param` names the field at fault.

    It is an HTTPException so that FastAPI lets it through when a middleware's `receive` raises it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # What clients sent may hold lone surrogates, which no UTF-8 body can carry.
        self.message = message.encode("utf-8", "backslashreplace").decode()
        self.param = None if param is None else param.encode("utf-8", "backslashreplace").decode()
        self.code = code
        super().__init__(status, self.message, dict(headers or {}))

    @property
    def body(self) -> ErrorBody:
        """The JSON object that clients get."""
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, path: str) -> Response:
        """The whole answer, as clients of the route `path` expect it."""
        body = anthropic_body(self.status_code, self.message) if speaks_anthropic(path) else self.body
        return Response(msgspec.json.encode(body), self.status_code, self.headers, "application/json")


def as_api_error(error: Exception) -> ApiError:
    """How any exception is told to a client; what is not meant for one becomes a bare 500."""
    match error:
        case ApiError():
            return error
        case ParameterError():
            return ApiError(400, error.message, param=error.param or None)
        case RequestValidationError():
            return _rejected(error.errors()[0])
        case QueueFull():
            after = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
            return ApiError(503, str(error), code="queue_full", headers=after)
        case EngineError():
            return ApiError(503, str(error), code="engine_unavailable", headers={"Retry-After": str(RETRY_SECONDS)})
        case RoutingError(__cause__=ValueError() | RecursionError() as cause):
            return _unreadable(cause)
        case RoutingError():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "The server failed to answer this request; its log says why.", code="internal_error")


@contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Tells errors about a chat request to a client that sent another one, from which it was made. `names` are patterns
    of parameters of chats, and what the client calls them."""
    try:
        yield
    except (ParameterError, ApiError, ValidationError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            told = _rejected({**first, "loc": ("body", *first["loc"])})
        else:
            told = as_api_error(error)
        message, param = told.message, told.param or ""
        for pattern, name in names.items():
            param = re.sub(f"^{pattern}(?![a-z_])", name, param)
        message = message.replace(f"`{told.param}`", f"`{param}`")
        raise ApiError(told.status_code, message, param=param or None, code=told.code, headers=told.headers) from error


def install(app: FastAPI) -> None:
    """Make `app` answer every error this way."""

    async def answer(request: Request, error: Exception) -> Response:
        told = as_api_error(error)
        if isinstance(error, RoutingError) and not isinstance(error, ApiError) and error.status_code in (404, 405):
            problem = "There is nothing at" if error.status_code == 404 else "The wrong method:"
            message = f"{problem} {request.method} {request.url.path}. GET /docs shows what there is."
            told = ApiError(error.status_code, message, headers=error.headers)
        return told.response(request.url.path)

    async def answer_unexpected(request: Request, error: Exception) -> Response:
        # The outermost handler: no middleware is left to add the id to the answer. The server logs the traceback.
        response = as_api_error(error).response(request.url.path)
        response.headers["X-Request-Id"] = request.state.request_id
        return response

    for kind in (ParameterError, RequestValidationError, QueueFull, EngineError, RoutingError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(Exception, answer_unexpected)


def _unreadable(cause: Exception) -> ApiError:
    """From what Python's JSON reader fails of; FastAPI only says that something was wrong with the body."""
    match cause:
        case UnicodeDecodeError(object=body) if body.startswith(GZIP):
            reason = "it is compressed with gzip. Send it as it is, without `Content-Encoding`"
        case UnicodeDecodeError():
            reason = f"it is not {cause.encoding.upper()} from byte {cause.start} on. Send it in UTF-8, not compressed"
        case RecursionError():
            reason = "it is nested too deeply. Use fewer levels of objects and lists"
        case _:
            reason = f"it holds an integer of more than {sys.get_int_max_str_digits()} digits. Use a smaller one"
    return ApiError(400, f"The body is not valid JSON: {reason}.", code="invalid_json")


def _rejected(first: Mapping[str, Any]) -> ApiError:
    """From pydantic's account of a field that it rejects."""
    if first["type"] == "json_invalid":
        reason, at = first["ctx"]["error"], first["loc"][-1]
        return ApiError(400, f"The body is not valid JSON: {reason} at character {at}.", code="invalid_json")
    path = _path(first["loc"])
    if not path:
        if isinstance(cause := first.get("ctx", {}).get("error"), ParameterError):
            return ApiError(400, cause.message, param=cause.param)
        return ApiError(400, "The body must be a JSON object, sent with `Content-Type: application/json`.")
    if first["type"] == "missing":
        return ApiError(400, f"`{path}` is missing.", param=path, code="missing_required_parameter")
    reason = first["msg"].removeprefix("Value error, ").rstrip(".")
    return ApiError(400, f"`{path}`: {reason}.", param=path)


def _path(loc: Sequence[str | int]) -> str:
    """`messages[0].content` from pydantic's location; parts in angle brackets name branches of a union."""
    path = ""
    for part in loc[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<") and part != "[key]":
            path += f".{part}" if path else part
    return path
